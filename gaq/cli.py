"""The command ``gaq``: quantize, report, inspect, doctor.

Exit codes: 0 done, 1 a gate failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gaq import settings
from gaq.third_party_warnings import hidden_in_commands
from gaq.untyped import Document

if TYPE_CHECKING:
    import torch
    from ase import Atoms

    from gaq.adapter import Adapter

__all__ = ["main"]


class InputError(ValueError):
    """Bad input; its message is one line for the user, and the exit code is 2."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gaq", description="Geometric-aware quantization of interatomic potentials.")
    commands = parser.add_subparsers(dest="command", required=True)

    quantize = commands.add_parser("quantize", help="quantize a trained model, without reference labels")
    quantize.add_argument("model", help="float model: MACE .model, NequIP .ckpt or .nequip.zip")
    quantize.add_argument(
        "-o",
        "--output",
        required=True,
        help="file to write: .model or .safetensors (runs no code); .ckpt or .nequip.zip",
    )
    quantize.add_argument("--config", default="gaq", help="preset, YAML file or mapping (default: gaq)")
    quantize.add_argument(
        "--calibration",
        help="structures like those the model will be used on (any format ASE reads); no labels needed",
    )
    quantize.add_argument(
        "--elements",
        metavar="LIST",
        help="keep only these of the model's elements, such as Li,P,S,Cl: those of the calibration data",
    )
    quantize.add_argument("--head", help="keep only this head of a model with several")
    quantize.add_argument("--device", default="cpu", help="cpu or cuda")
    quantize.add_argument("--force", action="store_true", help="write the model even if a gate fails, and mark it")

    report = commands.add_parser("report", help="measure a model: errors, equivariance, conservation, speed, size")
    report.add_argument("model")
    report.add_argument("--data", required=True, help="labelled structures")
    report.add_argument("-o", "--output", required=True, help="directory for report.json and report.html")
    report.add_argument("--reference", help="the float model to compare with")
    report.add_argument(
        "--trained",
        action="store_true",
        help="judge the model as trained with its rounding; files of training with the key `quantization` say so",
    )
    report.add_argument("--nve-ps", type=float, default=50.0, help="length of the NVE runs in ps; 0 leaves them out")
    report.add_argument("--frames", type=int, default=200, help="structures used for errors (evenly spaced)")
    report.add_argument("--device", default="cpu")

    inspect = commands.add_parser("inspect", help="one row per module: bits, scales, bytes, and why the rest is float")
    inspect.add_argument("model")
    inspect.add_argument("--device", default="cpu")
    inspect.add_argument(
        "--sensitivity", metavar="DATA", help="also round one tensor at a time on these structures (float models)"
    )

    commands.add_parser("doctor", help="versions, state of the hook, which kernels can run here and why not")
    return parser


def _read(path: str) -> list[Atoms]:
    from gaq.checks.errors import read_structures

    return read_structures(path)


def _gate_lines(gates: dict[str, Document]) -> str:
    """The measured gates as a table, and what was not measured."""
    from gaq.reporting import format_table, gate_rows, summary, unmeasured

    rows = []
    for row in gate_rows(gates):
        word = row["verdict"]
        printed = word if word != "fail" else "fails (printed only)" if row["enforced"] else "FAIL"
        rows.append({**row, "verdict": printed})
    lines = [format_table(rows, ["gate", "value", "bound", "unit", "verdict", "what"]), summary(gates)]
    return "\n".join([*lines, *(f"  not measured: {name}: {needs}" for name, needs in unmeasured(gates).items())])


def _metric_lines(report: Document) -> str:
    from gaq.reporting.tables import format_table, metric_rows

    rows = metric_rows(report["model"], report["reference"])
    names = ["metric", "unit", "model", "reference"]
    return format_table([dict(zip(names, row, strict=True)) for row in rows], ["metric", "model", "reference", "unit"])


def _checked_output(name: str, model: str) -> Path:
    """Return the path of the file to write.

    Raises:
        InputError: if the file cannot be written there, or is the input model.
    """
    output = Path(name)
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: the folder {output.parent} does not exist.")
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder; give the name of a file.")
    if output.exists() and output.samefile(model):
        raise InputError(f"--output {output}: is the input model itself; choose another name.")
    return output


