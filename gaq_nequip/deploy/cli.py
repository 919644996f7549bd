"""The command ``nequip-deploy``: makes a small file of a quantized model, which runs without this package.

    nequip-deploy build MODEL OUT [--target ase|pair_nequip|pair_allegro|batch] [--device cpu|cuda]
    nequip-deploy info FILE

Exit codes: 0 done, 1 the deployed file does not agree with the model, 2 bad input.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gaq.cli import frame
from gaq.cli.arguments import EXIT_CODES, add_common
from gaq.cli.frame import DONE, FAILED
from gaq.cli.inputs import InputError, check_structure_file, checked_output, find_adapter, number_of_at_least
from gaq.files.whole import put
from gaq.progress import explained
from gaq.untyped import AnyModule, Document

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["main"]

NAME = "nequip-deploy"
PACKAGE, COMPILED = ".nequip.zip", ".nequip.pt2"
BUILD_CODES = (
    "exit codes: 0 done; 1 the deployed file does not agree with the model and is not written; 2 bad input, with one "
    "line on stderr and nothing written"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Deploy quantized NequIP and Allegro models; float ones: nequip-compile.",
        epilog=BUILD_CODES,
    )
    add_common(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build", help="freeze, fold, compile, slim and check a quantized model", epilog=BUILD_CODES
    )
    build.add_argument("model", nargs="?", help="quantized .ckpt or .nequip.zip")
    build.add_argument("output", help="file to write: .nequip.pt2 (compiled) or .nequip.zip (package)")
    build.add_argument("--train-dir", help="folder of a training run, in place of MODEL: its best.ckpt, or last.ckpt")
    build.add_argument("--target", help="ase (default), pair_nequip, pair_allegro or batch")
    build.add_argument("--device", default="cpu", help="cpu or cuda")
    build.add_argument(
        "--example",
        metavar="FILE",
        help="structures (any format ASE reads), one of which to compile with in place of one of the training data",
    )
    build.add_argument(
        "--species", metavar="MAP", help="the model's type of each element, such as H:myH,C:myC; see the docs"
    )
    build.add_argument("--compare", metavar="FLOAT", help="the float model as nequip-compile made it, for its size")
    build.add_argument("--plain", action="store_true", help="NequIP's own convolution in place of the fused kernel")
    build.add_argument("--tolerance", type=float, help="allowed force difference to the model, meV/Å; see the docs")
    info = commands.add_parser(
        "info", help="print the metadata of a deployed file and where its bytes are", epilog=EXIT_CODES
    )
    info.add_argument("file", help="any file; if it is not a model of NequIP, one line says what it is")
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


def _build(arguments: argparse.Namespace) -> int:
    source = _model_path(arguments)
    output, kind = _checked(arguments, source)

    from gaq.deployed.check import default_tolerance
    from gaq.model.state import state_of
    from gaq_nequip import files
    from gaq_nequip.deploy.check import check, is_checked, structures_of
    from gaq_nequip.deploy.compile import check_compiler, compile_model, frozen_copy
    from gaq_nequip.deploy.sizes import WeightSizes, table
    from gaq_nequip.example import edges_of
    from gaq_nequip.names import EXAMPLE
    from gaq_nequip.species import species_of, type_names

    target = arguments.target or "ase"
    if kind == COMPILED:
        check_compiler()
    # The frozen copy is deployed, and the result is compared with the model.
    with explained(f"loading {source}: NequIP builds the model, and compiles its generated code"):
        model = files.load(source, species=arguments.species)
    state = state_of(model)
    if state is None:
        raise InputError(
            f"{source}: a float model. Quantize it first (gaq quantize {source.name} --calibration DATA.xyz -o "
            "OUT.ckpt), train it with the key `quantization`, or deploy it as it is with nequip-compile."
        )
    _refuse_ghosts(model, target)
    example = model.__dict__[EXAMPLE] = _example(arguments.example, model, source)
    if is_checked(output, target):  # what the check needs, before the work
        if not edges_of(example):
            raise InputError(
                f"{arguments.example or source}: no two atoms of the example structure are within the model's cutoff, "
                "so there is nothing to compare the deployed file with the model on. --example takes another."
            )
        structures_of(example, species_of(model), type_names(model))
    frozen = frozen_copy(model, to_compile=kind == COMPILED)
    sizes = WeightSizes.of(model, frozen)
    with tempfile.TemporaryDirectory(prefix="gaq-") as folder:
        trial = Path(folder) / output.name
        if kind == PACKAGE:
            with explained("packaging: the code of all modules goes into the file"):
                files.save(frozen, trial)
        else:
            noise = default_tolerance(state.config) if state.config.rounds_activations else 0.0
            with explained("compiling: torch generates C++ for the model and its forces, which takes minutes"):
                compile_model(frozen, example, trial, target, arguments.device, _fuses(arguments, frozen), noise)
        with explained("comparing the deployed file with the model"):
            difference = check(model, example, trial, target, arguments.device)
        print(table(sizes, source, trial, difference, arguments.compare))
        allowed = default_tolerance(state.config) if arguments.tolerance is None else arguments.tolerance
        if difference is not None and not difference.forces <= allowed:
            print(
                f"nequip-deploy: not written, because forces differ from the model by {difference.forces:.3g} meV/Å, "
                f"more than {allowed:g}. --tolerance sets another bound.",
                file=sys.stderr,
            )
            return FAILED
        put(trial, output)
    print(f"written: {output}")
    return DONE


def _refuse_ghosts(model: AnyModule, target: str) -> None:
    """Refuse to compile a model with message passing for ``pair_style allegro``.

    That style divides space among ranks, and its ghost atoms have no neighbours of their own: forces would be wrong,
    without a word.

    Raises:
        InputError: naming what to use.
    """
    from gaq_nequip.sites import class_name

    layers = [m for m in model.modules() if class_name(m) == "ConvNetLayer"]
    if target == "pair_allegro" and len(layers) > 1:
        raise InputError(
            f"--target pair_allegro: the model passes messages through {len(layers)} layers, and pair_style allegro "
            "would give wrong forces. Use --target pair_nequip (one rank), or `gaq deploy` (any number)."
        )


def _checked(arguments: argparse.Namespace, source: Path) -> tuple[Path, str]:
    """Check all values before the model is loaded; return the file to write and its form.

    Raises:
        InputError: naming the option.
    """
    from nequip.scripts._compile_utils import COMPILE_TARGET_DICT

    from gaq.files.kinds import new_name
    from gaq.process import check_device

    find_adapter("", str(source))
    output = Path(arguments.output)
    kind = new_name(output, (COMPILED, PACKAGE))
    checked_output("OUT", arguments.output, str(source))
    if kind == PACKAGE:
        given = [f"--{name}" for name in ("target", "plain") if getattr(arguments, name)]
        if given:
            raise InputError(f"{' and '.join(given)}: without effect on a package, which is compiled later.")
    elif (arguments.target or "ase") not in COMPILE_TARGET_DICT:
        raise InputError(f"--target {arguments.target}: choose one of {', '.join(COMPILE_TARGET_DICT)}.")
    if arguments.tolerance is not None:
        number_of_at_least("--tolerance", arguments.tolerance, 0.0, "a force difference in meV/Å")
    if arguments.example is not None:
        check_structure_file("--example", arguments.example)
    if arguments.compare is not None and not Path(arguments.compare).is_file():
        raise InputError(f"--compare {arguments.compare}: no such file.")
    check_device(arguments.device)
    return output, kind


def _example(path: str | None, model: torch.nn.Module, source: Path) -> dict[str, Tensor]:
    """The graph to compile with: of a structure in the file that ``--example`` names, or that of the model's file."""
    from gaq.checks.errors import read_structures
    from gaq_nequip.example import FEWEST_ATOMS, example_data, from_structures

    if path is None:
        return example_data(source)
    structures = read_structures(path)
    if max(map(len, structures)) < FEWEST_ATOMS:
        raise InputError(f"--example {path}: needs a structure of at least {FEWEST_ATOMS} atoms.")
    return from_structures(model, structures)


