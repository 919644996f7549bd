"""Checkpoints in the folder of a MACE run: which the run wrote itself, and which it cannot use.

MACE tells its checkpoints by the name and seed of the run, takes the one of the highest epoch, whichever run wrote it,
and loads from it what fits. A quantized run ends with its own, and says in one line why it cannot go on from another.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gaq.model.state import differing_grid, require_state, same_grid
from gaq.untyped import Patched

__all__ = ["Checkpoint", "CheckpointError", "check_restart", "checkpoints_in", "load_own"]

STATE = "_extra_state"
"""Entry of a checkpoint's weights with the quantization of the model; float models have none."""


class CheckpointError(ValueError):
    """A checkpoint that a run was about to load and cannot use; the message names it and says what helps."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file.

    Attributes:
        path: of the file.
        epoch: by its name.
        stage_two: whether it is of MACE's second stage (``swa``).
        changed: when it was written, ns.
    """

    path: Path
    epoch: int
    stage_two: bool
    changed: int


def checkpoints_in(folder: str | Path, tag: str) -> list[Checkpoint]:
    """Return the checkpoints of a name and seed, in the order of epochs.

    Args:
        folder: of the checkpoints; it need not exist.
        tag: what MACE makes of name and seed.
    """
    pattern = re.compile(rf"{re.escape(tag)}_epoch-(\d+)(_swa)?\.pt")
    matches = [(path, pattern.fullmatch(path.name)) for path in Path(folder).glob("*.pt") if path.is_file()]
    checkpoints = [
        Checkpoint(path, int(match[1]), match[2] is not None, path.stat().st_mtime_ns)
        for path, match in matches
        if match is not None
    ]
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.epoch)


def check_restart(model: torch.nn.Module, folder: str | Path, tag: str) -> None:
    """Refuse a checkpoint from which a run is to go on and cannot: MACE would train from the start without a word.

    A checkpoint of a float run will do. One of other quantization settings is found when it is loaded
    (`gaq_mace.root.OtherSettingsError`).

    Args:
        model: of the run, with its quantizers.
        folder: of the checkpoints.
        tag: what MACE makes of name and seed.

    Raises:
        CheckpointError: naming the file.
    """
    present = checkpoints_in(folder, tag)
    latest = [checkpoint for checkpoint in present if checkpoint.stage_two] or present
    if latest and (problem := _problem(latest[-1], model, restart=True)) is not None:
        raise CheckpointError(
            f"cannot go on from {latest[-1].path}: {problem}. Move it away to go on from an earlier one, or start anew "
            "without restart_latest."
        )


def load_own(handler: Patched, model: torch.nn.Module, earlier: Sequence[Checkpoint], goes_on: bool) -> None:
    """Let MACE, when training is over, load the checkpoints that the run wrote, not those of an earlier run.

    Where the run wrote none of a stage, the one of the highest epoch is loaded, as in stock MACE.

    Args:
        handler: the run's `CheckpointHandler`; its ``load_latest`` is replaced. The replacement raises a
            `CheckpointError` for a checkpoint that the model cannot use, such as one that another run wrote meanwhile.
        model: of the run.
        earlier: the checkpoints that were there when training began.
        goes_on: whether the run goes on from one of them.
    """
    load_latest = handler.load_latest

    @functools.wraps(load_latest)
    def load(state: object, swa: bool = False, device: object = None, strict: bool = False) -> object:
        present = [c for c in checkpoints_in(handler.io.directory, handler.io.tag) if c.stage_two == bool(swa)]
        if not present:
            return load_latest(state=state, swa=swa, device=device, strict=strict)
        written = [checkpoint for checkpoint in present if checkpoint not in earlier]
        latest, chosen = present[-1], (written or present)[-1]
        if (problem := _problem(chosen, model, restart=not written)) is not None:
            raise CheckpointError(f"cannot use {chosen.path}: {problem}. {_REMEDY}")
        if chosen is not latest:
            logging.warning(f"{latest.path} is left aside: it was there before this run, which wrote {chosen.path}")
        elif not written and not goes_on:
            logging.warning(f"{chosen.path} is loaded, which was there before this run: this run wrote no checkpoint")
        try:
            if chosen is latest:
                return load_latest(state=state, swa=swa, device=device, strict=strict)
            return handler.load(state=state, path=str(chosen.path), device=device, strict=strict)
        except (ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"cannot use {chosen.path}: {_in_short(error)}. {_REMEDY}") from error

    handler.load_latest = load


_REMEDY = (
    "Another run of the same name and seed has written it into the folder of this run: move it away, and end this run "
    "with restart_latest: true."
)


def _problem(checkpoint: Checkpoint, model: torch.nn.Module, restart: bool) -> str | None:
    """Say why a quantized model cannot use a checkpoint; None if it can.

    Args:
        checkpoint: the file.
        model: with its quantizers.
        restart: whether the run goes on from it: then one of a float run will do, and other settings are found later.
    """
    try:
        stored = torch.load(checkpoint.path, map_location="cpu")  # as MACE does
    except Exception as error:  # what is damaged raises anything, from EOFError to UnpicklingError
        return f"it cannot be read ({_in_short(error)})"
    weights = stored.get("model") if isinstance(stored, Mapping) else None
    if not isinstance(weights, Mapping):
        return "it is not a checkpoint of MACE"
    here = {name: value for name, value in model.state_dict().items() if name != STATE}
    parameters = [name for name, _ in model.named_parameters()]
    differing = [f"it has no {name}" for name in parameters if name not in weights]
    differing += [
        f"{name} has the shape {tuple(weights[name].shape)} there, {tuple(here[name].shape)} here"
        for name in here
        if name in weights and weights[name].shape != here[name].shape
    ]
    if differing:
        more = f", and {len(differing) - 1} more parts differ" if len(differing) > 1 else ""
        return f"it is of another model: {differing[0]}{more}"
    text = bytes(weights[STATE].cpu().numpy().tobytes()).decode() if STATE in weights else ""
    if restart:
        return None
    if not text:
        return "it was written by a run without the key `quantization`"
    config, settings = require_state(model).config, json.loads(text)["meta"]["config"]
    return None if same_grid(config.to_dict(), settings) else f"it {differing_grid(config, settings)}"


def _in_short(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": .")