def _quantize(arguments: argparse.Namespace) -> int:
    from gaq import api
    from gaq.adapter import adapter_for_file
    from gaq.config.parse import parse_config
    from gaq.model.elements import check_known

    output = _checked_output(arguments.output, arguments.model)
    config = parse_config(arguments.config)
    observes = config.rounds_activations or config.attention is not None
    needs_data = observes or config.distillation.steps > 0 or config.weights.rounding == "gptq"
    if arguments.calibration is None and (needs_data or not arguments.force):
        purpose = (
            f"preset {config.preset} needs structures to calibrate on" if needs_data else "the gates need structures"
        )
        remedy = "" if needs_data else ", or --force to write the model unjudged"
        raise InputError(f"{purpose}: give --calibration DATA.xyz (labels are not needed){remedy}.")
    structures = _read(arguments.calibration) if arguments.calibration else []
    calibration, unseen = _split(structures)
    adapter = adapter_for_file(arguments.model)
    model = adapter.load(arguments.model, arguments.device)
    if adapter.config(model) is not None:
        raise InputError(f"{arguments.model}: already quantized; give the float model it was made from.")
    selected = _selected(adapter, model, structures, arguments)
    model = model if selected is None else selected
    check_known(adapter.elements(model), structures)
    quantized = api.prepare(copy.deepcopy(model), config)
    if calibration:
        api.calibrate(quantized, calibration)
    api.convert(quantized)
    _print_unfused(adapter, quantized)
    failed = _write_judged(adapter, quantized, selected, unseen, arguments)
    if failed and not arguments.force:
        print(
            f"gaq: not written, because {', '.join(failed)} failed. More or better calibration data helps; "
            "--force writes the model all the same and marks it.",
            file=sys.stderr,
        )
        return 1
    before, after = Path(arguments.model).stat().st_size, output.stat().st_size
    print(f"{output}: {after / 1024:.0f} KiB, {before / after:.1f} times smaller than {arguments.model}")
    if selected is not None:
        head = "" if arguments.head is None else f", head {arguments.head}"
        print(f"{output}: knows {', '.join(adapter.elements(selected))}{head}")
    return 1 if failed else 0


def _split(structures: Sequence[Atoms]) -> tuple[Sequence[Atoms], Sequence[Atoms]]:
    """Check the structures, and split them into those to calibrate on and those to judge on."""
    from gaq.checks.structures import check_calibration_structures, check_labels, hold_out

    if not structures:
        return structures, structures
    check_calibration_structures(structures)
    check_labels(structures)
    return hold_out(structures)


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
) -> list[str]:
    """Measure a quantized model from a trial file, and write it unless a gate fails that ``--force`` does not excuse.

    It is compared with the float model, or the part of it that was selected, on structures that calibration did not
    see. Without structures nothing is measured.

    Returns:
        Names of the gates that failed.
    """
    from gaq import api
    from gaq.checks.errors import spaced
    from gaq.reporting import failed_gates

    output = Path(arguments.output)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        trial = Path(folder) / output.name
        reference = Path(arguments.model)
        if selected is not None:
            reference = Path(folder) / f"selected{reference.suffix}"
            adapter.save_float(selected, reference)
        adapter.save(quantized, trial)
        gates: dict[str, Document] = {}
        if structures:
            measured = api.report(
                trial, spaced(structures, 64), reference, nve_ps=0.0, device=arguments.device, gates_only=True
            )
            gates = measured["gates"]
            print(_gate_lines(gates))
        failed = failed_gates(gates)
        adapter.notes(quantized)["gates"] = {
            name: {key: gate[key] for key in ("value", "bound", "passed", "enforced")} for name, gate in gates.items()
        }
        adapter.notes(quantized)["failed_gates"] = failed
        if arguments.force or not failed:
            adapter.save(quantized, trial)
            trial.replace(output)
    return failed


def _report(arguments: argparse.Namespace) -> int:
    from gaq import api
    from gaq.checks.errors import spaced
    from gaq.reporting import failed_gates, write_report

    if not arguments.nve_ps >= 0:
        raise InputError(f"--nve-ps {arguments.nve_ps:g}: give a length in ps, or 0 to leave the runs out.")
    if arguments.frames < 1:
        raise InputError(f"--frames {arguments.frames}: at least one structure is needed.")
    if Path(arguments.output).exists() and not Path(arguments.output).is_dir():
        raise InputError(f"--output {arguments.output}: is a file; give the name of a folder.")
    report = api.report(
        arguments.model,
        spaced(_read(arguments.data), arguments.frames),
        arguments.reference,
        nve_ps=arguments.nve_ps,
        device=arguments.device,
        trained=arguments.trained,
    )
    write_report(report, arguments.output)
    if report["gates"]:
        print(_gate_lines(report["gates"]))
    else:
        print(f"{_metric_lines(report)}\n{arguments.model}: a float model: no gates apply")
    print(f"written: {Path(arguments.output) / 'report.html'}")
    return 1 if failed_gates(report["gates"]) else 0


