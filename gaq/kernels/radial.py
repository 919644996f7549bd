"""Radial functions as tables: a polynomial in each interval, interpolated from the function's values alone.

The weights that a radial network gives to an edge depend on its length alone. The range from 0 to the cutoff is divided
into equal intervals. In each of them the network is evaluated at the Chebyshev-Lobatto nodes (Trefethen, Approximation
Theory and Approximation Practice, chapter 2), and the polynomial through these values is kept as its coefficients, made
in float64 and rounded once to the dtype of the model. Neighbouring intervals share the node between them, so the
weights, and the energy, are continuous; forces are the exact gradient of the energy that is computed. The slope jumps
at an end of an interval by at most twice its error.

Coefficients make slopes as exact as values. Values at knots would not: there a slope in float32 is a difference of two
rounded values over a short step.

The error of the value is measured in every interval where atoms are (`NEAREST`), half-way between two nodes. The error
of the slope follows from it, because both are multiples of the same next coefficient. Where an error is too large, the
number of intervals grows as the errors ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gaq.caches import cached
from gaq.kernels.signatures import COEFFICIENTS

__all__ = [
    "COEFFICIENTS",
    "DOUBLE_TOLERANCE",
    "FEWEST",
    "NEAREST",
    "SLOPE_FACTOR",
    "TOLERANCE",
    "RadialTable",
    "check_lengths",
    "evaluate",
    "evaluate_several",
    "finer",
    "interpolate",
    "inverse",
    "node_lengths",
    "polynomials",
    "tabulate",
]

DEGREE = COEFFICIENTS - 1
TOLERANCE = 3e-8
"""Bound of the error of the values, relative to the largest value."""
SLOPE_FACTOR = 30.0
"""Bound of the error of the slopes, relative to the largest slope, in units of the bound for the values."""
DOUBLE_TOLERANCE = 1e-11
"""`TOLERANCE` for models in float64, whose users may take differences of forces."""
NEAREST = 0.5
"""Length in Å above which errors are measured: atoms do not come closer, and there the network may give anything."""
FEWEST, MOST = 16, 4096


@dataclass(frozen=True)
class RadialTable:
    """Radial functions as a table.

    Attributes:
        coefficients: of the polynomials in the position 0 <= t <= 1 within an interval, the constant first, shape
            (..., paths, intervals, COEFFICIENTS, channels), float64.
        r_max: cutoff in Å; the intervals are equal, from 0 to the cutoff.
        error: largest error of the value, relative to the largest value of the same function.
        slope_error: largest error of the slope, relative to the largest slope of the same function.
    """

    coefficients: Tensor
    r_max: float
    error: float
    slope_error: float


@cached(4)
def _nodes(degree: int) -> tuple[tuple[float, ...], float, float]:
    """Chebyshev-Lobatto nodes in [0, 1], where to measure, and by how much the error of a slope is larger there."""
    nodes = [(1 - math.cos(math.pi * k / degree)) / 2 for k in range(degree + 1)]
    between = (1 - math.cos(math.pi * (degree // 2 + 0.5) / degree)) / 2
    # The error is c * prod(t - t_k), with the same c for value and slope; the slope's is largest at a node.
    products = [math.prod(t - other for other in nodes if other != t) for t in nodes]
    largest_slope = max(abs(p) for p in products)
    return tuple(nodes), between, largest_slope / abs(math.prod(between - t for t in nodes))


def node_lengths(r_max: float, intervals: int) -> Tensor:
    """Lengths at the nodes, (intervals * DEGREE + 1,), float64; the first is a little above 0."""
    nodes = torch.tensor(_nodes(DEGREE)[0], dtype=torch.float64)
    starts = torch.arange(intervals, dtype=torch.float64)[:, None]
    lengths = torch.cat([(starts + nodes[:-1]).flatten(), torch.tensor([float(intervals)])]) * (r_max / intervals)
    lengths[-1] = r_max
    # Bessel functions are regular at 0, but written as sin(x)/x, which float64 cannot evaluate there.
    lengths[0] = 1e-5 * lengths[1]
    return lengths


def check_lengths(r_max: float, intervals: int, nearest: float = NEAREST) -> Tensor:
    """Lengths at which errors are measured, one in each interval above `nearest`."""
    lengths = (torch.arange(intervals, dtype=torch.float64) + _nodes(DEGREE)[1]) * (r_max / intervals)
    return lengths[lengths > min(nearest, 0.5 * r_max)]


@cached(1)
def inverse() -> Tensor:
    """Matrix from values at the nodes of an interval to coefficients, (COEFFICIENTS, COEFFICIENTS), float64."""
    nodes = torch.tensor(_nodes(DEGREE)[0], dtype=torch.float64)
    matrix = torch.linalg.inv(torch.stack([nodes**k for k in range(COEFFICIENTS)], dim=1))
    matrix[0] = torch.eye(COEFFICIENTS, dtype=torch.float64)[0]  # the constant is the value at the first node
    return matrix


def polynomials(values: Tensor, matrix: Tensor | None = None) -> Tensor:
    """Coefficients of the polynomials through values at the nodes.

    Args:
        values: (..., intervals * DEGREE + 1, columns), float64.
        matrix: what `inverse` returns, for a graph that has to hold it.

    Returns:
        (..., intervals, COEFFICIENTS, columns).
    """
    # Windows of one interval each, which share the values at their ends.
    windows = values.unfold(-2, COEFFICIENTS, DEGREE).transpose(-1, -2)
    lower = ((inverse() if matrix is None else matrix) @ windows)[..., :-1, :]
    # To the last bit the value at the end is that of the next interval's beginning.
    return torch.cat([lower, windows[..., -1:, :] - lower.sum(-2, keepdim=True)], dim=-2)


def interpolate(
    function: Callable[[Tensor], Tensor],
    r_max: float,
    intervals: int,
    last: Tensor | None = None,
    out: Tensor | None = None,
    nearest: float = NEAREST,
) -> RadialTable:
    """Tabulate radial functions with a number of intervals, and measure the errors.

    Args:
        function: lengths (n,) in Å, float64, to (..., n, features); called once.
        r_max: cutoff in Å.
        intervals: from 0 to the cutoff.
        last: last layer of a radial network, which is linear, so that it can be applied to coefficients instead of
            values: (paths, features, channels), float64. Without it, the features are the channels of one path.
        out: memory for the coefficients, contiguous, (..., paths, intervals, COEFFICIENTS, channels), in float64 or in
            float32; None for new memory in float64.
        nearest: length in Å above which errors are measured.
    """
    nodes, checks = node_lengths(r_max, intervals), check_lengths(r_max, intervals, nearest)
    at_nodes, exact = function(torch.cat([nodes, checks])).split([nodes.numel(), checks.numel()], dim=-2)
    coefficients = polynomials(at_nodes)
    first = intervals - checks.numel()
    _, between, slope_factor = _nodes(DEGREE)
    powers = torch.tensor([between**k for k in range(COEFFICIENTS)], dtype=torch.float64)
    missed = torch.einsum("...kc,k->...c", coefficients[..., first:, :, :], powers) - exact
    leading = coefficients.shape[:-3]
    paths, channels = (1, coefficients.shape[-1]) if last is None else (last.shape[0], last.shape[2])
    if out is None:
        out = coefficients.new_empty(*leading, paths, intervals, COEFFICIENTS, channels)
    if last is None:
        out.copy_(coefficients.unsqueeze(-4))
        largest = torch.stack(
            [of.abs().amax(dim=(-2, -1)) for of in (missed, *coefficients[..., first:, :2, :].unbind(-2))], dim=-1
        )
    else:
        several, errors = (of.view(math.prod(leading), *of.shape[len(leading) :]) for of in (coefficients, missed))
        largest = _through_last(several, errors, last, out.view(-1, *out.shape[-4:]))
    error, value, slope = largest.unbind(-1)
    # Both errors and slopes for intervals of length 1: the ratio is the same.
    return RadialTable(out, r_max, float((error / value).max()), float((slope_factor * error / slope).max()))


def _through_last(coefficients: Tensor, missed: Tensor, last: Tensor, out: Tensor) -> Tensor:
    """Apply the last layer of a radial network to coefficients.

    In float32 only the constants and the slopes are multiplied in float64, before they are rounded: the others are
    smaller by the length of an interval, and so are the errors of their products.

    Args:
        coefficients: of the features, (tables, intervals, COEFFICIENTS, features), float64.
        missed: errors of the features in the last intervals, (tables, checks, features), float64.
        last: (paths, features, channels), float64.
        out: for the coefficients, (tables, paths, intervals, COEFFICIENTS, channels).

    Returns:
        The largest error, value and slope of each table in the intervals with checks, (tables, 3), float64.
    """
    tables, intervals, _, features = coefficients.shape
    first = intervals - missed.shape[1]
    # Coefficients that are multiplied in float64, and those that are multiplied in the dtype of the table.
    exact = COEFFICIENTS if out.dtype == torch.float64 else 2
    lowest = coefficients[:, :, :exact].transpose(1, 2).reshape(tables, exact * intervals, features)
    higher = coefficients[:, :, exact:].to(out.dtype).view(tables, -1, features)
    last_reduced = last.to(out.dtype)
    missed, last_float = missed.float(), last.float()  # their sizes are all that matters
    extremes: list[Tensor] = []
    for table in range(tables):
        # A path at a time, so that nothing leaves the cache but the coefficients.
        for path in range(len(last)):
            rows = out[table, path]
            products = (lowest[table] @ last[path]).view(exact, intervals, -1)
            rows[:, :exact] = products.transpose(0, 1)
            if exact < COEFFICIENTS:
                rows[:, exact:] = (higher[table] @ last_reduced[path]).view(intervals, COEFFICIENTS - exact, -1)
            for values in (missed[table] @ last_float[path], products[0, first:], products[1, first:]):
                extremes += torch.aminmax(values)
    largest = torch.stack([value.double() for value in extremes]).view(tables, len(last), 3, 2)
    return largest.abs().amax(dim=(1, 3))


def finer(table: RadialTable, tolerance: float) -> int | None:
    """Number of intervals with which a table would be exact enough; None if it is.

    Raises:
        ValueError: if 4096 intervals do not suffice: the function is not smooth.
    """
    intervals = table.coefficients.shape[-3]
    value, slope = table.error / tolerance, table.slope_error / (SLOPE_FACTOR * tolerance)
    if value <= 1 and slope <= 1:
        return None
    if intervals >= MOST or not math.isfinite(value + slope):
        raise ValueError(f"the radial function cannot be tabulated: error {table.error:.1e} with {intervals} intervals")
    # Errors fall as the powers DEGREE + 1 and DEGREE of the interval, once it is short enough.
    growth = 1.05 * max(value ** (1 / (DEGREE + 1)), slope ** (1 / DEGREE))
    return min(MOST, max(intervals + 8, 8 * math.ceil(intervals * min(growth, 4.0) / 8)))


def tabulate(
    function: Callable[[Tensor], Tensor],
    r_max: float,
    tolerance: float = TOLERANCE,
    fewest: int = FEWEST,
    last: Tensor | None = None,
) -> RadialTable:
    """Tabulate radial functions as finely as the tolerance asks for.

    Args:
        function: as `interpolate` takes it.
        r_max: cutoff in Å.
        tolerance: bound of the error of the values, relative to the largest value; see `SLOPE_FACTOR` for the slopes.
        fewest: number of intervals to begin with.
        last: as `interpolate` takes it.

    Raises:
        ValueError: if 4096 intervals do not suffice: the function is not smooth.
    """
    table = interpolate(function, r_max, fewest, last)
    while (intervals := finer(table, tolerance)) is not None:
        table = interpolate(function, r_max, intervals, last)
    return table


def evaluate(coefficients: Tensor, lengths: Tensor, r_max: float) -> Tensor:
    """Interpolate in plain torch, shape (edges, paths, channels); zero from `r_max` on.

    Args:
        coefficients: (paths, intervals, COEFFICIENTS, channels).
        lengths: (edges,).
        r_max: cutoff in Å.
    """
    index, t = _located(coefficients, lengths, r_max)
    return _polynomial(coefficients[:, index].transpose(0, 1), t) * (lengths < r_max)[:, None, None]


def evaluate_several(coefficients: Tensor, lengths: Tensor, r_max: float, tables: Tensor, paths: int) -> Tensor:
    """Interpolate like `evaluate`, where each edge has one of several tables, which lie end to end.

    Args:
        coefficients: (tables * paths, intervals, COEFFICIENTS, channels).
        lengths: (edges,).
        r_max: cutoff in Å.
        tables: number of each edge's table, (edges,).
        paths: number of paths in one table.
    """
    # Not table by table: to find the edges of a table the host would have to wait for the GPU.
    several = coefficients.view(-1, paths, *coefficients.shape[1:])
    index, t = _located(coefficients, lengths, r_max)
    return _polynomial(several[tables, :, index], t) * (lengths < r_max)[:, None, None]


def _located(coefficients: Tensor, lengths: Tensor, r_max: float) -> tuple[Tensor, Tensor]:
    """Interval of each edge, and the position within it, each (edges,)."""
    intervals = coefficients.shape[1]
    position = lengths / (r_max / intervals)
    index = position.detach().long().clamp(0, intervals - 1)
    return index, position - index


def _polynomial(coefficients: Tensor, t: Tensor) -> Tensor:
    """Values of polynomials, (edges, paths, COEFFICIENTS, channels), at t, (edges,)."""
    value = coefficients[:, :, -1]
    for k in range(COEFFICIENTS - 2, -1, -1):
        value = coefficients[:, :, k] + t[:, None, None] * value
    return value
