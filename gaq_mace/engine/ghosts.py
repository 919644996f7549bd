"""Steps on a part of space, as LAMMPS divides it among its processes: local atoms, and ghosts that only send.

A ghost is an atom of another part, or a periodic image. In the first layer its species is all that neighbours see of
it. After that, what edges read of it is what its own part has computed, which LAMMPS copies; on the way back the
gradients of ghosts are added to those of the atoms that they stand for. MACE exchanges features at the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gaq.untyped import Context

__all__ = ["Exchanged", "Exchanges", "OfSpecies", "Part", "Senders"]


class Exchanges(Protocol):
    """What LAMMPS's object of a step (`MLIAPDataPy`) can do with values of local atoms and ghosts, (atoms, length)."""

    def forward_exchange(self, source: Tensor, target: Tensor, length: int) -> object:
        """Copy the rows of local atoms, and to each ghost the row of the atom that it stands for."""

    def reverse_exchange(self, source: Tensor, target: Tensor, length: int) -> object:
        """Copy the rows of local atoms, and add to them the rows of the ghosts that stand for them."""


@dataclass(frozen=True)
class Part:
    """Atoms of a step on a part of space.

    Attributes:
        local: number of local atoms, which come first. They receive.
        species: of all atoms, local ones and ghosts, (atoms,). All send.
        lammps: LAMMPS's object of the step.
    """

    local: int
    species: Tensor
    lammps: Exchanges


class Senders(Protocol):
    """Gives what edges read of all atoms, from what a layer has made of the local ones."""

    def __call__(self, x: Tensor, up: Callable[[Tensor], Tensor]) -> Tensor:
        """Return features of all atoms, (atoms, rows, channels).

        Args:
            x: of the local atoms, sorted by species.
            up: what the layer makes such features with, of its inputs.
        """


@dataclass(frozen=True)
class OfSpecies:
    """Before the first layer all atoms of a species have the same features.

    Attributes:
        rows: of each species, (species, 1, channels).
        species: of all atoms, (atoms,).
    """

    rows: Tensor
    species: Tensor

    def __call__(self, x: Tensor, up: Callable[[Tensor], Tensor]) -> Tensor:
        return up(self.rows).index_select(0, self.species)


@dataclass(frozen=True)
class Exchanged:
    """After the first layer LAMMPS copies the features of ghosts.

    Attributes:
        part: of space.
        place: position of each local atom in the order sorted by species, (local,).
    """

    part: Part
    place: Tensor

    def __call__(self, x: Tensor, up: Callable[[Tensor], Tensor]) -> Tensor:
        rows = x.index_select(0, self.place).flatten(1)
        sent: Tensor = _Exchange.apply(rows, self.part)
        return sent.view(-1, *x.shape[1:])


class _Exchange(torch.autograd.Function):
    """Rows of local atoms to rows of all atoms, and gradients back."""

    @staticmethod
    def forward(ctx: Context, rows: Tensor, part: Part) -> Tensor:
        ctx.part = part
        source = rows.new_zeros(part.species.shape[0], rows.shape[1])
        source[: part.local] = rows
        target = torch.empty_like(source)
        part.lammps.forward_exchange(source, target, rows.shape[1])
        return target

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        source = grad.contiguous()
        target = torch.empty_like(source)
        ctx.part.lammps.reverse_exchange(source, target, source.shape[1])
        return target[: ctx.part.local], None
