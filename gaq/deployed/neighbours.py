"""Neighbours of atoms, in a list that is kept while atoms move less than half of a skin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["NeighbourList"]

Floats = NDArray[np.float64]


class NeighbourList:
    """Edges of a structure within a cutoff, and more by a skin.

    Args:
        cutoff: in Å.
        skin: in Å; 0 makes a list in every step.

    Attributes:
        sender: of each edge, (edges,), int64.
        receiver: of each edge, (edges,), int64, in ascending order.
        shifts: of the periodic image of the sender, in Å, (edges, 3), float64: a vector from sender to receiver is the
            difference of their positions plus the shift.
        made: number of lists made so far.
    """

    sender: Tensor
    receiver: Tensor
    shifts: Tensor

    def __init__(self, cutoff: float, skin: float) -> None:
        self.cutoff, self.skin = cutoff, skin
        self.made = 0
        self._reference: Floats | None = None
        self._box: tuple[bytes, bytes] = (b"", b"")

    def update(self, atoms: Atoms) -> None:
        """Make the list anew if pairs of atoms within the cutoff could be missing from it.

        Raises:
            ValueError: for positions that are no finite numbers.
        """
        positions = atoms.positions
        cell, pbc = np.asarray(atoms.cell, dtype=np.float64), np.asarray(atoms.pbc)
        box = cell.tobytes(), pbc.tobytes()
        last = self._reference
        if last is not None and box == self._box and last.shape == positions.shape:
            moved = positions - last
            # Not the reverse: a distance may be NaN.
            if np.einsum("ij,ij->i", moved, moved).max(initial=0.0) <= (0.5 * self.skin) ** 2:
                return
        wrong = np.flatnonzero(~np.isfinite(positions).all(axis=1))
        if len(wrong):
            raise ValueError(f"the position of atom {wrong[0]} is {positions[wrong[0]]}: not a finite number.")
        self._make(positions, cell, pbc)
        self._reference, self._box = positions.copy(), box
        self.made += 1

    def _make(self, positions: Floats, cell: Floats, pbc: NDArray[np.bool_]) -> None:
        from matscipy.neighbours import neighbour_list

        reach = self.cutoff + self.skin
        if not len(positions):
            self.receiver = self.sender = torch.zeros(0, dtype=torch.int64)
            self.shifts = torch.zeros(0, 3, dtype=torch.float64)
            return
        full = _spanned(positions, cell, pbc, reach)
        receiver, sender, images = neighbour_list("ijS", cutoff=reach, positions=positions, cell=full, pbc=pbc)
        open_axes = images[:, ~pbc].any(axis=1)
        # In a very skewed cell matscipy gives images along axes that are not periodic.
        kept = slice(None) if not open_axes.any() else ~open_axes
        self.receiver = torch.from_numpy(receiver[kept].astype(np.int64))
        self.sender = torch.from_numpy(sender[kept].astype(np.int64))
        self.shifts = torch.from_numpy(-(images[kept] @ full))


def _spanned(positions: Floats, cell: Floats, pbc: NDArray[np.bool_], reach: float) -> Floats:
    """Cell that is as it is along periodic axes, and holds all atoms along the others."""
    full = cell.copy()
    longest = float(np.abs(positions).max()) + reach
    for axis in np.flatnonzero(~pbc):
        # At right angles to the other two, which a longer vector along the same direction might not span a volume with.
        others = [full[other] for other in range(3) if other != axis]
        normal = np.cross(*others)
        size = float(np.linalg.norm(normal))
        direction = normal / size if size > 0 else np.eye(3)[axis]
        full[axis] = 4 * longest * direction
    return full
