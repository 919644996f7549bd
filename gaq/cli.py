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
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]


class InputError(ValueError):
    """Bad input: one line for the user, exit code 2."""


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
        "--calibration", help="structures (any format ASE reads) the model is to be used on; labels are not needed"
    )
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
        help="hold the force error to the bound for models trained with the key `quantization` (1.00 of the "
        "reference's); checkpoints of such a training are anyway",
    )
    report.add_argument("--nve-ps", type=float, default=50.0, help="length of the NVE runs in ps; 0 leaves them out")
    report.add_argument("--frames", type=int, default=200, help="structures used for errors (evenly spaced)")
    report.add_argument("--device", default="cpu")

    inspect = commands.add_parser("inspect", help="a row a module: bits, scales, bytes, and why the rest is float")
    inspect.add_argument("model")
    inspect.add_argument("--device", default="cpu")
    inspect.add_argument(
        "--sensitivity", metavar="DATA", help="also round one tensor at a time on these structures (float models)"
    )

    commands.add_parser("doctor", help="versions, state of the hook, which kernels can run here and why not")
    return parser


def _read(path: str) -> list[Any]:
    from gaq.checks.errors import read_structures

    return read_structures(path)


def _spaced(structures: Sequence[Any], count: int) -> list[Any]:
    import numpy as np

    if len(structures) <= count:
        return list(structures)
    return [structures[int(i)] for i in np.linspace(0, len(structures) - 1, count)]


def _gate_lines(gates: dict[str, dict[str, Any]]) -> str:
    from gaq.reporting.tables import format_table

    rows = []
    for name, gate in gates.items():
        verdict = {True: "pass", False: "FAIL" if gate["enforced"] else "fails (printed only)", None: "not measured"}
        rows.append(
            {
                "gate": name,
                "value": gate["value"],
                "bound": "" if gate["bound"] is None else f"{gate['comparison']} {gate['bound']:.4g}",
                "unit": gate["unit"],
                "verdict": verdict[gate["passed"]],
                "what": gate["note"],
            }
        )
    return format_table(rows, ["gate", "value", "bound", "unit", "verdict", "what"])


