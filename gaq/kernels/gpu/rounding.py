"""`gaq.kernels.rounding` in Triton: magnitude and direction are encoded and decoded in registers.

A program is one warp and rounds the features of one irrep of one atom. It holds all components of a few channels, so
that sums over components stay within a thread. The same warp computes the local frame in float64, as on the CPU,
because the frame decides which of two neighbouring codes a direction gets; it is only a few numbers for each atom.

The codes are those of the CPU kernel, except where rounding noise of the arithmetic decides a tie.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gaq.kernels.cpu.native import refuse_second_derivative
from gaq.kernels.gpu import interpreted
from gaq.kernels.gpu.tracing import operation, wrapped

__all__ = ["round_features"]

WORDS = 8
"""Integers of a piece, in the order of `gaq.kernels.rounding.Plan`."""


@triton.jit
def _nearest(v):
    """Round to the nearest integer, halves to even, for numbers far below 2^22 (float64: 2^51)."""
    if v.dtype == tl.float32:
        nearest = (v + 12582912.0) - 12582912.0
    else:
        nearest = (v + 6755399441055744.0) - 6755399441055744.0
    return nearest


@triton.jit
def _nearest_wide(v):
    """Round to the nearest integer, halves to even, up to 2^23 (float64: 2^52), where codes of 24 bits end."""
    size = tl.abs(v)
    if v.dtype == tl.float32:
        size = (size + 8388608.0) - 8388608.0
    else:
        size = (size + 4503599627370496.0) - 4503599627370496.0
    return tl.where(v < 0, -size, size)


@triton.jit
def _divide(a, b):
    """Divide as IEEE 754 demands; on a GPU the plain float32 quotient is an approximation."""
    wide = b + tl.zeros_like(a)
    if a.dtype == tl.float32:
        quotient = tl.math.div_rn(a, wide)
    else:
        quotient = a / wide
    return quotient


@triton.jit
def _root(v):
    if v.dtype == tl.float32:
        root = tl.sqrt_rn(v)
    else:
        root = tl.sqrt(v)
    return root


@triton.jit
def _step(size, top):
    return _divide(tl.maximum(size, 1e-30) * 1.000001, top)


@triton.jit
def _entry(matrix, k, j, P: tl.constexpr):
    i = tl.arange(0, P)
    return tl.sum(tl.sum(tl.where((i[:, None] == k) & (i[None, :] == j), matrix, 0.0), axis=1), axis=0)


@triton.jit
def _frame(references, EPS: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Orthonormal axes as rows, (P, P) in float64, from reference vectors in the rows: Gram-Schmidt, done twice."""
    i = tl.arange(0, P)
    SPANNING: tl.constexpr = 2 if D == 3 else D
    squares = tl.sum(references * references, axis=1)
    floor = tl.sqrt(tl.max(tl.where(i < SPANNING, squares, 0.0), axis=0)) * (32.0 * EPS)
    axes = tl.zeros([P, P], dtype=tl.float64)
    for k in range(SPANNING):
        axis = tl.sum(tl.where(i[:, None] == k, references, 0.0), axis=0)
        for again in tl.static_range(2):
            along = tl.sum(axes * axis[None, :], axis=1)
            axis -= tl.sum(axes * along[:, None], axis=0)
            length = tl.sqrt(tl.sum(axis * axis, axis=0))
            least = floor
            if again == 1:
                least = floor * 0.0 + 0.5
            axis = tl.where(length > least, axis / tl.maximum(length, 1e-30), 0.0)
        axes += tl.where(i[:, None] == k, axis[None, :], 0.0)
    # Zero axes become directions orthogonal to the others, so that no component is lost.
    for k in range(SPANNING):
        axis = tl.sum(tl.where(i[:, None] == k, axes, 0.0), axis=0)
        size = tl.sum(axis * axis, axis=0)
        left = tl.where(i < D, 1.0 - tl.sum(axes * axes, axis=0), 0.0)
        most = tl.max(left, axis=0)
        best = tl.min(tl.where(left == most, i, P), axis=0)
        column = tl.sum(tl.where(i[None, :] == best, axes, 0.0), axis=1)
        rest = tl.where(i == best, 1.0, 0.0) - tl.sum(axes * column[:, None], axis=0)
        rest = rest / tl.sqrt(tl.maximum(most, 1e-30))
        rest = tl.where(size < 0.5, rest, 0.0)
        axes += tl.where(i[:, None] == k, rest[None, :], 0.0)
    if D == 3:
        ax, ay, az = _entry(axes, 0, 0, P), _entry(axes, 0, 1, P), _entry(axes, 0, 2, P)
        bx, by, bz = _entry(axes, 1, 0, P), _entry(axes, 1, 1, P), _entry(axes, 1, 2, P)
        cx, cy, cz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        # Under inversion the other axes change sign, a cross product does not: the third mixture gives it its sign.
        side = _entry(references, 2, 0, P) * cx + _entry(references, 2, 1, P) * cy + _entry(references, 2, 2, P) * cz
        third = tl.where(i == 0, cx, tl.where(i == 1, cy, tl.where(i == 2, cz, 0.0)))
        axes += tl.where(i[:, None] == 2, tl.where(side < 0, -third, third)[None, :], 0.0)
    return axes


