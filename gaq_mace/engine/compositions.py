"""Species of a structure's atoms: sorted, with the radial tables of their pairs, and kept from step to step."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaq.caches import Cache
from gaq.kernels import gpu
from gaq_mace.engine.radial_tables import Knots, RadialTables

__all__ = ["COMPOSITIONS", "MOST_SPECIES", "Composition", "Compositions"]

COMPOSITIONS = 8
"""Compositions that are kept."""
MOST_SPECIES = 8
"""Most species for which, on a GPU, the radial tables of all pairs are made at once. With more species, each step looks
up the pairs that its edges join."""


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
        tables: number of the radial table of a pair of species, (species, species); None where there is only one
            table, or where it depends on the edges which tables are needed.
        knots: radial tables of each layer, None for one without tables; None where it depends on the edges which tables
            are needed.
    """

    key: bytes
    species: Tensor
    by_species: Tensor
    place: Tensor
    ordered: Tensor
    bounds: list[tuple[int, int, int]]
    tables: Tensor | None
    knots: list[Knots | None] | None


class Compositions:
    """Cache of the compositions used last.

    Args:
        layers: of the engine, for their radial tables.
    """

    def __init__(self, layers: torch.nn.ModuleList) -> None:
        self.layers = layers
        self.kept: Cache[tuple[bytes, torch.device], Composition] = Cache(COMPOSITIONS)
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
        radial_tables = self._radial_tables()
        pairs: tuple[int, ...] | None = (0,)
        tables = None
        if radial_tables is not None and radial_tables.by_species:
            present = [z for z, _, _ in bounds]
            pairs = None
            # On the CPU nothing has to wait for a look at the edges, and only the pairs that occur need tables.
            if gpu.chosen(species.device) and 0 < len(present) <= MOST_SPECIES:
                pairs = tuple(sorted({radial_tables.code(a, b) for a in present for b in present}))
                numbers = torch.zeros(radial_tables.elements, radial_tables.elements, dtype=torch.int64)
                for first in present:
                    for second in present:
                        numbers[first, second] = pairs.index(radial_tables.code(first, second))
                tables = numbers.to(species.device)
        knots = None if pairs is None else self._knots(pairs, like)
        return Composition(key, species, by_species, place, species[by_species], bounds, tables, knots)

    def tables(self, composition: Composition, edges: Tensor, like: Tensor) -> tuple[list[Knots | None], Tensor | None]:
        """Radial tables of a step.

        Args:
            composition: species of the atoms.
            edges: sender and receiver, (2, edges), in the order of the structure.
            like: has the dtype and device of the tables.

        Returns:
            The tables of each layer, None for one without tables, and the number of each edge's table; None where there
            is only one table.
        """
        species = composition.species
        if composition.knots is not None:
            if composition.tables is None:
                return composition.knots, None
            return composition.knots, composition.tables[species[edges[0]], species[edges[1]]]
        radial_tables = self._radial_tables()
        assert radial_tables is not None
        first, second = species[edges[0]], species[edges[1]]
        codes = torch.minimum(first, second) * radial_tables.elements + torch.maximum(first, second)
        occurring, numbers = torch.unique(codes, return_inverse=True)
        # Without edges any table will do.
        pairs = tuple(occurring.tolist()) or (0,)
        return self._knots(pairs, like), numbers

    def _radial_tables(self) -> RadialTables | None:
        """Radial tables of the first layer that has any: all layers number the pairs of species alike."""
        layers: Any = self.layers  # of `Layer`s; a ModuleList knows modules only
        return next((layer.radial for layer in layers if layer.radial is not None), None)

    def _knots(self, pairs: tuple[int, ...], like: Tensor) -> list[Knots | None]:
        layers: Any = self.layers  # of `Layer`s; a ModuleList knows modules only
        return [layer.tables(pairs, like) for layer in layers]
