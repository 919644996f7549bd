"""Rounding of node or edge features where they lie, in the layout of the kernels or of the framework.

The values are those of `gaq.quantizers.features.FeatureQuantizer` with per-atom ranges. The gradient passes unchanged,
as it does there from 14 bits on. Coarser steps, static ranges and tabulated codebooks are not served: `plan` returns
None, and the caller has to use the quantizer itself.

`reference` calls the quantizer on features that are brought into its layout and back. `rounded` is a torch operation in
the framework's layout, which a compiled file carries as a static library (`shims.cpp`): a compiler would turn the
quantizer's plain operations into several passes over memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gaq.kernels import gpu
from gaq.kernels.cpu import native
from gaq.kernels.cpu.native import kernel
from gaq.quantizers.features import FeatureQuantizer
from gaq.untyped import Context

__all__ = ["Piece", "Plan", "own_layout", "plan", "reference", "round_features", "rounded"]

COMPONENTS = (1, 3, 5, 7, 9)
WORDS = 9
"""Integers of a piece in a plan."""
SERIAL = 1 << 15
"""Number of features that one thread rounds in some ten microseconds."""


@dataclass(frozen=True)
class Piece:
    """Place of one irrep's features in a tensor. Offsets and strides are in elements.

    Attributes:
        dimension: 2l + 1.
        channels: multiplicity.
        offset: constant part of the first element's offset.
        atom_stride: from one atom to the next.
        row_stride: from one component to the next.
        scaled_offset: part of the first element's offset that is multiplied by the number of atoms.
        channel_stride: from one channel to the next.
    """

    dimension: int
    channels: int
    offset: int
    atom_stride: int
    row_stride: int
    scaled_offset: int = 0
    channel_stride: int = 1


@dataclass(frozen=True)
class Plan:
    """Pieces to round, as the C++ code reads them.

    Attributes:
        ints: number of pieces, row length of the mixtures, and `WORDS` integers for each piece.
        reals: largest codes of the pieces, and the mixtures.
        copied: pieces that are copied without rounding.
    """

    ints: Tensor
    reals: Tensor
    copied: tuple[Piece, ...] = ()
    # A plain dictionary, because compilers trace through it: one entry for each device in use.
    _tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Tables that the GPU kernel reads, copied to a device once: integers, largest codes, mixtures."""
        if device not in self._tables:
            count, stride = (int(n) for n in self.ints[:2])
            rows = self.ints[2:].view(count, WORDS)
            if any(p.channel_stride != 1 for p in self.copied) or bool((rows[:, -1] != 1).any()):
                raise ValueError("the GPU kernel rounds features whose channels lie side by side")
            copied = [
                [p.scaled_offset, p.offset, p.dimension, p.channels, p.atom_stride, p.row_stride, 0, 0]
                for p in self.copied
            ]
            tops = torch.cat([self.reals[:count], torch.zeros(len(copied), dtype=torch.float64)])
            words = torch.cat([rows[:, :-1], torch.tensor(copied, dtype=torch.int64).view(-1, 8)])
            mixing = self.reals[count:].view(-1, stride) if stride else torch.zeros(1, 1, dtype=torch.float64)
            self._tables[device] = (words.to(device), tops.to(device), mixing.to(device))
        return self._tables[device]

    @functools.cached_property
    def summary(self) -> tuple[int, bool, int]:
        """Constants for which the GPU kernel is compiled.

        Returns:
            Integer whose bit d tells whether irreps of d components are rounded; whether directions are coded in the
            local frame; number of an atom's elements in all pieces.
        """
        rows = self.ints[2:].view(-1, WORDS).tolist()
        dimensions = 0
        for row in rows:
            dimensions |= 1 << row[2]
        covered = sum(row[2] * row[3] for row in rows) + sum(p.dimension * p.channels for p in self.copied)
        return dimensions, any(row[6] for row in rows), covered


