r"""`gaq.kernels.contraction` in Triton.

One kernel serves the values and the derivative. It computes

.. math:: out_{a r c} = \sum_{g \in G_r} \Big( \prod_{m \in g} x_{a m c} \Big)
    \sum_{t \in g} p_t w_{z_a k_t c} y_{a l_t c}

over groups g of terms that share all factors but the last. For the values, y is x, l is the last factor of a monomial,
and p is 1. The derivative of a monomial M by a feature m that it holds p times is p M / x_m. That is a polynomial
again: its groups are the distinct M / x_m, and its last factors are the gradients of the outputs in which M occurs, so
y is the gradient. A program computes a row of the result for a tile of atoms and channels. Nothing is summed across
programs, so repeated runs give the same bits.

Terms are read from tables: written out as code, the thousands of terms of a foundation model would take minutes to
compile. A term costs one word of the table, a coefficient and a feature, which come from the GPU's caches.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gaq.kernels.cpu.native import refuse_second_derivative
from gaq.kernels.gpu import interpreted
from gaq.kernels.gpu.tracing import operation, wrapped

__all__ = ["contraction", "derivative_table", "value_table"]

FACTORS = 3
"""Largest number of factors of a group: monomials have a degree of at most 4."""
ROW_BITS, POWER_BITS = 7, 3


@triton.jit
def _factor(x_ptr, at, row, channels, mask):
    """Load a row of the features; 1 where a group has no such factor (row -1)."""
    return tl.where(row >= 0, tl.load(x_ptr + at + tl.maximum(row, 0) * channels, mask=mask, other=0.0), 1.0)


@triton.jit
def polynomial_kernel(
    x_ptr,  # (atoms, rows_x, channels): the factors
    y_ptr,  # (atoms, rows_y, channels): the last ones
    out_ptr,  # (atoms, rows_out, channels)
    species_ptr,  # (atoms,)
    coefficient_ptr,  # (species, terms, channels)
    row_ptr,  # (rows_out + 1,): the first group of each row
    group_ptr,  # (groups, 4): factors, -1 where there are fewer; the first term
    term_ptr,  # (entries,): number of the coefficient, power and last factor in one word
    atoms,
    channels,
    kinds,
    terms,
    rows_x,
    rows_y,
    rows_out,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0)
    row = tl.program_id(1)
    a = (tile // tiles) * BLOCK_A + tl.arange(0, BLOCK_A)
    c = (tile % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = a < atoms
    mask = inside[:, None] & (c < channels)[None, :]
    kind = tl.load(species_ptr + a, mask=inside, other=0)
    # An unknown species must not read beyond the table; its atoms become NaN below.
    known = (kind >= 0) & (kind < kinds)
    kind = tl.where(known, kind, 0)
    wide = a.to(tl.int64)
    x_at = wide[:, None] * rows_x * channels + c[None, :]
    y_at = wide[:, None] * rows_y * channels + c[None, :]
    w_at = kind.to(tl.int64)[:, None] * terms * channels + c[None, :]
    total = tl.zeros([BLOCK_A, BLOCK_C], dtype=out_ptr.dtype.element_ty)
    first = tl.load(row_ptr + row)
    last = tl.load(row_ptr + row + 1)
    for g in range(first, last):
        product = _factor(x_ptr, x_at, tl.load(group_ptr + 4 * g), channels, mask)
        product *= _factor(x_ptr, x_at, tl.load(group_ptr + 4 * g + 1), channels, mask)
        product *= _factor(x_ptr, x_at, tl.load(group_ptr + 4 * g + 2), channels, mask)
        begin = tl.load(group_ptr + 4 * g + 3)
        end = tl.load(group_ptr + 4 * g + 7)
        inner = tl.zeros([BLOCK_A, BLOCK_C], dtype=out_ptr.dtype.element_ty)
        for t in range(begin, end):
            word = tl.load(term_ptr + t)
            # 7 and 3 bits: ROW_BITS, POWER_BITS.
            y = tl.load(y_ptr + y_at + (word & 127) * channels, mask=mask, other=0.0)
            w = tl.load(coefficient_ptr + w_at + (word >> 10) * channels, mask=mask, other=0.0)
            inner += w * (y * ((word >> 7) & 7).to(y.dtype))
        total += product * inner
    total = tl.where(known[:, None], total, float("nan"))
    out_at = wide[:, None] * rows_out * channels + c[None, :] + row * channels
    tl.store(out_ptr + out_at, total, mask=mask)


Entry = tuple[int, tuple[int, ...], int, int, int]
"""Row, other factors, number of the coefficient, power and last factor of a term."""


def _table(rows: int, entries: list[Entry]) -> Tensor:
    """Write the three tables of the kernel end to end, int32, after the lengths of the first two.

    Raises:
        ValueError: for more rows, terms or factors than the words of the table can hold.
    """
    entries = sorted(entries)
    ends = [0] * (rows + 1)
    groups: list[int] = []
    words: list[int] = []
    before = None
    for row, factors, coefficient, power, last in entries:
        if len(factors) > FACTORS or last >= 1 << ROW_BITS or power >= 1 << POWER_BITS or coefficient >= 1 << 21:
            raise ValueError("the GPU kernel serves polynomials of degree 4 in 128 rows with 2 million terms at most")
        if before != (row, factors):
            groups += [*factors, *[-1] * (FACTORS - len(factors)), len(words)]
            ends[row + 1] += 1
            before = (row, factors)
        words.append(coefficient << (ROW_BITS + POWER_BITS) | power << ROW_BITS | last)
    for row in range(rows):
        ends[row + 1] += ends[row]
    groups += [-1, -1, -1, len(words)]
    return torch.tensor([len(ends), len(groups), *ends, *groups, *words], dtype=torch.int32)


def value_table(rows_out: int, monomials: tuple[tuple[int, ...], ...], terms: tuple[tuple[int, int], ...]) -> Tensor:
    """Table from which the kernel computes the outputs.

    Args:
        rows_out: outputs.
        monomials, terms: of a `gaq.kernels.contraction.Polynomial`.
    """
    return _table(rows_out, [(row, monomials[m][:-1], t, 1, monomials[m][-1]) for t, (m, row) in enumerate(terms)])


def derivative_table(
    rows_in: int, monomials: tuple[tuple[int, ...], ...], terms: tuple[tuple[int, int], ...]
) -> Tensor:
    """Table from which the kernel computes the gradient by the features."""
    entries = []
    for t, (number, output) in enumerate(terms):
        monomial = monomials[number]
        for row in set(monomial):
            at = monomial.index(row)
            entries.append((row, monomial[:at] + monomial[at + 1 :], t, monomial.count(row), output))
    return _table(rows_in, entries)


def blocks(atoms: int, channels: int) -> tuple[int, int]:
    """Atoms and channels of a tile. In a trace the number of atoms is a symbol, and the tile does not depend on it."""
    if interpreted() and not isinstance(atoms, torch.SymInt):
        return triton.next_power_of_2(max(atoms, 1)), triton.next_power_of_2(channels)
    block_c = min(128, triton.next_power_of_2(channels))
    return max(1, 512 // block_c), block_c


def _launch(
    x: Tensor, y: Tensor, species: Tensor, coefficients: Tensor, table: Tensor, heads: list[int], rows_out: int
) -> Tensor:
    atoms, rows_x, channels = x.shape
    out = x.new_empty(atoms, rows_out, channels)
    if out.numel() == 0:
        return out
    rows, groups = heads
    block_a, block_c = blocks(atoms, channels)
    grid = (triton.cdiv(atoms, block_a) * triton.cdiv(channels, block_c), rows_out)
    wrapped(polynomial_kernel)[grid](
        x,
        y,
        out,
        species,
        coefficients,
        table[2 : 2 + rows],
        table[2 + rows : 2 + rows + groups],
        table[2 + rows + groups :],
        atoms,
        channels,
        coefficients.shape[0],
        coefficients.shape[1],
        rows_x,
        y.shape[1],
        rows_out,
        BLOCK_A=block_a,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out


@operation("gaq::contraction_gpu", mutates_args=())
def contraction_op(
    features: Tensor,
    species: Tensor,
    coefficients: Tensor,
    values: Tensor,
    derivative: Tensor,
    heads: list[int],
    rows_out: int,
) -> Tensor:
    """Compute the outputs; `heads` holds the lengths of the tables' parts, `derivative` is for the gradient."""
    return _launch(features, features, species, coefficients, values, heads[:2], rows_out)