def failed_gates(gates: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the enforced gates that were measured and failed."""
    return [name for name, gate in gates.items() if gate["enforced"] and gate["passed"] is False]


def _measure(
    adapter: Any,
    path: str,
    structures: Sequence[Any],
    reference: tuple[Any, str] | None,
    nve_ps: float,
    device: str,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    from gaq.checks.gates import BOUNDS
    from gaq.reporting import ReferenceModel, build_report

    model = adapter.load(path, device)
    adapter.batches(model, structures, 1)  # raises for what the model does not know, before the long part
    config = adapter.config(model)
    if config is None:
        preset = "gaq"
    else:
        preset = config.preset if config.preset in BOUNDS else "gaq"
    if config is not None and adapter.status(model) == "training":
        extra = {"training": "qat", **(extra or {})}
    other = None
    if reference is not None:
        reference_adapter, reference_path = reference
        float_model = reference_adapter.load(reference_path, device)
        other = ReferenceModel(
            potential=reference_adapter.potential(reference_adapter.in_float64(float_model)),
            calculator=reference_adapter.calculator(reference_path, device),
            path=reference_path,
        )
    # Float64: differences of energies at 0.01 Å are the rounding of float32.
    return build_report(
        adapter.potential(adapter.in_float64(model)),
        adapter.calculator(path, device),
        structures,
        model_path=path,
        preset=preset,
        reference=other,
        nve_ps=nve_ps,
        progress=True,
        extra=extra,
    )


def _quantize(arguments: argparse.Namespace) -> int:
    from gaq import api
    from gaq.adapter import adapter_for_file
    from gaq.config.parse import parse_config

    output = Path(arguments.output)
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: the folder {output.parent} does not exist.")
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder; give the name of a file.")
    if output.exists() and output.samefile(arguments.model):
        raise InputError(f"--output {output}: is the input model itself; choose another name.")
    config = parse_config(arguments.config)
    observes = config.rounds_activations or config.attention is not None
    needs_data = observes or config.distillation.steps > 0 or config.weights.rounding == "gptq"
    if arguments.calibration is None and needs_data:
        raise InputError(
            f"preset {config.preset} needs structures to calibrate on: give --calibration DATA.xyz "
            "(labels are not needed)."
        )
    structures = _read(arguments.calibration) if arguments.calibration else []
    adapter = adapter_for_file(arguments.model)
    model = adapter.load(arguments.model, arguments.device)
    if adapter.config(model) is not None:
        raise InputError(f"{arguments.model}: already quantized; give the float model it was made from.")
    adapter.batches(model, structures, 1) if structures else None
    quantized = api.prepare(copy.deepcopy(model), config)
    if structures:
        api.calibrate(quantized, structures)
    api.convert(quantized)

    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        trial = Path(folder) / output.name
        adapter.save(quantized, trial)
        gates: dict[str, dict[str, Any]] = {}
        if structures:
            measured = _measure(
                adapter,
                str(trial),
                _spaced(structures, 64),
                (adapter, arguments.model),
                nve_ps=0.0,
                device=arguments.device,
            )
            gates = measured["gates"]
            print(_gate_lines(gates))
        failed = failed_gates(gates)
        adapter.notes(quantized)["gates"] = {
            name: {key: gate[key] for key in ("value", "bound", "passed", "enforced")} for name, gate in gates.items()
        }
        adapter.notes(quantized)["failed_gates"] = failed
        if failed and not arguments.force:
            print(
                f"gaq: not written, because {', '.join(failed)} failed. More or better calibration data helps; "
                "--force writes the model all the same and marks it.",
                file=sys.stderr,
            )
            return 1
        adapter.save(quantized, trial)
        trial.replace(output)
    before, after = Path(arguments.model).stat().st_size, output.stat().st_size
    print(f"{output}: {after / 1024:.0f} KiB, {before / after:.1f} times smaller than {arguments.model}")
    return 1 if failed else 0


def _report(arguments: argparse.Namespace) -> int:
    from gaq.adapter import adapter_for_file
    from gaq.reporting import write_report

    if not arguments.nve_ps >= 0:
        raise InputError(f"--nve-ps {arguments.nve_ps:g}: give a length in ps, or 0 to leave the runs out.")
    if arguments.frames < 1:
        raise InputError(f"--frames {arguments.frames}: at least one structure is needed.")
    if Path(arguments.output).exists() and not Path(arguments.output).is_dir():
        raise InputError(f"--output {arguments.output}: is a file; give the name of a folder.")
    structures = _spaced(_read(arguments.data), arguments.frames)
    adapter = adapter_for_file(arguments.model)
    reference = None
    if arguments.reference:
        reference = (adapter_for_file(arguments.reference), arguments.reference)
    extra = {"training": "qat"} if arguments.trained else None
    report = _measure(adapter, arguments.model, structures, reference, arguments.nve_ps, arguments.device, extra)
    write_report(report, arguments.output)
    print(_gate_lines(report["gates"]))
    print(f"written: {Path(arguments.output) / 'report.html'}")
    return 1 if failed_gates(report["gates"]) else 0


def _inspect(arguments: argparse.Namespace) -> int:
    from gaq import api
    from gaq.adapter import adapter_for_file

    adapter = adapter_for_file(arguments.model)
    model = adapter.load(arguments.model, arguments.device)
    config = adapter.config(model)
    if config is None:
        print(f"{arguments.model}: a float model")
    else:
        print(f"{arguments.model}: preset {config.preset}, {adapter.status(model)}")
    print(api.summary(model))
    notes = adapter.notes(model)
    if notes.get("failed_gates"):
        print(f"MARKED: written with --force although these gates failed: {', '.join(notes['failed_gates'])}")
    if notes:
        print("notes: " + json.dumps(notes, indent=2))
    if arguments.sensitivity:
        if config is not None:
            raise InputError("--sensitivity needs the float model: this one is rounded already.")
        print("one tensor at 8 bits at a time: mean force difference, meV/Å")
        for entry in api.sensitivity(model, _spaced(_read(arguments.sensitivity), 20)):
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command ``gaq``; returns the exit code."""
    arguments = _parser().parse_args(argv)
    # What torch and e3nn say about themselves would bury the one line a user has to read.
    warnings.filterwarnings("ignore", message=".*TorchScript type system", category=UserWarning)
    warnings.filterwarnings("ignore", message=".*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", category=UserWarning)
    warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.command == "quantize":
            return _quantize(arguments)
        if arguments.command == "report":
            return _report(arguments)
        if arguments.command == "inspect":
            return _inspect(arguments)
        return _doctor()
    except (ValueError, TypeError, OSError) as error:
        print(f"gaq: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
