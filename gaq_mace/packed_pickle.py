"""A quantized model as a pickle that stock MACE loads.

A stock `.model` is a pickle of the complete module: dense Clebsch-Gordan buffers, TorchScript archives and float
weights. A packed one is a pickle of *how to build it*: the constructor of `ScaleShiftMACE` with its configuration, then
``load_state_dict`` with weights computed as ``codes * scale``. Every function in it belongs to Python, torch, e3nn or
MACE. So it loads where this package is not installed, as the plain MACE model with the dequantized weights. Where this
package is installed, ``MACE.__setstate__`` (see `gaq_mace.hook.patches`) puts the quantizers of the activations back.
The exception is a model with the interaction block of `gaq_mace.attention`: its constructor names that block, so it
loads only with this package.

The file holds every parameter. If the reader's MACE builds a model with other parameters, by name or shape, loading
stops with an error that names them and the MACE that wrote the file, with this package installed or without. Before
that the reader computes a checksum of everything that the model is built of; where it is not the stored one, nothing is
built.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import json
import operator
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from mace.modules import models as mace_models
from torch import Tensor

from gaq.files.packing import pack
from gaq.quantizers.weights import QuantizedTensor
from gaq.untyped import Document
from gaq_mace.names import CONSTRUCTOR, PACKED
from gaq_mace.packed import Packed, other_mace, take_apart

__all__ = ["reduce_packed", "reduce_stock"]


class Call:
    """Pickles as ``function(*arguments)``: the reader gets the result, not this object.

    An object that occurs twice in a pickle is called once.
    """

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function = function
        self.arguments = arguments

    def __call__(self, *arguments: object, **options: object) -> object:
        raise TypeError("a call is made by the reader of the pickle; it can be called so that a partial may hold it")

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


def _method(name: str, *arguments: object) -> operator.methodcaller:
    return operator.methodcaller(name, *arguments)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = []
    size = 1
    for n in reversed(shape):
        strides.append(size)
        size *= n
    return tuple(reversed(strides))


class _Pool:
    """The codes of one width of all weights, and the expression that turns their bytes into integers."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.parts: list[Tensor] = []
        self.length = 0

    def add(self, codes: Tensor) -> int:
        """Append the codes of a weight; returns where they begin, in elements."""
        offset = self.length
        self.parts.append(codes.reshape(-1))
        self.length += codes.numel()
        return offset

    def expression(self) -> Call | Tensor:
        """The integers, as the reader computes them from bytes with stock functions only."""
        codes = torch.cat(self.parts)
        if self.bits == 4:
            return Call(operator.sub, Call(operator.xor, _nibbles(pack(codes, 4)), 8), 8)
        if self.bits == 12:
            # The last four bits of a code are noise, the others are not: stored apart, the others can be compressed.
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


def _nibbles(data: Tensor) -> Call:
    """The expression for the four-bit halves of bytes, from 0 to 15, the low half first."""
    halves = (Call(operator.and_, data, 15), Call(operator.rshift, data, 4))
    return Call(_method("char"), Call(_method("flatten"), Call(torch.stack, halves, 1)))


_POOLS = (4, 8, 12, 16)


def _pool_bits(bits: int) -> int:
    return next(n for n in _POOLS if bits <= n)


class _Place(NamedTuple):
    """Where the codes and scales of a weight lie: width of the pool, first code, dtype of the scales, first scale."""

    bits: int
    code: int
    dtype: torch.dtype
    scale: int


