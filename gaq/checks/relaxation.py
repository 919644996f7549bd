"""Geometry optimisation of a structure by two models: whether they find one minimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.nve import bond_lengths, covalent_bonds
from gaq.checks.potential import Potential, calculator_of

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["FORCE", "Relaxed", "minimum_change", "relaxed"]

FORCE = 1e-3
"""Largest force on an atom at which an optimisation ends, eV/Å."""
RUIN = 1000.0
"""Force on an atom from which on nothing can be optimised, eV/Å."""


@dataclass(frozen=True, eq=False)
class Relaxed:
    """Result of an optimisation.

    Attributes:
        atoms: the structure at its end, without a calculator.
        steps: steps taken.
        force: largest force on an atom at the end, eV/Å.
    """

    atoms: Atoms
    steps: int
    force: float


def relaxed(potential: Potential, atoms: Atoms, steps: int = 500, force: float = FORCE) -> Relaxed:
    """Optimise the positions by BFGS until no atom has a force above `force` (eV/Å); the cell is kept.

    It ends early where forces grow beyond `RUIN`, or do not change with the positions.
    """
    from ase.optimize import BFGS

    atoms = atoms.copy()
    atoms.set_constraint()
    atoms.calc = calculator_of(potential)
    optimizer = BFGS(atoms, logfile=None)

    def largest() -> float:
        return float(np.linalg.norm(atoms.get_forces(), axis=1).max())

    try:
        for _ in optimizer.irun(fmax=force, steps=steps):
            if not largest() < RUIN:
                break
    except np.linalg.LinAlgError:
        pass  # forces that do not change with the positions leave no Hessian; what is left of them is the result
    left = largest()
    atoms.calc = None
    return Relaxed(atoms, optimizer.nsteps, left)


def minimum_change(model: Atoms, reference: Atoms, potential: Potential) -> tuple[float | None, float]:
    """Compare the minimum of a model with that of its reference.

    Args:
        model: the model's minimum.
        reference: the reference's.
        potential: the reference model.

    Returns:
        The largest change of the length of a covalent bond in Å, or of the distance of two neighbours where there are
        no such bonds, None without any; and the energy of the model's minimum above the other in the reference model,
        meV. Bonds and energies, because whole molecules turn and soft torsions move by far at no cost.
    """
    energies = np.asarray(potential([model, reference])[0], dtype=np.float64)
    first, second = covalent_bonds(reference)[:2]
    if not len(first):
        from ase.neighborlist import natural_cutoffs, neighbor_list

        first, second = neighbor_list("ij", reference, natural_cutoffs(reference, mult=1.2))
        # A pair of which several images are neighbours has no one distance.
        pairs, counts = np.unique(np.stack([first, second])[:, first < second], axis=1, return_counts=True)
        first, second = pairs[:, counts == 1]
    change = None
    if len(first):
        change = float(np.abs(bond_lengths(model, first, second) - bond_lengths(reference, first, second)).max())
    return change, 1e3 * float(energies[0] - energies[1])
