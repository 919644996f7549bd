"""The ruler: rounding of invariant numbers (scalars, magnitudes, single components).

Rounding an invariant keeps equivariance whatever the step. All functions work in plain torch
operations, at any derivative order, and pass gradients straight through inside the range and not at all
outside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_linear", "round_log_magnitude"]


def round_linear(x: Tensor, limit: Tensor, top: float, signed: bool) -> Tensor:
    """Round to the nearest of equally spaced values.

    Args:
        x: numbers to round.
        limit: largest representable size, positive, broadcastable to `x`.
        top: number of steps between 0 and `limit`.
        signed: whether negative values exist; if not, `x` must be >= 0.

    Returns:
        Rounded numbers, the shape of `x`; zero stays exactly zero.
    """
    step = limit / top
    y = (x / step).clamp(-top if signed else 0.0, top)
    return (y + (torch.round(y) - y).detach()) * step


def round_log_magnitude(m: Tensor, limit: Tensor, top: float, log_range: float = 4096.0) -> Tensor:
    """Round magnitudes on a logarithmic scale: the relative error is the same at every size.

    Code 0 is exactly zero; codes 1 to `top` run from ``limit / log_range`` to ``limit``, evenly in the
    logarithm. Sizes under half the smallest one become zero.

    Args:
        m: magnitudes >= 0.
        limit: largest representable magnitude, positive, broadcastable.
        top: largest code.
        log_range: ratio of the largest to the smallest magnitude that the code can tell from zero.

    Returns:
        Rounded magnitudes, the shape of `m`.
    """
    clipped = torch.minimum(m, limit)
    ratio = (clipped / limit).clamp_min(1.0 / log_range)
    span = torch.log(torch.full_like(limit, log_range))
    code = torch.round(torch.log(ratio) / span * (top - 1.0))
    rounded = limit * torch.exp(code * span / (top - 1.0))
    rounded = torch.where(clipped * (2.0 * log_range) < limit, torch.zeros_like(rounded), rounded)
    return clipped + (rounded - clipped).detach()
