"""A quantized model as a pickle that stock MACE loads.

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

import copyreg
import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from mace.modules import models as mace_models
from torch import Tensor

from gaq.files.packing import pack
from gaq_mace.names import PACKED
from gaq_mace.packed import other_mace, take_apart

__all__ = ["reduce_packed", "reduce_stock"]


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
    return operator.itemgetter(3), (steps,), {PACKED: payload}


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
    message = Call(other_mace(meta).format, Call(sorted, unknown), Call(sorted, missing))
    count = Call(len, Call(operator.or_, unknown, missing))
    # Through the module, whose public name this is; the function pickles as that of a private one.
    comparison = operator.methodcaller("assert_close", count, 0, msg=message)
    return Call(comparison, Call(importlib.import_module, "torch.testing"))


def reduce_stock(stock: type, entries: dict[str, Any]) -> tuple[Any, ...]:
    """The value of ``__reduce_ex__`` that stores a model as one of MACE's own class.

    Args:
        stock: MACE's own class.
        entries: of the model's ``__dict__`` that the file is to hold.
    """
    # Not by copyreg.__newobj__, with which pickle insists on the class of the object itself.
    return copyreg._reconstructor, (stock, object, None), entries  # type: ignore[attr-defined]  # private, but what pickle uses
