"""Comparing a deployed file with the model that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gaq.untyped import Calculator

if TYPE_CHECKING:
    from ase import Atoms

    from gaq.config.schema import QuantizationConfig

__all__ = ["Check", "compare", "default_tolerance", "relative_tolerance", "structures_for"]

RELATIVE = 1e-5
"""Allowed force difference, relative to the largest force: structures made at random have large ones."""
RELATIVE_ROUNDED = 1e-4
"""The same with rounded activations, whose noise grows with them. One and the same model changes its forces by as much
when the atoms of a structure are listed in another order (benchmarks/deploy_tolerance.py)."""


@dataclass(frozen=True)
class Check:
    """Differences between a deployed file and its model.

    Attributes:
        energy: largest difference of the energy per atom, meV.
        forces: largest difference of a force component, meV/Å.
        force_scale: largest force component, meV/Å.
        structures: number of structures compared.
        stress: largest difference of a component of the stress, meV/Å³; 0 where none was compared.
    """

    energy: float
    forces: float
    force_scale: float
    structures: int
    stress: float = 0.0

    def within(self, tolerance: float, relative: float) -> bool:
        """Whether forces differ by no more than a bound in meV/Å, or by no more than a part of the largest of them."""
        return self.forces <= max(tolerance, relative * self.force_scale)


def default_tolerance(config: QuantizationConfig | None) -> float:
    """Allowed force difference, meV/Å, between a deployed file and its model.

    With exact activations only the fold differs: 0.5. With rounded activations, a number on the edge between two steps
    may fall to the other side in another order of summation. Forces then differ by the rounding noise itself, which is
    below 5 at 16 bits. On coarser grids the difference is printed, not judged.

    Args:
        config: of the model; None for a float one.
    """
    if config is None or not config.rounds_activations:
        return 0.5
    attention = None if config.attention is None else config.attention.bits
    bits = [b for b in (config.scalars.bits, config.vectors.magnitude_bits, attention) if b is not None]
    return 5.0 if min(bits) >= 16 else float("inf")


def relative_tolerance(config: QuantizationConfig | None) -> float:
    """Allowed force difference, relative to the largest force; `default_tolerance` has the absolute one.

    Args:
        config: of the model; None for a float one.
    """
    return RELATIVE if config is None or not config.rounds_activations else RELATIVE_ROUNDED


def compare(reference: Calculator, deployed: Calculator, structures: Sequence[Atoms], stress: bool = False) -> Check:
    """Compare two calculators, the deployed one second.

    Args:
        reference: of the model.
        deployed: of the file.
        structures: at least one.
        stress: whether the stress of periodic structures is compared as well.
    """
    differences = []
    for atoms in structures:
        values = []
        for calculator in (reference, deployed):
            copy = atoms.copy()
            copy.calc = calculator
            stresses = copy.get_stress() if stress and copy.pbc.all() else np.zeros(6)
            values.append((copy.get_potential_energy(), copy.get_forces(), stresses))
        (energy, forces, stress_one), (other_energy, other_forces, other_stress) = values
        differences.append(
            (
                abs(energy - other_energy) / len(atoms),
                np.abs(forces - other_forces).max(),
                np.abs(forces).max(),
                np.abs(stress_one - other_stress).max(),
            )
        )
    # np.max, because the largest of a NaN and a number has to be NaN, whatever their order.
    largest = [float(value) for value in 1e3 * np.max(differences, axis=0)]
    return Check(largest[0], largest[1], largest[2], len(structures), largest[3])


def structures_for(elements: Sequence[str], r_max: float) -> list[Atoms]:
    """Structures of several sizes to compare on: single atoms, no neighbours, molecules, cells.

    Args:
        elements: chemical symbols.
        r_max: cutoff in Å.
    """
    from ase import Atoms
    from ase.build import bulk
    from ase.data import atomic_numbers, covalent_radii

    rng = np.random.default_rng(0)
    single = [Atoms([element]) for element in elements[:3]]
    apart = Atoms([elements[0], elements[-1]], [[0, 0, 0], [0, 0, r_max + 1.0]])

    def packed(repeat: tuple[int, int, int]) -> Atoms:
        # Twelve neighbours each, so farther apart than in a covalent solid.
        cell = bulk("Cu", "fcc", a=1.0, cubic=True).repeat(repeat)
        cell.symbols[:] = [elements[i % len(elements)] for i in rng.permutation(len(cell))]
        radius = np.mean([covalent_radii[atomic_numbers[symbol]] for symbol in cell.get_chemical_symbols()])
        cell.set_cell(cell.cell * (3.2 * radius * np.sqrt(2)), scale_atoms=True)
        cell.positions += rng.normal(0, 0.05, cell.positions.shape)
        return cell

    skewed = packed((2, 2, 2))
    skewed.set_cell(skewed.cell @ (np.eye(3) + np.triu(rng.normal(0, 0.05, (3, 3)))), scale_atoms=True)
    cluster = packed((2, 2, 1))
    cluster.pbc, cluster.cell = False, np.zeros((3, 3))
    return [*single, apart, cluster, packed((1, 1, 1)), skewed, packed((3, 3, 2))]
