"""A nanosecond of NVE with deployed files: energy, temperature, geometry, vibrations and distances beside FP32.

    python benchmarks/nanosecond.py --work DIR [SYSTEM:PRESET:SEED ...]
    python benchmarks/nanosecond.py --work DIR --table

Velocity Verlet at 0.5 fs without a thermostat, on one thread. Azobenzene runs 1 ns, a periodic box of 64 molecules of
water (192 atoms) 100 ps, both in float32. Models are quantized and deployed by the commands `gaq quantize` and
`gaq deploy`, FP32 by the second alone. Presets that cannot be deployed run 50 ps through the stock MACECalculator. All
presets start a seed from the same positions and velocities, which FP32 equilibrated.

The model of the box is one of acetylacetone, which knows H, C and O: the run tests conservation, and the difference to
FP32, not water.

Without names, all runs are made one after the other. Stopped or killed, a run goes on from its last checkpoint when the
command is given again, and takes the steps it would have taken: the results have the same bits. Processes with the same
DIR share the work. `--table` gathers finished and partial runs into results/nanosecond.json and its figures.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase import Atoms, units
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.optimize import BFGS, FIRE
from common import SHARED
from mace_speed import water_box
from nve_run import CalculatorForces, DeployedForces, Forces, Protocol, Run
from nve_table import write_table

from gaq import settings
from gaq.ase import Calculator
from gaq.cli.frame import DONE, FAILED
from gaq.files.whole import written_whole

FP32 = "fp32"
STOCK = ("w4a8", "naive_w8a8")
"""Presets that `gaq deploy` refuses, because they round activations to 8 bits."""
STOCK_PS = 50.0
TEMPERATURE = 300.0


@dataclass(frozen=True)
class System:
    """A system to simulate.

    Attributes:
        model: name of the float model.
        data: structures for its quantization.
        protocol: of a run.
    """

    model: str
    data: str
    protocol: Protocol


SYSTEMS = {
    "azobenzene": System("mace_azobenzene", "rmd17/azobenzene_train_01.xyz", Protocol(torsion=(8, 0, 1, 2))),
    # Water may react in a model that was not trained on it.
    "water": System(
        "mace_acac", "acac/train_300K.xyz", Protocol(steps=200_000, block=2048, save_every=100, bonds=False)
    ),
}
RUNS = [
    *("azobenzene:gaq:0", "azobenzene:fp32:0", "azobenzene:w8:0", "azobenzene:w4a16:0", "azobenzene:gaq:1"),
    *("azobenzene:fp32:1", "azobenzene:gaq:2", "azobenzene:fp32:2", "azobenzene:naive_w8a8:0", "azobenzene:w4a8:0"),
    *("water:gaq:0", "water:fp32:0", "water:w8:0"),
]
"""Runs of this benchmark, the most telling ones first."""


def command(*arguments: object) -> None:
    """Run a command of `gaq` on one thread.

    Raises:
        subprocess.CalledProcessError: if it cannot be done; a gate that fails is no such reason.
    """
    code = "import sys; from gaq.cli import main; sys.exit(main())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], env=environment)
    if done.returncode not in (DONE, FAILED):
        done.check_returncode()


def model_file(work: Path, system: str, preset: str) -> Path:
    """The float model, or the quantized one, made at the first call."""
    name = SYSTEMS[system].model
    if preset == FP32:
        return SHARED / f"models/{name}.model"
    path = work / f"{name}_{preset}.model"
    if not path.exists():
        data = SHARED / "data" / SYSTEMS[system].data
        source = SHARED / f"models/{name}.model"
        # `--force`: what the gates of the naive preset say is known.
        command("quantize", source, "--config", preset, "--calibration", data, "-o", path, "--force")
    return path


def deployed_file(work: Path, system: str, preset: str) -> Path:
    """The deployed model, made at the first call."""
    path = work / f"{SYSTEMS[system].model}_{preset}.gaq"
    if not path.exists():
        # The bound of the command, 5 meV/Å for `gaq`, is absolute, and its structures have forces up to 100 eV/Å.
        command("deploy", model_file(work, system, preset), path)
        if not path.exists():
            raise RuntimeError(f"{path} was not written: see the differences above")
    return path


def start(work: Path, system: str, seed: int) -> Path:
    """Positions and velocities that all runs of a seed start from, equilibrated with FP32 for 2 ps.

    The energy of the molecule above its minimum is then set to that of harmonic vibrations at 300 K, by scaling its
    velocities: else the mean temperature of a run of one molecule is a matter of its start.
    """
    path = work / f"{system}_start_{seed}.traj"
    if path.exists():
        return path
    calculator = Calculator(deployed_file(work, system, FP32))
    atoms = read(SHARED / "data/rmd17/azobenzene_test_01.xyz", 0) if system == "azobenzene" else water_box(64)
    atoms = Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, calculator=calculator)
    molecule = not atoms.pbc.any()
    if molecule:
        BFGS(atoms, logfile=None).run(fmax=1e-3, steps=500)
    else:
        FIRE(atoms, logfile=None).run(fmax=0.3, steps=200)
    lowest = atoms.get_potential_energy()
    rng = np.random.default_rng(seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=rng)
    step = SYSTEMS[system].protocol.timestep_fs * units.fs
    Langevin(atoms, step, temperature_K=TEMPERATURE, friction=0.02 / units.fs, rng=rng).run(4000)
    Stationary(atoms)
    if molecule:
        ZeroRotation(atoms)
        kinetic = (3 * len(atoms) - 6) * units.kB * TEMPERATURE - (atoms.get_potential_energy() - lowest)
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(kinetic / atoms.get_kinetic_energy()))
    atoms.calc = None
    with written_whole(path) as part:
        write(part, atoms)
    return path


def forces_of(work: Path, system: str, preset: str, atoms: Atoms) -> tuple[Forces, Path]:
    """Energies and forces of a preset, and the file they come from."""
    if preset not in STOCK:
        path = deployed_file(work, system, preset)
        return DeployedForces(path, atoms), path
    from mace.calculators import MACECalculator

    path = model_file(work, system, preset)
    return CalculatorForces(MACECalculator(str(path), device="cpu", default_dtype="float32"), atoms), path


def opened(work: Path, name: str) -> Run:
    """A run as its checkpoint has it, or at its start."""
    system, preset, seed = name.split(":")
    begin = start(work, system, int(seed))
    atoms = read(begin)
    forces, file = forces_of(work, system, preset, atoms)
    protocol = SYSTEMS[system].protocol
    if preset in STOCK:
        protocol = replace(protocol, steps=round(1e3 * STOCK_PS / protocol.timestep_fs))
    identity: dict[str, Any] = {
        "run": name,
        "file": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        "start": hashlib.sha256(begin.read_bytes()).hexdigest()[:16],
        "protocol": str(protocol),
    }
    return Run(atoms, forces, protocol, checkpoint(work, name), identity)


def checkpoint(work: Path, name: str) -> Path:
    return work / f"run_{name.replace(':', '_')}.npz"


@contextlib.contextmanager
def held(work: Path, name: str) -> Iterator[bool]:
    """Hold a run against other processes; False if one of them does. The system frees it if this process dies."""
    with open(work / f"{name.replace(':', '_')}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


class Stop:
    """True once the process was asked to end by Ctrl-C or SIGTERM: runs leave a checkpoint first."""

    def __init__(self) -> None:
        self.asked = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = number

    def __call__(self) -> bool:
        return self.asked > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=RUNS, metavar="SYSTEM:PRESET:SEED")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, starts and checkpoints")
    parser.add_argument("--table", action="store_true", help="only gather what runs have come to")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.table:
        write_table(args.work, {name: opened(args.work, name) for name in RUNS if checkpoint(args.work, name).exists()})
        return
    for name in args.runs:
        with held(args.work, name) as mine:
            if not mine:
                print(f"{name}: another process runs it", flush=True)
                continue
            # The stock calculator must not keep neighbour lists, which no checkpoint holds.
            stock = settings.override(skin=0.0) if name.split(":")[1] in STOCK else contextlib.nullcontext()
            with stock:
                # Before signals are caught, so that Ctrl-C stops the making of models.
                run = opened(args.work, name)
                stop = Stop()
                run.advance(stop, f"NVE {name}")
            picoseconds = 1e-3 * run.step * run.protocol.timestep_fs
            print(f"{name}: {picoseconds:.1f} ps{', ' + run.reason if run.reason else ''}", flush=True)
            if stop():
                sys.exit(128 + stop.asked)


if __name__ == "__main__":
    main()
