"""Features at places where the local frame is nearly undetermined."""

from __future__ import annotations

import torch
from torch import Tensor

from gaq.quantizers.frames import mixtures


def nearly_dependent(dimension: int, channels: int, missing: int, left: float) -> Tensor:
    """Features, shape (atoms, channels, dimension), that span the whole space, unlike their mixtures.

    Of the mixtures that give the local frame the last `missing` keep only the share `left` of what the others do not
    span: a place that atoms pass again and again as they move.
    """
    generator = torch.Generator().manual_seed(dimension)
    x = torch.randn(60, channels, dimension, dtype=torch.float64, generator=generator)
    mixing = mixtures(dimension, channels)[: 2 if dimension == 3 else dimension]
    kept = len(mixing) - missing
    references = mixing @ x
    axes = torch.linalg.qr(references[:, :kept].transpose(1, 2)).Q
    outside = references - (references @ axes) @ axes.transpose(1, 2)
    outside[:, :kept] = 0.0
    return x - (1 - left) * torch.linalg.pinv(mixing) @ outside
