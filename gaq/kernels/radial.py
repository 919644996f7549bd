"""Radial functions as tables: cubic Hermite interpolation of value and slope.

The weights a radial network gives to an edge are functions of its length alone (of one pair of species at most), so they
are tabulated at equal steps of r and interpolated by the C1 spline that has the network's own values and slopes at the
knots. Forces differentiate the spline itself: they are the exact gradient of the energy that is computed.

The error of the value is h^4/384 max|f''''|; it is measured between the knots, and the step is halved until it is
below `TOLERANCE` of the largest value, which is what float32 arithmetic resolves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RadialTable", "TOLERANCE", "evaluate", "tabulate"]

TOLERANCE = 2e-7
FEWEST, MOST = 129, 4097


@dataclass(frozen=True)
class RadialTable:
    """A tabulated radial function.

    Attributes:
        knots: values and slopes (1/Å), shape (paths, knots, 2, channels), float64.
        r_max: cutoff in Å; the knots lie at equal steps from 0 to it.
        error: largest difference to the function between knots, relative to its largest value.
        slope_error: the same of the slope.
    """

    knots: Tensor
    r_max: float
    error: float
    slope_error: float


def _value_and_slope(function: Callable[[Tensor], Tensor], lengths: Tensor) -> tuple[Tensor, Tensor]:
    lengths = lengths.detach()
    with torch.enable_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(lengths, torch.ones_like(lengths))
        value, slope = torch.autograd.forward_ad.unpack_dual(function(dual))
    if slope is None:
        slope = torch.zeros_like(value)
    return value.detach(), slope.detach()


def tabulate(function: Callable[[Tensor], Tensor], r_max: float, tolerance: float = TOLERANCE) -> RadialTable:
    """A table of a radial function, as fine as it has to be.

    Args:
        function: lengths (n,) in Å, float64, to weights (n, paths, channels).
        r_max: cutoff in Å.
        tolerance: largest error between knots, relative to the largest value.

    Raises:
        ValueError: if 4097 knots do not suffice: the function is not smooth.
    """
    count = FEWEST
    while True:
        lengths = torch.linspace(0.0, r_max, count, dtype=torch.float64)
        # Bessel functions are regular at 0 but written sin(x)/x.
        lengths[0] = 1e-6 * r_max
        value, slope = _value_and_slope(function, lengths)
        knots = torch.stack([value, slope], dim=1).permute(2, 0, 1, 3).contiguous()
        between = (torch.arange(count - 1, dtype=torch.float64) + 0.5) * (r_max / (count - 1))
        # Atoms do not come closer than this, and a network may do anything there.
        between = between[between > 0.1]
        exact, exact_slope = _value_and_slope(function, between)
        found, found_slope = _value_and_slope(lambda r: evaluate(knots, r, r_max), between)
        error = float((found - exact).abs().max() / exact.abs().max())
        slope_error = float((found_slope - exact_slope).abs().max() / exact_slope.abs().max())
        if error <= tolerance:
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
    t = (position - index)[:, None, None]
    low, high = knots[:, index].transpose(0, 1), knots[:, index + 1].transpose(0, 1)
    s = 1 - t
    value = low[:, :, 0] * (1 + 2 * t) * s * s + low[:, :, 1] * (t * s * s * step)
    value = value + high[:, :, 0] * (t * t * (3 - 2 * t)) - high[:, :, 1] * (t * t * s * step)
    return value * (lengths < r_max)[:, None, None]