@triton.jit
def _vectors(
    x_ptr,
    out_ptr,
    mixing_ptr,
    at,
    channels,
    row_stride,
    levels,
    top,
    mixing_stride,
    FRAMED: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """Round the vectors of D components of one atom, of which P >= D are held, C channels at a time."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    i = tl.arange(0, P)
    most = tl.zeros([C], dtype=dtype)
    references = tl.zeros([P, P], dtype=tl.float64)
    for start in range(0, channels, C):
        c = start + tl.arange(0, C)
        inside = (i < D)[:, None] & (c < channels)[None, :]
        v = tl.load(x_ptr + at + i[:, None] * row_stride + c[None, :], mask=inside, other=0.0)
        most = tl.maximum(most, tl.sum(v * v, axis=0))
        if FRAMED:
            mixing = tl.load(mixing_ptr + i[:, None] * mixing_stride + c[None, :], mask=inside, other=0.0)
            for j in range(D):
                row = tl.load(x_ptr + at + j * row_stride + c, mask=c < channels, other=0.0).to(tl.float64)
                mixed = tl.sum(mixing * row[None, :], axis=1)
                references += tl.where(i[None, :] == j, mixed[:, None], 0.0)
    axes = references
    if FRAMED:
        axes = _frame(references, EPS, D, P)
    step = _step(_root(tl.max(most, axis=0)), top)
    n = levels.to(dtype)
    for start in range(0, channels, C):
        c = start + tl.arange(0, C)
        inside = (i < D)[:, None] & (c < channels)[None, :]
        v = tl.load(x_ptr + at + i[:, None] * row_stride + c[None, :], mask=inside, other=0.0)
        rounded = _nearest(_divide(_root(tl.sum(v * v, axis=0)), step)) * step
        if FRAMED:
            along = tl.zeros([P, C], dtype=dtype)
            for j in range(D):
                column = tl.sum(tl.where(i[None, :] == j, axes, 0.0), axis=1).to(dtype)
                row = tl.load(x_ptr + at + j * row_stride + c, mask=c < channels, other=0.0)
                along += column[:, None] * row[None, :]
        else:
            along = v
        size = tl.abs(along)
        if D == 3:
            scale = _divide(n + tl.zeros([C], dtype=dtype), tl.maximum(tl.sum(size, axis=0), 1e-30))
            scaled = size * scale[None, :]
            code = _nearest(scaled)
            moved = tl.abs(scaled - code)
            missing = n - tl.sum(code, axis=0)
            # The component that rounding moved most takes the missing levels; of equal ones, the first.
            repaired = tl.min(tl.where(moved == tl.max(moved, axis=0)[None, :], i[:, None], P), axis=0)
            code += tl.where(i[:, None] == repaired[None, :], missing[None, :], 0.0)
            point = tl.where(along < 0, -code, code)
        else:
            scale = _divide(n + tl.zeros([C], dtype=dtype), tl.maximum(tl.max(size, axis=0), 1e-30))
            point = _nearest(along * scale[None, :])
        square = tl.sum(point * point, axis=0)
        factor = _divide(rounded, _root(tl.maximum(square, 1.0)))
        if FRAMED:
            for j in range(D):
                column = tl.sum(tl.where(i[None, :] == j, axes, 0.0), axis=1).to(dtype)
                y = tl.sum(point * column[:, None], axis=0) * factor
                tl.store(out_ptr + at + j * row_stride + c, y, mask=c < channels)
        else:
            tl.store(out_ptr + at + i[:, None] * row_stride + c[None, :], point * factor[None, :], mask=inside)


@triton.jit
def _scalars(x_ptr, out_ptr, at, channels, top, C: tl.constexpr):
    most = tl.zeros([C], dtype=x_ptr.dtype.element_ty)
    for start in range(0, channels, C):
        c = start + tl.arange(0, C)
        most = tl.maximum(most, tl.abs(tl.load(x_ptr + at + c, mask=c < channels, other=0.0)))
    step = _step(tl.max(most, axis=0), top)
    for start in range(0, channels, C):
        c = start + tl.arange(0, C)
        v = tl.load(x_ptr + at + c, mask=c < channels, other=0.0)
        tl.store(out_ptr + at + c, _nearest_wide(_divide(v, step)) * step, mask=c < channels)


@triton.jit
def rounding_kernel(
    x_ptr,
    out_ptr,
    int_ptr,  # (pieces, WORDS)
    top_ptr,  # (pieces,), float64: the largest code; 0: the piece is copied
    mixing_ptr,  # (references, mixing_stride), float64
    atoms,
    mixing_stride,
    FRAMED: tl.constexpr,
    EPS: tl.constexpr,
    DIMENSIONS: tl.constexpr,  # bit d: whether pieces of dimension d occur
    C: tl.constexpr,
):
    atom = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    words = int_ptr + 8 * piece
    dimension = tl.load(words + 2)
    channels = tl.load(words + 3).to(tl.int32)
    row_stride = tl.load(words + 5)
    levels = tl.load(words + 7)
    at = tl.load(words) * atoms + tl.load(words + 1) + atom * tl.load(words + 4)
    exact = tl.load(top_ptr + piece)
    top = exact.to(x_ptr.dtype.element_ty)
    if exact == 0.0:
        for row in range(0, dimension.to(tl.int32)):
            for start in range(0, channels, C):
                c = start + tl.arange(0, C)
                place = at + row * row_stride + c
                tl.store(out_ptr + place, tl.load(x_ptr + place, mask=c < channels, other=0.0), mask=c < channels)
    elif dimension == 1:
        _scalars(x_ptr, out_ptr, at, channels, top, 4 * C)
    else:
        for D in tl.static_range(3, 11, 2):
            # Two conditions: the first is decided when the kernel is compiled.
            if (DIMENSIONS >> D) & 1:  # noqa: SIM102
                if dimension == D:
                    _vectors(
                        x_ptr,
                        out_ptr,
                        mixing_ptr,
                        at,
                        channels,
                        row_stride,
                        levels,
                        top,
                        mixing_stride,
                        FRAMED,
                        EPS,
                        D,
                        4 if D == 3 else (8 if D < 9 else 16),
                        C,
                    )


@operation("gaq::round_features_gpu", mutates_args=())
def round_op(
    features: Tensor,
    ints: Tensor,
    tops: Tensor,
    mixing: Tensor,
    atoms: int,
    dimensions: int,
    framed: bool,
    covered: int,
) -> Tensor:
    """Round features; elements that no piece covers are copied. `covered` counts the elements of an atom in pieces."""
    everything = covered * atoms == features.numel()
    rounded = torch.empty_like(features) if everything else features.clone()
    if atoms == 0 or tops.numel() == 0:
        return features.clone()
    wrapped(rounding_kernel)[(atoms, tops.numel())](
        features,
        rounded,
        ints,
        tops,
        mixing,
        atoms,
        mixing.shape[1],
        FRAMED=framed,
        EPS=torch.finfo(features.dtype).eps,
        DIMENSIONS=dimensions,
        C=128 if interpreted() else block(dimensions),
        num_warps=1,
    )
    return rounded


def block(dimensions: int) -> int:
    """Channels of a tile: as many as one warp can hold of the widest irrep."""
    return 32 if dimensions & 512 else 64


def _setup(ctx, inputs, output) -> None:
    pass


def _differentiate(ctx, grad):
    # Straight-through: differentiable to any order in itself, but the kernels around it are differentiable only once.
    refuse_second_derivative()
    return grad, None, None, None, None, None, None, None


round_op.register_autograd(_differentiate, setup_context=_setup)


def round_features(
    features: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    atoms: int,
    dimensions: int,
    framed: bool,
    covered: int,
) -> Tensor:
    """Compute `gaq.kernels.rounding.round_features` on a GPU.

    Args:
        features: any shape.
        tables: integers of the pieces (pieces, `WORDS`), int64; their largest codes (pieces,), float64; mixing of the
            channels (references, channels), float64.
        atoms: number of atoms.
        dimensions: bit d is set where pieces of dimension d occur.
        framed: whether directions are coded in the local frame.
        covered: elements of an atom in all pieces together.
    """
    features = features.contiguous()
    return round_op(features, *tables, atoms, dimensions, framed, covered)  # type: ignore[no-any-return]  # untyped
