"""What the user gave on the command line, checked before the work begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["InputError", "checked_output", "read_structures"]


class InputError(ValueError):
    """Bad input; its message is one line for the user, and the exit code is 2."""


def read_structures(path: str) -> list[Atoms]:
    from gaq.checks import errors

    return errors.read_structures(path)


def checked_output(name: str, model: str) -> Path:
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
