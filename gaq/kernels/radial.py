"""Radial functions as tables: quintic Hermite interpolation of value, slope and curvature.

The weights a radial network gives to an edge are functions of its length alone, so they are tabulated at equal steps of
r and interpolated by the C2 spline that has the network's own values, slopes and curvatures at the knots. Forces
differentiate the spline itself: they are the exact gradient of the energy that is computed, and are smooth.

The error of the value is h^6/46080 max|f^(6)|. It and that of the slope are measured between the knots, and the step is
halved until they are below `TOLERANCE` and `SLOPE_TOLERANCE` of the largest value and slope, beneath what float32
resolves. Three numbers a knot allow steps so long that the part of a table in use stays in cache.
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
"""For models in float64, whose users may difference forces again."""
FEWEST, MOST = 33, 4097


@dataclass(frozen=True)
class RadialTable:
    """A tabulated radial function.

    Attributes:
        knots: values, slopes (1/Å) and curvatures (1/Å²), shape (paths, knots, 3, channels), float64.
        r_max: cutoff in Å; the knots lie at equal steps from 0 to it.
        error: largest difference to the function between knots, relative to its largest value.
        slope_error: the same of the slope.
    """

    knots: Tensor
    r_max: float
    error: float
    slope_error: float


# torch keeps one stack of levels of forward differentiation for the process, and takes no care of threads.
_forward_differentiation = threading.Lock()


def derivatives(function: Callable[[Tensor], Tensor], lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, slope and curvature, each (n, paths, channels)."""
    ones = torch.ones_like(lengths)

    def slope(r: Tensor) -> tuple[Tensor, Tensor]:
        value, tangent = torch.func.jvp(function, (r,), (ones,))  # type: ignore[misc]
        return tangent, value

    # Without grad mode torch takes formulas that are differentiable once, here too.
    with _forward_differentiation, torch.enable_grad():
        first, second, value = torch.func.jvp(slope, (lengths,), (ones,), has_aux=True)  # type: ignore[misc]
    return value.detach(), first.detach(), second.detach()


def knot_lengths(r_max: float, count: int) -> Tensor:
    """Where the knots lie, (count,), float64; the first a little above 0."""
    lengths = torch.linspace(0.0, r_max, count, dtype=torch.float64)
    # Bessel functions are regular at 0 but written sin(x)/x, and there nothing is left of them in float64.
    lengths[0] = 1e-3 * lengths[1]
    return lengths


def _interpolated(knots: Tensor, r_max: float, lengths: Tensor) -> Tensor:
    return evaluate(knots, lengths, r_max)


def tabulate(
    function: Callable[[Tensor], Tensor], r_max: float, tolerance: float = TOLERANCE, fewest: int = FEWEST
) -> RadialTable:
    """A table of a radial function, as fine as it has to be.

    Args:
        function: lengths (n,) in Å, float64, to weights (n, paths, channels).
        r_max: cutoff in Å.
        tolerance: largest error between knots, relative to the largest value.
        fewest: knots to begin with.

    Raises:
        ValueError: if 4097 knots do not suffice: the function is not smooth.
    """
    count = fewest
    while True:
        lengths = knot_lengths(r_max, count)
        knots = torch.stack(derivatives(function, lengths), dim=1).permute(2, 0, 1, 3).contiguous()
        between = (torch.arange(count - 1, dtype=torch.float64) + 0.5) * (r_max / (count - 1))
        # Atoms do not come closer than this, and a network may do anything there.
        between = between[between > 0.3]
        exact, exact_slope, _ = derivatives(function, between)
        found, found_slope, _ = derivatives(functools.partial(_interpolated, knots, r_max), between)
        error = float((found - exact).abs().max() / exact.abs().max())
        slope_error = float((found_slope - exact_slope).abs().max() / exact_slope.abs().max())
        if error <= tolerance and slope_error <= tolerance * SLOPE_TOLERANCE / TOLERANCE:
            return RadialTable(knots, r_max, error, slope_error)
        if count >= MOST:
            raise ValueError(f"the radial function cannot be tabulated: error {error:.1e} with {count} knots")
        count = 2 * count - 1


def evaluate(knots: Tensor, lengths: Tensor, r_max: float) -> Tensor:
    """The interpolated function in plain torch, shape (edges, paths, channels); zero from `r_max` on.

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
    """The spline from its knots below and above, (edges, paths, 3, channels), at 0 <= t <= 1, (edges,)."""
    weights = hermite(t[:, None, None], step)
    terms = [weights[k] * low[:, :, k] + weights[3 + k] * high[:, :, k] for k in range(3)]
    return terms[0] + terms[1] + terms[2]


def evaluate_several(knots: Tensor, lengths: Tensor, r_max: float, tables: Tensor, paths: int) -> Tensor:
    """The same where every edge has a table of its own among several, one after the other in `knots`.

    Args:
        knots: (tables * paths, knots, 3, channels).
        lengths: (edges,).
        r_max: cutoff in Å.
        tables: of each edge, (edges,).
        paths: of one table.
    """
    # Without asking which edges a table has, for which the host would have to wait for a card.
    several = knots.view(-1, paths, *knots.shape[1:])
    step = r_max / (knots.shape[1] - 1)
    position = lengths / step
    index = position.detach().long().clamp(0, knots.shape[1] - 2)
    low, high = several[tables, :, index], several[tables, :, index + 1]
    return _between(low, high, position - index, step) * (lengths < r_max)[:, None, None]


def hermite(t: Tensor, step: float) -> list[Tensor]:
    """Weights of value, slope and curvature at the lower knot, then at the upper one, at 0 <= t <= 1 between them."""
    s = 1 - t

    def lower(u: Tensor, v: Tensor) -> list[Tensor]:
        return [v**3 * (1 + 3 * u + 6 * u * u), v**3 * u * (1 + 3 * u) * step, v**3 * u * u * (0.5 * step * step)]

    upper = lower(s, t)
    return [*lower(t, s), upper[0], -upper[1], upper[2]]
