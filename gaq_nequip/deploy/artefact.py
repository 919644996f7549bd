"""Compiled ``.nequip.pt2`` files: their metadata and sizes, and how to make them smaller.

Such a file is a zip archive made by AOTInductor. torch's loader reads these entries, below one root folder of any name:

=====================================================  ========================================================
``archive_format`` and ``_version``, ``byteorder``     a description of the archive, with ``.data/``
``data/aotinductor/model/NAME.so``                     the compiled model; its constants are ELF sections
``data/aotinductor/model/NAME_metadata.json``          metadata: strings, NequIP's and ours
``data/aotinductor/model/NAME.json``                   operators called through torch, if there are any
``data/aotinductor/model/NAME.cpp``                    only its name, by which some versions find the metadata
=====================================================  ========================================================

On other devices or with other settings there are also compiled kernels, blobs of weights and custom objects. The
loader takes the root folder from the first two names of the archive. So a renamed file keeps working, but an entry
outside of the root, such as NequIP's list of libraries with custom operators, must not be among those two.

This module needs only the standard library.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gaq.files.whole import written_whole

__all__ = ["ArtefactError", "ArtefactSizes", "metadata", "sections", "slim"]

_MODEL_FOLDER = "data/aotinductor/model"
_WEIGHT_FOLDERS = ("data/weights", "data/constants")
_SOURCES = frozenset({".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".S"})
_METADATA = "_metadata.json"
_CONSTANT_SECTIONS = frozenset({b".lrodata", b".ldata"})
_NOBITS = 8
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, IndexError, EOFError, OverflowError, RuntimeError)
"""Errors that reading a damaged archive, or a damaged library in it, may raise."""


class ArtefactError(ValueError):
    """A file is not a complete compiled model; the message names the file, what is wrong, and what to do."""


@dataclass(frozen=True)
class ArtefactSizes:
    """Where the bytes of a compiled file are.

    Attributes:
        total: the file on the disk, compressed or not.
        weights: constants of the model (parameters, buffers, tables), before compression. In a library that is not
            64-bit ELF they cannot be told from the code, and count as code.
        code: the rest of the library with its debug symbols, before compression.
        sources: generated C++ files and headers, before compression.
        other: everything else in the archive, before compression.
    """

    total: int
    weights: int
    code: int
    sources: int
    other: int


def slim(source: Path, target: Path) -> bool:
    """Write a smaller archive that computes the same, bit for bit, and loads in the same programs.

    Debug symbols and C++ sources are left out and the rest is compressed; unknown entries are kept. Slimming a slimmed
    file gives the same bytes.

    Args:
        source: compiled model.
        target: file to write, which may be `source`; it is replaced at once, when it is complete.

    Returns:
        False if the library kept its symbols: there is no program ``strip``, or it cannot be used on this library.

    Raises:
        ArtefactError: `source` is not a complete compiled model, or the folder of `target` does not exist.
        OSError: the file cannot be written.
    """
    source, target = Path(source), Path(target)
    if not target.parent.is_dir():
        raise ArtefactError(f"{target}: the folder {target.parent} does not exist; make it, or name another.")
    with _reading(source) as archive, written_whole(target) as part:
        library = _library(archive, source)
        code = archive.read(library)
        stripped = _strip(code)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as result:
            for entry in archive.infolist():
                kept = _kept(entry.filename, library)
                if kept is None:
                    continue
                if entry.filename == library:
                    data = code if stripped is None else stripped
                else:
                    data = archive.read(entry) if kept else b""
                # No time stamp, so that equal models give equal files.
                result.writestr(zipfile.ZipInfo(entry.filename), data, zipfile.ZIP_DEFLATED, compresslevel=9)
        shutil.copymode(source, part)
    return stripped is not None


def sections(path: Path) -> ArtefactSizes:
    """Where the bytes of a compiled file are.

    Raises:
        ArtefactError: the file is not a complete compiled model.
    """
    path = Path(path)
    with _reading(path) as archive:
        library = _library(archive, path)
        code = archive.read(library)
        embedded, appended = _constants(code)
        weights = sum(map(len, embedded)) + len(appended)
        sources = other = 0
        rest = len(code) - weights
        for entry in archive.infolist():
            inner = PurePosixPath(_below_root(entry.filename))
            if entry.filename == library:
                continue
            if inner.suffix == ".blob" or str(inner.parent) in _WEIGHT_FOLDERS:
                weights += entry.file_size
            elif _is_source(entry.filename):
                sources += entry.file_size
            else:
                other += entry.file_size
    return ArtefactSizes(path.stat().st_size, weights, rest, sources, other)


def metadata(path: Path) -> dict[str, str]:
    """Metadata of a compiled file: cutoff, types, inputs, device, and our own, whose keys begin with ``gaq``.

    No code of the file is loaded.

    Raises:
        ArtefactError: the file is not a complete compiled model, or has no metadata.
    """
    path = Path(path)
    with _reading(path) as archive:
        name = _library(archive, path).removesuffix(".so") + _METADATA
        try:
            facts = json.loads(archive.read(name))
        except KeyError:
            raise ArtefactError(f"{path}: there is no metadata in it; compile it with {_COMPILE}.") from None
        except ValueError as error:
            raise ArtefactError(f"{path}: its metadata cannot be read ({error}); {_AGAIN}.") from error
    if not isinstance(facts, dict):
        raise ArtefactError(f"{path}: its metadata is not a mapping; {_AGAIN}.")
    return {str(key): str(value) for key, value in facts.items()}


_COMPILE = "nequip-deploy build (quantized models) or nequip-compile --mode aotinductor (float ones)"
_AGAIN = "copy or compile it again"


@contextmanager
def _reading(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the archive; damage that shows within the context becomes an `ArtefactError`."""
    if path.is_dir():
        raise ArtefactError(f"{path}: a folder; give a compiled model, made with {_COMPILE}.")
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file; make it with {_COMPILE}.")
    with path.open("rb") as file:
        start = file.read(4)
        if not start:
            raise ArtefactError(f"{path}: an empty file; {_AGAIN}.")
        # The directory of a zip archive stands at its end, the signature of an entry at its start.
        if start not in (b"PK\x03\x04", b"PK\x05\x06"):
            raise ArtefactError(f"{path}: not a compiled model, which is a zip archive; make one with {_COMPILE}.")
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except ArtefactError:
            raise
        except _DAMAGE as error:
            raise ArtefactError(f"{path}: truncated or damaged ({error}); {_AGAIN}.") from error


