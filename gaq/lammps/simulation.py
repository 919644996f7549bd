"""Structures in LAMMPS: input files, runs on some ranks, and what comes out."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gaq.lammps.installation import Installation, LammpsError

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Evaluation", "evaluate", "run", "with_box", "write_data"]

EV_PER_BAR_A3 = 1.0 / 1.6021765e6
"""LAMMPS's units metal: a pressure in bar times a volume in Å^3, as an energy."""


@dataclass(frozen=True)
class Evaluation:
    """What LAMMPS computed of a structure.

    Attributes:
        energy: in eV.
        forces: (atoms, 3), in eV/Å.
        stress: (6,) xx, yy, zz, yz, xz, xy as ASE has it, in eV/Å^3.
    """

    energy: float
    forces: NDArray[Any]
    stress: NDArray[Any]


def run(lammps: Installation, script: str, folder: Path, ranks: int = 1, threads: int = 1) -> str:
    """Run an input script in a folder, and return what LAMMPS printed.

    Raises:
        LammpsError: with LAMMPS's own error, if it stops with one.
    """
    (folder / "in.lammps").write_text(script)
    command = [str(lammps.program), "-in", "in.lammps", "-log", "none", "-nocite"]
    if ranks > 1:
        if lammps.launcher is None:
            raise LammpsError(f"{lammps.program}: no mpiexec starts it on {ranks} ranks.")
        command = [str(lammps.launcher), "-n", str(ranks), *command]
    environment = {**lammps.environment, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        lines = done.stdout.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        raise LammpsError(f"LAMMPS on {ranks} rank{'s' * (ranks > 1)}: {' '.join(errors)}")
    grid = re.search(r"(\d+) by (\d+) by (\d+) MPI processor grid", done.stdout)
    if grid is not None and math.prod(map(int, grid.groups())) != ranks:
        raise LammpsError(
            f"{lammps.launcher} starts {ranks} separate LAMMPS instead of one on {ranks} ranks: it belongs to another "
            "MPI than that of LAMMPS. Put LAMMPS's own first on the PATH."
        )
    return done.stdout


def write_data(atoms: Atoms, elements: Sequence[str], path: Path) -> None:
    """Write a data file; types are numbers of the elements. The cell must be lower triangular.

    Raises:
        ValueError: if it is not.
    """
    from ase.data import atomic_masses, atomic_numbers

    cell = np.asarray(atoms.cell)
    if np.abs(np.triu(cell, 1)).max() > 1e-12:
        raise ValueError("LAMMPS needs cells whose matrix is lower triangular")
    lines = ["structure", "", f"{len(atoms)} atoms", f"{len(elements)} atom types", ""]
    lines += [f"0.0 {float(cell[i, i])!r} {axis}lo {axis}hi" for i, axis in enumerate("xyz")]
    lines += [f"{float(cell[1, 0])!r} {float(cell[2, 0])!r} {float(cell[2, 1])!r} xy xz yz", "", "Masses", ""]
    lines += [f"{i} {atomic_masses[atomic_numbers[name]]}" for i, name in enumerate(elements, 1)]
    lines += ["", "Atoms # atomic", ""]
    for i, (symbol, place) in enumerate(zip(atoms.get_chemical_symbols(), atoms.positions.tolist(), strict=True), 1):
        lines.append(f"{i} {elements.index(symbol) + 1} {' '.join(map(repr, place))}")
    path.write_text("\n".join(lines) + "\n")


def with_box(atoms: Atoms) -> Atoms:
    """The same structure turned into the frame of LAMMPS's boxes, which hold molecules with vacuum around them."""
    atoms = atoms.copy()
    if not atoms.pbc.any():
        atoms.center(vacuum=8.0)
    cell, _ = atoms.cell.standard_form()
    atoms.set_cell(cell, scale_atoms=True)
    return atoms


PREAMBLE = """plugin load {plugin}
units metal
newton on
atom_style atomic
boundary {boundary}
box tilt large
read_data structure.data
{pair}
neighbor 1.0 bin
neigh_modify every 1 delay 0 check yes
thermo_modify norm no
"""
REPORT = """run 0
print "$(pe:%.14g) &
 $(pxx:%.14g) $(pyy:%.14g) $(pzz:%.14g) $(pyz:%.14g) $(pxz:%.14g) $(pxy:%.14g)" file report.txt screen no
write_dump all custom forces.txt id fx fy fz modify sort id format float %.14g
"""


def evaluate(
    lammps: Installation,
    plugin: Path,
    atoms: Atoms,
    elements: Sequence[str],
    pair: str,
    folder: Path,
    ranks: int = 1,
    threads: int = 1,
    before: str = "",
) -> Evaluation:
    """Compute energy, forces and stress of a structure.

    Args:
        lammps: which LAMMPS.
        plugin: the plugin to load.
        atoms: the structure; its cell is the box, periodic or not.
        elements: of LAMMPS's types.
        pair: commands pair_style and pair_coeff.
        folder: for the files of the run.
        ranks: MPI processes.
        threads: of each.
        before: commands after pair_coeff and before the run.

    Raises:
        LammpsError: if LAMMPS stops with an error.
    """
    write_data(atoms, elements, folder / "structure.data")
    boundary = " ".join("p" if periodic else "f" for periodic in atoms.pbc)
    preamble = PREAMBLE.format(plugin=plugin, boundary=boundary, pair=pair)
    run(lammps, f"{preamble}{before}\n{REPORT}", folder, ranks, threads)
    energy, *pressure = map(float, (folder / "report.txt").read_text().split())
    forces = np.loadtxt(folder / "forces.txt", skiprows=9, ndmin=2)[:, 1:]
    return Evaluation(energy, forces, -np.array(pressure) * EV_PER_BAR_A3)
