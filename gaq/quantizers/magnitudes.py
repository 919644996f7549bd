"""The ruler: rounding of invariant numbers (scalars, magnitudes, single components).

Rounding an invariant keeps equivariance whatever the step. All functions work in plain torch
operations, at any derivative order, and pass gradients straight through inside the range and not at all
outside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_linear"]


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
