"""The command ``nequip-deploy``: a quantized model to a small file that runs where this package is not installed.

    nequip-deploy build MODEL OUT [--target ase|pair_nequip|pair_allegro|batch] [--device cpu|cuda]
    nequip-deploy info FILE

Exit codes: 0 done, 1 the deployed file does not agree with the model, 2 bad input.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaq.third_party_warnings import hidden_in_commands, known_hidden

__all__ = ["main"]

PACKAGE, COMPILED = ".nequip.zip", ".nequip.pt2"


class InputError(ValueError):
    """Bad input: one line for the user, exit code 2."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nequip-deploy", description="Deploy quantized NequIP and Allegro models; float ones: nequip-compile."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="freeze, fold, compile, slim and check a quantized model")
    build.add_argument("model", nargs="?", help="quantized .ckpt or .nequip.zip")
    build.add_argument("output", help="file to write: .nequip.pt2 (compiled) or .nequip.zip (package)")
    build.add_argument("--train-dir", help="folder of a training run, in place of MODEL: its best.ckpt, or last.ckpt")
    build.add_argument("--target", default="ase", help="ase (default), pair_nequip, pair_allegro or batch")
    build.add_argument("--device", default="cpu", help="cpu or cuda")
    build.add_argument("--compare", metavar="FLOAT", help="the float model as nequip-compile made it, for its size")
    build.add_argument("--plain", action="store_true", help="NequIP's own convolution in place of the fused kernel")
    build.add_argument("--tolerance", type=float, help="allowed force difference to the model, meV/Å; see the docs")
    info = commands.add_parser("info", help="what a deployed file says of itself, and where its bytes are")
    info.add_argument("file")
    return parser


def _model_path(arguments: argparse.Namespace) -> Path:
    if arguments.train_dir is not None:
        if arguments.model is not None:
            raise InputError("give MODEL or --train-dir, not both.")
        folder = Path(arguments.train_dir)
        for name in ("best.ckpt", "last.ckpt"):
            if (folder / name).is_file():
                return folder / name
        raise InputError(f"--train-dir {folder}: there is neither best.ckpt nor last.ckpt in it.")
    if arguments.model is None:
        raise InputError("give MODEL, a quantized .ckpt or .nequip.zip, or --train-dir.")
    return Path(arguments.model)


@dataclass(frozen=True)
class Check:
    """How far a deployed file is from the model it was made of, on the example structure and distorted copies.

    Attributes:
        energy: largest difference of the energy per atom, meV.
        forces: largest difference of a force component, meV/Å.
        force_scale: largest force component, meV/Å.
        structures: number compared.
    """

    energy: float
    forces: float
    force_scale: float
    structures: int


def _structures(example: Any, count: int = 4, amplitude: float = 0.05) -> list[Any]:
    """The example structure and copies of it with atoms moved at random by `amplitude` Å."""
    from nequip.data import to_ase

    first = to_ase(example)[0]
    first.info.clear()
    first.calc = None
    found = [first]
    for seed in range(count - 1):
        other = first.copy()
        other.rattle(amplitude, seed=seed)
        found.append(other)
    return found


def _compare(reference: Any, deployed: Any, structures: Sequence[Any]) -> Check:
    import numpy as np

    energy = forces = scale = 0.0
    for atoms in structures:
        values = []
        for calculator in (reference, deployed):
            copy = atoms.copy()
            copy.calc = calculator
            values.append((copy.get_potential_energy(), copy.get_forces()))
        energy = max(energy, 1e3 * abs(values[0][0] - values[1][0]) / len(atoms))
        forces = max(forces, 1e3 * float(np.abs(values[0][1] - values[1][1]).max()))
        scale = max(scale, 1e3 * float(np.abs(values[0][1]).max()))
    return Check(energy, forces, scale, len(structures))


def default_tolerance(config: Any) -> float:
    """Allowed force difference, meV/Å, between a deployed file and its model.

    Where activations are exact, the fold is all that differs: 0.5. Where they are rounded, a number that lies on
    the edge between two steps may fall on the other side in another order of summation, and forces differ by the
    rounding noise itself, which at 16 bits is below 5; coarser grids are printed, not judged.
    """
    if not config.rounds_activations:
        return 0.5
    attention = None if config.attention is None else config.attention.bits
    bits = [b for b in (config.scalars.bits, config.vectors.magnitude_bits, attention) if b is not None]
    return 5.0 if min(bits) >= 16 else float("inf")


