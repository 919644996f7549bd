"""`gaq.kernels.linear` in Triton, on the GPU's matrix units, in float32.

One kernel computes three products:

- *rounded*: features are rounded to codes in registers, and the codes split into two signed int8 planes, or three for
  more than 16 bits. The int8 x int8 products with int32 sums are combined in 64 bits and rounded to float32 once.
- *not rounded*, and the *gradient*: float32 by int8. A float32 is exactly the sum of three bfloat16 (3 x 8 bits of
  significand), an int8 is a bfloat16, and their products have 16 bits. So three bfloat16 x bfloat16 products with
  float32 sums are as exact as the sums. ``input_precision="ieee"`` would give the same without the matrix units.
  Features below 2^-110 lose their lowest plane to underflow.

Scales are applied to the sums, not to the weights; in the gradient, whose sum runs over the outputs, to the incoming
gradient. Weights of four bits are unpacked in registers. A row that holds a NaN or an infinity becomes NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gaq.files.packing import PLANES_MAX
from gaq.kernels.cpu.native import refuse_second_derivative
from gaq.kernels.gpu import interpreted
from gaq.kernels.gpu.tracing import operation, wrapped

__all__ = ["linear", "serves"]


@triton.jit
def _weights(w_ptr, k, n, w_k, w_n, mask, PACKED: tl.constexpr):
    """Load a tile of int8 weights, unpacked where they have four bits."""
    at = k[:, None] * w_k + n[None, :] * w_n
    if PACKED:
        byte = tl.load(w_ptr + (at >> 1), mask=mask, other=0).to(tl.int32)
        weights = ((((byte >> ((at & 1) * 4)) & 15) ^ 8) - 8).to(tl.int8)
    else:
        weights = tl.load(w_ptr + at, mask=mask, other=0)
    return weights


@triton.jit
def _add_float_product(a, w, total, EMULATED: tl.constexpr):
    """Add the product of float32 and int8, exact up to the rounding of the sums."""
    high = a.to(tl.bfloat16)
    rest = a - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    if EMULATED:  # the interpreter does not multiply matrices of bfloat16
        wide = w.to(tl.float32)
        total = tl.dot(low.to(tl.float32), wide, total, input_precision="ieee")
        total = tl.dot(middle.to(tl.float32), wide, total, input_precision="ieee")
        total = tl.dot(high.to(tl.float32), wide, total, input_precision="ieee")
    else:
        narrow = w.to(tl.bfloat16)
        total = tl.dot(low, narrow, total)
        total = tl.dot(middle, narrow, total)
        total = tl.dot(high, narrow, total)
    return total


@triton.jit
def _codes(a, step):
    """Features over the step of their row, to the nearest integer, halves to even, up to 2^23."""
    ratio = tl.math.div_rn(a, tl.zeros_like(a) + step[:, None])
    size = (tl.abs(ratio) + 8388608.0) - 8388608.0
    return tl.where(ratio < 0, -size, size).to(tl.int32)


@triton.jit
def _joined(high, middle, low, THREE: tl.constexpr):
    """The exact sums of all planes, rounded to float32 once."""
    total = high.to(tl.int64)
    if THREE:
        total = total * 256 + middle.to(tl.int64)
    return (total * 256 + low.to(tl.int64)).to(tl.float32)


@triton.jit
def linear_kernel(
    a_ptr,  # (rows, inner)
    w_ptr,  # (inner, columns) by the strides, int8 or packed
    scale_ptr,  # (groups, outputs)
    residual_ptr,  # (rows, columns)
    out_ptr,  # (rows, columns)
    rows,
    columns,
    inner,
    a_row,
    a_inner,
    w_inner,
    w_column,
    residual_row,
    residual_column,
    outputs,
    top,  # largest code of the features
    GROUPED: tl.constexpr,  # a tile of the inputs is a group
    PLANES: tl.constexpr,  # of the codes of the features: 2 or 3; 0: the features are not rounded
    PACKED: tl.constexpr,
    BACKWARD: tl.constexpr,  # the sum runs over the outputs
    RESIDUAL: tl.constexpr,
    EMULATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(columns, BLOCK_N)
    column_tile = tl.program_id(0) % tiles
    m = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = (m < rows)[:, None]
    column_inside = (n < columns)[None, :]
    a_at = m.to(tl.int64)[:, None] * a_row

    step = tl.zeros([BLOCK_M], dtype=tl.float32)
    if PLANES:
        # NaN and infinity times 0 are NaN, and stay so in the step.
        largest = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start in range(0, inner, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = tl.load(a_ptr + a_at + k[None, :] * a_inner, mask=row_inside & (k < inner)[None, :], other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(a), axis=1))
            step += tl.sum(a * 0.0, axis=1)
        largest = tl.maximum(largest, 1e-30) * 1.000001
        step += tl.math.div_rn(largest, tl.zeros_like(largest) + top)

    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    high_total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    middle_total = high_total
    low_total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + a_at + k[None, :] * a_inner, mask=row_inside & (k < inner)[None, :], other=0.0)
        w = _weights(w_ptr, k, n, w_inner, w_column, (k < inner)[:, None] & column_inside, PACKED)
        if PLANES:
            code = _codes(a, step)
            high = (code + 128) >> 8
            low = code - (high << 8)
            if PLANES == 3:
                middle = high
                high = (middle + 128) >> 8
                middle_total = tl.dot((middle - (high << 8)).to(tl.int8), w, middle_total, out_dtype=tl.int32)
            high_total = tl.dot(high.to(tl.int8), w, high_total, out_dtype=tl.int32)
            low_total = tl.dot(low.to(tl.int8), w, low_total, out_dtype=tl.int32)
            if GROUPED:
                scale = tl.load(scale_ptr + (start // BLOCK_K) * outputs + n, mask=n < columns, other=0.0)
                total += _joined(high_total, middle_total, low_total, PLANES == 3) * scale[None, :]
                high_total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
                middle_total = high_total
                low_total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
        elif BACKWARD:
            group = 0
            if GROUPED:
                group = column_tile
            a *= tl.load(scale_ptr + group * outputs + k, mask=k < inner, other=0.0)[None, :]
            total = _add_float_product(a, w, total, EMULATED)
        elif GROUPED:
            scale = tl.load(scale_ptr + (start // BLOCK_K) * outputs + n, mask=n < columns, other=0.0)
            part = _add_float_product(a, w, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), EMULATED)
            total += part * scale[None, :]
        else:
            total = _add_float_product(a, w, total, EMULATED)
    if not BACKWARD:
        if not GROUPED:
            if PLANES:
                total = _joined(high_total, middle_total, low_total, PLANES == 3)
            total *= tl.load(scale_ptr + n, mask=n < columns, other=0.0)[None, :]
        if PLANES:
            total *= step[:, None]
    inside = row_inside & column_inside
    if RESIDUAL:
        at = m.to(tl.int64)[:, None] * residual_row + n[None, :] * residual_column
        total += tl.load(residual_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + m.to(tl.int64)[:, None] * columns + n[None, :], total, mask=inside)


def serves(x: Tensor, codes: Tensor, group_size: int) -> bool:
    """Whether the kernel can compute a layer: float32, groups of 32, 64 or 128 inputs or none."""
    return x.dtype == torch.float32 and group_size in (0, 32, 64, 128) and 2 * codes.numel() < 1 << 31


def planes_of(top: int) -> int:
    """Number of int8 planes of codes up to `top`; 0 where nothing is rounded."""
    return 0 if top == 0 else (2 if top <= PLANES_MAX else 3)


def blocks(rows: int, rounded: bool) -> dict[str, int]:
    """Sizes of the tiles: small where there are few rows, so that more of the GPU has work.

    In a trace the number of rows is a symbol, on which no size may depend.
    """
    symbol = isinstance(rows, torch.SymInt)
    if interpreted() and not symbol:
        block_m = min(128, max(16, triton.next_power_of_2(max(rows, 1))))
        return {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4}
    # As large as the registers allow (benchmarks/gpu_resources.py).
    if symbol or rows <= 2048:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8 if rounded else 4}


def _launch(
    a: Tensor,
    codes: Tensor,
    scale: Tensor,
    residual: Tensor | None,
    columns: int,
    top: int,
    group_size: int,
    backward: bool,
) -> Tensor:
    rows, inner = a.shape
    out = a.new_empty(rows, columns)
    if out.numel() == 0:
        return out
    outputs = scale.shape[1]
    packed = codes.dtype == torch.uint8
    by_input, by_output = (outputs, 1) if packed else codes.stride()
    tile = blocks(rows, top > 0)
    if group_size:
        tile["BLOCK_N" if backward else "BLOCK_K"] = group_size
    added = out if residual is None else residual
    wrapped(linear_kernel)[(triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"]),)](
        a,
        codes,
        scale,
        added,
        out,
        rows,
        columns,
        inner,
        a.stride(0),
        a.stride(1),
        by_output if backward else by_input,
        by_input if backward else by_output,
        added.stride(0),
        added.stride(1),
        outputs,
        float(top),
        GROUPED=group_size > 0,
        PLANES=planes_of(top),
        PACKED=packed,
        BACKWARD=backward,
        RESIDUAL=residual is not None,
        EMULATED=interpreted(),
        **tile,
    )
    return out


@operation("gaq::linear_gpu", mutates_args=())
def linear_op(x: Tensor, codes: Tensor, scale: Tensor, residual: Tensor | None, top: int, group_size: int) -> Tensor:
    """Compute a layer; see `gaq.kernels.linear.linear`."""
    return _launch(x, codes, scale, residual, scale.shape[1], top, group_size, False)


@operation("gaq::linear_backward_gpu", mutates_args=())
def linear_backward_op(grad: Tensor, codes: Tensor, scale: Tensor, inputs: int, group_size: int) -> Tensor:
    """Compute the gradient by the features, (rows, inputs)."""
    return _launch(grad, codes, scale, None, inputs, 0, group_size, True)


def _setup(ctx, inputs, output) -> None:
    x, codes, scale, _, _, group_size = inputs
    ctx.save_for_backward(codes, scale)
    ctx.inputs, ctx.group_size = x.shape[1], group_size


def _differentiate(ctx, grad):
    refuse_second_derivative()
    if ctx.needs_input_grad[2]:
        raise RuntimeError("the fused kernels give no gradient by the scales")
    codes, scale = ctx.saved_tensors
    back = linear_backward_op(grad, codes, scale, ctx.inputs, ctx.group_size) if ctx.needs_input_grad[0] else None
    return back, None, None, grad.clone() if ctx.needs_input_grad[3] else None, None, None


linear_op.register_autograd(_differentiate, setup_context=_setup)


def linear(x: Tensor, codes: Tensor, scale: Tensor, residual: Tensor | None, top: int, group_size: int) -> Tensor:
    """Compute `gaq.kernels.linear.linear` on a GPU, for layers that `serves` accepts."""
    scale = scale.float().contiguous()
    return linear_op(x, codes, scale, residual, top, group_size)  # type: ignore[no-any-return]  # untyped
