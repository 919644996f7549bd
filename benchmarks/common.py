"""What the benchmark scripts share: data, batched NVE runs, result files."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation

from gaq.checks.nve import fit_drift
from gaq.checks.potential import Potential
from gaq.reporting.environment import hardware, versions

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
RESULTS = Path(__file__).resolve().parent / "results"


def spaced(structures: Sequence[Atoms], count: int) -> list[Atoms]:
    """`count` of the structures, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(structures) - 1, min(count, len(structures))).astype(int))
    return [structures[i] for i in chosen]


def write_result(name: str, rows: list[dict[str, Any]], work: Path | None = None, **extra: Any) -> Path:
    """Write ``results/<name>.json`` with the rows and what they were measured on.

    In the command `work` is shown as DIR, and the folder of a model elsewhere on this machine as MODEL.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = shlex.join([Path(sys.executable).name, *sys.argv]).replace(str(ROOT) + "/", "")
    if work is not None:
        command = command.replace(str(work), "DIR")
    content = {
        "rows": rows,
        "hardware": hardware(),
        "versions": versions(),
        "command": re.sub(r"--model /\S*/", "--model MODEL/", command.replace(str(SHARED), "../shared")),
        "date": datetime.date.today().isoformat(),
        **extra,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def nve_replicas(
    potential: Potential,
    structure: Atoms,
    replicas: int = 6,
    duration_ps: float = 2.0,
    timestep_fs: float = 0.5,
    temperature_k: float = 300.0,
    equilibrate_ps: float = 0.2,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Several NVE runs of one molecule, all in one batch a step (velocity Verlet).

    Returns:
        Mean drift (meV/atom/ps), its standard error over the replicas, and the ratio of |drift x time| to the
        standard deviation of the kinetic energy.
    """
    rng = np.random.default_rng(seed)
    copies = []
    for _ in range(replicas):
        atoms = structure.copy()
        MaxwellBoltzmannDistribution(atoms, temperature_K=2 * temperature_k, rng=rng)
        Stationary(atoms)
        ZeroRotation(atoms)
        copies.append(atoms)
    mass = copies[0].get_masses()[None, :, None]
    x = np.array([a.positions for a in copies])
    v = np.array([a.get_velocities() for a in copies])
    dt = timestep_fs * units.fs

    def forces(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for atoms, p in zip(copies, positions, strict=True):
            atoms.positions = p
        energy, force = potential(copies)
        return energy, np.array(force)

    n = len(structure)
    energy, force = forces(x)
    first = round(equilibrate_ps * 1000 / timestep_fs)
    steps = first + round(duration_ps * 1000 / timestep_fs)
    times, totals, kinetics = [], [], []
    for step in range(steps):
        v += 0.5 * dt * force / mass
        x = x + dt * v
        energy, force = forces(x)
        v += 0.5 * dt * force / mass
        kinetic = 0.5 * (mass * v**2).sum((1, 2))
        if step < first and step % 10 == 0:
            # A thermostat for the start only: rescale to the target temperature.
            v *= np.sqrt(1.5 * n * units.kB * temperature_k / kinetic)[:, None, None]
        if step >= first and step % 10 == 0:
            times.append((step - first) * timestep_fs / 1000)
            totals.append(energy.astype(float) + kinetic)
            kinetics.append(kinetic)
        tick()
    t = np.array(times)
    total = np.array(totals)
    slopes = np.array([fit_drift(t, total[:, i])[0] for i in range(replicas)]) / n * 1000
    spread = np.array(kinetics).std(0).mean()
    drift = float(slopes.mean())
    return {
        "drift_mev_per_atom_per_ps": drift,
        "standard_error": float(slopes.std(ddof=1) / np.sqrt(replicas)),
        "drift_over_std_kinetic": float(abs(drift) * n / 1000 * duration_ps / spread),
        "replicas": replicas,
        "duration_ps": duration_ps,
        "timestep_fs": timestep_fs,
    }


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file, or an empty dictionary if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}
