"""Packed model files: a `.model` that stock MACE loads, and a `.safetensors` that runs no code.

A stock `.model` is a pickle of the whole module: dense Clebsch-Gordan buffers, TorchScript archives and
float weights. A packed one is a pickle of *how to build it*: the constructor of `ScaleShiftMACE` with its
configuration, then ``load_state_dict`` with weights computed as ``codes * scale``. Every callable in it
belongs to Python, torch, e3nn or MACE, so it loads where this package is not installed, as the plain MACE
model that holds the dequantized weights. Where it is installed, the state set at the end of the pickle
(see `gaq_mace.hook.patches`) puts the activation quantizers back. A model with the interaction block of
`gaq_mace.attention` is the exception: the constructor names that block, so it loads only with this package.

Both forms hold every parameter. A reader whose MACE builds a model with other parameters, by name or shape, gets an
error that names them and the MACE that wrote the file; with this package installed and without.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib
import json
import operator
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from e3nn import o3
from mace.modules import gate_dict, interaction_classes, readout_classes
from mace.modules import models as mace_models
from mace.tools.scripts_utils import extract_config_mace_model
from torch import Tensor

from gaq.files.archive import deflate
from gaq.files.packing import pack, packed_bytes, unpack
from gaq.model.state import StoredState, check_format
from gaq.process import default_dtype
from gaq.quantizers.weights import QuantizedTensor, WeightLayout, dequantize
from gaq.third_party_warnings import known_hidden
from gaq_mace.layers import original_type
from gaq_mace.model import (
    FixedWeight,
    ModelFileError,
    _layouts,
    feature_quantizers,
    is_quantized,
    meta_of,
    quantized_weights,
    restore,
    weight_quantizers,
)

__all__ = ["ModelFileError", "load", "reduce_packed", "reduce_stock", "restore_from_pickle", "save"]

STATE_KEY = "gaq_packed"
"""Attribute under which a packed pickle hands its state to the model it has built."""


class Call:
    """Pickles as ``function(*arguments)``: the result, not this object, is what a reader gets.

    One object that occurs twice is called once.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def _method(name: str, *arguments: Any) -> operator.methodcaller:
    return operator.methodcaller(name, *arguments)


def model_config(model: torch.nn.Module) -> dict[str, Any]:
    """Constructor arguments of a MACE model, with arrays as lists and irreps as text.

    Raises:
        ModelFileError: if the interactions differ in a number the constructor takes only once.
    """
    config = extract_config_mace_model(model)
    if "error" in config:
        raise ModelFileError(str(config["error"]))
    neighbors = {float(block.avg_num_neighbors) for block in model.interactions}  # type: ignore[union-attr]
    if len(neighbors) > 1:
        raise ModelFileError(f"the interactions differ in avg_num_neighbors ({sorted(neighbors)}); cannot be packed.")
    for key in ("cueq_config", "oeq_config"):
        config.pop(key, None)
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("interaction_cls", "interaction_cls_first"):
            value = original_type(value)
        if isinstance(value, np.ndarray | Tensor):
            value = value.tolist()
        elif isinstance(value, np.generic):
            value = value.item()
        plain[key] = value
    plain["avg_num_neighbors"] = float(plain["avg_num_neighbors"])
    return plain