@operation("gaq::contraction_backward_gpu", mutates_args=())
def contraction_backward_op(
    features: Tensor, grad: Tensor, species: Tensor, coefficients: Tensor, derivative: Tensor, heads: list[int]
) -> Tensor:
    """Compute the gradient by the features."""
    return _launch(features, grad, species, coefficients, derivative, heads, features.shape[1])


def _setup(ctx, inputs, output) -> None:
    features, species, coefficients, _, derivative, heads, _ = inputs
    ctx.save_for_backward(features, species, coefficients, derivative)
    ctx.heads = heads[2:]


def _differentiate(ctx, grad):
    refuse_second_derivative()
    if ctx.needs_input_grad[2]:
        raise RuntimeError("the fused kernels give no gradient by the coefficients")
    features, species, coefficients, derivative = ctx.saved_tensors
    back = contraction_backward_op(features, grad.contiguous(), species, coefficients, derivative, ctx.heads)
    return back, None, None, None, None, None, None


contraction_op.register_autograd(_differentiate, setup_context=_setup)


def heads_of(*tables: Tensor) -> list[int]:
    """Read the lengths of the first two parts of tables, which must lie on the CPU."""
    return [int(n) for table in tables for n in table[:2]]


def contraction(
    features: Tensor, species: Tensor, coefficients: Tensor, tables: tuple[Tensor, Tensor, list[int]], rows_out: int
) -> Tensor:
    """Compute `gaq.kernels.contraction.contraction` on a GPU. Atoms of a species without coefficients become NaN.

    Args:
        features: (atoms, rows_in, channels), float32 or float64.
        species: (atoms,), int64.
        coefficients: (species, terms, channels).
        tables: `value_table` and `derivative_table` on the device of the features, and `heads_of` them.
        rows_out: outputs.

    Raises:
        ValueError: if one atom or species has more elements than a 32-bit index can reach.
    """
    if max(features.shape[1], rows_out) * features.shape[2] >= 1 << 31 or math.prod(coefficients.shape[1:]) >= 1 << 31:
        raise ValueError("too many rows and channels for the GPU kernel")
    values, derivative, heads = tables
    return contraction_op(  # type: ignore[no-any-return]  # a registered operation is untyped
        features.contiguous(), species.contiguous(), coefficients.contiguous(), values, derivative, heads, rows_out
    )
