"""Which pairs of species have radial tables, and where these lie: for all layers of an engine.

A table costs as much as some hundred evaluations of the radial network. Where the functions depend on the species of
both atoms, a step whose pairs have no tables yet evaluates the network for each of its edges instead. The tables are
made when the evaluations that they would have saved have cost as much, so at most twice the lesser cost is spent,
whether a structure is computed once or simulated.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gaq_mace.engine.edges import Tables
from gaq_mace.engine.radial_tables import RadialTables

__all__ = ["LIMIT", "PairTables"]

LIMIT = 2**30
"""Bytes of the tables of an engine. Structures whose pairs need more evaluate the radial network for each edge."""
EDGES_OF_AN_INTERVAL = 8
"""Edges for which evaluating the radial network, with its derivative, takes as long as making an interval's table."""


class _Made(NamedTuple):
    """Tables that exist. Never changed: threads read it while others make more.

    Attributes:
        codes: pairs of species, in the order of their tables.
        places: number of the table of a pair of species, -1 where there is none, (species, species).
        tables: of each layer, end to end.
    """

    codes: tuple[int, ...]
    places: Tensor
    tables: list[Tables]


class PairTables:
    """Radial tables of all layers, for the pairs of species that occur.

    Args:
        layers: those of an engine's layers that have tables; all number the species alike.
        device: of the tables.

    Attributes:
        by_species: whether there are several tables.
        made: the tables that exist.
    """

    def __init__(self, layers: Sequence[RadialTables], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.elements, self.by_species = layers[0].elements, layers[0].by_species
        # Memory of the tables of each layer's weights and densities, with room for more pairs than are made.
        self.banks: list[list[Tensor]] = []
        self.spent: dict[int, float] = {}
        self.lock = threading.RLock()
        self.made = _Made((), torch.full((self.elements, self.elements), -1, device=device), [])
        if not self.by_species:
            self._extend([0])

    def of_species(self, present: Sequence[int]) -> tuple[list[Tables], Tensor] | None:
        """Tables for all pairs of some species, and the number of each pair's table, (species, species).

        None where they take more memory than `LIMIT`.
        """
        codes = sorted({self._code(a, b) for a in present for b in present})
        with self.lock:
            if len(codes) > self._most():
                return None
            self._need(codes)
            return self.made.tables, self.made.places

    def of_edges(self, first: Tensor, second: Tensor) -> tuple[list[Tables], Tensor] | None:
        """Tables for the edges of a step, and the number of each edge's table, (edges,).

        None where evaluating the radial network for each edge costs less, or where tables take more memory than
        `LIMIT`.

        Args:
            first: species of one atom of each edge, (edges,).
            second: species of the other, (edges,).

        Raises:
            ValueError: if the functions of a pair cannot be tabulated.
        """
        made = self.made
        numbers = made.places[first, second]
        if not numbers.numel():
            return None
        if int(numbers.min()) >= 0:
            return made.tables, numbers
        codes = torch.unique(torch.minimum(first, second) * self.elements + torch.maximum(first, second)).tolist()
        with self.lock:
            if not self._due(codes, first.numel()):
                return None
            self._need(codes)
            return self.made.tables, self.made.places[first, second]

    def _code(self, first: int, second: int) -> int:
        """Number of a pair of species, in either order."""
        return min(first, second) * self.elements + max(first, second)

    def _most(self) -> int:
        """Number of pairs whose tables fit into `LIMIT`."""
        return LIMIT // sum(layer.bytes_of_pair() for layer in self.layers)

    def _due(self, codes: Sequence[int], edges: int) -> bool:
        """Whether tables are worth their price; if not, count what is spent without them."""
        missing = [code for code in codes if code not in self.made.codes]
        if len(codes) > self._most():
            return False
        price = EDGES_OF_AN_INTERVAL * len(missing) * max(layer.intervals[0] for layer in self.layers)
        if edges + sum(self.spent.get(code, 0.0) for code in missing) >= price:
            return True
        for code in missing:
            self.spent[code] = self.spent.get(code, 0.0) + edges / len(missing)
        return False

    def _need(self, codes: Sequence[int]) -> None:
        """Make those tables of some pairs that do not exist."""
        missing = [code for code in codes if code not in self.made.codes]
        if not missing:
            return
        if len(self.made.codes) + len(missing) > self._most():
            # Beyond the limit only what this structure needs is kept.
            self.made, missing = self.made._replace(codes=()), list(codes)
        # Tensors made in inference mode could not be used by later calls outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._extend(missing)
        for code in missing:
            self.spent.pop(code, None)

    def _extend(self, codes: list[int]) -> None:
        """Make the tables of some pairs, and put them behind those that exist."""
        kept = list(self.made.codes)
        while not self._filled(len(kept), codes):
            # A pair needs more intervals than all others had, and tables that lie end to end have equal numbers.
            kept, codes = [], kept + codes
            self.banks = []
        places = torch.full_like(self.made.places, -1, device="cpu")
        for place, code in enumerate(kept + codes):
            first, second = divmod(code, self.elements)
            places[first, second] = places[second, first] = place
        tables: list[Tables] = []
        for weights, *density in self.banks:
            tables.append((weights.flatten(0, 1), density[0].flatten(0, 1) if density else None))
        self.made = _Made((*kept, *codes), places.to(self.device), tables)

    def _filled(self, count: int, codes: Sequence[int]) -> bool:
        """Put tables of pairs behind the `count` that the banks have; say no if these have too few intervals."""
        pairs = [divmod(code, self.elements) for code in codes]
        for layer in self.layers:
            layer.prepare(pairs)
        if count and any(
            list(bank.shape[1:]) != list(shape)
            for layer, banks in zip(self.layers, self.banks, strict=True)
            for bank, shape in zip(banks, layer.shapes(), strict=True)
        ):
            return False
        self._make_room(count, count + len(codes))
        for layer, banks in zip(self.layers, self.banks, strict=True):
            # Not counted as a change: a step of another thread reads other tables of these banks.
            rooms = [bank.data[count : count + len(codes)] for bank in banks]
            on_cpu = [room if self.device.type == "cpu" else torch.empty_like(room, device="cpu") for room in rooms]
            if not layer.make(pairs, on_cpu):
                return False
            if self.device.type != "cpu":
                for room, made in zip(rooms, on_cpu, strict=True):
                    room.copy_(made)
        return True

    def _make_room(self, count: int, needed: int) -> None:
        """Make the banks large enough for a number of tables, of which `count` are there."""
        if count and needed <= len(self.banks[0][0]):
            return
        size = max(needed, min(2 * count, self._most()))
        before, self.banks = self.banks, []
        for number, layer in enumerate(self.layers):
            banks = [torch.empty(size, *shape, dtype=layer.dtype, device=self.device) for shape in layer.shapes()]
            for part, bank in enumerate(banks):
                if count:
                    bank[:count] = before[number][part][:count]
            self.banks.append(banks)
