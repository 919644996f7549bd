"""What a file is, by its content: nothing in it is run, and its name does not matter."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FileKind", "kind_of", "new_name"]


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        words: what it is, for messages.
        framework: adapter that reads it, ``mace`` or ``nequip``; None for any other file, and a damaged one.
        name: short name of the kinds that are treated in different ways.
    """

    words: str
    framework: str | None = None
    name: str = "other"


MACE_MODEL = FileKind("a MACE model", "mace", "model")
MACE_SAFETENSORS = FileKind("a quantized MACE model (safetensors)", "mace", "safetensors")
DEPLOYED = FileKind("a deployed model", None, "deployed")
MACE_MLIAP = FileKind("a MACE model exported for LAMMPS (ML-IAP)", "mace", "export")
MACE_SCRIPT = FileKind("a MACE model compiled by TorchScript", "mace", "script")
CHECKPOINT = FileKind("a NequIP checkpoint", "nequip", "checkpoint")
PACKAGE = FileKind("a NequIP package", "nequip", "package")
COMPILED = FileKind("a compiled NequIP model", "nequip", "compiled")
MACE_CHECKPOINT = FileKind(
    "a checkpoint of mace_run_train, which holds weights without a model; give the .model file it writes"
)

MOST_BYTES = 1 << 28
"""Most bytes that are read of a pickle. What tells its kind stands near its start in all that is known."""

_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, EOFError, OSError, NotImplementedError)

_STARTS = (
    (b"\x7fELF", "a compiled library or program"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89PNG", "an image"),
    (b"%PDF", "a PDF document"),
)


def kind_of(path: str | Path) -> FileKind:
    """Say what a file is.

    Raises:
        ValueError: if there is no such file, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file.")
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    if not start:
        return FileKind("an empty file")
    try:
        if zipfile.is_zipfile(path):
            return _archive(path)
        # Before pickles: the length of the header, with which the file begins, may look like the start of one.
        if start[8:9] == b"{" and (kind := _safetensors(path)) is not None:
            return kind
        if start[:1] == b"\x80":
            with path.open("rb") as file:
                return _pickle(file.read(MOST_BYTES))
    except _DAMAGE:
        return FileKind("a damaged file")
    return next((FileKind(words) for magic, words in _STARTS if start.startswith(magic)), None) or _text(start)


def new_name(path: Path, suffixes: tuple[str, ...]) -> str:
    """The suffix of a file to be written.

    Args:
        path: name that the user chose.
        suffixes: what files of the framework end in.

    Raises:
        ValueError: if the name ends in none of them, naming them all.
    """
    for suffix in suffixes:
        if path.name.endswith(suffix) and path.name != suffix:
            return suffix
    raise ValueError(f"{path}: the file to write has to end in {' or '.join(suffixes)}, which says its form.")


def _archive(path: Path) -> FileKind:
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
        if any(name.startswith("data/aotinductor/model/") for name in names):
            metadata = next((n for n in archive.namelist() if n.endswith("_metadata.json")), None)
            is_nequip = metadata is not None and b"type_names" in archive.read(metadata)
            return COMPILED if is_nequip else FileKind("a compiled model (AOTInductor) of another program")
        if any(name.startswith("code/") for name in names) and "constants.pkl" in names:
            of_mace = any("__torch__/mace/" in name for name in names)
            return MACE_SCRIPT if of_mace else FileKind("a TorchScript model of another program")
        if any(name.endswith("eager_model.pkl") for name in names):
            return PACKAGE
        if ".data/extern_modules" in names:
            return FileKind("a torch package of another program")
        if "data.pkl" in names:
            entry = archive.namelist()[names.index("data.pkl")]
            with archive.open(entry) as file:
                return _pickle(file.read(MOST_BYTES))
        if all(name.endswith(".npy") for name in archive.namelist()):
            return FileKind("a NumPy archive")
    return FileKind("a zip archive without a model")


def _pickle(content: bytes) -> FileKind:
    """Kind of a pickle, by the names in it; they stand there as text."""
    if b"LAMMPS_MLIAP_MACE" in content:
        return MACE_MLIAP
    if b"pytorch-lightning_version" in content:
        return CHECKPOINT if b"nequip" in content else FileKind("a Lightning checkpoint of another program")
    if b"mace.modules" in content or b"gaq_packed" in content:
        return MACE_MODEL
    if b"lr_scheduler" in content and b"interactions.0." in content:
        return MACE_CHECKPOINT
    return FileKind("a pickle that holds no MACE or NequIP model")


def _safetensors(path: Path) -> FileKind | None:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            return None
        header = json.loads(file.read(length))
    metadata = header.get("__metadata__", {})
    if "gaq_deployed" in metadata:
        return DEPLOYED
    if "gaq" in metadata:
        return MACE_SAFETENSORS
    return FileKind("a safetensors file of another program, which holds tensors without a model")


def _text(start: bytes) -> FileKind:
    try:
        text = start.decode("utf-8", errors="strict" if len(start) < 4096 else "ignore")
    except UnicodeDecodeError:
        return FileKind("a file of an unknown binary format")
    if "\0" in text:
        return FileKind("a file of an unknown binary format")
    if text.splitlines()[0].strip().isdigit():
        return FileKind("a file of structures (XYZ)")
    return FileKind("a text file")
