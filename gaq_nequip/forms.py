"""The forms of NequIP's files: checkpoints, packages, compiled models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gaq.files.kinds import kind_of
from gaq.model.state import ModelFileError

__all__ = ["CHECKPOINT", "COMPILED", "PACKAGE", "SUFFIXES", "form_of", "named"]

CHECKPOINT, PACKAGE, COMPILED = ".ckpt", ".nequip.zip", ".nequip.pt2"
SUFFIXES = (CHECKPOINT, PACKAGE, COMPILED)
_FORMS = {"checkpoint": CHECKPOINT, "package": PACKAGE, "compiled": COMPILED}


def form_of(path: str | Path) -> str:
    """The one of `SUFFIXES` that a file's name ends in; by its content if the name ends otherwise.

    Raises:
        ModelFileError: if the file is not one of NequIP's.
    """
    path = Path(path)
    if path.name.endswith(SUFFIXES):
        return next(suffix for suffix in SUFFIXES if path.name.endswith(suffix))
    try:
        kind = kind_of(path)
    except ValueError as error:
        raise ModelFileError(str(error)) from error
    if kind.name not in _FORMS:
        raise ModelFileError(f"{path}: {kind.words}, not a model file of NequIP ({', '.join(SUFFIXES)}).")
    return _FORMS[kind.name]


@contextmanager
def named(path: str | Path) -> Iterator[Path]:
    """A name of a file by which NequIP knows its form: a link, within this context, if its own name does not tell."""
    path = Path(path)
    form = form_of(path)
    if path.name.endswith(form):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"model{form}"
        link.symlink_to(path.resolve())
        yield link
