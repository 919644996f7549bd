"""Species of a structure's atoms: sorted, with the radial tables of their pairs, and kept from step to step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gaq.caches import Cache
from gaq.kernels import gpu
from gaq.untyped import AnyModule
from gaq_mace.engine.edges import Tables
from gaq_mace.engine.pair_tables import PairTables
from gaq_mace.engine.reading import Unsupported

__all__ = ["COMPOSITIONS", "MOST_SPECIES", "Composition", "Compositions", "alone"]

COMPOSITIONS = 8
"""Compositions that are kept."""
MOST_SPECIES = 8
"""Most species for which, on a GPU, the radial tables of all pairs are made at once. With more species, each step looks
up the pairs that its edges join."""


Found = tuple[list[Tables], Tensor] | None


@dataclass(frozen=True)
class Composition:
    """Species of a structure's atoms and their order: the part of a step that does not change while atoms only move.

    Attributes:
        key: species of the atoms, as bytes.
        species: number of each atom's species, (atoms,), in the order of the structure.
        by_species: atoms sorted by species, (atoms,).
        place: position of each atom in the sorted order, (atoms,).
        ordered: species in the sorted order, (atoms,).
        bounds: species, first atom and end of each slice of equal species.
        places: number of the radial table of a pair of species, (species, species); None where there is only one
            table, or where it depends on the edges which tables are needed.
        tables: radial tables of each layer, None for one without tables; None where it depends on the edges which
            tables are needed.
    """

    key: bytes
    species: Tensor
    by_species: Tensor
    place: Tensor
    ordered: Tensor
    bounds: list[tuple[int, int, int]]
    places: Tensor | None
    tables: list[Tables | None] | None

    @functools.cached_property
    def slices(self) -> Tensor:
        """`bounds` as a tensor, (slices, 3), int64."""
        return torch.tensor(self.bounds, dtype=torch.int64).view(-1, 3)


def alone(species: Tensor) -> Composition:
    """Composition of atoms that are sorted already, whose pairs do not matter; species (atoms,) in ascending order."""
    every, firsts = torch.arange(species.numel()), torch.unique_consecutive(species, return_counts=True)
    ends = firsts[1].cumsum(0)
    bounds = list(zip(firsts[0].tolist(), (ends - firsts[1]).tolist(), ends.tolist(), strict=True))
    return Composition(b"", species, every, every, species, bounds, None, None)


class Compositions:
    """Cache of the compositions used last.

    Args:
        layers: of the engine, for their radial tables.
        device: of the tables.

    Attributes:
        pairs: radial tables of all layers; None where no layer has any.
    """

    def __init__(self, layers: AnyModule, device: torch.device) -> None:
        self.layers = layers
        self.kept: Cache[tuple[bytes, torch.device], Composition] = Cache(COMPOSITIONS)
        tabulated = [layer.radial for layer in layers if layer.radial is not None]
        self.pairs = PairTables(tabulated, device) if tabulated else None
        self.last: tuple[weakref.ref[Tensor], int, Composition] | None = None

    def __call__(self, attributes: Tensor) -> Composition:
        """Composition of a structure.

        Args:
            attributes: species of the atoms as one-hot vectors, (atoms, species).
        """
        # Tensors made in inference mode count no changes, so a later call could not tell that one has changed.
        versioned = not attributes.is_inference()
        # Read once: another thread may replace it.
        last = self.last
        if versioned and last is not None and last[0]() is attributes and last[1] == attributes._version:
            return last[2]
        species = attributes.argmax(dim=1)
        # Here the host waits for the GPU.
        listed = species.cpu().numpy()
        key = listed.tobytes(), attributes.device
        counts = np.bincount(listed).tolist()
        composition = self.kept.get(key, lambda: self._sorted(key[0], species, counts, attributes))
        self.last = (weakref.ref(attributes), attributes._version, composition) if versioned else None
        return composition

    def _sorted(self, key: bytes, species: Tensor, counts: list[int], like: Tensor) -> Composition:
        """Sort atoms by species, and look up the radial tables of their pairs."""
        by_species = torch.argsort(species, stable=True)
        place = torch.empty_like(by_species)
        place[by_species] = torch.arange(by_species.numel(), device=place.device)
        bounds, start = [], 0
        for z, count in enumerate(counts):
            if count:
                bounds.append((z, start, start + count))
            start += count
        places, tables = None, None
        if self.pairs is None or not self.pairs.by_species:
            tables = self._of_layers(None if self.pairs is None else self.pairs.made.tables)
        # On the CPU nothing has to wait for a look at the edges, and only the pairs that occur need tables.
        elif gpu.chosen(species.device) and 0 < len(bounds) <= MOST_SPECIES:
            found = self._found(self.pairs.of_species, [z for z, _, _ in bounds])
            if found is not None:
                tables, places = self._of_layers(found[0]), found[1]
        return Composition(key, species, by_species, place, species[by_species], bounds, places, tables)

    def tables(
        self, composition: Composition, edges: Tensor, species: Tensor | None = None
    ) -> tuple[list[Tables | None], Tensor | None]:
        """Radial tables of a step.

        Args:
            composition: species of the atoms.
            edges: sender and receiver, (2, edges), in the order of the structure.
            species: of the atoms that edges join, where they are others than those of the composition.

        Returns:
            The tables of each layer, None for one whose radial network is to be evaluated for each edge, and the
            number of each edge's table; None where there is at most one table.

        Raises:
            Unsupported: if the radial functions of a pair cannot be tabulated.
        """
        if composition.tables is not None and composition.places is None:
            return composition.tables, None
        of_atoms = composition.species if species is None else species
        pairs = of_atoms[edges[0]], of_atoms[edges[1]]
        if composition.tables is not None and composition.places is not None and species is None:
            return composition.tables, composition.places[pairs]
        assert self.pairs is not None
        found = self._found(self.pairs.of_edges, *pairs)
        return (self._of_layers(None), None) if found is None else (self._of_layers(found[0]), found[1])

    @staticmethod
    def _found(look_up: Callable[..., Found], *args: AnyModule) -> Found:
        """Tables that a function of `PairTables` finds or makes."""
        try:
            return look_up(*args)
        except ValueError as error:
            raise Unsupported(str(error)) from error

    def _of_layers(self, tables: list[Tables] | None) -> list[Tables | None]:
        """Put tables in the places of the layers that have some."""
        layers: AnyModule = self.layers  # of `Layer`s; a ModuleList knows modules only
        remaining = iter(tables or ())
        return [None if layer.radial is None else next(remaining, None) for layer in layers]