def build(config: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """A plain MACE model of a configuration, leaving the global dtype and random state as they are."""
    with torch.random.fork_rng(devices=[]), default_dtype(dtype), known_hidden():
        return mace_models.ScaleShiftMACE(**config)


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


@dataclass
class Packed:
    """A quantized model taken apart.

    Attributes:
        meta: plain data: versions, configuration, digest.
        config: constructor arguments.
        dtype: of the model.
        quantized: codes and scales by parameter name.
        plain: every other parameter, and the buffers that the constructor does not make by itself.
        ranges: observed sizes by site name.
        ratios: range ratios of the weights of a model in training.
    """

    meta: dict[str, Any]
    config: dict[str, Any]
    dtype: torch.dtype
    quantized: dict[str, QuantizedTensor]
    plain: dict[str, Tensor]
    ranges: dict[str, Tensor]
    ratios: dict[str, Tensor]


def digest(state: dict[str, Tensor]) -> str:
    """A checksum of all tensors that are not derived from the configuration."""
    summary = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        data = tensor.float() if tensor.is_floating_point() else tensor
        summary.update(name.encode())
        summary.update(data.contiguous().numpy().tobytes())
    return summary.hexdigest()


@dataclass(frozen=True)
class Constructed:
    """What the constructor of MACE makes of a configuration, without the values of parameters.

    Attributes:
        parameters: names and shapes, as `described` gives them.
        buffers: checksums by name.
    """

    parameters: frozenset[str]
    buffers: dict[str, str]


@functools.lru_cache(maxsize=8)
def constructed(key: bytes) -> Constructed:
    """Build a plain model and describe it. Slow (a second model), so once a configuration.

    Args:
        key: configuration and dtype, pickled.
    """
    config, dtype = pickle.loads(key)
    model = build(config, dtype)
    parameters = dict(model.named_parameters())
    state = model.state_dict()
    buffers = {name: _checksum(tensor) for name, tensor in state.items() if name not in parameters}
    return Constructed(frozenset(described(parameters)), buffers)


def _checksum(tensor: Tensor) -> str:
    """Of one tensor, to the last bit."""
    data = tensor.detach().cpu().contiguous()
    summary = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    summary.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return summary.hexdigest()


def described(tensors: Mapping[str, Tensor]) -> set[str]:
    """Names with shapes: ``"readouts.0.linear.weight (128,)"``."""
    return {f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()}


def take_apart(model: torch.nn.Module) -> Packed:
    """What a file of this model has to hold.

    A file leaves out the buffers that MACE's constructor makes by itself, Clebsch-Gordan tables above all. Which those
    are is known from a second model, built of the configuration (once for each, see `constructed`).

    Raises:
        ModelFileError: if the constructor would not make a model with these parameters, so that the file could not be
            loaded again.
    """
    config = model_config(model)
    dtype = _dtype(model)
    quantized = quantized_weights(model)
    parameters = dict(model.named_parameters())
    made = constructed(pickle.dumps((config, dtype)))
    if differing := made.parameters ^ described(parameters):
        raise ModelFileError(
            f"{', '.join(sorted(differing))}: not what MACE builds of this model's configuration, so a packed file of "
            "it could not be loaded again. Save a model whose modules are MACE's own."
        )
    plain = {}
    for name, tensor in model.state_dict().items():
        if name == "_extra_state" or name in quantized:
            continue
        value = tensor.detach().cpu()
        if name in parameters or made.buffers.get(name) != _checksum(value):
            plain[name] = value.clone()
    meta = meta_of(model)
    # Packing rounds the weights: whoever reads the file gets a converted model.
    meta["status"] = "converted"
    weights = {name: q.dequantize() for name, q in quantized.items()}
    stored = {**weights, **{k: v for k, v in plain.items() if k in parameters}}
    meta["digest"] = digest(stored)
    meta["checked"] = sorted(stored)
    ranges = {name: q.ranges() for name, q in feature_quantizers(model).items()}
    ratios = {name: q.range_ratio.detach().cpu() for name, q in weight_quantizers(model).items()}
    return Packed(meta, config, dtype, quantized, plain, ranges, ratios)


_WRITTEN = "this file was written with"


def _other_mace(meta: Mapping[str, Any]) -> str:
    """The error for a reader with another MACE; braces for what only the file has, and for what only the model has."""
    writer = str(meta.get("mace", "of an unknown version"))
    return (
        f"{_WRITTEN} mace-torch {writer} (torch {meta.get('torch', '?')}, gaq {meta.get('gaq', '?')}), and the mace "
        "installed here builds this model with other tensors. In the file only: {}. In the model only: {}. "
        f"Install the version that wrote the file (pip install mace-torch=={writer}) and load it there."
    )


def check_parameters(model: torch.nn.Module, stored: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Refuse to load tensors into a model that has other parameters.

    Args:
        model: as MACE has built it.
        stored: every parameter, and some buffers, by name.
        meta: of the file.

    Raises:
        ModelFileError: naming the tensors that differ and the MACE that wrote the file.
    """
    missing = described(dict(model.named_parameters())) - described(stored)
    unknown = described(stored) - described(model.state_dict())
    if missing or unknown:
        raise ModelFileError(_other_mace(meta).format(sorted(unknown), sorted(missing)))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = []
    size = 1
    for n in reversed(shape):
        strides.append(size)
        size *= n
    return tuple(reversed(strides))


class _Pool:
    """One byte buffer of codes of one width, and the expression that turns it into integers."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.parts: list[Tensor] = []
        self.length = 0

    def add(self, codes: Tensor) -> int:
        offset = self.length
        self.parts.append(codes.reshape(-1))
        self.length += codes.numel()
        return offset

    def expression(self) -> Any:
        """Integers as the reader will compute them, from bytes and stock functions only."""
        codes = torch.cat(self.parts)
        if self.bits == 4:
            return Call(operator.sub, Call(operator.xor, _nibbles(pack(codes, 4)), 8), 8)
        if self.bits == 12:
            # The last four bits of a code are noise, the rest is not: apart, the latter can be compressed.
            codes = torch.cat((codes, codes.new_zeros(self.length % 2)))
            fours = _nibbles(pack(((codes & 15) ^ 8) - 8, 4))
            high = Call(_method("short"), (codes >> 4).to(torch.int8))
            return Call(operator.add, Call(operator.mul, high, 16), Call(_method("short"), fours))
        data = pack(codes, self.bits)
        planes = data.view(torch.int8)
        if self.bits == 8:
            return planes
        high = Call(_method("short"), planes[: self.length].clone())
        return Call(operator.add, Call(operator.mul, high, 256), planes[self.length :].clone())


def _nibbles(data: Tensor) -> Any:
    """The expression that gives the four-bit halves of bytes, low ones first, from 0 to 15."""
    halves = (Call(operator.and_, data, 15), Call(operator.rshift, data, 4))
    return Call(_method("char"), Call(_method("flatten"), Call(torch.stack, halves, 1)))


_POOLS = (4, 8, 12, 16)


def _pool_bits(bits: int) -> int:
    return next(n for n in _POOLS if bits <= n)


def reduce_packed(model: torch.nn.Module) -> tuple[Any, ...]:
    """The value of ``__reduce_ex__`` that stores a quantized model packed."""
    packed = take_apart(model)
    pools = {bits: _Pool(bits) for bits in _POOLS}
    scales: dict[torch.dtype, list[Tensor]] = {torch.bfloat16: [], torch.float32: []}
    placed: dict[str, tuple[int, int, torch.dtype, int]] = {}
    for name, tensor in packed.quantized.items():
        bits = _pool_bits(tensor.bits)
        kind = torch.bfloat16 if torch.equal(tensor.scale, tensor.scale.bfloat16().float()) else torch.float32
        start = sum(t.numel() for t in scales[kind])
        scales[kind].append(tensor.scale.to(kind))
        placed[name] = (bits, pools[bits].add(tensor.codes), kind, start)
    codes = {bits: pool.expression() for bits, pool in pools.items() if pool.length}
    scale = {kind: Call(_method("float"), torch.cat(parts)) for kind, parts in scales.items() if parts}

    state: dict[str, Any] = {}
    fixed: dict[str, tuple[Any, ...]] = {}
    for name, tensor in packed.quantized.items():
        bits, offset, kind, start = placed[name]
        pieces = []
        for segment in tensor.layout.segments(tensor.granularity, tensor.group_size):
            integers = Call(
                _method("as_strided", segment.shape, _strides(segment.shape), offset + segment.offset), codes[bits]
            )
            step_shape = segment.scale_shape
            if len(step_shape) == 1 and len(segment.shape) > 1:
                step_shape = (1,) * len(segment.shape)
            step = Call(
                _method("as_strided", step_shape, _strides(step_shape), start + segment.scale_offset), scale[kind]
            )
            pieces.append(Call(_method("flatten"), Call(operator.mul, integers, step)))
        flat = pieces[0] if len(pieces) == 1 else Call(torch.cat, pieces)
        state[name] = Call(_method("view", tuple(tensor.codes.shape)), flat)
        own = Call(_method("narrow", 0, start, tensor.scale.numel()), scale[kind])
        fixed[name] = (tensor.bits, tensor.granularity, tensor.group_size, own)
    state.update(packed.plain)

    arguments = {
        key: Call(o3.Irreps, str(value)) if isinstance(value, o3.Irreps) else value
        for key, value in packed.config.items()
    }
    # In this order: the model is made in its own dtype, and the reader's dtype and random numbers are
    # put back afterwards.
    before_dtype = Call(torch.get_default_dtype)
    before_random = Call(torch.get_rng_state)
    constructor = functools.partial(mace_models.ScaleShiftMACE, **arguments)  # type: ignore[arg-type]
    made = Call(constructor)
    own = Call(_method("state_dict"), made)
    steps = (
        before_dtype,
        before_random,
        Call(torch.set_default_dtype, packed.dtype),
        made,
        Call(torch.set_default_dtype, before_dtype),
        Call(torch.set_rng_state, before_random),
        _parameters_checked(made, own, state, packed.meta),
        # The constructor's own buffers stay; of the parameters every one is in the file by now.
        Call(torch.nn.Module.load_state_dict, made, Call(operator.or_, own, state)),
    )
    payload = {"meta": packed.meta, "ranges": packed.ranges, "weights": fixed}
    return operator.itemgetter(3), (steps,), {STATE_KEY: payload}


def _parameters_checked(made: Call, own: Call, state: dict[str, Any], meta: dict[str, Any]) -> Call:
    """`check_parameters` as the reader will compute it, from stock functions only.

    Args:
        made: the model as MACE has built it.
        own: its state.
        state: what the file holds.
        meta: of the file.
    """

    def texts(names: Any, tensors: Any) -> Call:
        shapes = Call(map, tuple, Call(map, operator.attrgetter("shape"), tensors))
        return Call(set, Call(map, "{} {}".format, names, shapes))

    names = Call(map, operator.itemgetter(0), Call(_method("named_parameters"), made))
    parameters = texts(names, Call(_method("parameters"), made))
    stored = texts(Call(_method("keys"), state), Call(_method("values"), state))
    model = texts(Call(_method("keys"), own), Call(_method("values"), own))
    unknown, missing = Call(operator.sub, stored, model), Call(operator.sub, parameters, stored)
    message = Call(_other_mace(meta).format, Call(sorted, unknown), Call(sorted, missing))
    count = Call(len, Call(operator.or_, unknown, missing))
    # Through the module, whose public name this is; the function pickles as that of a private one.
    comparison = operator.methodcaller("assert_close", count, 0, msg=message)
    return Call(comparison, Call(importlib.import_module, "torch.testing"))


def reduce_stock(model: torch.nn.Module, stock: type) -> tuple[Any, ...]:
    """The value of ``__reduce_ex__`` of a model that is not quantized: that of the stock class."""
    import copyreg

    return copyreg.__newobj__, (stock,), model.__dict__  # type: ignore[attr-defined]


def verify(model: torch.nn.Module, meta: dict[str, Any]) -> None:
    """Check the parameters of a model against the names and the checksum stored with it.

    Raises:
        ModelFileError: if they differ: another MACE built the model, or the file was altered or damaged.
    """
    state = model.state_dict()
    names, checked = {name for name, _ in model.named_parameters()}, set(meta["checked"])
    if names != checked:
        raise ModelFileError(_other_mace(meta).format(sorted(checked - names), sorted(names - checked)))
    if digest({name: state[name] for name in checked}) != meta["digest"]:
        raise ModelFileError(
            "the weights in this file do not match the checksum stored with them: it was altered or damaged. "
            "Quantize the float model again."
        )


def check_sites(model: torch.nn.Module, meta: Mapping[str, Any], ranges: Mapping[str, Tensor], complete: bool) -> None:
    """Refuse ranges of activations that belong to no site of a restored model, and sites without theirs.

    Args:
        model: restored.
        meta: of the file.
        ranges: by site name.
        complete: whether the file holds the ranges of all sites, and not only those that were observed.

    Raises:
        ModelFileError: naming the sites that differ and the MACE that wrote the file.
    """
    sites = set(feature_quantizers(model))
    unknown, missing = set(ranges) - sites, sites - set(ranges) if complete else set()
    if unknown or missing:
        raise ModelFileError(_other_mace(meta).format(sorted(unknown), sorted(missing)))


def restore_from_pickle(model: torch.nn.Module, payload: dict[str, Any]) -> None:
    """Called at the end of unpickling where this package is installed: put the quantizers back."""
    meta = dict(payload["meta"])
    check_format(meta)
    verify(model, meta)
    weights = {name: FixedWeight(b, g, n, scale) for name, (b, g, n, scale) in payload["weights"].items()}
    restore(model, StoredState(meta, payload["ranges"], weights))
    check_sites(model, meta, payload["ranges"], complete=True)


def save(model: torch.nn.Module, path: str | Path) -> None:
    """Write a quantized model, packed.

    Args:
        model: a quantized model, in training or converted (the file always holds rounded weights).
        path: ``*.safetensors`` for the form that runs no code on load, anything else for the pickle that
            stock MACE loads. Nothing is left behind if writing fails.

    Raises:
        ValueError: if the model is not quantized.
        FileNotFoundError: if the folder does not exist.
    """
    if not is_quantized(model):
        raise ValueError("this model is not quantized: save it with torch.save, or quantize it first.")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist.")
    part = path.with_name(path.name + ".part")
    try:
        if path.suffix == ".safetensors":
            _save_safetensors(take_apart(model), part)
        else:
            torch.save(model, part)
            deflate(part, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_compressed(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_DEFLATED for entry in archive.infolist())


def compress_packed(folder: str | Path, name: str) -> None:
    """Compress the packed models that MACE's training command has written, as `save` does with its own.

    Args:
        folder: where they lie.
        name: that their names begin with.
    """
    from gaq_mace.hook.patches import is_packed

    for path in Path(folder).glob(f"{glob.escape(name)}*.model"):
        if is_packed(str(path)) and not _is_compressed(path):
            part = path.with_name(path.name + ".part")
            try:
                deflate(path, part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)


_NAMES: dict[str, dict[str, Any]] = {
    "interaction_cls": interaction_classes,
    "interaction_cls_first": interaction_classes,
    "readout_cls": readout_classes,
    "gate": gate_dict,
}


def _config_to_json(config: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key in _NAMES and value is not None:
            names = [name for name, known in _NAMES[key].items() if known is value]
            if not names:
                raise ModelFileError(f"{key} {value!r} is not one of MACE's own, so it cannot be stored by name.")
            value = names[0]
        elif isinstance(value, o3.Irreps):
            value = {"irreps": str(value)}
        plain[key] = value
    return plain


def _config_from_json(plain: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for key, value in plain.items():
        if key in _NAMES and value is not None:
            if value not in _NAMES[key]:
                raise ModelFileError(
                    f"{key}: this MACE does not know {value!r}; install the version that wrote the file."
                )
            value = _NAMES[key][value]
        elif isinstance(value, dict) and set(value) == {"irreps"}:
            value = o3.Irreps(value["irreps"])
        config[key] = value
    return config


def _save_safetensors(packed: Packed, path: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {f"plain:{name}": t.contiguous() for name, t in packed.plain.items()}
    table = {}
    # All in two tensors, in the order of the table: an entry each would make the header as large as some models.
    for name, q in packed.quantized.items():
        table[name] = [q.bits, q.granularity, q.group_size, list(q.codes.shape)]
    tensors["codes"] = torch.cat([pack(q.codes, q.bits) for q in packed.quantized.values()])
    tensors["scales"] = torch.cat([q.scale.to(torch.bfloat16) for q in packed.quantized.values()])
    # Ranges of the atom's own were never observed, and are not stored.
    tensors.update({f"range:{name}": t for name, t in packed.ranges.items() if bool(t.any())})
    header = {
        "meta": {key: value for key, value in packed.meta.items() if key != "checked"},
        "config": _config_to_json(packed.config),
        "dtype": str(packed.dtype).removeprefix("torch."),
        "weights": table,
    }
    save_file(tensors, path, metadata={"gaq": json.dumps(header)})


def _load_safetensors(path: Path) -> torch.nn.Module:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"truncated, or not a safetensors file ({error}).") from error
    if "gaq" not in metadata:
        raise ModelFileError("a safetensors file, but not one written by gaq.")
    header = json.loads(metadata["gaq"])
    check_format(header["meta"])
    if int(header["meta"].get("format", 0)) < 2:
        raise ModelFileError("a form of before format 2, with a tensor a weight; quantize the float model again.")
    model = build(_config_from_json(header["config"]), getattr(torch, header["dtype"]))
    state = {key.removeprefix("plain:"): t for key, t in tensors.items() if key.startswith("plain:")}
    shapes = {name: torch.empty(shape, device="meta") for name, (*_, shape) in header["weights"].items()}
    check_parameters(model, {**state, **shapes}, header["meta"])
    layouts = _layouts(model)
    parameters = {name for name, _ in model.named_parameters()}
    header["meta"]["checked"] = sorted(parameters)
    weights = {}
    begin = first = 0
    for name, (bits, granularity, group_size, shape) in header["weights"].items():
        layout: WeightLayout = layouts[name]
        end = begin + packed_bytes(layout.numel, bits)
        last = first + layout.scales(granularity, group_size)
        codes = unpack(tensors["codes"][begin:end], bits, shape)
        scale = tensors["scales"][first:last].float()
        begin, first = end, last
        state[name] = dequantize(codes, scale, layout.scale_index(granularity, group_size))
        weights[name] = FixedWeight(bits, granularity, group_size, scale)
    # The constructor's own buffers stay.
    model.load_state_dict({**model.state_dict(), **state})
    verify(model, header["meta"])
    ranges = {key.removeprefix("range:"): t for key, t in tensors.items() if key.startswith("range:")}
    restore(model, StoredState(header["meta"], ranges, weights))
    check_sites(model, header["meta"], ranges, complete=False)
    return model


def _check_device(device: str) -> None:
    """A missing device is the user's to mend, not a damaged file."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known to torch; use cpu or cuda.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this torch finds no CUDA device; use cpu.")


def _check_archive(path: Path) -> None:
    """torch.load does not look at the checksums of an archive's entries, and the digest covers weights only."""
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise ModelFileError(f"damaged: the entry {bad} does not match its checksum. Quantize the float model again.")


# What a damaged file, or one of another kind, makes pickle, torch and the constructors raise.
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


def load(path: str | Path, device: str = "cpu") -> torch.nn.Module:
    """Load a MACE model, stock or quantized, from a ``.model`` or ``.safetensors`` file.

    A ``.model`` is a pickle: loading one runs what is in it. Use safetensors for files from strangers.

    Raises:
        ModelFileError: for a file that is missing, truncated, altered, of another kind, or written by a
            later version.
        ValueError: for a device that is not there.
    """
    from gaq_mace.hook.patches import ensure_installed, is_packed

    ensure_installed()
    _check_device(device)
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path).to(device)
        if is_packed(str(path)):
            _check_archive(path)
        # A packed pickle sets both and puts them back, but where MACE's constructor raises.
        with torch.random.fork_rng(devices=[]), default_dtype(torch.get_default_dtype()), known_hidden():
            model = torch.load(path, map_location=device, weights_only=False)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, AssertionError) and first.startswith(_WRITTEN):
            # A packed pickle checks its parameters itself (see `_parameters_checked`).
            raise ModelFileError(f"{path}: {first}") from error
        raise ModelFileError(f"{path}: truncated, damaged, or not a MACE model ({first}).") from error
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelFileError(
            f"{path}: a compiled (TorchScript) model; give the .model file that mace_run_train writes beside it."
        )
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "interactions"):
        raise ModelFileError(f"{path}: holds a {type(model).__name__}, not a MACE model.")
    return model.to(device)