def _fuses(arguments: argparse.Namespace, model: AnyModule) -> bool:
    """Whether convolutions go through the fused kernel; prints the reason if the kernel cannot be used."""
    from gaq.kernels import gpu
    from gaq.kernels.cpu import native

    kind = arguments.device.split(":")[0]
    if arguments.plain or kind not in ("cpu", "cuda"):
        return False
    reason = native.why_not() if kind == "cpu" else gpu.why_not()
    if reason is None and kind == "cpu":
        try:
            native.static_library(model.model_dtype)  # the one that the file will carry
        except native.CompilerError as error:
            reason = str(error)
    if reason is not None:
        print(f"nequip-deploy: NequIP's own convolution is used: {reason}", file=sys.stderr)
    return reason is None


def _info(arguments: argparse.Namespace) -> int:
    from gaq_nequip import files
    from gaq_nequip.forms import form_of

    path = Path(arguments.file)
    find_adapter("", str(path))
    if form_of(path) == COMPILED:
        from gaq_nequip.deploy import artefact

        facts = artefact.metadata(path)
        sizes = artefact.sections(path)
        print(f"{path}: {'quantized' if 'gaq_preset' in facts else 'float'}, compiled")
        for key in sorted(facts):
            print(f"  {key:28s} {facts[key]}")
        for name in ("total", "weights", "code", "sources", "other"):
            print(f"  {name + ' bytes':28s} {getattr(sizes, name)}")
        return DONE
    from gaq.model.state import state_of
    from gaq.model.summary_table import format_rows
    from gaq_nequip.summary import rows

    with explained(f"loading {path}: NequIP builds the model, and compiles its generated code"):
        model = files.load(path)
    state = state_of(model)
    print(f"{path}: {'float' if state is None else f'preset {state.config.preset}, {state.status}'}")
    for key, value in sorted(model.metadata.items()):  # type: ignore[operator,union-attr]  # NequIP's property
        if key != "gaq_config":
            print(f"  {key:28s} {value}")
    print(format_rows(rows(model)))
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command ``nequip-deploy``; returns the exit code."""
    if frame.without_framework(NAME, "nequip"):
        return frame.REFUSED
    arguments = _parser().parse_args(argv)

    def work() -> tuple[int, Document]:
        from gaq.process import command_output
        from gaq_nequip.host import nequip_state

        with command_output(logging.WARNING), nequip_state():
            return _build(arguments) if arguments.command == "build" else _info(arguments), {}

    return frame.run(NAME, work)


if __name__ == "__main__":
    sys.exit(main())
