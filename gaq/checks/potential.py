"""The interface through which physics checks see a model: energies and forces of a list of structures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gaq.untyped import Calculator

__all__ = ["CalculatorPotential", "Potential", "calculator_of", "energies_of"]

if TYPE_CHECKING:
    from ase import Atoms


class Potential(Protocol):
    """Anything that maps structures to energies (eV) and forces (eV/Å)."""

    def __call__(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Energies, shape (len(structures),), and one (n_atoms, 3) force array per structure."""
        ...


def energies_of(potential: Potential, structures: Sequence[Atoms]) -> np.ndarray:
    """Energies alone, shape (len(structures),), eV.

    A potential with a method ``energies`` leaves the forces out, which are half of the work or more.
    """
    alone = getattr(potential, "energies", None)
    return np.asarray(potential(structures)[0] if alone is None else alone(structures))


class CalculatorPotential:
    """A `Potential` made of an ASE calculator, one structure at a time.

    Args:
        calculator: an ASE calculator that implements ``energy`` and ``forces``.
    """

    def __init__(self, calculator: Calculator) -> None:
        self.calculator = calculator

    def __call__(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        energies, forces = [], []
        for structure in structures:
            atoms = structure.copy()
            atoms.calc = self.calculator
            # Calculators take atoms at the same positions for the same structure, whatever arrays the model reads.
            self.calculator.reset()
            forces.append(np.array(atoms.get_forces()))
            energies.append(atoms.get_potential_energy())
        return np.array(energies), forces


def calculator_of(potential: Potential) -> Calculator:
    """An ASE calculator of energies and forces that asks a potential."""
    from ase.calculators.calculator import Calculator as ASECalculator
    from ase.calculators.calculator import all_changes

    class PotentialCalculator(ASECalculator):  # type: ignore[misc]
        implemented_properties = ["energy", "forces"]  # noqa: RUF012  (a list in ASE's base class)

        def calculate(
            self, atoms: Any = None, properties: Sequence[str] = (), system_changes: Sequence[str] = all_changes
        ) -> None:
            super().calculate(atoms, properties, system_changes)
            energies, (forces,) = potential([atoms])
            self.results = {"energy": float(energies[0]), "forces": np.asarray(forces, dtype=np.float64)}

    return PotentialCalculator()
