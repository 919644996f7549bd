"""The potential of tests/lammps/exchanging_potential.cpp in torch, as an ASE calculator without parts of space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress

CUTOFF = 3.2
CHARGES = {"H": 0.4, "C": -0.7, "O": 0.9}


def write(path: Path, charges: Mapping[str, float] = CHARGES, number_bytes: int = 8) -> Path:
    """Write the potential's file."""
    words = [f"{name} {charge}" for name, charge in charges.items()]
    path.write_text(f"exchanging {number_bytes} {CUTOFF} {' '.join(words)}\n")
    return path


class Exchanging(Calculator):
    """Energy, energies, forces and stress; atoms of other elements are not seen."""

    implemented_properties: ClassVar[list[str]] = ["energy", "energies", "forces", "stress"]

    def __init__(self, charges: Mapping[str, float] = CHARGES, scale: float = 1.0) -> None:
        super().__init__()
        self.charges, self.scale = charges, scale

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        seen = torch.tensor([symbol in self.charges for symbol in atoms.get_chemical_symbols()])
        charge = torch.tensor([self.charges.get(s, 0.0) for s in atoms.get_chemical_symbols()], dtype=torch.float64)
        receiver, sender, vectors = (torch.from_numpy(part) for part in neighbor_list("ijD", atoms, CUTOFF))
        inside = seen[receiver] & seen[sender]
        receiver, sender, vectors = receiver[inside], sender[inside], -vectors[inside]  # ASE: receiver to sender
        vectors.requires_grad_(True)
        weight = (1 - vectors.square().sum(1) / CUTOFF**2) ** 3

        def gathered(messages: torch.Tensor) -> torch.Tensor:
            rows = torch.zeros(len(atoms), *messages.shape[1:], dtype=torch.float64)
            return rows.index_add(0, receiver, messages)

        density = gathered(charge[sender] * weight)
        dipole = gathered((density[sender] * weight)[:, None] * vectors)
        energies = charge * density + 0.1 * density**2 + 0.3 * dipole.square().sum(1)
        energies = self.scale * (energies + gathered(weight * (dipole[receiver] * dipole[sender]).sum(1)))
        (gradient,) = torch.autograd.grad(energies.sum(), vectors)
        forces = torch.zeros(len(atoms), 3, dtype=torch.float64)
        forces = forces.index_add(0, receiver, -gradient).index_add(0, sender, gradient)
        self.results = {
            "energy": float(energies.detach().sum()),
            "energies": energies.detach().numpy(),
            "forces": forces.numpy(),
        }
        if atoms.cell.rank == 3:
            stress = (vectors.detach().T @ gradient).numpy() / atoms.get_volume()
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress)
