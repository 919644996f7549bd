"""Compiled ``.nequip.pt2`` files: what is in them, and the same with less in it.

Such a file is a zip archive that AOTInductor made. torch's loader reads of it, below one root folder of any name:

=====================================================  ========================================================
``archive_format`` and ``_version``, ``byteorder``     what the archive says of itself, with ``.data/``
``data/aotinductor/model/NAME.so``                     the compiled model; its constants are ELF sections
``data/aotinductor/model/NAME_metadata.json``          strings, NequIP's and ours
``data/aotinductor/model/NAME.json``                   operators that are called through torch, where there are any
``data/aotinductor/model/NAME.cpp``                    its name only, by which some versions find the metadata
=====================================================  ========================================================

and besides, on other devices or with other settings, compiled kernels, blobs of weights and custom objects. The root
folder comes from the first two names of the archive, so a renamed file keeps working, and an entry outside of the
root, as NequIP's list of libraries with custom operators is, must not stand among them.

This module needs the standard library only.
"""

from __future__ import annotations

import json
import os
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

__all__ = ["ArtefactError", "ArtefactSizes", "metadata", "sections", "slim"]

_MODEL_FOLDER = "data/aotinductor/model"
_WEIGHT_FOLDERS = ("data/weights", "data/constants")
_SOURCES = frozenset({".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".S"})
_METADATA = "_metadata.json"
_CONSTANT_SECTIONS = frozenset({b".lrodata", b".ldata"})
_NOBITS = 8
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, IndexError, EOFError, OverflowError, RuntimeError)
"""What reading a damaged archive, or a damaged library in it, may raise."""


class ArtefactError(ValueError):
    """A file that is not a whole compiled model; says what was wrong with which file, and what to do instead."""


@dataclass(frozen=True)
class ArtefactSizes:
    """Where the bytes of a compiled file are.

    Attributes:
        total: the file as it lies on the disk, compressed or not.
        weights: constants of the model (parameters, buffers, tables), not compressed. In a library that is not 64-bit
            ELF they cannot be told from the code, and count there.
        code: the rest of the library, debug symbols among it, not compressed.
        sources: generated C++ files and headers, not compressed.
        other: everything else in the archive, not compressed.
    """

    total: int
    weights: int
    code: int
    sources: int
    other: int


def slim(source: Path, target: Path) -> bool:
    """Write a smaller archive that computes the same, bit for bit, and loads in the same programs.

    Debug symbols and C++ sources are left out and the rest is compressed; entries that are not known are kept. Doing it
    twice gives the same bytes.

    Args:
        source: compiled model.
        target: file to write, which may be `source`; never seen half written.

    Returns:
        False if the library kept its symbols: there is no program ``strip``, or it cannot be used on this library.

    Raises:
        ArtefactError: `source` is not a whole compiled model, or there is no folder for `target`.
        OSError: the file cannot be written.
    """
    source, target = Path(source), Path(target)
    if not target.parent.is_dir():
        raise ArtefactError(f"{target}: the folder {target.parent} does not exist; make it, or name another.")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, _reading(source) as archive:
            library = _library(archive, source)
            code = archive.read(library)
            stripped = _strip(code)
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as result:
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
        # mkstemp makes files that only their owner can read.
        shutil.copymode(source, temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return stripped is not None


def sections(path: Path) -> ArtefactSizes:
    """Where the bytes of a compiled file are.

    Raises:
        ArtefactError: not a whole compiled model.
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
    """What a compiled file says of itself: cutoff, types, inputs, device, and ours, whose keys begin with ``gaq``.

    No code of the file is loaded.

    Raises:
        ArtefactError: not a whole compiled model, or one without metadata.
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
    """The archive, open; damage that shows while it is read becomes an `ArtefactError`."""
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
    """Name of the entry that torch would load."""
    found = []
    for name in archive.namelist():
        inner = PurePosixPath(_below_root(name))
        if str(inner.parent) == _MODEL_FOLDER and inner.suffix == ".so":
            found.append(name)
    if not found:
        raise ArtefactError(
            f"{path}: a zip archive without a compiled library, such as a package (.nequip.zip); compile the model "
            f"with {_COMPILE}."
        )
    # As torch does.
    return found[-1]


def _kept(name: str, library: str) -> bool | None:
    """True for an entry to keep, False for one whose name alone is needed, None for one to leave out."""
    stem = library.removesuffix(".so")
    if name == f"{stem}.cpp":
        return False
    if _is_source(name):
        return None
    beside = PurePosixPath(name).parent == PurePosixPath(library).parent
    # The kernels' copy; torch reads that of the last source in the archive.
    if beside and name.endswith(f".kernel{_METADATA}") and not stem.endswith(".kernel"):
        return None
    return True


def _strip(code: bytes) -> bytes | None:
    """The library without what only debuggers and linkers read; None if that cannot be done here."""
    program = shutil.which("strip")
    embedded, appended = _constants(code)
    # Very large constants follow the ELF file, where `strip` would cut them off; without any, nothing shows that they
    # came through.
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
    """The sections that hold the constants, and what is appended to the ELF file; both empty if it is not one."""
    # 64 bits, little-endian: all that AOTInductor makes for Linux.
    if code[:6] != b"\x7fELF\x02\x01":
        return (), b""
    offset, size, count, names = struct.unpack_from("<Q10xHHH", code, 40)
    headers = [struct.unpack_from("<IIQQQQ", code, offset + size * i) for i in range(count)]
    end = offset + size * count
    found = []
    for name, kind, _flags, _address, begin, length in headers:
        if kind == _NOBITS:
            continue
        end = max(end, begin + length)
        if end > len(code):
            raise zipfile.BadZipFile("the library in it is cut off")
        label = headers[names][4] + name
        if code[label : code.index(b"\0", label)] in _CONSTANT_SECTIONS:
            found.append(code[begin : begin + length])
    return tuple(found), code[end:]
