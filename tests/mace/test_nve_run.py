"""NVE runs of the benchmark: a run that is killed and resumed has the bits of one that was not; what is sampled."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.io import read, write
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from mace_models import write_trained_model
from trained import ethanol

from gaq.ase import Calculator
from gaq.deployment import deploy
from gaq.kernels.cpu import native

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from nve_run import CalculatorForces, DeployedForces, Protocol, Run
from nve_table import density_of_states, difference, row_of

PROTOCOL = Protocol(steps=6000, block=64, save_every=10)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A deployed model, and a molecule of ethanol with velocities."""
    if not native.available():
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("nve")
    write_trained_model(folder / "small.model")
    deploy(folder / "small.model", folder / "small.gaq")
    atoms = ethanol()[0]
    atoms = Atoms(atoms.symbols, atoms.positions)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    write(folder / "start.traj", atoms)
    return folder / "small.gaq", folder / "start.traj"


BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
CODE = f"""
import sys
sys.path.append({BENCHMARKS!r})
from pathlib import Path
import torch
from ase.io import read
from nve_run import DeployedForces, Protocol, Run
torch.set_num_threads(1)
file, start, path = map(Path, sys.argv[1:])
atoms = read(start)
Run(atoms, DeployedForces(file, atoms), {PROTOCOL!r}, path, {{"run": "small"}}).advance()
"""


def run(files: tuple[Path, Path], path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", CODE, *map(str, files), str(path)])


@pytest.mark.slow
def test_killed_and_resumed(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(files, tmp_path / "whole.npz").wait() == 0
    killed = tmp_path / "killed.npz"
    process = run(files, killed)
    while not killed.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with np.load(killed) as stored:
        assert 0 < int(stored["step"]) < PROTOCOL.steps
        # The list was made at other positions than those of the checkpoint: a new one would have other edges.
        assert np.abs(stored["history"] - stored["positions"]).max() > 0
    assert run(files, killed).wait() == 0
    with np.load(tmp_path / "whole.npz") as whole, np.load(killed) as resumed:
        assert set(whole) == set(resumed)
        for name in whole:
            assert whole[name].tobytes() == resumed[name].tobytes(), name


def test_checkpoint_of_another_run(files: tuple[Path, Path], tmp_path: Path) -> None:
    atoms = read(files[1])
    Run(atoms, DeployedForces(files[0], atoms), PROTOCOL, tmp_path / "a.npz", {"run": "a"}).save()
    with pytest.raises(ValueError, match="a checkpoint of another run"):
        Run(atoms, DeployedForces(files[0], atoms), PROTOCOL, tmp_path / "a.npz", {"run": "b"})


def test_same_steps_as_ase(files: tuple[Path, Path], tmp_path: Path) -> None:
    from ase.md.verlet import VelocityVerlet

    atoms = read(files[1])
    ours = Run(atoms, DeployedForces(files[0], atoms), Protocol(steps=40), tmp_path / "a.npz", {})
    ours.advance()
    atoms.calc = Calculator(files[0])
    VelocityVerlet(atoms, 0.5 * units.fs).run(40)
    assert np.abs(ours.positions - atoms.positions).max() < 1e-6
    total = atoms.get_potential_energy() + atoms.get_kinetic_energy()
    assert ours.trace[-1, 0] == pytest.approx(total, abs=1e-6)


def test_broken_bond_ends_a_run(tmp_path: Path) -> None:
    """Nitrogen whose atoms fly apart at 2 Å in 10 fs: a bond of 0.71 + 0.71 Å is broken at twice that."""
    atoms = molecule("N2")
    atoms.set_velocities([[0, 0, 0.1 / units.fs], [0, 0, -0.1 / units.fs]])
    atoms.calc = EMT()
    run = Run(atoms, CalculatorForces(EMT(), atoms), Protocol(steps=4000, temperature_K=1e6), tmp_path / "a.npz", {})
    run.advance()
    assert "atoms 0 and 1 came apart" in run.reason
    assert run.done
    assert run.step < 400


def test_spectrum_of_an_oscillator(tmp_path: Path) -> None:
    """The line of a molecule of two atoms is where its harmonic frequency is."""
    from ase.calculators.harmonic import HarmonicCalculator, HarmonicForceField

    atoms = molecule("N2")
    constant = 140.0  # eV/Å², along the bond
    hessian = np.zeros((6, 6))
    for a, b, sign in ((2, 2, 1), (5, 5, 1), (2, 5, -1), (5, 2, -1)):
        hessian[a, b] = sign * constant
    calculator = HarmonicCalculator(HarmonicForceField(ref_atoms=atoms.copy(), ref_energy=0.0, hessian_x=hessian))
    atoms.set_velocities([[0, 0, 0.01], [0, 0, -0.01]])
    forces = CalculatorForces(calculator, atoms)
    run = Run(atoms, forces, Protocol(steps=8200, block=2048, bonds=False), tmp_path / "a.npz", {})
    run.advance()
    mass = 0.5 * atoms.get_masses()[0]
    expected = np.sqrt(constant / mass) / (2 * np.pi) * units.fs / 2.99792458e-5
    waves, density = density_of_states(run)
    assert run.blocks == 1
    assert waves[np.argmax(density)] == pytest.approx(expected, abs=2 * waves[1])
    assert density.sum() * waves[1] == pytest.approx(1.0)
    row = row_of("nitrogen:fp32:0", run)
    assert row["ps"] == pytest.approx(4.1)
    assert abs(row["drift_mev_per_atom_per_ps"]) < 1e-4


def test_difference_of_densities() -> None:
    assert difference(np.array([1.0, 1.0]), np.array([2.0, 2.0])) == 0.0
    assert difference(np.array([1.0, 0.0]), np.array([0.0, 3.0])) == 1.0
    assert difference(np.array([1.0, 1.0]), np.array([3.0, 1.0])) == 0.25
