"""Rounding of invariant numbers: scalars, magnitudes, single components.

Rounding an invariant keeps a model equivariant whatever the step. The functions consist of plain torch operations and
can be differentiated to any order. Gradients pass straight through inside the range and are zero outside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["atom_range", "round_linear"]


def atom_range(sizes: Tensor) -> Tensor:
    """Range of each atom: its largest size, times 1.000001 so that rounding cannot put that size outside.

    Args:
        sizes: shape (batch, channels, components), >= 0.

    Returns:
        Shape (batch, 1), positive.
    """
    return sizes.amax((1, 2)).unsqueeze(-1).clamp_min(1e-30) * 1.000001


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