def _build(arguments: argparse.Namespace) -> int:
    source = _model_path(arguments)
    output = Path(arguments.output)
    kind = next((suffix for suffix in (PACKAGE, COMPILED) if output.name.endswith(suffix)), None)
    if kind is None:
        raise InputError(f"{output}: give a name that ends in {COMPILED} (compiled) or {PACKAGE} (package).")
    if not output.parent.is_dir():
        raise InputError(f"{output}: the folder {output.parent} does not exist.")
    from nequip.scripts._compile_utils import COMPILE_TARGET_DICT

    if arguments.target not in COMPILE_TARGET_DICT:
        raise InputError(f"--target {arguments.target}: choose one of {', '.join(COMPILE_TARGET_DICT)}.")

    from gaq.model.state import state_of
    from gaq_nequip import files

    model = files.load(source)
    state = state_of(model)
    if state is None:
        raise InputError(
            f"{source}: a float model. Quantize it first (gaq quantize {source.name} --calibration DATA.xyz -o "
            "OUT.ckpt), train it with the key `quantization`, or deploy it as it is with nequip-compile."
        )
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        trial = Path(folder) / output.name
        if kind == PACKAGE:
            files.save(model, trial)
        else:
            noise = default_tolerance(state.config) if state.config.rounds_activations else 0.0
            compile_model(source, trial, arguments.target, arguments.device, _fuses(arguments), noise)
        check = _check(model, source, trial, arguments.target, arguments.device)
        print(_table(model, source, trial, check, arguments.compare))
        allowed = default_tolerance(state.config) if arguments.tolerance is None else arguments.tolerance
        if check is not None and check.forces > allowed:
            print(
                f"nequip-deploy: not written, because forces differ from the model by {check.forces:.3g} meV/Å, more "
                f"than {allowed:g}. --tolerance sets another bound.",
                file=sys.stderr,
            )
            return 1
        trial.replace(output)
    print(f"written: {output}")
    return 0


def _fuses(arguments: argparse.Namespace) -> bool:
    """Whether convolutions are to go through the fused kernel; without a compiler AOTInductor would fail as well."""
    from gaq.kernels import gpu
    from gaq.kernels.cpu import native

    kind = arguments.device.split(":")[0]
    if arguments.plain or kind not in ("cpu", "cuda"):
        return False
    reason = native.why_not() if kind == "cpu" else gpu.why_not()
    if reason is not None:
        print(f"nequip-deploy: NequIP's own convolution is used: {reason}", file=sys.stderr)
    return reason is None


@contextmanager
def _kernels_at_hand(device: str) -> Iterator[None]:
    """Within this context `nequip-compile` fuses convolutions, and Inductor puts the kernels into what it compiles."""
    import os

    from nequip.scripts import compile as nequip_compile
    from torch._inductor import config as inductor

    from gaq.kernels.cpu import native
    from gaq.kernels.shims import c_shims
    from gaq_nequip.engine.fused import fuse

    before = os.environ.get("LIBRARY_PATH")
    options: dict[str, Any] = {}
    on_cpu = device.split(":")[0] == "cpu"  # for a card Inductor compiles the Triton kernels it sees
    if on_cpu:
        options = {
            "aot_inductor.custom_ops_to_c_shims": c_shims(),
            "aot_inductor.custom_op_libs": [native.STATIC_NAME],
        }
    modify = nequip_compile.modify

    def modify_and_fuse(model: Any, modifiers: Any) -> Any:
        # Not a modifier by name: those of a package are the ones it was written with.
        model = modify(model, modifiers)
        if on_cpu:
            folder = str(native.static_library(model.model_dtype))
            os.environ["LIBRARY_PATH"] = folder if not before else f"{folder}{os.pathsep}{before}"
        for name, reason in fuse(model, device).items():
            print(f"nequip-deploy: {name} keeps NequIP's own convolution: {reason}", file=sys.stderr)
        return model

    nequip_compile.modify = modify_and_fuse
    try:
        with inductor.patch(options):
            yield
    finally:
        nequip_compile.modify = modify
        if before is None:
            os.environ.pop("LIBRARY_PATH", None)
        else:
            os.environ["LIBRARY_PATH"] = before


