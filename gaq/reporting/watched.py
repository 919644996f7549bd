"""Potentials that show their progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.potential import Potential, energies_of
from gaq.progress import Progress
from gaq.training.sampling import by_atoms

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["watched"]

PIECE = 512
"""Most atoms of the structures after which progress is shown: a batch of the fused kernels."""


def watched(potential: Potential, description: str, shown: bool) -> Potential:
    """Return a potential that shows its progress on each list of structures; the same potential if nothing is shown."""
    return _Watched(potential, description) if shown else potential


class _Watched:
    def __init__(self, potential: Potential, description: str) -> None:
        self.potential = potential
        self.description = description

    def __call__(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        energies, forces = [], []
        with self._progress(structures) as progress:
            for span in by_atoms([len(structure) for structure in structures], PIECE):
                energy, force = self.potential(structures[span])
                energies.append(np.asarray(energy))
                forces.extend(force)
                progress.advance(len(force))
        return np.concatenate(energies), forces

    def energies(self, structures: Sequence[Atoms]) -> np.ndarray:
        """Energies alone, shape (len(structures),), eV."""
        energies = []
        with self._progress(structures) as progress:
            for span in by_atoms([len(structure) for structure in structures], PIECE):
                energies.append(energies_of(self.potential, structures[span]))
                progress.advance(len(energies[-1]))
        return np.concatenate(energies)

    def _progress(self, structures: Sequence[Atoms]) -> Progress:
        return Progress(len(structures), self.description, "structure", stays=False)
