"""A deployed file in LAMMPS against the ASE calculator of the same file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ase.calculators.calculator import Calculator as ASECalculator
from ase.calculators.calculator import all_changes

from gaq.ase import Calculator
from gaq.config.parse import parse_config
from gaq.deployed.check import Check, compare, default_tolerance, relative_tolerance, structures_for
from gaq.deployed.form import metadata_of
from gaq.lammps.installation import Installation
from gaq.lammps.simulation import evaluate, with_box

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Row", "allowed", "check"]


@dataclass(frozen=True)
class Row:
    """One structure on some ranks.

    Attributes:
        structure: what it is.
        head: of the model.
        ranks: MPI processes.
        check: differences between LAMMPS and ASE.
        agrees: whether forces differ by no more than is allowed.
    """

    structure: str
    head: str
    ranks: int
    check: Check
    agrees: bool


class _InLammps(ASECalculator):
    """Calculator that runs LAMMPS anew for each structure."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012  (ASE's form)

    def __init__(self, lammps: Installation, plugin: Path, path: Path, head: str, ranks: int) -> None:
        super().__init__()
        self.lammps, self.plugin, self.ranks = lammps, plugin, ranks
        self.model, self.head = path.resolve(), head

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None  # `super` has copied them
        elements = sorted(set(self.atoms.get_chemical_symbols()))
        pair = f'pair_style gaq head "{self.head}"\npair_coeff * * "{self.model}" {" ".join(elements)}'
        with tempfile.TemporaryDirectory(prefix="gaq-") as folder:
            result = evaluate(self.lammps, self.plugin, self.atoms, elements, pair, Path(folder), self.ranks)
        self.results = {"energy": result.energy, "forces": result.forces, "stress": result.stress}


def allowed(path: Path) -> tuple[float, float]:
    """Allowed force difference, in meV/Å and relative to the largest force; the larger one counts.

    Infinite where rounding is so coarse that its noise cannot be judged.
    """
    configuration = metadata_of(path)["configuration"]
    config = None if configuration is None else parse_config(configuration)
    return default_tolerance(config), relative_tolerance(config)


def check(path: Path, lammps: Installation, plugin: Path, ranks: Sequence[int]) -> Iterator[Row]:
    """Compare a deployed file in LAMMPS with `gaq.ase.Calculator` on molecules and crystals of its elements.

    Args:
        path: file that `gaq deploy` wrote.
        lammps: which LAMMPS.
        plugin: the plugin to load.
        ranks: numbers of MPI processes.

    Raises:
        ValueError: if it is no such file.
        LammpsError: if LAMMPS stops with an error.
    """
    described, bounds = metadata_of(path), allowed(path)
    structures = [atoms for atoms in structures_for(described["elements"], described["r_max"]) if len(atoms) > 2]
    for head in described["heads"]:
        reference = Calculator(path, head)
        for atoms in map(with_box, structures):
            kind = "crystal" if atoms.pbc.all() else "molecule"
            for number in ranks:
                in_lammps = _InLammps(lammps, plugin, path, head, number)
                difference = compare(reference, in_lammps, [atoms], stress=True)
                yield Row(f"{kind} of {len(atoms)} atoms", head, number, difference, difference.within(*bounds))
