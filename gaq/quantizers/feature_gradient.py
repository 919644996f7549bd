"""Rounding of features in one node of the autograd graph, with its gradient.

`gaq.quantizers.features.FeatureQuantizer` takes it where no second derivative is needed. This module is embedded in
packages: it imports nothing but torch and the core.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gaq.quantizers.magnitudes import atom_range
from gaq.untyped import Context

__all__ = ["Piece", "RoundFeatures"]


class Piece(NamedTuple):
    """One irrep within the feature axis, and how it is rounded.

    Attributes:
        start: first element in the feature axis.
        size: number of elements in the feature axis.
        multiplicity: number of channels.
        dimension: 2 l + 1.
        limit: static range of each channel, shape (channels, 1).
        step: `limit` over `top`.
        top: largest code; 0 if the piece is not rounded.
        split: whether magnitude and direction are rounded separately.
        per_atom: whether the range is that of each atom, in place of `limit`.
        factor: factor on the range of each atom.
    """

    start: int
    size: int
    multiplicity: int
    dimension: int
    limit: Tensor
    step: Tensor
    top: float
    split: bool
    per_atom: bool
    factor: float


class Quantizer(Protocol):
    """What `RoundFeatures` reads of a feature quantizer."""

    channels_first: bool

    def active_pieces(self, dtype: torch.dtype) -> list[Piece]: ...

    def nearest_direction(self, vector: Tensor, dimension: int) -> Tensor: ...


class RoundFeatures(torch.autograd.Function):
    """Rounds all pieces of a tensor in one node of the graph, with the gradient written out.

    The number of operations sets the time of a small molecule's step; this node takes about half as many as the plain
    operations. Its values are theirs, and its gradient is that of `gaq.quantizers.magnitudes.round_linear` and
    `gaq.quantizers.directions.round_vector`. The second derivative treats their Jacobians as constant, which is right
    to the order of the rounding error.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]  # torch declares any arguments
        x: Tensor, quantizer: Quantizer
    ) -> tuple[Tensor, ...]:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        saved: list[Tensor] = []
        for piece in quantizer.active_pieces(x.dtype):
            target = out[..., piece.start : piece.start + piece.size]
            values = x[..., piece.start : piece.start + piece.size]
            if not quantizer.channels_first:
                values = values.reshape(-1, piece.multiplicity, piece.dimension)
                target = target.view(-1, piece.multiplicity, piece.dimension)
            if piece.top == 0.0:
                target.copy_(values)
            elif not piece.split:
                limit, step = piece.limit, piece.step
                if piece.per_atom:
                    limit = atom_range(values.abs()).unsqueeze(-1) * piece.factor
                    step = limit / piece.top
                target.copy_((values / step).round_().clamp_(-piece.top, piece.top).mul_(step))
                saved.append((values.abs() <= limit).to(x.dtype))
            else:
                length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
                limit, step = piece.limit, piece.step
                if piece.per_atom:
                    limit = atom_range(length).unsqueeze(-1) * piece.factor
                    step = limit / piece.top
                rounded_length = (length / step).round_().clamp_(max=piece.top).mul_(step)
                unit = values / length.clamp_min(torch.finfo(x.dtype).tiny)
                rounded_unit = quantizer.nearest_direction(values, piece.dimension)
                target.copy_(rounded_length * rounded_unit)
                # A length that rounds to zero has no direction left to project on: the gradient passes unchanged.
                rounds_to_zero = rounded_length == 0
                stretch = (rounded_length / length).masked_fill_(rounds_to_zero, 1.0)
                radial = torch.where(rounds_to_zero, unit, rounded_unit) * (length <= limit) - stretch * unit
                saved += [radial, unit, stretch]
        return (out, *saved)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Quantizer], output: tuple[Tensor, ...]) -> None:
        ctx.channels_first = inputs[1].channels_first
        ctx.pieces = inputs[1].active_pieces(inputs[0].dtype)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, None]:
        saved = list(ctx.saved_tensors)
        parts = []
        for piece in ctx.pieces:
            values = gradients[0][..., piece.start : piece.start + piece.size]
            shape = values.shape
            if not ctx.channels_first:
                values = values.reshape(-1, piece.multiplicity, piece.dimension)
            if piece.top > 0.0 and not piece.split:
                values = values * saved.pop(0)
            elif piece.top > 0.0:
                # J = u_q u^T + s (1 - u u^T), so J^T g = u ((u_q - s u) . g) + s g.
                radial, unit, stretch = saved.pop(0), saved.pop(0), saved.pop(0)
                values = unit * (radial * values).sum(-1, keepdim=True) + stretch * values
            parts.append(values.reshape(shape))
        return torch.cat(parts, -1), None
