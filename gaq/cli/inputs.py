"""What the user gave on the command line, checked before the work begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["InputError", "checked_output", "checked_output_folder", "read_structures"]


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
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"--output {output}: no permission to write into the folder {output.parent}.")
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder; give the name of a file.")
    if output.exists() and output.samefile(model):
        raise InputError(f"--output {output}: is the input model itself; choose another name.")
    return output


def checked_output_folder(name: str) -> Path:
    """Return the path of a folder that a command makes, or writes into.

    Raises:
        InputError: if it is a file, or cannot be made or written into.
    """
    output = Path(name)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; give the name of a folder.")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise InputError(f"--output {output}: {there} is a file, not a folder.")
    if not os.access(there, os.W_OK):
        raise InputError(f"--output {output}: no permission to write into the folder {there}.")
    return output
