"""What the user gave on the command line, checked before the work begins."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from ase import Atoms

    from gaq.adapter import Adapter

__all__ = [
    "InputError",
    "check_folder",
    "check_output_folder",
    "check_structure_file",
    "checked_output",
    "find_adapter",
    "load_model",
    "number_of_at_least",
    "read_structures",
]


class InputError(ValueError):
    """Bad input; its message is one line for the user, and the exit code is 2."""


def find_adapter(option: str, path: str) -> Adapter:
    """Return the adapter of a model file.

    Args:
        option: option that named the file, empty for the argument of the command.
        path: the file.

    Raises:
        InputError: if there is no such file, or it is not a model; the message says what it is.
    """
    from gaq.adapter import adapter_for_file

    try:
        return adapter_for_file(path)
    except ValueError as error:
        raise InputError(f"{option} {error}".strip()) from error


def load_model(
    adapter: Adapter, path: str, device: str, species: str | None = None, exports: bool = False
) -> torch.nn.Module:
    """Load a model; if it takes long, a line says why."""
    from gaq.progress import explained

    reason = "loading {}: the framework builds the model and compiles its generated code"
    with explained(reason.format(path)):
        return adapter.load_export(path, device, species) if exports else adapter.load(path, device, species)


def check_structure_file(option: str, path: str) -> None:
    """Refuse a file of structures that does not exist.

    Raises:
        InputError: naming the option.
    """
    if Path(path).is_dir():
        raise InputError(f"{option} {path}: is a directory; give a file that ASE reads, such as .xyz.")
    if not Path(path).is_file():
        raise InputError(f"{option} {path}: does not exist; give a file that ASE reads, such as .xyz.")


def read_structures(path: str) -> list[Atoms]:
    """Read all structures of a file."""
    from gaq.checks import errors
    from gaq.progress import explained

    with explained(f"reading {path}"):
        return errors.read_structures(path)


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder in which no file can be written.

    Raises:
        InputError: naming the option.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{option}: the folder {folder} {what}.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{option}: nothing can be written in the folder {folder} ({error.strerror}).") from error


def check_output_folder(option: str, name: str) -> Path:
    """Return the folder to write to, which need not exist yet.

    Raises:
        InputError: if it is a file, or nothing can be written where it is or would be.
    """
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {folder}: is a file; give the name of a folder.")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    check_folder(f"{option} {folder}", existing)
    return folder


def checked_output(option: str, name: str, model: str) -> Path:
    """Return the path of the file to write.

    Raises:
        InputError: if the file cannot be written there, or is the input model.
    """
    output = Path(name)
    check_folder(f"{option} {output}", output.parent)
    if output.is_dir():
        raise InputError(f"{option} {output}: is a folder; give the name of a file.")
    if output.exists() and output.samefile(model):
        raise InputError(f"{option} {output}: is the input model itself; choose another name.")
    return output


def number_of_at_least(option: str, value: float, least: float, meaning: str) -> None:
    """Refuse a number below a bound, NaN and infinity.

    Args:
        option: the option.
        value: its value.
        least: smallest value that is allowed.
        meaning: what the number is, for the message.

    Raises:
        InputError: naming the option and its value.
    """
    if not (math.isfinite(value) and value >= least):
        raise InputError(f"{option} {value:g}: give {meaning}, a finite number of at least {least:g}.")
