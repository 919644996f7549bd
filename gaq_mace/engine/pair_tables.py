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
        shapes: of a pair's tables, of each layer.
    """

    codes: tuple[int, ...]
    places: Tensor
    tables: list[Tables]
    shapes: list[list[tuple[int, ...]]]


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
        self.elements, self.by_species, self.ordered = layers[0].elements, layers[0].by_species, layers[0].ordered
        # Memory of the tables of each layer's weights and densities, with room for more pairs than are made.
        self.banks: list[list[Tensor]] = []
        self.spent: dict[int, float] = {}
        self.lock = threading.RLock()
        self.made = _Made((), torch.full((self.elements, self.elements), -1, device=device), [], [])
        if not self.by_species:
            self._need([0])

    def of_species(self, present: Sequence[int]) -> tuple[list[Tables], Tensor] | None:
        """Tables for all pairs of some species, and the number of each pair's table, (species, species).

        None where they take more memory than `LIMIT`.
        """
        codes = sorted({self._code(a, b) for a in present for b in present})
        with self.lock:
            if len(codes) > self._most():
                return None
            return (self.made.tables, self.made.places) if self._need(codes) else None

    def of_edges(self, first: Tensor, second: Tensor) -> tuple[list[Tables], Tensor] | None:
        """Tables for the edges of a step, and the number of each edge's table, (edges,).

        None where evaluating the radial network for each edge costs less, or where tables take more memory than
        `LIMIT`.

        Args:
            first: species of the sender of each edge, (edges,).
            second: species of the receiver, (edges,).

        Raises:
            ValueError: if the functions of a pair cannot be tabulated.
        """
        made = self.made
        numbers = made.places[first, second]
        if not numbers.numel():
            return None
        if int(numbers.min()) >= 0:
            return made.tables, numbers
        pairs = first * self.elements + second
        if not self.ordered:
            pairs = torch.minimum(pairs, second * self.elements + first)
        codes = torch.unique(pairs).tolist()
        with self.lock:
            if not (self._due(codes, first.numel()) and self._need(codes)):
                return None
            return self.made.tables, self.made.places[first, second]

    def _code(self, first: int, second: int) -> int:
        """Number of a pair of species, in either order where tables do not tell them apart."""
        if self.ordered:
            return first * self.elements + second
        return min(first, second) * self.elements + max(first, second)

    def _most(self) -> int:
        """Number of pairs whose tables fit into `LIMIT`, as far as the number of their intervals is known."""
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

    def _need(self, codes: Sequence[int]) -> bool:
        """Make those tables of some pairs that do not exist; say no where they take more memory than `LIMIT`."""
        missing = [code for code in codes if code not in self.made.codes]
        # Tensors made in inference mode could not be used by later calls outside of it.
        with torch.inference_mode(False), torch.no_grad():
            while missing:
                for layer in self.layers:
                    layer.prepare([self._pair(code) for code in missing])
                present, added = list(self.made.codes), missing
                if present and self.made.shapes != self._shapes():
                    # A pair needs more intervals than all others had; tables that lie end to end have equal numbers.
                    present, added = [], present + added
                if len(present) + len(added) > self._most():
                    # Beyond the limit only what this structure needs is kept.
                    present, added = [], list(codes)
                if len(added) > self._most():
                    return False
                banks = self._banks_with_room(len(present), len(present) + len(added))
                if self._fill(banks, len(present), added):
                    self._publish(banks, [*present, *added])
                    break
        for code in missing:
            self.spent.pop(code, None)
        return True

    def _pair(self, code: int) -> tuple[int, int]:
        """The two species of a pair."""
        return divmod(code, self.elements)

    def _shapes(self) -> list[list[tuple[int, ...]]]:
        """Shapes of the tables that a pair would get now, of each layer."""
        return [layer.shapes() for layer in self.layers]

    def _banks_with_room(self, count: int, needed: int) -> list[list[Tensor]]:
        """Banks for a number of tables, of which the first `count` exist; larger ones where these are full."""
        if count and needed <= len(self.banks[0][0]):
            return self.banks
        size = max(needed, min(2 * count, self._most()))
        made = []
        for number, layer in enumerate(self.layers):
            banks = [torch.empty(size, *shape, dtype=layer.dtype, device=self.device) for shape in layer.shapes()]
            for part, bank in enumerate(banks):
                if count:
                    bank[:count] = self.banks[number][part][:count]
            made.append(banks)
        return made

    def _fill(self, banks: list[list[Tensor]], count: int, codes: Sequence[int]) -> bool:
        """Put tables of pairs behind the first `count` of the banks; say no if a pair needs more intervals."""
        pairs = [self._pair(code) for code in codes]
        for layer, parts in zip(self.layers, banks, strict=True):
            # Not counted as a change: a step of another thread reads other tables of these banks.
            rooms = [bank.data[count : count + len(codes)] for bank in parts]
            on_cpu = [room if self.device.type == "cpu" else torch.empty_like(room, device="cpu") for room in rooms]
            if not layer.make(pairs, on_cpu):
                return False
            if self.device.type != "cpu":
                for room, made in zip(rooms, on_cpu, strict=True):
                    room.copy_(made)
        return True

    def _publish(self, banks: list[list[Tensor]], codes: Sequence[int]) -> None:
        """Let all threads see tables."""
        places = torch.full_like(self.made.places, -1, device="cpu")
        for place, code in enumerate(codes):
            first, second = self._pair(code)
            places[first, second] = place
            if not self.ordered:
                places[second, first] = place
        tables: list[Tables] = []
        for weights, *density in banks:
            tables.append((weights.flatten(0, 1), density[0].flatten(0, 1) if density else None))
        self.banks = banks
        self.made = _Made(tuple(codes), places.to(self.device), tables, self._shapes())
