"""Neighbour lists that are kept over the steps of a simulation, for MACE's own calculator.

MACE rebuilds the graph of a structure in every step. While atoms only move, and not far, all pairs within the cutoff
were within the cutoff plus a skin some steps ago, and nothing else in a batch changes. The batches made here are those
that MACE's calculator would make: the same edges in the same order, the same numbers in every field. Where that is not
certain, the step uses MACE's own batch. The first list of a structure is compared with MACE's batch.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mace import data as mace_data
from mace.data.neighborhood import get_neighborhood
from numpy.typing import NDArray
from torch import Tensor

from gaq import settings
from gaq.caches import WeakKeyCache
from gaq.untyped import Batch, Calculator
from gaq_mace import engine

if TYPE_CHECKING:
    from ase import Atoms

Configuration = Any
"""A `mace.data.Configuration`. MACE declares fields that may be missing, and this module empties one."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_SLACK = 1e-6
"""Part of the skin that is not used, in Å, so that rounding cannot lose a pair."""

_EDGES = ("edge_index", "shifts", "unit_shifts")
_MOVING = (*_EDGES, "positions")


def _same(first: Any, second: Any) -> bool:  # Any: what is found out of one type holds for the other
    """Whether two values of a configuration are certainly equal."""
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(_same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    try:
        return bool(first == second)
    except (TypeError, ValueError, RuntimeError):
        return False


def _same_batch(first: Batch, second: Batch) -> bool:
    """Whether two batches are equal in all fields."""
    fields, others = first.__dict__, second.__dict__
    return fields.keys() == others.keys() and all(_same(value, others[name]) for name, value in fields.items())


def _copied(value: object) -> object:
    """Copy a field of a batch, because whoever receives a batch may change it in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copied(entry) for name, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value


def _farthest(positions: Floats, reference: Floats) -> float:
    """Largest distance of an atom from its reference position, in Å; NaN if a position is NaN."""
    moved = positions - reference
    return math.sqrt(np.einsum("ij,ij->i", moved, moved).max())


def _full_cell(positions: Floats, cell: Floats, pbc: NDArray[np.bool_], cutoff: float) -> Floats:
    """Extend the cell where it is not periodic, by the operations of `get_neighborhood` in their order."""
    full = cell.copy() if cell.any() else np.identity(3)
    longest = np.max(np.absolute(positions)) + 1
    for axis in np.flatnonzero(~pbc):
        full[axis] = longest * 5 * cutoff * np.identity(3)[axis]
    return full


def _grid(cell: Floats, cutoff: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Number of matscipy's bins along each axis, and distances between opposite faces of the cell, in Å.

    The order of operations is matscipy's, because rounding decides where the cell is an exact multiple of the cutoff.
    """

    def cross(a: list[float], b: list[float]) -> list[float]:
        return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]

    first, second, third = cell.tolist()
    normals = cross(second, third), cross(third, first), cross(first, second)
    volume = abs(third[0] * normals[2][0] + third[1] * normals[2][1] + third[2] * normals[2][2])
    heights = tuple(volume / math.sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2]) for n in normals)
    counts = [max(math.floor(height / cutoff), 1) for height in heights]
    while math.prod(counts) > 2**31 - 1:
        counts = [max(count // 2, 1) for count in counts]
    return tuple(counts), heights


class _Pairs:
    """Pairs of atoms within the cutoff plus the skin, at the positions for which the list was made.

    Attributes:
        reference: those positions, (atoms, 3) in Å.
        edges: sender and receiver, (2, pairs).
        unit_shifts: (pairs, 3), in cell vectors.
        shifts: (pairs, 3) in Å.
        sound: whether matscipy found no shifts along open axes; otherwise the list cannot be used.
    """

    def __init__(self, positions: Floats, cell: Floats, pbc: NDArray[np.bool_], cutoff: float, width: float) -> None:
        self.reference, self.pbc, self.cutoff, self.width = positions, pbc, cutoff, width
        periodic = tuple(pbc.tolist())
        edges, self.shifts, self.unit_shifts, _ = get_neighborhood(positions, cutoff + width, periodic, cell.copy())
        self.edges: Integers = edges.astype(np.int64)
        # In a very skewed cell, where atoms lie outside their bins, matscipy gives shifts along open axes.
        self.sound = not self.unit_shifts[:, ~pbc].any()
        self._base: Integers = np.empty(0, dtype=np.int64)
        self._counts: tuple[int, ...] = ()
        self._spans: list[int] = []
        # MACE's order changes little in the next steps, and a list that is nearly in order sorts fast.
        keys = self._keys(positions, _full_cell(positions, cell, pbc, cutoff), slice(None))
        if keys is not None:
            order = np.argsort(keys, kind="stable")
            self.edges, self._base = self.edges.take(order, axis=1), self._base[order]
            self.shifts, self.unit_shifts = self.shifts[order], self.unit_shifts[order]

    def serves(self, positions: Floats) -> bool:
        """Whether all pairs within the cutoff are in the list."""
        return self.sound and _farthest(positions, self.reference) <= 0.5 * self.width - _SLACK

    def _keys(self, positions: Floats, cell: Floats, chosen: Integers | slice) -> Integers | None:
        """Numbers by which the chosen pairs sort into matscipy's order; None where its shifts could not be used.

        For each sender, matscipy goes through the surrounding bins in the order z, y, x, and through the atoms of a bin
        by number.

        Args:
            positions: of all atoms, in Å.
            cell: as `_full_cell` makes it.
            chosen: index into the pairs.
        """
        counts, heights = _grid(cell, self.cutoff)
        size = np.array(counts)
        inverse = np.linalg.inv(cell.T)
        # Term by term as in matscipy's C code, so that rounding puts an atom at a border into the same bin.
        places = positions[:, :1] * inverse[:, 0] + positions[:, 1:2] * inverse[:, 1] + positions[:, 2:] * inverse[:, 2]
        bins = np.floor(places * size).astype(np.int64)
        if not self.pbc.all():
            open_bins, open_size = bins[:, ~self.pbc], size[~self.pbc]
            if (open_bins <= -open_size).any() or (open_bins >= 2 * open_size - 1).any():
                return None
            bins[:, ~self.pbc] = np.clip(open_bins, 0, open_size - 1)
        atoms = len(positions)
        # Bins by which two atoms of a pair can be apart until the list is remade.
        reach = self.cutoff + 2 * self.width
        spans = [2 * (math.ceil(reach * n / height) + 1) + 1 for n, height in zip(counts, heights, strict=True)]
        weights = np.array([1, spans[0], spans[0] * spans[1]])
        if (counts, spans) != (self._counts, self._spans):
            across = self.unit_shifts @ (size * weights)
            self._base = (self.edges[0] * math.prod(spans) + across) * atoms + self.edges[1]
            self._counts, self._spans = counts, spans
        bin_keys = (bins @ weights) * atoms
        senders, receivers = self.edges[:, chosen]
        return self._base[chosen] + bin_keys[receivers] - bin_keys[senders]

    def within(self, positions: Floats, cell: Floats) -> tuple[Integers, NDArray[np.int32]] | None:
        """Edges (2, edges) and unit shifts (edges, 3) within the cutoff, in MACE's order; None if uncertain.

        Args:
            positions: of all atoms, in Å.
            cell: as `_full_cell` makes it.
        """
        vectors = positions.take(self.edges[1], axis=0)
        vectors -= positions.take(self.edges[0], axis=0)
        vectors += self.shifts
        squares = np.einsum("ij,ij->i", vectors, vectors)
        limit = self.cutoff * self.cutoff
        # matscipy computes distances in another way, and may decide otherwise on a pair right at the cutoff.
        scale = self.cutoff + float(np.abs(positions).max()) + float(np.abs(cell).sum())
        error = 1e-13 * self.cutoff * scale
        chosen = np.flatnonzero(squares < limit + error)
        if (squares.take(chosen) > limit - error).any():
            return None
        keys = self._keys(positions, cell, chosen)
        if keys is None:
            return None
        if (keys[1:] < keys[:-1]).any():
            chosen = chosen.take(np.argsort(keys, kind="stable"))
        return self.edges.take(chosen, axis=1), self.unit_shifts.take(chosen, axis=0)


class Neighbours:
    """Neighbour list and batch template of the structure that a calculator computed last.

    Attributes:
        made: number of lists made so far.
    """

    def __init__(self) -> None:
        self.made = 0
        self._config: Configuration | None = None
        self._settings: tuple[object, ...] = ()
        self._last: Floats = np.empty((0, 3))
        # Threads may share a calculator.
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._pairs: _Pairs | None = None
        self._template: Batch = None
        self._refused = False

    def batch(self, calculator: Calculator, atoms: Atoms, stock: Callable[[], Batch], width: float) -> Batch:
        """Make the batch of a structure.

        Args:
            calculator: a `mace.calculators.MACECalculator`.
            atoms: an `ase.Atoms`.
            stock: makes the batch by MACE's own means.
            width: of the skin, in Å.
        """
        with self._lock:
            return self._batch(calculator, _configuration(calculator, atoms), stock, width)

    def _batch(self, calculator: Calculator, config: Configuration, stock: Callable[[], Batch], width: float) -> Batch:
        settings = (
            calculator.r_max,
            calculator.default_dtype,
            calculator.device,
            list(calculator.available_heads),
            list(calculator.z_table.zs),
            width,
        )
        positions, last = config.positions, self._last
        self._last = positions
        if settings != self._settings or not self._knows(config):
            self._forget()
            self._settings = settings
            # Copies, because the caller may change arrays of the atoms in place.
            self._config = dataclasses.replace(
                config,
                positions=None,
                properties=copy.deepcopy(config.properties),
                property_weights=copy.deepcopy(config.property_weights),
            )
            return stock()
        if self._refused or not len(positions):
            return stock()
        if self._pairs is None or not self._pairs.serves(positions):
            self._pairs = None
            # A list with a skin takes longer to make. It pays off if it serves several steps, but not for structures
            # that are unrelated.
            if not _farthest(positions, last) <= 0.25 * width:
                return stock()
            self._pairs = _Pairs(positions, config.cell, np.array(config.pbc), calculator.r_max, width)
            self.made += 1
            if not self._pairs.sound:
                return stock()
        if self._template is None:
            return self._checked(calculator, config, stock())
        batch = self._assembled(calculator, config)
        return stock() if batch is None else batch

    def _knows(self, config: Configuration) -> bool:
        """Whether a configuration differs from the last one in its positions only."""
        if self._config is None:
            return False
        names = (field.name for field in dataclasses.fields(config) if field.name != "positions")
        return all(_same(getattr(config, name), getattr(self._config, name)) for name in names)

    def _checked(self, calculator: Calculator, config: Configuration, stock_batch: Batch) -> Batch:
        """Keep MACE's own batch as the template of later ones, if it can be reproduced from the list, and return it."""
        template = copy.copy(stock_batch)
        for name, value in stock_batch.__dict__.items():
            if name in _MOVING:
                # Later batches need neither the values nor their memory.
                template.__dict__[name] = None
            else:
                template.__dict__[name] = _copied(value)
        self._template = template
        batch = self._assembled(calculator, config)
        if batch is None:
            self._template = None
        elif not _same_batch(batch, stock_batch):
            self._refused, self._template, self._pairs = True, None, None
            logging.warning(
                "gaq: neighbour lists are made anew in every step: MACE's batch differs from that of a kept list."
            )
        return stock_batch

    def _assembled(self, calculator: Calculator, config: Configuration) -> Batch:
        """Make a batch from the template and the list; None where MACE's batch might be another one."""
        assert self._pairs is not None
        positions, pbc = config.positions, self._pairs.pbc
        cell = _full_cell(positions, config.cell, pbc, calculator.r_max)
        edges_within = self._pairs.within(positions, cell)
        if edges_within is None:
            return None
        edges, unit_shifts = edges_within
        dtype = {"float64": torch.float64, "float32": torch.float32}[calculator.default_dtype]
        made = {
            "edge_index": torch.from_numpy(edges),
            # Not taken from the shifts of the list: the product of a longer matrix may be rounded differently.
            "shifts": torch.from_numpy(np.dot(unit_shifts, cell)).to(dtype),
            "unit_shifts": torch.from_numpy(unit_shifts).to(dtype),
            "positions": torch.tensor(positions, dtype=dtype),
        }
        if not pbc.all():
            # Along open axes MACE's cell depends on the positions.
            made["cell"] = torch.tensor(cell, dtype=dtype)
            volume = torch.linalg.det(made["cell"])
            reciprocal = 2 * torch.pi * torch.linalg.inv(made["cell"].mT) if volume.abs() > 0 else torch.zeros(3, 3)
            made["rcell"] = reciprocal.to(dtype).contiguous()
            made["volume"] = volume[None]
        batch = copy.copy(self._template)
        fields = batch.__dict__
        for name, value in self._template.__dict__.items():
            if name in made:
                fields[name] = made[name].to(calculator.device)
            else:
                fields[name] = _copied(value)
        # Bounds of the graphs in each field: only the number of edges differs.
        fields["__slices__"].update({name: [0, edges.shape[1]] for name in _EDGES})
        return batch


def _configuration(calculator: Calculator, atoms: Atoms) -> Configuration:
    """Configuration that `MACECalculator` takes from a structure before it makes a graph."""
    calculator.arrays_keys.update({calculator.charges_key: "charges"})
    keys = mace_data.KeySpecification(info_keys=calculator.info_keys, arrays_keys=calculator.arrays_keys)
    return mace_data.config_from_atoms(atoms, key_specification=keys, head_name=calculator.head)


# Not an attribute of the calculator, which would get into its copies and pickles.
_kept: WeakKeyCache[Calculator, Neighbours] = WeakKeyCache()


def kept_by(calculator: Calculator) -> Neighbours | None:
    """Neighbour list of a calculator; None where it has none."""
    return _kept.peek(calculator)


def _suits(calculator: Calculator) -> bool:
    """Whether all models of a calculator are accelerated, and its batches hold one structure without padding."""
    if calculator.use_compile or any(getattr(calculator, f"pad_num_{name}", 0) for name in ("atoms", "edges")):
        return False
    return all(engine.is_accelerated(model) for model in calculator.models)


def atoms_to_batch(calculator: Calculator, atoms: Atoms, stock: Callable[[Calculator, Atoms], Batch]) -> Batch:
    """Make the batch of a structure, with a neighbour list that is kept where the calculator allows it.

    Args:
        calculator: a `mace.calculators.MACECalculator`.
        atoms: an `ase.Atoms`.
        stock: the calculator's own ``_atoms_to_batch``.

    Raises:
        ValueError: for a value of ``GAQ_SKIN`` that is not a length.
    """
    width = settings.current().skin if _suits(calculator) else 0.0
    if width <= 2 * _SLACK:
        _kept.drop(calculator)
        return stock(calculator, atoms)
    neighbours = _kept.get(calculator, Neighbours)
    return neighbours.batch(calculator, atoms, lambda: stock(calculator, atoms), width)
