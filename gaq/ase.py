"""ASE calculator of deployed files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase.calculators.calculator import Calculator as ASECalculator
from ase.calculators.calculator import all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from gaq import settings
from gaq.deployed.form import metadata_of
from gaq.deployed.neighbours import NeighbourList
from gaq.deployed.potential import Potential
from gaq.kernels import program

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Calculator"]


class Calculator(ASECalculator):
    """ASE calculator of a file that ``gaq deploy`` wrote.

    A step is one call of C++; neither MACE nor NequIP is imported. It uses as many threads as torch does.

    Args:
        path: the file.
        head: of a model with several; None for the first.
        skin: length by which neighbour lists reach beyond the cutoff, in Å; they are kept until an atom has moved by
            half of it. None for ``GAQ_SKIN``; 0 makes a list in every step.

    Raises:
        ValueError: if the file is not whole or of another version, or has no such head; at a step, if it does not know
            an element, a position is not a finite number, or `info` of the structure has another charge or spin than
            the file has fixed.
        gaq.kernels.cpu.native.CompilerError: where the kernels cannot be built.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012  (ASE's form)

    def __init__(self, path: str | Path, head: str | None = None, skin: float | None = None) -> None:
        super().__init__()
        self.path, self.head = Path(path), head
        self._symbols: list[str] = []
        self._potential = Potential(self.path, [], head)
        self._fixed: dict[str, int] = metadata_of(self.path).get("fixed", {})
        self._list = NeighbourList(self._potential.r_max, settings.current().skin if skin is None else skin)
        self._numbers = b""
        self._types = torch.zeros(0, dtype=torch.int64)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute all properties of a structure; the stress only for a cell with a volume."""
        super().calculate(atoms, properties, system_changes)
        structure: Any = self.atoms  # of ase.Atoms, which `super` has copied
        self._check(structure)
        self._know(structure)
        self._list.update(structure)
        sender, receiver = self._list.sender, self._list.receiver
        positions = torch.from_numpy(np.ascontiguousarray(structure.positions))
        vectors = program.edge_vectors(positions, sender, receiver, self._list.shifts)
        energies, gradient = self._potential(self._types, sender, receiver, vectors)
        structures = torch.zeros(len(structure), dtype=torch.int64)
        strained = structure.cell.rank == 3
        forces, strain = program.forces_and_strain(vectors, gradient, sender, receiver, structures, 1, strained)
        energy = float(energies.sum())
        self.results = {"energy": energy, "free_energy": energy, "energies": energies.numpy(), "forces": forces.numpy()}
        if strain is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(strain[0].numpy() / structure.get_volume())

    def _check(self, atoms: Atoms) -> None:
        """Refuse a structure of another charge or spin than the file has fixed."""
        for name, value in self._fixed.items():
            for key in (name, f"total_{name}"):
                if float(atoms.info.get(key, value)) != value:
                    raise ValueError(
                        f"{self.path}: {name} {value} is fixed in the file, and the structure has info[{key!r}] = "
                        f"{atoms.info[key]}. Deploy the model again with --{name} {atoms.info[key]}."
                    )

    def _know(self, atoms: Atoms) -> None:
        """Number the types of the atoms; where there are new elements, open the file for them as well."""
        numbers = atoms.numbers.tobytes()
        if numbers == self._numbers:
            return
        symbols = atoms.get_chemical_symbols()
        if not set(symbols) <= set(self._symbols):
            known = sorted({*self._symbols, *symbols})
            self._potential = Potential(self.path, known, self.head)
            self._symbols = known
        place = {symbol: number for number, symbol in enumerate(self._symbols)}
        self._types = torch.tensor([place[symbol] for symbol in symbols], dtype=torch.int64)
        self._numbers = numbers
