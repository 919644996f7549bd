"""Layouts of features, the (atoms, rows, channels) of the kernels and that of e3nn, and quantizers in either."""

from __future__ import annotations

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from torch import Tensor

from gaq.kernels import rounding
from gaq.quantizers.features import FeatureQuantizer

__all__ = ["Rounder", "from_mul_ir", "rows_of", "to_mul_ir"]


def rows_of(irreps: o3.Irreps) -> list[slice]:
    """Where the components of each block lie in the layout (atoms, rows, channels)."""
    found, start = [], 0
    for _, ir in irreps:
        found.append(slice(start, start + ir.dim))
        start += ir.dim
    return found


def to_mul_ir(x: Tensor, rows: list[slice]) -> Tensor:
    """(atoms, rows, channels) to e3nn's layout (atoms, irreps.dim)."""
    return torch.cat([x[:, r].transpose(1, 2).reshape(x.shape[0], -1) for r in rows], dim=1)


def from_mul_ir(x: Tensor, rows: list[slice], channels: int) -> Tensor:
    parts, start = [], 0
    for r in rows:
        size = (r.stop - r.start) * channels
        parts.append(x[:, start : start + size].view(x.shape[0], channels, -1).transpose(1, 2))
        start += size
    return torch.cat(parts, dim=1)


class Rounder:
    """A quantizer of features in e3nn's layout, applied to those of the kernels.

    Args:
        quantizer: as the model has it, or None.
        irreps: of its layout.
        channels: of every block.
    """

    def __init__(self, quantizer: FeatureQuantizer | None, irreps: o3.Irreps, channels: int) -> None:
        self.quantizer = quantizer
        self.rows = rows_of(irreps)
        total = self.rows[-1].stop if self.rows else 0
        pieces = [
            rounding.Piece(r.stop - r.start, channels, r.start * channels, total * channels, channels)
            for r in self.rows
        ]
        self.plan = None if quantizer is None else rounding.plan(quantizer, pieces)

    def __call__(self, x: Tensor) -> Tensor:
        """(atoms, rows, channels), rounded."""
        if self.quantizer is None:
            return x
        if self.plan is not None:
            return rounding.round_features(x, self.plan, x.shape[0])
        return from_mul_ir(self.quantizer(to_mul_ir(x, self.rows)), self.rows, x.shape[2])
