"""Console scripts: MACE's training command with the hook in place, and its LAMMPS export for quantized models."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gaq.cli import frame
from gaq.cli.arguments import EXIT_CODES, add_common
from gaq.cli.inputs import checked_output, find_adapter
from gaq.home import home_or_stand_in
from gaq.third_party_warnings import hidden_in_commands
from gaq.untyped import AnyModule, Document

if TYPE_CHECKING:
    import torch

__all__ = ["create_lammps_model", "train"]

EXPORT = "gaq_mace_create_lammps_model"
DTYPES = ("float32", "float64")
SUFFIXES = {"libtorch": "-lammps.pt", "mliap": "-mliap_lammps.pt"}


@hidden_in_commands()
def train() -> int:
    """Run `mace_run_train` with the hook, whether or not torch's autoload is on: the script ``gaq_mace_train``.

    Returns:
        The exit code: 0, or 2 where MACE is not installed.
    """
    if frame.without_framework("gaq_mace_train", "mace"):
        return frame.REFUSED
    with home_or_stand_in():
        import mace  # noqa: F401  (before e3nn)

        from gaq_mace.hook.patches import apply, ensure_installed

        ensure_installed()
        from mace.cli import run_train

        apply(run_train)  # with autoload switched off, the import above does not
        run_train.main()
    return frame.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=EXPORT,
        description="Convert a MACE model, quantized or not, for LAMMPS.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=EXIT_CODES,
    )
    add_common(parser)
    parser.add_argument("model_path", help="model to convert: .model or .safetensors")
    parser.add_argument("--head", nargs="?", default=None, help="head of the model; needed where there are several")
    parser.add_argument("--dtype", nargs="?", default="float64", choices=DTYPES, help="data type")
    parser.add_argument(
        "--format",
        default="libtorch",
        choices=sorted(SUFFIXES),
        help="libtorch for `pair_style mace`, mliap for `pair_style mliap unified`",
    )
    parser.add_argument(
        "-o",
        "--output",
        default=None,
        help="file to write; default: the model's path and -lammps.pt or -mliap_lammps.pt",
    )
    return parser


def _choose_head(model: torch.nn.Module, name: str | None) -> str | None:
    """The head with this name, or the only one of the model; None for models from before MACE had heads.

    Raises:
        ValueError: if there is no such head, or a name is needed to choose one.
    """
    heads: list[str | None] = list(getattr(model, "heads", None) or [None])
    if name is not None:
        if name not in heads:
            raise ValueError(f"--head {name}: no such head; the model has {', '.join(map(str, heads))}.")
        return name
    if len(heads) > 1:
        raise ValueError(f"the model has the heads {', '.join(map(str, heads))}: choose one with --head.")
    return heads[0]


def _kept(model: torch.nn.Module) -> str:
    """The sentence that tells the user what the exported file keeps of the quantization."""
    from gaq.model.state import feature_quantizers, state_of

    state = state_of(model)
    if state is None:
        return "The model is not quantized."
    features = feature_quantizers(model)
    inputs = f"features are rounded in {len(features)} places" if features else "no features are rounded"
    return (
        f"Kept of the quantization (preset {state.config.preset}): {len(state.weights)} weight tensors hold their "
        f"rounded values, as floats; {inputs}."
    )


def _write(exported: torch.nn.Module, target: Path, format_: str) -> None:
    """Write an exported model; nothing is left behind if writing fails."""
    import torch

    from gaq.files.whole import written_whole

    with written_whole(target) as part:
        if format_ == "mliap":
            torch.save(exported, part)
        else:
            from e3nn.util import jit

            jit.compile(exported).save(str(part))


def _notes_for_mliap(model: torch.nn.Module) -> list[str]:
    """What a user of the file has to know: how it computes, and how wide LAMMPS's exchange has to be."""
    from gaq_mace.engine.serving import record_of
    from gaq_mace.root import is_quantized

    interactions: AnyModule = model.interactions
    numbers: AnyModule = model.atomic_numbers
    species = numbers.numel()  # which some blocks of MACE exchange as well
    lines = []
    if is_quantized(model):
        record = record_of(model, warn=False)
        reason = record.reason if record.engine is None else record.engine.why_not_parts()
        lines.append(
            "Where gaq is installed, LAMMPS runs it through the fused kernels."
            if reason is None
            else f"LAMMPS runs it through MACE's own operations: {reason}."
        )
    widths = [block.linear_up.irreps_out.dim + species for block in list(interactions)[1:]]
    if widths:
        lines.append(
            "A LAMMPS that sizes its exchange before it knows the model needs this line before pair_style:\n"
            f"  fix pad all property/atom d2_pad {max(widths)} ghost yes"
        )
    return lines


def _convert(arguments: argparse.Namespace) -> None:
    import mace  # noqa: F401  (before e3nn)
    import torch
    from mace.calculators import LAMMPS_MACE
    from mace.calculators.lammps_mliap_mace import LAMMPS_MLIAP_MACE

    from gaq.process import default_dtype
    from gaq.progress import explained
    from gaq_mace.files import load
    from gaq_mace.model import convert
    from gaq_mace.root import is_quantized

    find_adapter("", arguments.model_path)
    target = Path(arguments.output or arguments.model_path + SUFFIXES[arguments.format])
    checked_output("--output", str(target), arguments.model_path)
    with explained(f"loading {arguments.model_path}: MACE builds the model and compiles its generated code"):
        model = load(arguments.model_path)
    if is_quantized(model):
        convert(model)
    head = _choose_head(model, arguments.head)
    dtype = getattr(torch, arguments.dtype)
    model = model.to(dtype)
    with default_dtype(dtype):
        options = {} if head is None else {"head": head}
        if arguments.format == "mliap":
            model.lammps_mliap = True  # type: ignore[assignment]  # torch types attributes of modules as tensors
            exported = LAMMPS_MLIAP_MACE(model, **options)
            # Read from the environment where the object is made, and pickled with it; without it a build of LAMMPS that
            # keeps its atoms on the CPU is refused.
            exported.config.allow_cpu = True
            _write(exported, target, "mliap")
        else:
            _write(LAMMPS_MACE(model, **options), target, "libtorch")
    print(_kept(model))
    print(f"Wrote {target} ({arguments.format}, {arguments.dtype}, {os.path.getsize(target):,} bytes)")
    if arguments.format == "mliap":
        print(*_notes_for_mliap(model), sep="\n")


def create_lammps_model(argv: Sequence[str] | None = None) -> int:
    """Convert a MACE model, quantized or not, for LAMMPS: the script ``gaq_mace_create_lammps_model``.

    The libtorch format is the TorchScript that `mace_create_lammps_model` writes. For mliap that command rebuilds the
    model for cuEquivariance, which drops the rounding of features and fails where cuEquivariance is missing. This
    command stores the model as it is.

    Returns:
        The exit code: 0, or 2 for bad input, with nothing written.
    """
    if frame.without_framework(EXPORT, "mace"):
        return frame.REFUSED
    arguments = _parser().parse_args(argv)

    def work() -> tuple[int, Document]:
        from gaq.process import unchanged

        with unchanged():  # LAMMPS's package, which MACE imports where it is installed, changes the environment
            _convert(arguments)
        return frame.DONE, {}

    return frame.run(EXPORT, work)