def _pooled(
    quantized: Mapping[str, QuantizedTensor],
) -> tuple[dict[str, _Place], dict[int, Call | Tensor], dict[torch.dtype, Call]]:
    """All codes in a buffer for each width, and all scales in a buffer for each dtype.

    Returns:
        The place of each weight by name, the expressions for the codes by width, and those for the scales by dtype.
    """
    pools = {bits: _Pool(bits) for bits in _POOLS}
    scales: dict[torch.dtype, list[Tensor]] = {torch.bfloat16: [], torch.float32: []}
    places = {}
    for name, tensor in quantized.items():
        bits = _pool_bits(tensor.bits)
        dtype = torch.bfloat16 if torch.equal(tensor.scale, tensor.scale.bfloat16().float()) else torch.float32
        first_scale = sum(t.numel() for t in scales[dtype])
        scales[dtype].append(tensor.scale.to(dtype))
        places[name] = _Place(bits, pools[bits].add(tensor.codes), dtype, first_scale)
    codes = {bits: pool.expression() for bits, pool in pools.items() if pool.length}
    steps = {dtype: Call(_method("float"), torch.cat(parts)) for dtype, parts in scales.items() if parts}
    return places, codes, steps


def _dequantized(tensor: QuantizedTensor, place: _Place, codes: Call | Tensor, scales: Call) -> Call:
    """The expression for a weight: ``codes * scale`` of each of its segments, in the shape of the weight."""
    pieces = []
    for segment in tensor.layout.segments(tensor.granularity, tensor.group_size):
        integers = Call(
            _method("as_strided", segment.shape, _strides(segment.shape), place.code + segment.offset), codes
        )
        step_shape = segment.scale_shape
        if len(step_shape) == 1 and len(segment.shape) > 1:
            step_shape = (1,) * len(segment.shape)
        step = Call(_method("as_strided", step_shape, _strides(step_shape), place.scale + segment.scale_offset), scales)
        pieces.append(Call(_method("flatten"), Call(operator.mul, integers, step)))
    flat = pieces[0] if len(pieces) == 1 else Call(torch.cat, pieces)
    return Call(_method("view", tuple(tensor.codes.shape)), flat)


def reduce_packed(model: torch.nn.Module) -> tuple[object, ...]:
    """The value of ``__reduce_ex__`` that stores a quantized model packed."""
    packed = take_apart(model)
    places, codes, scales = _pooled(packed.quantized)
    state: Document = {}
    fixed: dict[str, tuple[object, ...]] = {}
    for name, tensor in packed.quantized.items():
        place = places[name]
        state[name] = _dequantized(tensor, place, codes[place.bits], scales[place.dtype])
        scale = Call(_method("narrow", 0, place.scale, tensor.scale.numel()), scales[place.dtype])
        fixed[name] = (tensor.bits, tensor.granularity, tensor.group_size, scale)
    state.update(packed.plain)

    arguments = {
        key: Call(o3.Irreps, str(value)) if isinstance(value, o3.Irreps) else value
        for key, value in packed.config.items()
    }
    # In this order: the model is made in its own dtype, and then the reader's dtype and random numbers are put back.
    reader_dtype = Call(torch.get_default_dtype)
    reader_random = Call(torch.get_rng_state)
    payload = {"meta": packed.meta, "ranges": packed.ranges, "weights": fixed}
    # With this package the reader's MACE has a constructor that leaves the compilation of generated code for later.
    models = Call(importlib.import_module, mace_models.__name__)
    constructor = Call(getattr, models, CONSTRUCTOR, mace_models.ScaleShiftMACE)
    construct = functools.partial(constructor, **arguments)
    built = Call(construct)
    built_state = Call(_method("state_dict"), built)
    steps = (
        _contents_checked(construct, state, payload, packed),
        reader_dtype,
        reader_random,
        Call(torch.set_default_dtype, packed.dtype),
        built,
        Call(torch.set_default_dtype, reader_dtype),
        Call(torch.set_rng_state, reader_random),
        _parameters_checked(built, built_state, state, packed.meta),
        # The buffers that the constructor makes stay; every parameter is in the file by now.
        Call(torch.nn.Module.load_state_dict, built, Call(operator.or_, built_state, state)),
    )
    return operator.itemgetter(steps.index(built)), (steps,), {PACKED: payload}


