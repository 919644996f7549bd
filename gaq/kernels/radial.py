"""Radial functions as tables: quintic Hermite interpolation of value, slope and curvature.

The weights that a radial network gives to an edge depend on its length alone, so they are tabulated at equal steps of r
and interpolated by the C2 spline that has the network's values, slopes and curvatures at the knots. Forces are
derivatives of the spline: they are smooth, and the exact gradient of the energy that is computed.

The error of the value is h^6/46080 max|f^(6)|. The errors of value and slope are measured between the knots, and the
step is halved until they are below `TOLERANCE` and `SLOPE_TOLERANCE`, relative to the largest value and slope, which is
less than float32 resolves. With three numbers at a knot the steps are so long that the used part of a table stays in
cache.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "DOUBLE_TOLERANCE",
    "SLOPE_TOLERANCE",
    "TOLERANCE",
    "RadialTable",
    "derivatives",
    "evaluate",
    "evaluate_several",
    "knot_lengths",
    "tabulate",
]

TOLERANCE = 3e-8
SLOPE_TOLERANCE = 3e-7
DOUBLE_TOLERANCE = 1e-11
"""For models in float64, whose users may take differences of forces."""
FEWEST, MOST = 33, 4097


@dataclass(frozen=True)
class RadialTable:
    """A radial function as a table.

    Attributes:
        knots: values, slopes (1/Å) and curvatures (1/Å²), shape (paths, knots, 3, channels), float64.
        r_max: cutoff in Å; knots lie at equal steps from 0 to the cutoff.
        error: largest error of the value between knots, relative to the largest value.
        slope_error: largest error of the slope between knots, relative to the largest slope.
    """

    knots: Tensor
    r_max: float
    error: float
    slope_error: float


# torch has one stack of forward-differentiation levels in a process, and does not protect it from threads.
_forward_differentiation = threading.Lock()


def derivatives(function: Callable[[Tensor], Tensor], lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, slope and curvature of a radial function at lengths (n,), each (n, paths, channels)."""
    ones = torch.ones_like(lengths)

    def slope(r: Tensor) -> tuple[Tensor, Tensor]:
        value, tangent = torch.func.jvp(function, (r,), (ones,))  # type: ignore[misc]  # two values without has_aux
        return tangent, value

    # Outside grad mode torch uses formulas that are differentiable only once, also in forward differentiation.
    with _forward_differentiation, torch.enable_grad():
        results = torch.func.jvp(slope, (lengths,), (ones,), has_aux=True)
        first, second, value = results  # type: ignore[misc]  # three values with has_aux
    return value.detach(), first.detach(), second.detach()


def knot_lengths(r_max: float, count: int) -> Tensor:
    """Lengths at the knots, (count,), float64; the first is a little above 0."""
    lengths = torch.linspace(0.0, r_max, count, dtype=torch.float64)
    # Bessel functions are regular at 0, but written as sin(x)/x, which float64 cannot evaluate there.
    lengths[0] = 1e-3 * lengths[1]
    return lengths


def _interpolated(knots: Tensor, r_max: float, lengths: Tensor) -> Tensor:
    return evaluate(knots, lengths, r_max)


def tabulate(
    function: Callable[[Tensor], Tensor], r_max: float, tolerance: float = TOLERANCE, fewest: int = FEWEST
) -> RadialTable:
    """Tabulate a radial function as finely as the tolerance asks for.

    Args:
        function: lengths (n,) in Å, float64, to weights (n, paths, channels).
        r_max: cutoff in Å.
        tolerance: largest error between knots, relative to the largest value.
        fewest: number of knots to begin with.

    Raises:
        ValueError: if 4097 knots do not suffice: the function is not smooth.
    """
    count = fewest
    while True:
        lengths = knot_lengths(r_max, count)
        knots = torch.stack(derivatives(function, lengths), dim=1).permute(2, 0, 1, 3).contiguous()
        between = (torch.arange(count - 1, dtype=torch.float64) + 0.5) * (r_max / (count - 1))
        # Å: atoms do not come closer, and there the network may give anything.
        between = between[between > 0.3]
        exact, exact_slope, _ = derivatives(function, between)
        value, slope, _ = derivatives(functools.partial(_interpolated, knots, r_max), between)
        error = float((value - exact).abs().max() / exact.abs().max())
        slope_error = float((slope - exact_slope).abs().max() / exact_slope.abs().max())
        if error <= tolerance and slope_error <= tolerance * SLOPE_TOLERANCE / TOLERANCE:
            return RadialTable(knots, r_max, error, slope_error)
        if count >= MOST:
            raise ValueError(f"the radial function cannot be tabulated: error {error:.1e} with {count} knots")
        count = 2 * count - 1


def evaluate(knots: Tensor, lengths: Tensor, r_max: float) -> Tensor:
    """Interpolate in plain torch, shape (edges, paths, channels); zero from `r_max` on.

    Args:
        knots: as in `RadialTable`.
        lengths: (edges,).
        r_max: cutoff in Å.
    """
    step = r_max / (knots.shape[1] - 1)
    position = lengths / step
    index = position.detach().long().clamp(0, knots.shape[1] - 2)
    low, high = knots[:, index].transpose(0, 1), knots[:, index + 1].transpose(0, 1)
    return _between(low, high, position - index, step) * (lengths < r_max)[:, None, None]


def _between(low: Tensor, high: Tensor, t: Tensor, step: float) -> Tensor:
    """Spline between the knots below and above, (edges, paths, 3, channels), at 0 <= t <= 1, (edges,)."""
    weights = hermite(t[:, None, None], step)
    terms = [weights[k] * low[:, :, k] + weights[3 + k] * high[:, :, k] for k in range(3)]
    return terms[0] + terms[1] + terms[2]


def evaluate_several(knots: Tensor, lengths: Tensor, r_max: float, tables: Tensor, paths: int) -> Tensor:
    """Interpolate like `evaluate`, where each edge has one of several tables, which lie end to end in `knots`.

    Args:
        knots: (tables * paths, knots, 3, channels).
        lengths: (edges,).
        r_max: cutoff in Å.
        tables: number of each edge's table, (edges,).
        paths: number of paths in one table.
    """
    # Not table by table: to find the edges of a table the host would have to wait for the GPU.
    several = knots.view(-1, paths, *knots.shape[1:])
    step = r_max / (knots.shape[1] - 1)
    position = lengths / step
    index = position.detach().long().clamp(0, knots.shape[1] - 2)
    low, high = several[tables, :, index], several[tables, :, index + 1]
    return _between(low, high, position - index, step) * (lengths < r_max)[:, None, None]


def hermite(t: Tensor, step: float) -> list[Tensor]:
    """Weights of value, slope and curvature at the lower, then at the upper knot, for 0 <= t <= 1 between them."""
    s = 1 - t

    def lower(u: Tensor, v: Tensor) -> list[Tensor]:
        return [v**3 * (1 + 3 * u + 6 * u * u), v**3 * u * (1 + 3 * u) * step, v**3 * u * u * (0.5 * step * step)]

    upper = lower(s, t)
    return [*lower(t, s), upper[0], -upper[1], upper[2]]
