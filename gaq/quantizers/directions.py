"""Rounding of vectors (l > 0): magnitude and direction separately."""

from __future__ import annotations

import torch
from torch import Tensor

from gaq.codebooks.cube import cube_quantize
from gaq.codebooks.pyramid import octahedral_quantize
from gaq.codebooks.tables import nearest_direction
from gaq.quantizers.magnitudes import round_linear

__all__ = ["round_vector"]


def round_vector(
    v: Tensor,
    limit: Tensor,
    magnitude_top: float,
    levels: int,
    table: Tensor,
    dimension: int,
    axes: Tensor | None = None,
) -> Tensor:
    """Round the magnitude and the direction of vectors separately (magnitude-direction quantization).

    The value is ``round(|v|) * round(v / |v|)``. The gradient is straight-through *on the sphere*: with
    ``u = v / |v|`` the Jacobian is ``u_q u^T + (m_q / m)(1 - u u^T)``. Radial changes pass through the rounded
    magnitude, tangential ones through the rounded direction (the geometric straight-through estimator of arXiv
    2603.05343; the Jacobian is our derivation). A vector whose magnitude rounds to zero becomes exactly zero and passes
    gradients unchanged: it has no direction to project on.

    Args:
        v: vectors, shape (..., channels, 2 l + 1).
        limit: largest magnitude of each channel, shape (channels,).
        magnitude_top: largest magnitude code.
        levels: levels of the octahedral and the cube code, from `gaq.codebooks.direction_levels`.
        table: directions of a tabulated codebook, shape (size, 3), used for l = 1 unless it is empty.
        dimension: 2 l + 1 (an argument, because a traced tensor does not know its shape).
        axes: axes of the direction code, shape (batch, 2 l + 1, 2 l + 1), from `gaq.quantizers.frames.local_frame`;
            None for those of the laboratory.

    Returns:
        Rounded vectors, the shape of `v`.
    """
    square = (v * v).sum(-1, keepdim=True)
    present = square > 0
    magnitude = torch.sqrt(torch.where(present, square, torch.ones_like(square)))
    direction = v / magnitude
    vector = v.detach()
    if axes is not None:
        vector = torch.matmul(vector, axes.transpose(1, 2))
    if dimension != 3:
        nearest = cube_quantize(vector, levels)
    elif table.numel() > 0:
        nearest = nearest_direction(table, vector)
    else:
        nearest = octahedral_quantize(vector, levels)
    if axes is not None:
        nearest = torch.matmul(nearest, axes)
    rounded_direction = direction + (nearest - direction).detach()
    rounded_magnitude = round_linear(magnitude, limit.unsqueeze(-1), magnitude_top, False)
    kept = present & (rounded_magnitude > 0)
    return torch.where(kept, rounded_magnitude * rounded_direction, v - v.detach())