def merge_scalars(pieces: Sequence[Piece]) -> list[Piece] | None:
    """Merge consecutive scalar pieces, as the quantizer does; None where they do not lie side by side."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        side_by_side = piece.channel_stride == 1
        if last is not None and last.dimension == piece.dimension == 1 and side_by_side:
            if piece.offset != last.offset + last.channels or piece.scaled_offset != last.scaled_offset:
                return None
            merged[-1] = Piece(
                1, last.channels + piece.channels, last.offset, last.atom_stride, last.row_stride, last.scaled_offset
            )
        else:
            merged.append(piece)
    return merged


def plan(quantizer: FeatureQuantizer, pieces: Sequence[Piece]) -> Plan | None:
    """Plan the rounding of a quantizer by the kernel; None where the kernel cannot do it.

    Args:
        quantizer: of a converted model.
        pieces: place of each irrep of the quantizer's layout, in its order.
    """
    merged = merge_scalars(pieces)
    served = quantizer.passes_through and not quantizer.differentiable_twice
    if merged is None or not served or quantizer.direction_table.numel():
        return None
    if [(abs(m), d) for m, d in zip(quantizer.multiplicities, quantizer.dimensions, strict=True)] != [
        (p.channels, p.dimension) for p in merged
    ]:
        return None
    ints: list[int] = []
    tops: list[float] = []
    copied: list[Piece] = []
    for multiplicity, piece in zip(quantizer.multiplicities, merged, strict=True):
        scalar = piece.dimension == 1
        on = quantizer.round_scalars and quantizer.scalars_enabled
        if not scalar:
            on = quantizer.round_vectors and quantizer.vectors_enabled
        if multiplicity < 0 or not on:
            copied.append(piece)
            continue
        if piece.dimension not in COMPONENTS or not (scalar or quantizer.split):
            return None
        ints += [piece.scaled_offset, piece.offset, piece.dimension, piece.channels, piece.atom_stride]
        ints += [piece.row_stride, int(quantizer.local_frame), quantizer.levels, piece.channel_stride]
        tops.append(quantizer.scalar_top if scalar else quantizer.magnitude_top / quantizer.vector_range_factor)
    mixing = quantizer.mixing.double().cpu()
    stride = mixing.shape[1] if mixing.dim() == 2 else 0
    reals = torch.cat([torch.tensor(tops, dtype=torch.float64), mixing.flatten()])
    return Plan(torch.tensor([len(tops), stride, *ints], dtype=torch.int64), reals, tuple(copied))


def own_layout(quantizer: FeatureQuantizer) -> list[Piece]:
    """Pieces of the layout in which the quantizer itself is called."""
    total = sum(
        d if quantizer.channels_first else abs(m) * d
        for m, d in zip(quantizer.multiplicities, quantizer.dimensions, strict=True)
    )
    if quantizer.channels_first:
        atom_stride, channel_stride = total * abs(quantizer.multiplicities[0]), total
    else:
        atom_stride, channel_stride = total, None
    pieces = []
    offset = 0
    for m, d in zip(quantizer.multiplicities, quantizer.dimensions, strict=True):
        pieces.append(Piece(d, abs(m), offset, atom_stride, 1, channel_stride=channel_stride or d))
        offset += d if quantizer.channels_first else abs(m) * d
    return pieces


def _call(features: Tensor, ints: Tensor, reals: Tensor, atoms: int) -> Tensor:
    result = features.clone()
    kernel("round", features.dtype)(
        ints.data_ptr(),
        reals.data_ptr(),
        atoms,
        features.data_ptr(),
        result.data_ptr(),
        # With few features, threads cost more time than they save.
        min(torch.get_num_threads(), 1 + features.numel() // SERIAL),
    )
    return result


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]  # torch declares *args
        ctx: torch.autograd.function.FunctionCtx, features: Tensor, rounding_plan: Plan, atoms: int
    ) -> Tensor:
        return _call(features.contiguous(), rounding_plan.ints, rounding_plan.reals, atoms)

    @staticmethod
    def backward(  # type: ignore[override]  # torch declares *args
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        return grad, None, None


def round_features(features: Tensor, rounding_plan: Plan, atoms: int) -> Tensor:
    """Round features; shape and dtype (float32 or float64) stay. The gradient passes unchanged.

    Args:
        features: of any shape; the plan has the places of the irreps.
        rounding_plan: from `plan`.
        atoms: number of atoms.
    """
    if gpu.chosen(features.device):
        from gaq.kernels.gpu import rounding as gpu_rounding

        tables = rounding_plan.tables(features.device)
        return gpu_rounding.round_features(features, tables, atoms, *rounding_plan.summary)
    return _Round.apply(features, rounding_plan, atoms)  # type: ignore[no-any-return]  # untyped in torch


@native.operation("rounded")
def _rounded(features: Tensor, ints: Tensor, reals: Tensor) -> Tensor:
    return _call(features.contiguous(), ints.contiguous(), reals.contiguous(), features.shape[0])


@_rounded.register_fake
def _rounded_fake(features: Tensor, ints: Tensor, reals: Tensor) -> Tensor:
    return features.new_empty(features.shape)


def _pass(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


_rounded.register_autograd(_pass)


def rounded(features: Tensor, ints: Tensor, reals: Tensor) -> Tensor:
    """Round features on the CPU by an operation that can be traced and compiled; the gradient passes unchanged.

    Args:
        features: (atoms or edges, ...), float32 or float64, in the layout of `own_layout`.
        ints, reals: of a `Plan` for that layout.
    """
    return torch.ops.gaq.rounded(features, ints, reals)  # type: ignore[no-any-return]  # untyped in torch


def reference(features: Tensor, quantizer: FeatureQuantizer, pieces: Sequence[Piece], atoms: int) -> Tensor:
    """Round features through the quantizer itself."""
    flat = features.reshape(-1)
    places = []
    for piece in pieces:
        atom = torch.arange(atoms)[:, None, None] * piece.atom_stride
        channel = torch.arange(piece.channels)[None, :, None] * piece.channel_stride
        row = torch.arange(piece.dimension)[None, None, :] * piece.row_stride
        places.append((piece.scaled_offset * atoms + piece.offset + atom + channel + row).reshape(atoms, -1))
    index = torch.cat(places, dim=1)
    rounded = flat.index_put((index.reshape(-1),), quantizer(flat[index]).reshape(-1))
    return rounded.view(features.shape)
