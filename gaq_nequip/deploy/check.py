"""Checking that a deployed file computes the same as the model it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gaq.untyped import AnyModule, Calculator
from gaq_nequip import files
from gaq_nequip.calculator import compiled_calculator, model_calculator, saved_calculator

if TYPE_CHECKING:
    from ase import Atoms
    from torch import Tensor

    from gaq.config.schema import QuantizationConfig

__all__ = ["Check", "check", "default_tolerance"]


@dataclass(frozen=True)
class Check:
    """Differences between a deployed file and its model, on the example structure and distorted copies.

    Attributes:
        energy: largest difference of the energy per atom, meV.
        forces: largest difference of a force component, meV/Å.
        force_scale: largest force component, meV/Å.
        structures: number of structures compared.
    """

    energy: float
    forces: float
    force_scale: float
    structures: int


def check(model: AnyModule, example: dict[str, Tensor], deployed: Path, target: str, device: str) -> Check | None:
    """Compare a deployed file with its model; None for a target that ASE cannot run.

    The compiled graphs of such targets differ from that of ``ase`` in their outputs only.
    """
    compiled = deployed.name.endswith(files.COMPILED)
    if compiled and target != "ase":
        return None
    calculator = compiled_calculator(deployed, device) if compiled else saved_calculator(deployed, device)
    return _compare(model_calculator(model, device), calculator, _structures(example))


def default_tolerance(config: QuantizationConfig) -> float:
    """Allowed force difference, meV/Å, between a deployed file and its model.

    With exact activations only the fold differs: 0.5. With rounded activations, a number on the edge between two steps
    may fall to the other side in another order of summation. Forces then differ by the rounding noise itself, which is
    below 5 at 16 bits. On coarser grids the difference is printed, not judged.
    """
    if not config.rounds_activations:
        return 0.5
    attention = None if config.attention is None else config.attention.bits
    bits = [b for b in (config.scalars.bits, config.vectors.magnitude_bits, attention) if b is not None]
    return 5.0 if min(bits) >= 16 else float("inf")


def _structures(example: dict[str, Tensor], count: int = 4, amplitude: float = 0.05) -> list[Atoms]:
    """The example structure and copies of it with atoms moved at random by `amplitude` Å."""
    from nequip.data import to_ase

    original = to_ase(example)[0]
    original.info.clear()
    original.calc = None
    structures = [original]
    for seed in range(count - 1):
        distorted = original.copy()
        distorted.rattle(amplitude, seed=seed)
        structures.append(distorted)
    return structures


def _compare(reference: Calculator, deployed: Calculator, structures: Sequence[Atoms]) -> Check:
    differences = []
    for atoms in structures:
        values = []
        for calculator in (reference, deployed):
            copy = atoms.copy()
            copy.calc = calculator
            values.append((copy.get_potential_energy(), copy.get_forces()))
        (energy, forces), (other_energy, other_forces) = values
        differences.append(
            (abs(energy - other_energy) / len(atoms), np.abs(forces - other_forces).max(), np.abs(forces).max())
        )
    # np.max, because the largest of a NaN and a number has to be NaN, whatever their order.
    energy, forces, scale = 1e3 * np.max(differences, axis=0)
    return Check(float(energy), float(forces), float(scale), len(structures))