def _below_root(name: str) -> str:
    return name.partition("/")[2]


def _is_source(name: str) -> bool:
    inner = PurePosixPath(_below_root(name))
    return str(inner.parent) == _MODEL_FOLDER and inner.suffix in _SOURCES


def _library(archive: zipfile.ZipFile, path: Path) -> str:
    """Name of the library that torch would load."""
    libraries = []
    for name in archive.namelist():
        inner = PurePosixPath(_below_root(name))
        if str(inner.parent) == _MODEL_FOLDER and inner.suffix == ".so":
            libraries.append(name)
    if not libraries:
        raise ArtefactError(
            f"{path}: a zip archive without a compiled library, such as a package (.nequip.zip); compile the model "
            f"with {_COMPILE}."
        )
    # torch takes the last one.
    return libraries[-1]


def _kept(name: str, library: str) -> bool | None:
    """True for an entry to keep, False for one to keep without its content, None for one to leave out."""
    stem = library.removesuffix(".so")
    if name == f"{stem}.cpp":
        return False
    if _is_source(name):
        return None
    beside = PurePosixPath(name).parent == PurePosixPath(library).parent
    # A copy of the metadata for the kernels; torch reads the one that belongs to the last source in the archive.
    if beside and name.endswith(f".kernel{_METADATA}") and not stem.endswith(".kernel"):
        return None
    return True


def _strip(code: bytes) -> bytes | None:
    """The library without what only debuggers and linkers read; None if it cannot be stripped here."""
    program = shutil.which("strip")
    embedded, appended = _constants(code)
    # Very large constants follow the ELF file, where `strip` would cut them off. And without embedded constants there
    # is nothing to compare, to check that `strip` did no harm.
    if program is None or appended or not embedded:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.so"
        file.write_bytes(code)
        done = subprocess.run([program, "--strip-unneeded", str(file)], capture_output=True, check=False)
        result = file.read_bytes()
    if done.returncode or _constants(result) != (embedded, appended):
        return None
    return result


def _constants(code: bytes) -> tuple[Sequence[bytes], bytes]:
    """The sections with the constants, and the bytes after the end of the ELF file; both empty for other files."""
    # 64 bits, little-endian: what AOTInductor makes for Linux.
    if code[:6] != b"\x7fELF\x02\x01":
        return (), b""
    offset, size, count, names = struct.unpack_from("<Q10xHHH", code, 40)
    headers = [struct.unpack_from("<IIQQQQ", code, offset + size * i) for i in range(count)]
    end = offset + size * count
    constants = []
    for name, kind, _flags, _address, begin, length in headers:
        if kind == _NOBITS:
            continue
        end = max(end, begin + length)
        if end > len(code):
            raise zipfile.BadZipFile("the library in it is cut off")
        label = headers[names][4] + name
        if code[label : code.index(b"\0", label)] in _CONSTANT_SECTIONS:
            constants.append(code[begin : begin + length])
    return tuple(constants), code[end:]