def _print_unfused(adapter: Adapter, model: torch.nn.Module) -> None:
    """Say at once which parts of a quantized model the fused kernels do not serve."""
    for name, reason in adapter.unfused(model).items():
        print(f"not on the fast path: {name}: {reason}")


def _inspect(arguments: argparse.Namespace) -> int:
    from gaq import api
    from gaq.adapter import adapter_for_file
    from gaq.checks.errors import spaced

    adapter = adapter_for_file(arguments.model)
    model = adapter.load(arguments.model, arguments.device)
    config = adapter.config(model)
    if config is None:
        print(f"{arguments.model}: a float model")
    else:
        print(f"{arguments.model}: preset {config.preset}, {adapter.status(model)}")
    print(api.summary(model))
    if config is not None:
        _print_unfused(adapter, model)
    notes = adapter.notes(model)
    if notes.get("failed_gates"):
        print(f"MARKED: written with --force although these gates failed: {', '.join(notes['failed_gates'])}")
    elif notes.get("gates") == {}:
        print("MARKED: written with --force and without structures: no gate was measured")
    if notes:
        print("notes: " + json.dumps(notes, indent=2))
    if arguments.sensitivity:
        if config is not None:
            raise InputError("--sensitivity needs the float model: this one is rounded already.")
        print("one tensor at 8 bits at a time: mean force difference, meV/Å")
        for entry in api.sensitivity(model, spaced(_read(arguments.sensitivity), 20)):
            mark = "  <- deserves 16 bits" if entry.deserves_16_bits else ""
            print(f"  {entry.parameter:60s} {entry.force_difference:8.3f} {entry.numel:9d} weights{mark}")
    return 0


def _doctor() -> int:
    from gaq.adapter import adapters
    from gaq.reporting.environment import hardware, versions

    print("versions")
    for name, version in versions().items():
        print(f"  {name:16s} {version}")
    print("hardware")
    for name, value in hardware().items():
        print(f"  {name:16s} {value}")
    print("adapters")
    for name in adapters():
        print(f"  {name:16s} ready")
    for name in {"mace", "nequip"} - set(adapters()):
        print(f"  {name:16s} not here: pip install 'gaq[{name}]' (MACE and NequIP need separate environments)")
    print("hooks")
    for adapter in adapters().values():
        for line in getattr(adapter, "doctor", lambda: [])():
            print(f"  {line}")
    print("settings")
    for setting in settings.rows():
        problem = "" if setting.problem is None else f": {setting.problem}"
        print(f"  {setting.variable:16s} {setting.value:8s} {setting.source}{problem}")
    settings.current()  # raises for values that are not allowed, after all have been shown
    from gaq.kernels import gpu
    from gaq.kernels.cpu import native

    print("kernels")
    print("  reference        plain torch, any device, any dtype: training, Hessians, compiled files")
    reason = native.why_not()
    compiled = f"ready, {native.library()._name}" if reason is None else f"not here: {reason}"
    print(f"  cpu              {compiled}")
    print(f"  cuda             {'ready, by Triton' if gpu.why_not() is None else 'not here: ' + str(gpu.why_not())}")
    print("                   converted MACE models at inference, float32 and float64; GAQ_ENGINE=0 turns it off")
    return 0


@contextmanager
def _as_a_command() -> Iterator[None]:
    """Send logs to the terminal and set frameworks up within this context; leaving it restores the process."""
    from gaq.adapter import adapters
    from gaq.process import command_output, unchanged

    with ExitStack() as stack:
        stack.enter_context(command_output(logging.INFO))
        stack.enter_context(unchanged())
        for adapter in adapters().values():
            stack.enter_context(adapter.process_state())
        yield


@hidden_in_commands()
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command ``gaq``; returns the exit code."""
    arguments = _parser().parse_args(argv)
    commands = {"quantize": _quantize, "report": _report, "inspect": _inspect}
    try:
        with _as_a_command():
            return commands[arguments.command](arguments) if arguments.command in commands else _doctor()
    except (ValueError, TypeError, OSError) as error:
        print(f"gaq: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
