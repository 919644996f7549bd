"""NVE in LAMMPS and in ASE from the same start: drift and fluctuation of the energy.

    python benchmarks/lammps_nve.py FILE.gaq --work DIR [--ps 20] [--ranks 2] [--structure FILE.xyz]

FILE is a deployed model. Both run on the structure, by default 64 molecules of water on a grid; a molecule without a
cell gets one. FIRE relaxes it and Langevin dynamics brings it to 300 K first; then velocity Verlet of 0.5 fs. The drift
is the slope of a line through the total energies, one each 10 fs, with its standard error from blocks of a tenth of the
run.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from ase import Atoms, units
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from common import write_result
from mace_speed import water_box

from gaq.ase import Calculator
from gaq.lammps import build
from gaq.lammps.installation import find
from gaq.lammps.simulation import run, write_data
from gaq.progress import progress_over
from gaq.untyped import Document

STEP, EVERY = 0.5, 20  # fs, steps between energies
SCRIPT = """plugin load {plugin}
units metal
newton on
atom_style atomic
boundary p p p
box tilt large
read_data start.data
pair_style gaq
pair_coeff * * {file} {elements}
neighbor 1.0 bin
velocity all set 0 0 0
{velocities}
fix nve all nve
timestep {step}
variable total equal etotal
fix out all print {every} "TOTAL $(v_total:%.10f) TEMPERATURE $(temp:%.4f)" screen no file energies
run {steps}
"""


def start(file: Path, structure: Path | None) -> Atoms:
    """A structure at 300 K."""
    atoms = water_box(64) if structure is None else read(structure, 0)
    atoms = Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=True)
    if atoms.cell.rank < 3:
        atoms.center(vacuum=6.0)
    atoms.calc = Calculator(file)
    FIRE(atoms, logfile=None).run(fmax=0.3, steps=100)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    Langevin(atoms, STEP * units.fs, temperature_K=300, friction=0.02 / units.fs, rng=np.random.default_rng(1)).run(
        1000
    )
    Stationary(atoms)
    return atoms


def judged(totals: list[float], temperatures: list[float], atoms: int) -> Document:
    """Drift in meV an atom and ps, its standard error, and the standard deviation of the energy around the line."""
    energies = 1e3 * np.array(totals) / atoms
    times = 1e-3 * STEP * EVERY * np.arange(len(energies))
    slope, offset = np.polyfit(times, energies, 1)
    blocks = [
        np.polyfit(t, e, 1)[0] for t, e in zip(np.array_split(times, 10), np.array_split(energies, 10), strict=True)
    ]
    return {
        "drift_mev_per_atom_per_ps": float(slope),
        # The error of a slope falls as the length of the run to the power of 3/2.
        "standard_error": float(np.std(blocks, ddof=1) / np.sqrt(len(blocks)) / len(blocks)),
        "fluctuation_mev_per_atom": float(np.std(energies - slope * times - offset)),
        "temperature_k": float(np.mean(temperatures)),
        "temperature_at_the_end_k": float(np.mean(temperatures[-len(temperatures) // 10 :])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ps", type=float, default=20.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--structure", type=Path)
    parser.add_argument("--lammps", help="see `gaq lammps build`")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    file, steps = args.file.resolve(), round(1e3 * args.ps / STEP)
    begin = args.work / "start.traj"
    if not begin.exists():
        write(begin, start(file, args.structure))
    atoms = read(begin)
    rows = []
    lammps = find(args.lammps)
    elements = sorted(set(atoms.get_chemical_symbols()))
    write_data(atoms, elements, args.work / "start.data")
    # LAMMPS's units metal: Å/ps.
    velocities = atoms.get_velocities() * (1e3 * units.fs)
    lines = [f"set atom {i + 1} vx {v[0]:.15g} vy {v[1]:.15g} vz {v[2]:.15g}" for i, v in enumerate(velocities)]
    values = {"plugin": build.obtain(lammps), "file": file, "elements": " ".join(elements), "steps": steps}
    script = SCRIPT.format(velocities="\n".join(lines), step=1e-3 * STEP, every=EVERY, **values)
    run(lammps, script, args.work, args.ranks)
    found = re.findall(r"TOTAL (\S+) TEMPERATURE (\S+)", (args.work / "energies").read_text())
    values = judged([float(e) for e, _ in found], [float(t) for _, t in found], len(atoms))
    rows.append({"host": "LAMMPS", "ranks": args.ranks, "atoms": len(atoms), "ps": args.ps, **values})
    print(rows[-1], flush=True)
    atoms.calc = Calculator(file)
    dynamics = VelocityVerlet(atoms, STEP * units.fs)
    totals, temperatures = [], []
    for _ in progress_over(range(steps // EVERY), steps // EVERY, "NVE in ASE"):
        totals.append(atoms.get_total_energy())
        temperatures.append(atoms.get_temperature())
        dynamics.run(EVERY)
    rows.append(
        {"host": "ASE", "ranks": 1, "atoms": len(atoms), "ps": args.ps, **judged(totals, temperatures, len(atoms))}
    )
    print(rows[-1])
    print(write_result("lammps_nve", rows, args.work, lammps=lammps.version, file=file.name))


if __name__ == "__main__":
    main()
