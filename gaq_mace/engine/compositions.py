"""Which atoms a structure has: sorted by species, with the radial tables of their pairs, and kept from step to step."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaq.caches import Cache
from gaq.kernels import gpu

__all__ = ["COMPOSITIONS", "MOST_SPECIES", "Composition", "Compositions", "Knots"]

COMPOSITIONS = 8
"""Orders of atoms that are kept."""
MOST_SPECIES = 8
"""On a card, radial tables for all pairs of the species that are there, up to so many species; for more the pairs that
edges join are looked up in every step."""

Knots = tuple[Tensor, "Tensor | None"]
"""Radial tables of a layer, and those of its density."""


@dataclass(frozen=True)
class Composition:
    """Which atoms a structure has, and in which order: what of a step does not change while atoms only move.

    Attributes:
        key: the species of the atoms, as bytes.
        species: number of each atom's species, (atoms,), as the structure has them.
        by_species: atoms sorted by species, (atoms,); place: where each atom stands in that order.
        ordered: species in that order.
        bounds: species, first atom and end of each slice of equal species.
        tables: number of the radial table of a pair of species, (species, species); None where there is one table, or
            the edges have to be looked at.
        knots: the tables of each layer; None where the edges have to be looked at.
    """

    key: bytes
    species: Tensor
    by_species: Tensor
    place: Tensor
    ordered: Tensor
    bounds: list[tuple[int, int, int]]
    tables: Tensor | None
    knots: list[Knots] | None


class Compositions:
    """The compositions met lately.

    Args:
        layers: of the engine, for their radial tables.
    """

    def __init__(self, layers: torch.nn.ModuleList) -> None:
        self.layers = layers
        self.kept: Cache[tuple[bytes, torch.device], Composition] = Cache(COMPOSITIONS)
        self.last: tuple[weakref.ref[Tensor], int, Composition] | None = None

    def __call__(self, attributes: Tensor) -> Composition:
        """What is known of a structure from its atoms, (atoms, species) as one-hot vectors."""
        known = not attributes.is_inference()
        # Read once: another thread may put its own in this place.
        last = self.last
        if known and last is not None and last[0]() is attributes and last[1] == attributes._version:
            return last[2]
        species = attributes.argmax(dim=1)
        # Here the host waits for the card.
        listed = species.cpu().numpy()
        key = listed.tobytes(), attributes.device
        counts = np.bincount(listed).tolist()
        own = self.kept.get(key, lambda: self._sorted(key[0], species, counts, attributes))
        self.last = (weakref.ref(attributes), attributes._version, own) if known else None
        return own

    def _sorted(self, key: bytes, species: Tensor, counts: list[int], like: Tensor) -> Composition:
        by_species = torch.argsort(species, stable=True)
        place = torch.empty_like(by_species)
        place[by_species] = torch.arange(by_species.numel(), device=place.device)
        bounds, start = [], 0
        for z, count in enumerate(counts):
            if count:
                bounds.append((z, start, start + count))
            start += count
        radial_tables: Any = self.layers[0].radial
        pairs: tuple[int, ...] | None = (0,)
        tables = None
        if radial_tables.by_species:
            present = [z for z, _, _ in bounds]
            pairs = None
            # On the CPU nothing waits, and only tables of pairs that are met need be made.
            if gpu.chosen(species.device) and 0 < len(present) <= MOST_SPECIES:
                pairs = tuple(sorted({radial_tables.code(a, b) for a in present for b in present}))
                numbers = torch.zeros(radial_tables.elements, radial_tables.elements, dtype=torch.int64)
                for first in present:
                    for second in present:
                        numbers[first, second] = pairs.index(radial_tables.code(first, second))
                tables = numbers.to(species.device)
        layers: Any = self.layers
        knots = None if pairs is None else [layer.tables(pairs, like) for layer in layers]
        return Composition(key, species, by_species, place, species[by_species], bounds, tables, knots)

    def tables(self, own: Composition, edges: Tensor, like: Tensor) -> tuple[list[Knots], Tensor | None]:
        """The radial tables of each layer, and the number of each edge's; of no interest to most models."""
        if own.knots is not None:
            return own.knots, None if own.tables is None else own.tables[own.species[edges[0]], own.species[edges[1]]]
        radial_tables: Any = self.layers[0].radial
        first, second = own.species[edges[0]], own.species[edges[1]]
        codes = torch.minimum(first, second) * radial_tables.elements + torch.maximum(first, second)
        found, numbers = torch.unique(codes, return_inverse=True)
        # Without edges any table will do.
        pairs = tuple(found.tolist()) or (0,)
        layers: Any = self.layers
        return [layer.tables(pairs, like) for layer in layers], numbers
