"""The command ``gaq inspect``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gaq.cli.frame import DONE
from gaq.cli.inputs import InputError, check_structure_file, find_adapter, load_model, read_structures
from gaq.cli.lines import Say, say_undeployable, say_unfused, speaker
from gaq.process import check_device
from gaq.untyped import Document

if TYPE_CHECKING:
    import torch

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> tuple[int, Document]:
    """Show what a model file holds; returns the exit code and the same as plain data."""
    from gaq.files.kinds import kind_of
    from gaq.model.expected import legend
    from gaq.model.summary_table import format_rows

    say = speaker(arguments.json)
    if kind_of(arguments.model).name == "deployed":
        return _deployed(say, Path(arguments.model))
    adapter = find_adapter("", arguments.model)
    if arguments.sensitivity is not None:
        check_structure_file("--sensitivity", arguments.sensitivity)
    check_device(arguments.device)
    kind = kind_of(arguments.model)
    if arguments.sensitivity is not None and kind.name in ("export", "compiled"):
        raise InputError(f"--sensitivity needs the float model, and {arguments.model} is {kind.words}.")
    model = load_model(adapter, arguments.model, arguments.device, arguments.species, exports=True)
    config = adapter.config(model)
    if arguments.sensitivity is not None and config is not None:
        raise InputError("--sensitivity needs the float model: this one is rounded already.")
    rows, notes = adapter.rows(model), adapter.notes(model)
    unfused = {} if config is None else adapter.unfused(model)
    undeployable = None if config is None else adapter.undeployable(model)
    state = "a float model" if config is None else f"preset {config.preset}, {adapter.status(model)}"
    say(f"{arguments.model}: {state}" + (f" ({kind.words})" if kind.name == "export" else ""))
    say(format_rows(rows))
    if config is not None:
        say(legend(config))
        say_unfused(say, unfused)
        say_undeployable(say, undeployable)
    _say_notes(say, notes)
    scan = None if arguments.sensitivity is None else _sensitivity(say, model, arguments.sensitivity)
    return DONE, {
        "model": str(arguments.model),
        "kind": kind.words,
        "preset": None if config is None else config.preset,
        "status": adapter.status(model),
        "configuration": None if config is None else config.to_dict(),
        "elements": adapter.elements(model, strict=False),
        "modules": [asdict(row) for row in rows],
        "bytes": sum(row.bytes for row in rows),
        "not_fused": unfused,
        "not_deployable": undeployable,
        "notes": notes,
        "sensitivity": scan,
    }


def _deployed(say: Say, path: Path) -> tuple[int, Document]:
    """Show what a deployed file holds."""
    from gaq.deployed import form

    described, sizes = form.metadata_of(path), form.sizes_of(path)
    preset = described["preset"]
    say(f"{path}: a deployed model, " + ("float" if preset is None else f"preset {preset}") + ", without a framework")
    for key in ("framework", "made of", "elements", "heads", "r_max", "dtype", "gaq"):
        value = described[key]
        say(f"  {key:14s} {', '.join(value) if isinstance(value, list) else value}")
    for name, value in described.get("fixed", {}).items():
        say(f"  {name:14s} {value}, fixed at deployment")
    for name, size in sizes.items():
        say(f"  {name:14s} {size} bytes")
    _say_notes(say, described["notes"])
    total = sum(sizes.values())
    return DONE, {"model": str(path), "kind": "a deployed model", **described, "status": "deployed", "bytes": total}


def _say_notes(say: Say, notes: Document) -> None:
    if notes.get("failed_gates"):
        say(f"MARKED: written with --force although these gates failed: {', '.join(notes['failed_gates'])}")
    elif notes.get("gates") == {}:
        say("MARKED: written with --force and without structures: no gate was measured")
    if notes:
        say("notes: " + json.dumps(notes, indent=2))


def _sensitivity(say: Say, model: torch.nn.Module, data: str) -> list[Document]:
    """Round one tensor at a time and say what it costs."""
    from gaq import api
    from gaq.checks.errors import spaced

    say("one tensor at 8 bits at a time: mean force difference, meV/Å")
    scan = api.sensitivity(model, spaced(read_structures(data), 20))
    for entry in scan:
        mark = "  <- deserves 16 bits" if entry.deserves_16_bits else ""
        say(f"  {entry.parameter:60s} {entry.force_difference:8.3f} {entry.numel:9d} weights{mark}")
    return [asdict(entry) for entry in scan]
