"""Numbers of a sound report, and the Morse cluster on which reports are measured."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.calculators.morse import MorsePotential

from gaq.checks.potential import CalculatorPotential

__all__ = ["DIFFERENCE", "FP32", "GOOD", "Staircase", "cluster", "morse"]

FP32 = {
    "force_mae_mev_per_angstrom": 10.0,
    "force_rmse_mev_per_angstrom": 15.0,
    "nve": {"drift_mev_per_atom_per_ps": 0.001, "standard_error": 0.002},
    "file_bytes": 4_000_000,
}
DIFFERENCE = {"rms_mev_per_angstrom": 2.9, "force_rms_mev_per_angstrom": 1000.0, "structures": 8}
GOOD = {
    "force_mae_mev_per_angstrom": 10.1,
    "force_difference": DIFFERENCE,
    "lee_mev_per_angstrom": 0.1,
    "lee_naive_ratio": 174.0,
    "central_difference_relative_error": {"0.1": 0.016, "0.03": 0.0014, "0.01": 0.0002},
    "nve": {"drift_mev_per_atom_per_ps": 0.005, "drift_over_std_kinetic": 0.1, "stable": True},
    "smoothness": {"largest_jump_mev": 0.1, "allowed_mev": 1.0},
    "engine_error_ratio": 1.5,
    "file_bytes": 900_000,
}


def cluster(seed: int = 0) -> Atoms:
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    atoms = Atoms("P4", 2.21 / np.sqrt(8) * corners)
    atoms.rattle(0.05, seed=seed)
    return atoms


def morse() -> MorsePotential:
    return MorsePotential(epsilon=2.0, r0=2.21, rho0=4.0, rcut1=3.0, rcut2=4.0)


class Staircase(CalculatorPotential):
    """Energies rounded to 20 meV, and a force that ignores rotation."""

    def __call__(self, structures):
        energies, forces = super().__call__(structures)
        return 0.02 * np.round(energies / 0.02), [f + np.array([0.0, 0.0, 0.03]) for f in forces]
