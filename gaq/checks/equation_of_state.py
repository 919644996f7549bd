"""Equilibrium volume and bulk modulus of a periodic cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.potential import Potential, energies_of

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["equation_of_state", "strained"]

STRAINS = tuple(np.linspace(-0.02, 0.02, 9))
"""Relative lengths of the cells: volumes from 6 % less to 6 % more."""


def strained(atoms: Atoms, strains: Sequence[float] = STRAINS) -> list[Atoms]:
    """Copies of a cell whose lengths and positions are scaled by one and a strain."""
    copies = []
    for strain in strains:
        copy = atoms.copy()
        copy.set_constraint()
        copy.set_cell(atoms.cell * (1.0 + strain), scale_atoms=True)
        copies.append(copy)
    return copies


def equation_of_state(potential: Potential, atoms: Atoms) -> tuple[float, float] | None:
    """Volume an atom in Å³ and bulk modulus in eV/Å³; None if no minimum lies among `STRAINS`.

    The energy is a cubic polynomial of the inverse length of the cell (Alchagirov et al., Phys. Rev. B 63, 224115).
    """
    cells = strained(atoms)
    volumes = np.array([cell.get_volume() for cell in cells]) / len(atoms)
    energies = np.asarray(energies_of(potential, cells), dtype=np.float64) / len(atoms)
    scale = volumes.mean() ** (1 / 3)
    inverse = scale / np.cbrt(volumes)
    curve = np.polynomial.Polynomial.fit(inverse, energies - energies.mean(), 3).convert()
    slope, bend = curve.deriv(), curve.deriv(2)
    roots = [float(root.real) for root in slope.roots() if abs(root.imag) < 1e-12]
    minima = [root for root in roots if inverse.min() <= root <= inverse.max() and bend(root) > 0]
    if not minima:
        return None
    volume = (scale / minima[0]) ** 3
    # Where dE/dx is zero, d²E/dV² = d²E/dx² (dx/dV)², and dx/dV = -x / 3V.
    return volume, float(bend(minima[0]) * minima[0] ** 2 / (9 * volume))
