"""Feature layouts of the kernels, (atoms, rows, channels), and of e3nn, and quantizers in either layout."""

from __future__ import annotations

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from torch import Tensor

from gaq.kernels import rounding
from gaq.quantizers.features import FeatureQuantizer

__all__ = ["Rounder", "from_mul_ir", "rows_of", "to_mul_ir"]


def rows_of(irreps: o3.Irreps) -> list[slice]:
    """Rows of each block's components in the layout (atoms, rows, channels)."""
    rows, start = [], 0
    for _, ir in irreps:
        rows.append(slice(start, start + ir.dim))
        start += ir.dim
    return rows


def to_mul_ir(x: Tensor, rows: list[slice]) -> Tensor:
    """Bring features (atoms, rows, channels) into e3nn's layout, (atoms, irreps.dim)."""
    return torch.cat([x[:, r].transpose(1, 2).reshape(x.shape[0], -1) for r in rows], dim=1)


def from_mul_ir(x: Tensor, rows: list[slice], channels: int) -> Tensor:
    """Bring features (atoms, irreps.dim) from e3nn's layout into (atoms, rows, channels)."""
    parts, start = [], 0
    for r in rows:
        size = (r.stop - r.start) * channels
        parts.append(x[:, start : start + size].view(x.shape[0], channels, -1).transpose(1, 2))
        start += size
    return torch.cat(parts, dim=1)


class Rounder:
    """A quantizer for e3nn's layout, applied to features in the layout of the kernels.

    Args:
        quantizer: of the model; None leaves features as they are.
        irreps: of the quantizer's layout.
        channels: of every block.
    """

    def __init__(self, quantizer: FeatureQuantizer | None, irreps: o3.Irreps, channels: int) -> None:
        self.quantizer, self.channels = quantizer, channels
        self.rows = rows_of(irreps)
        total = self.rows[-1].stop if self.rows else 0
        pieces = [
            rounding.Piece(r.stop - r.start, channels, r.start * channels, total * channels, channels)
            for r in self.rows
        ]
        self.plan = None if quantizer is None else rounding.plan(quantizer, pieces)

    def __call__(self, x: Tensor) -> Tensor:
        """Round features (atoms, rows, channels)."""
        if self.quantizer is None:
            return x
        if self.plan is not None:
            return rounding.round_features(x, self.plan, x.shape[0])
        return from_mul_ir(self.quantizer(to_mul_ir(x, self.rows)), self.rows, x.shape[2])