def _contents_checked(construct: functools.partial[object], state: Document, payload: Document, packed: Packed) -> Call:
    """The reader's check that a file holds what was written, with stock functions only.

    A pickle has no checksum of its own, and torch does not look at those of its archive. What is checked are the
    results: weights after dequantization, so that a changed place of a weight among the codes is found as well.

    Args:
        construct: the constructor with its arguments.
        state: the tensors in the file, by name.
        payload: what this package needs beside them.
        packed: the contents.
    """
    # By value only: functions and classes have no text that is the same for every reader, and damage to their names
    # does not load.
    plain = sorted(
        k for k, v in packed.config.items() if isinstance(v, str | int | float | list | dict | o3.Irreps | None)
    )
    arguments = Call(operator.itemgetter(*plain), Call(operator.attrgetter("keywords"), construct))
    widths = Call(map, operator.itemgetter(0, 1, 2), Call(_method("values"), payload["weights"]))
    # JSON, because the text of a NumPy number depends on NumPy's version.
    facts = Call(json.dumps, (arguments, Call(list, widths), payload["meta"]))
    found = Call(zlib.crc32, Call(_method("encode"), facts))
    for tensor in (*state.values(), *payload["ranges"].values()):
        found = Call(zlib.crc32, Call(_method("tobytes"), Call(_method("numpy"), tensor)), found)

    values = [q.dequantize() if (q := packed.quantized.get(name)) else t for name, t in state.items()]
    expected = zlib.crc32(
        json.dumps(
            (
                tuple(packed.config[name] for name in plain),
                [(q.bits, q.granularity, q.group_size) for q in packed.quantized.values()],
                packed.meta,
            )
        ).encode()
    )
    for tensor in (*values, *packed.ranges.values()):
        expected = zlib.crc32(tensor.numpy().tobytes(), expected)
    return _equal(found, expected, DAMAGED)


DAMAGED = (
    "the contents of this file do not match the checksum stored with them: it was altered or damaged. Get it again, or "
    "quantize the float model again."
)


def _equal(found: Call, expected: int, message: str | Call) -> Call:
    """Stops the reader with a message where a number is not what it should be."""
    # Through the module: the function itself would be pickled by the name of a private module.
    comparison = operator.methodcaller("assert_close", found, expected, rtol=0, atol=0, msg=message)
    return Call(comparison, Call(importlib.import_module, "torch.testing"))


def _parameters_checked(built: Call, built_state: Call, state: Document, meta: Document) -> Call:
    """`gaq_mace.packed.check_parameters` as the reader computes it, with stock functions only.

    Args:
        built: the model as the reader's MACE builds it.
        built_state: its state dict.
        state: the tensors in the file, by name.
        meta: of the file.
    """

    def texts(names: Call, tensors: Call) -> Call:
        shapes = Call(map, tuple, Call(map, operator.attrgetter("shape"), tensors))
        return Call(set, Call(map, "{} {}".format, names, shapes))

    names = Call(map, operator.itemgetter(0), Call(_method("named_parameters"), built))
    parameters = texts(names, Call(_method("parameters"), built))
    stored = texts(Call(_method("keys"), state), Call(_method("values"), state))
    model = texts(Call(_method("keys"), built_state), Call(_method("values"), built_state))
    unknown, missing = Call(operator.sub, stored, model), Call(operator.sub, parameters, stored)
    message = Call(other_mace(meta).format, Call(sorted, unknown), Call(sorted, missing))
    return _equal(Call(len, Call(operator.or_, unknown, missing)), 0, message)


def reduce_stock(stock: type, entries: Document) -> tuple[object, ...]:
    """The value of ``__reduce_ex__`` that stores a model as one of MACE's own class.

    Args:
        stock: MACE's own class.
        entries: of the model's ``__dict__`` that the file is to hold.
    """
    # Not by copyreg.__newobj__, with which pickle insists on the class of the object itself.
    # Private, but what pickle itself uses for protocols below 2.
    return copyreg._reconstructor, (stock, object, None), entries  # type: ignore[attr-defined]  # private, and what every pickle calls
