"""Harmonic frequencies of a molecule, or of a cell at the centre of its Brillouin zone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gaq.checks.potential import Potential

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["frequencies", "frequency_shifts"]

Floats = NDArray[np.float64]


def frequencies(potential: Potential, atoms: Atoms, step: float = 0.01) -> Floats:
    """Frequencies in 1/cm, ascending, without rigid motion; imaginary ones are negative.

    All displaced structures, six an atom, go to the potential in a single list.

    Args:
        potential: the potential.
        atoms: the structure, at a minimum of the potential; not changed.
        step: displacement of the central differences of forces, Å.
    """
    from ase import units

    displaced = []
    for atom in range(len(atoms)):
        for axis in range(3):
            for sign in (1, -1):
                copy = atoms.copy()
                copy.set_constraint()
                copy.positions[atom, axis] += sign * step
                displaced.append(copy)
    forces = np.array(potential(displaced)[1], dtype=np.float64).reshape(-1, 2, 3 * len(atoms))
    hessian = (forces[:, 1] - forces[:, 0]) / (2 * step)
    hessian = 0.5 * (hessian + hessian.T)
    roots = np.repeat(np.sqrt(atoms.get_masses()), 3)
    inner = _without_rigid_motion(atoms, roots)
    squares = np.linalg.eigvalsh(inner.T @ (hessian / np.outer(roots, roots)) @ inner)
    # sqrt(eV/Å²/u) is an angular frequency in the units of ASE, whose ħ makes an energy of it.
    energies = units._hbar * 1e10 / np.sqrt(units._e * units._amu) * np.sqrt(np.abs(squares))
    return np.asarray(np.sign(squares) * energies / units.invcm)


def _without_rigid_motion(atoms: Atoms, roots: Floats) -> Floats:
    """Orthonormal basis of mass-weighted displacements that neither translate the atoms nor, in a molecule, turn them.

    Returns:
        Vectors as columns, (3 atoms, vibrations).
    """
    centred = atoms.positions - atoms.get_center_of_mass()
    axes = np.eye(3)
    rigid = [np.tile(axis, len(atoms)) for axis in axes]
    if not atoms.pbc.any():
        rigid += [np.cross(axis, centred).ravel() for axis in axes]
    vectors, sizes, _ = np.linalg.svd(np.array([roots * motion for motion in rigid]).T)
    # A linear molecule turns about two axes only.
    return np.asarray(vectors[:, int((sizes > 1e-6 * sizes[0]).sum()) :])


def frequency_shifts(model: Floats, reference: Floats) -> tuple[float, float]:
    """Mean and largest absolute shift in 1/cm of frequencies that are matched by their rank."""
    shifts = np.abs(model - reference)
    return float(shifts.mean()), float(shifts.max())
