"""Long runs, runs that are repeated, and processes that fork."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from ase import units
from ase.build import molecule
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from mace.calculators import MACECalculator

import gaq
from gaq.kernels.cpu import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")


def resident() -> float:
    """Resident memory of this process, MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from /proc")
@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_dynamics_take_no_more_memory(quantized: Callable[..., Any], steps: int) -> None:
    atoms = molecule("CH3CH2OH")
    model = quantized("gaq", "plain", torch.float32)
    atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype="float32")
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
    dynamics.run(100)
    before = resident()
    dynamics.run(steps)
    assert np.isfinite(atoms.get_potential_energy())
    # A tensor of this structure's edges and channels that each step kept would be 16 kB: 3 MiB after 200 steps.
    assert resident() - before < 2.0


ENERGIES = """
import sys
import mace, torch, numpy as np
from ase.build import molecule
from mace.calculators import MACECalculator
torch.set_num_threads(int(sys.argv[2]))
calculator = MACECalculator(model_paths=[sys.argv[1]], device="cpu", default_dtype="float32")
atoms = molecule("CH3CH2OH")
for step in range(3):
    atoms.rattle(0.03, seed=step)
    atoms.calc = calculator
    print("BITS", np.float64(atoms.get_potential_energy()).tobytes().hex(), atoms.get_forces().tobytes().hex())
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_same_bits_from_run_to_run(quantized: Callable[..., Any], tmp_path: Path, threads: str) -> None:
    gaq.save(quantized("gaq", "agnesi", torch.float32), tmp_path / "quantized.model")
    command = [sys.executable, "-W", "ignore", "-c", ENERGIES, str(tmp_path / "quantized.model"), threads]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert runs[0].count("BITS") == 3
    assert runs[0] == runs[1]