@contextmanager
def _tolerating(force: float) -> Iterator[None]:
    """Within this context NequIP lets compiled float32 models differ from plain ones by `force`, eV/Å, if that is more.

    Its own bound, 5e-5, is that of sums in another order. A rounded feature on the edge of two steps may then fall to
    the other side, which costs a step of its rounding.
    """
    from nequip.utils import dtype

    before = dtype._FLOAT32_MODEL_TOL
    # Not infinite: times zero that would be no number.
    dtype._FLOAT32_MODEL_TOL = min(max(before, force), 1e3)  # type: ignore[misc]
    try:
        yield
    finally:
        dtype._FLOAT32_MODEL_TOL = before  # type: ignore[misc]


def compile_model(
    source: Path,
    output: Path,
    target: str,
    device: str,
    fused: bool = False,
    tolerance: float = 0.0,
    frozen: bool = True,
) -> None:
    """NequIP's own compilation with the weights frozen to integers, then slimmed; writes `output`.

    Args:
        source: quantized checkpoint or package; a float one if not `frozen`.
        output: compiled file.
        target: of `nequip-compile`.
        device: cpu or cuda.
        fused: whether convolutions go through the fused kernel, which the file then carries.
        tolerance: force difference, meV/Å, that the rounding of features may make between two orders of summation.
        frozen: whether weights are stored as integers. A float model has none to store, and keeps its own.
    """
    from nequip.scripts import compile as nequip_compile

    from gaq_nequip import artefact, files

    arguments = ["--mode", "aotinductor", "--device", device, "--target", target]
    if frozen:
        arguments += ["--modifiers", "enable_GAQInt8"]
    data = _with_cell(files.example_data(source))
    if data is not None:
        path = output.with_name("example.pt")
        _save_data(data, path)
        arguments += ["--data-path", str(path)]
    with _tolerating(1e-3 * tolerance), _kernels_at_hand(device) if fused else nullcontext():
        nequip_compile.main([str(source), str(output), *arguments])
    logging.disable(logging.INFO)
    if not artefact.slim(output, output):
        print("nequip-deploy: the debug symbols could not be stripped (program `strip`), and stay.", file=sys.stderr)


def _with_cell(data: Any) -> Any | None:
    """The example structure in a box, if it is a molecule without one; None if it need not be changed.

    NequIP divides the virial by the volume and compares the stress it gets: without a cell its own compilation fails.
    """
    import torch
    from nequip.data import AtomicDataDict

    cell = data[AtomicDataDict.CELL_KEY]
    if bool((torch.linalg.det(cell) != 0).all()):
        return None
    positions = data[AtomicDataDict.POSITIONS_KEY]
    size = positions.amax(0) - positions.amin(0) + 20.0
    return {**data, AtomicDataDict.CELL_KEY: torch.diag(size).unsqueeze(0).to(cell)}


def _save_data(data: Any, path: Path) -> None:
    """Write data as `nequip-compile --data-path` reads it: the state of a TorchScript module."""
    import torch

    holder = torch.nn.Module()
    for name, value in data.items():
        holder.register_buffer(name, value)
    with known_hidden():  # TorchScript is deprecated, and what NequIP asks for
        torch.jit.save(torch.jit.script(holder), path)


def _check(model: Any, source: Path, deployed: Path, target: str, device: str) -> Check | None:
    """Compare with the model; None for targets that ASE cannot run, whose graph is that of ``ase`` but for outputs."""
    from nequip.integrations.ase import NequIPCalculator

    from gaq_nequip import files

    if deployed.name.endswith(COMPILED) and target != "ase":
        return None
    reference = NequIPCalculator._from_saved_model(str(source), device=device, chemical_species_to_atom_type_map=True)
    if deployed.name.endswith(COMPILED):
        calculator = files.CompiledModel(deployed, device).calculator()
    else:
        calculator = NequIPCalculator._from_saved_model(
            str(deployed), device=device, chemical_species_to_atom_type_map=True
        )
    return _compare(reference, calculator, _structures(files.example_data(source)))


