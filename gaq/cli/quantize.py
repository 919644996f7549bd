"""The command ``gaq quantize``."""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gaq.cli.frame import DONE, FAILED
from gaq.cli.inputs import (
    InputError,
    check_structure_file,
    checked_output,
    find_adapter,
    load_model,
    read_structures,
)
from gaq.cli.lines import Say, gate_lines, say_undeployable, say_unfused, speaker
from gaq.files.whole import put
from gaq.process import check_device
from gaq.progress import explained
from gaq.untyped import Document

if TYPE_CHECKING:
    import torch
    from ase import Atoms

    from gaq.adapter import Adapter
    from gaq.config.schema import QuantizationConfig

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> tuple[int, Document]:
    """Quantize a model, judge it, and write it; returns the exit code and the result."""
    from gaq import api
    from gaq.config.effect import training_only_note
    from gaq.config.parse import parse_config
    from gaq.model.elements import check_known

    say = speaker(arguments.json)
    adapter = find_adapter("", arguments.model)
    output = checked_output("--output", arguments.output, arguments.model)
    adapter.check_output(output, Path(arguments.model))
    config = parse_config(arguments.config)
    if (note := training_only_note(config)) is not None:
        print(note, file=sys.stderr)
    _check_calibration(arguments, config)
    check_device(arguments.device)
    structures = read_structures(arguments.calibration) if arguments.calibration else []
    calibration, unseen, left_out = _split(structures, arguments, say)
    model = load_model(adapter, arguments.model, arguments.device, arguments.species)
    if adapter.config(model) is not None:
        raise InputError(f"{arguments.model}: already quantized; give the float model it was made from.")
    selected = _selected(adapter, model, structures, arguments)
    model = model if selected is None else selected
    if structures:
        check_known(adapter.elements(model), structures)
    with explained("settling bits and searching for the ranges of weights"):
        quantized = api.prepare(copy.deepcopy(model), config)
    if calibration:
        api.calibrate(quantized, calibration)
    api.convert(quantized)
    unfused = adapter.unfused(quantized)
    say_unfused(say, unfused)
    undeployable = adapter.undeployable(quantized)
    say_undeployable(say, undeployable)
    gates, failed = _write_judged(adapter, quantized, selected, unseen, arguments, say)
    written = arguments.force or not failed
    before, after = Path(arguments.model).stat().st_size, output.stat().st_size if written else None
    notes = adapter.notes(quantized)
    result: Document = {
        "model": str(arguments.model),
        "output": str(output) if written else None,
        "preset": config.preset,
        "device": arguments.device,
        "elements": adapter.elements(model),
        "head": arguments.head,
        "model_bytes": before,
        "output_bytes": after,
        "times_smaller": None if after is None else before / after,
        "distillation": notes.get("distillation"),
        "not_fused": unfused,
        "not_deployable": undeployable,
        "left_out": left_out,
        "gates": gates,
        "failed_gates": failed,
    }
    if after is None:
        print(
            f"gaq: not written, because {', '.join(failed)} failed. More or better calibration data helps; "
            "--force writes the model all the same and marks it.",
            file=sys.stderr,
        )
        return FAILED, result
    say(f"{output}: {after / 1024:.0f} KiB, {before / after:.1f} times smaller than {arguments.model}")
    if selected is not None:
        head = "" if arguments.head is None else f", head {arguments.head}"
        say(f"{output}: knows {', '.join(adapter.elements(selected))}{head}")
    return FAILED if failed else DONE, result


def _check_calibration(arguments: argparse.Namespace, config: QuantizationConfig) -> None:
    """Refuse a call without the structures that its configuration or the gates need, or with a file that is not there.

    Raises:
        InputError: saying what needs them.
    """
    if arguments.calibration is not None:
        check_structure_file("--calibration", arguments.calibration)
        return
    observes = config.rounds_activations or config.attention is not None
    needs_data = observes or config.distillation.steps > 0 or config.weights.rounding == "gptq"
    if needs_data or not arguments.force:
        purpose = (
            f"preset {config.preset} needs structures to calibrate on" if needs_data else "the gates need structures"
        )
        remedy = "" if needs_data else ", or --force to write the model unjudged"
        raise InputError(f"{purpose}: give --calibration DATA.xyz (labels are not needed){remedy}.")


def _split(
    structures: Sequence[Atoms], arguments: argparse.Namespace, say: Say
) -> tuple[Sequence[Atoms], Sequence[Atoms], list[str]]:
    """Check the structures, and split them into those to calibrate on and those to judge on; say what is left out."""
    from gaq.checks.labels import check_keys, left_out_labels
    from gaq.checks.structures import check_structures, hold_out, without_single_atoms

    if not structures:
        return structures, structures, []
    check_structures(structures)
    check_keys(structures, arguments.energy_key, arguments.forces_key)
    kept, lines = without_single_atoms(structures)
    lines = [*left_out_labels(structures, arguments.energy_key, arguments.forces_key), *lines]
    for line in lines:
        say(line)
    return (*hold_out(kept), lines)


def _selected(
    adapter: Adapter, model: torch.nn.Module, structures: Sequence[Atoms], arguments: argparse.Namespace
) -> torch.nn.Module | None:
    """The part of the model that ``--elements`` and ``--head`` ask for; None without them."""
    from gaq.model.elements import check_calibration

    if arguments.elements is None and arguments.head is None:
        return None
    selected = adapter.select(model, arguments.elements, arguments.head)
    if arguments.elements is not None:
        check_calibration(adapter.elements(selected), structures)
    return selected


def _write_judged(
    adapter: Adapter,
    quantized: torch.nn.Module,
    selected: torch.nn.Module | None,
    structures: Sequence[Atoms],
    arguments: argparse.Namespace,
    say: Say,
) -> tuple[Document, list[str]]:
    """Measure a quantized model from a trial file, and write it unless a gate fails that ``--force`` does not excuse.

    It is compared with the float model, or the part of it that was selected, on structures that calibration did not
    see. Without structures nothing is measured.

    Returns:
        The gates, and the names of those that failed.
    """
    from gaq import api
    from gaq.checks.errors import spaced
    from gaq.reporting import failed_gates

    output = Path(arguments.output)
    with tempfile.TemporaryDirectory(prefix="gaq-") as folder:
        trial = Path(folder) / output.name
        reference = Path(arguments.model)
        if selected is not None:
            reference = Path(folder) / f"selected{reference.suffix}"
            adapter.save_float(selected, reference)
        adapter.save(quantized, trial)
        gates: dict[str, Document] = {}
        if structures:
            measured = api.report(
                trial,
                spaced(structures, 64),
                reference,
                nve_ps=0.0,
                device=arguments.device,
                gates_only=True,
                species=arguments.species,
                energy_key=arguments.energy_key,
                forces_key=arguments.forces_key,
            )
            gates = measured["gates"]
            say(gate_lines(gates))
        failed = failed_gates(gates)
        adapter.notes(quantized)["gates"] = {
            name: {key: gate[key] for key in ("value", "bound", "passed", "enforced")} for name, gate in gates.items()
        }
        adapter.notes(quantized)["failed_gates"] = failed
        if arguments.force or not failed:
            adapter.save(quantized, trial)
            put(trial, output)
    return gates, failed
