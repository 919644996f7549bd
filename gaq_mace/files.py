"""Packed model files: a `.model` that stock MACE loads, and a `.safetensors` that runs no code.

`gaq_mace.packed_pickle` and `gaq_mace.safetensors_file` describe the two forms. Both hold every parameter. If the
reader's MACE builds a model with other parameters, by name or shape, loading stops with an error that names them and
the MACE that wrote the file.
"""

from __future__ import annotations

import glob
import pickle
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path

import mace  # noqa: F401  (before e3nn)
import torch

from gaq.files.archive import deflate
from gaq.files.kinds import MACE_MLIAP, kind_of, new_name
from gaq.files.whole import written_whole
from gaq.model.state import FixedWeight, ModelFileError, StoredState, check_format
from gaq.process import alone, check_device, dtype_restored
from gaq.third_party_warnings import known_hidden
from gaq.untyped import Document
from gaq_mace.deferred import constructing, mark
from gaq_mace.names import PACKED
from gaq_mace.packed import WRITTEN, check_sites, take_apart, verify
from gaq_mace.root import is_quantized, restore
from gaq_mace.safetensors_file import load_safetensors, save_safetensors

__all__ = ["SUFFIXES", "compress_packed", "is_packed", "is_safetensors", "load", "restore_from_pickle", "save"]

SUFFIXES = (".model", ".safetensors")


def restore_from_pickle(model: torch.nn.Module, payload: Document) -> None:
    """Put the quantizers back at the end of unpickling.

    Args:
        model: with the dequantized weights.
        payload: what `gaq_mace.packed_pickle.reduce_packed` stored beside them.

    Raises:
        ModelFileError: if another MACE built the model, or the file was altered or is newer than this version.
    """
    meta = dict(payload["meta"])
    check_format(meta)
    verify(model, meta)
    weights = {name: FixedWeight(b, g, n, scale) for name, (b, g, n, scale) in payload["weights"].items()}
    restore(model, StoredState(meta, payload["ranges"], weights))
    check_sites(model, meta, payload["ranges"], complete=True)
    mark(model)


def is_packed(path: str | Path | None) -> bool:
    """Whether a file is a packed model; reads its pickle and runs nothing in it."""
    if path is None or not Path(path).is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return any(PACKED.encode() in archive.read(name) for name in pickles)


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is a model without code, by its content."""
    return Path(path).is_file() and kind_of(path).name == "safetensors"


def save(model: torch.nn.Module, path: str | Path) -> None:
    """Write a quantized model, packed.

    Args:
        model: a quantized model, in training or converted; the file holds rounded weights in either case.
        path: ``*.safetensors`` for the form that runs no code on load, ``*.model`` for the pickle that stock MACE
            loads. Nothing is left behind if writing fails.

    Raises:
        ValueError: if the model is not quantized, or the name ends otherwise.
        FileNotFoundError: if the folder does not exist.
    """
    if not is_quantized(model):
        raise ValueError("this model is not quantized: save it with torch.save, or quantize it first.")
    path = Path(path)
    suffix = new_name(path, SUFFIXES)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist.")
    with written_whole(path) as part:
        if suffix == ".safetensors":
            part.touch()
            mode = part.stat().st_mode
            save_safetensors(take_apart(model), part)
            part.chmod(mode)  # the library makes files that only their owner can read
        else:
            torch.save(model, part)
            deflate(part, part)


def _is_compressed(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_DEFLATED for entry in archive.infolist())


def compress_packed(folder: str | Path, name: str) -> None:
    """Compress the packed models that MACE's training command has written, as `save` does with its own.

    Args:
        folder: that holds them.
        name: of the run, with which the names of its files begin.
    """
    for path in Path(folder).glob(f"{glob.escape(name)}*.model"):
        if is_packed(path) and not _is_compressed(path):
            with written_whole(path) as part:
                deflate(path, part)


def _check_archive(path: Path) -> None:
    """Check the checksums of an archive's entries: torch.load does not, and the digest covers weights only.

    Raises:
        ModelFileError: naming an entry that was changed.
    """
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise ModelFileError(f"damaged: the entry {bad} does not match its checksum. Quantize the float model again.")


# What pickle, torch and the constructors raise for a file that is damaged or of another kind.
_UNREADABLE = (
    zlib.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    AttributeError,
    ImportError,
    AssertionError,
    TypeError,
    ValueError,
)


def load(path: str | Path, device: str = "cpu", exports: bool = False) -> torch.nn.Module:
    """Load a MACE model, stock or quantized, from a ``.model`` or ``.safetensors`` file of any name.

    A ``.model`` is a pickle: loading it runs the code in it. Use safetensors for files from strangers.

    Args:
        path: the file.
        device: device to load it to.
        exports: whether to read also the model in a file for ML-IAP, which is for looking at: in LAMMPS's form of it
            some attributes differ.

    Raises:
        ModelFileError: for a file that is missing, truncated, altered, of another kind, or written by a
            later version.
        ValueError: for a device that is not there.
    """
    check_device(device)
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors" or is_safetensors(path):
            return load_safetensors(path).to(device)
        packed = is_packed(path)
        if packed:
            _check_archive(path)
        # A packed pickle sets dtype and random state and puts them back, except where MACE's constructor raises.
        with ExitStack() as stack:
            stack.enter_context(dtype_restored())
            stack.enter_context(alone())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(known_hidden())
            if packed:
                stack.enter_context(constructing())
            model = torch.load(path, map_location=device, weights_only=False)
            if (payload := getattr(model, "__dict__", {}).pop(PACKED, None)) is not None:
                restore_from_pickle(model, payload)  # the hook has not done so: it is not installed
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, AssertionError) and reason.startswith(WRITTEN):
            # A packed pickle checks its parameters itself.
            raise ModelFileError(f"{path}: {reason}") from error
        raise ModelFileError(f"{path}: truncated, damaged, or not a MACE model ({reason}).") from error
    if type(model).__name__ == "LAMMPS_MLIAP_MACE":
        if not exports:
            raise ModelFileError(f"{path}: {MACE_MLIAP.words}; give the .model file that it was made from.")
        model = model.model.model
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelFileError(
            f"{path}: a compiled (TorchScript) model; give the .model file that mace_run_train writes beside it."
        )
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "interactions"):
        raise ModelFileError(f"{path}: holds a {type(model).__name__}, not a MACE model.")
    return model.to(device)