def float_weight_bytes(model: Any) -> int:
    """Bytes of the parameters of a model in float32."""
    return 4 * sum(p.numel() for p in model.parameters())


def packed_bytes(model: Any, fold: bool) -> tuple[int, int]:
    """Bytes of the codes and scales of a quantized model with what stays float, and how many numbers are packed.

    Args:
        model: quantized; it is not changed.
        fold: whether the self-connection is folded by type, as in compiled files.
    """
    import copy

    from gaq.model.state import is_kind
    from gaq_nequip.freeze import freeze
    from gaq_nequip.packed import PackedWeight

    frozen = freeze(copy.deepcopy(model), fold=fold)
    weights = [m for m in frozen.modules() if is_kind(m, PackedWeight)]
    rest = 4 * sum(p.numel() for p in frozen.parameters())
    return sum(m.bytes for m in weights) + rest, sum(m.numel for m in weights)


def _table(model: Any, source: Path, deployed: Path, check: Check | None, compare: str | None) -> str:
    from gaq_nequip import artefact

    rows: list[tuple[str, str, str]] = []
    total = float_weight_bytes(model)
    if total:
        plain, _ = packed_bytes(model, fold=False)
        folded, numbers = packed_bytes(model, fold=True)
        rows.append(("weights, float32", _kib(total), ""))
        rows.append(("weights, codes and scales", _kib(plain), f"{total / plain:.2f}x smaller"))
        if folded != plain:
            note = f"{total / folded:.2f}x smaller ({numbers} numbers)"
            rows.append(("  and self-connection folded by type", _kib(folded), note))
    if deployed.name.endswith(COMPILED):
        sizes = artefact.sections(deployed)
        rows.append(("constants in the file, not compressed", _kib(sizes.weights), ""))
    rows.append((f"{source.name}", _kib(source.stat().st_size), "the model it was made of"))
    rows.append((deployed.name, _kib(deployed.stat().st_size), ""))
    if compare is not None:
        stock = Path(compare).stat().st_size
        slimmed = deployed.with_name("slimmed" + COMPILED)
        artefact.slim(Path(compare), slimmed)
        own, equal = deployed.stat().st_size, slimmed.stat().st_size
        rows.append((Path(compare).name, _kib(stock), f"{stock / own:.2f}x larger"))
        rows.append(("  equally slimmed", _kib(equal), f"{equal / own:.2f}x larger"))
    if check is not None:
        rows.append((f"largest energy difference, {check.structures} structures", f"{check.energy:.2g}", "meV/atom"))
        note = f"meV/Å (largest force {check.force_scale:.0f})"
        rows.append((f"largest force difference, {check.structures} structures", f"{check.forces:.2g}", note))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"  {a:{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def _kib(size: int) -> str:
    return f"{size / 1024:.1f} KiB"


def _info(arguments: argparse.Namespace) -> int:
    path = Path(arguments.file)
    if path.name.endswith(COMPILED):
        from gaq_nequip import artefact

        facts = artefact.metadata(path)
        sizes = artefact.sections(path)
        print(f"{path}: {'quantized' if 'gaq_preset' in facts else 'float'}, compiled")
        for key in sorted(facts):
            print(f"  {key:28s} {facts[key]}")
        for name in ("total", "weights", "code", "sources", "other"):
            print(f"  {name + ' bytes':28s} {getattr(sizes, name)}")
        return 0
    from gaq.model.state import state_of
    from gaq.model.summary_table import format_rows
    from gaq_nequip import files
    from gaq_nequip.model import rows

    model = files.load(path)
    state = state_of(model)
    print(f"{path}: {'float' if state is None else f'preset {state.config.preset}, {state.status}'}")
    for key, value in sorted(model.metadata.items()):  # type: ignore[operator,union-attr]
        if key != "gaq_config":
            print(f"  {key:28s} {value}")
    print(format_rows(rows(model)))
    return 0


@hidden_in_commands()
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command ``nequip-deploy``; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.disable(logging.INFO)
    try:
        return _build(arguments) if arguments.command == "build" else _info(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"nequip-deploy: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
