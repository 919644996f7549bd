"""Energy drift without thermostat: the fused CPU engine against the reference path, on the same quantized models.

    python benchmarks/engine_nve.py --work DIR [--system azobenzene water] [--path engine reference] [--seed 0 1 2]

Stock `MACECalculator`, float32, preset `gaq` post-training. Azobenzene runs 50 ps at 1 fs, a periodic box of 8 water
molecules 10 ps at 0.5 fs. The model of the box is one of acetylacetone, which knows H, C and O: the run tests
conservation, not water. Each run has one seed of velocities and leaves its result in DIR, so processes can share the
work. `--table` gathers the results into results/engine_nve.json and plots the total energy of the first seed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
import warnings
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase.io import read
from ase.optimize import FIRE
from common import RESULTS, SHARED, load_json, mean_of_runs, write_result
from mace.calculators import MACECalculator
from mace_speed import water_box

import gaq
from gaq.checks.nve import nve_drift
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document
from gaq_mace.engine import disabled

SYSTEMS = {
    "azobenzene": {"model": "mace_azobenzene", "duration_ps": 50.0, "timestep_fs": 1.0},
    "water": {"model": "mace_acac", "duration_ps": 10.0, "timestep_fs": 0.5},
}
PATHS = ("engine", "reference")
SEEDS = range(10)


def quantized(work: Path, system: str) -> Path:
    """The model of a system quantized with `gaq`, made at the first call."""
    name = str(SYSTEMS[system]["model"])
    path = work / f"{name}_gaq.model"
    if not path.exists():
        data = "rmd17/azobenzene_train_01.xyz" if system == "azobenzene" else "acac/train_300K.xyz"
        structures = read(SHARED / "data" / data, ":")
        gaq.save(gaq.quantize(gaq.load(SHARED / f"models/{name}.model"), structures, "gaq"), path)
    return path


def start(system: str, calculator: Any) -> Any:
    """The first structure of a run: an azobenzene of the test data, or a relaxed box."""
    if system == "azobenzene":
        return read(SHARED / "data/rmd17/azobenzene_test_01.xyz", 0)
    atoms = water_box(8)
    atoms.calc = calculator
    FIRE(atoms, logfile=None).run(fmax=0.3, steps=100)
    return atoms


def run_name(system: str, path: str, seed: int) -> str:
    return f"{system}_{path}_{seed}"


def simulate(work: Path, system: str, path: str, seed: int) -> None:
    """Run one simulation, and leave its result in the working directory."""
    name = run_name(system, path, seed)
    if (work / f"{name}.json").exists():
        return
    calculator = MACECalculator(model_paths=str(quantized(work, system)), device="cpu", default_dtype="float32")
    options = {key: float(SYSTEMS[system][key]) for key in ("duration_ps", "timestep_fs")}
    atoms = start(system, calculator)
    with disabled() if path == "reference" else contextlib.nullcontext():
        began = time.perf_counter()
        # Water may react in a model that was not trained on it.
        bonds = system == "azobenzene"
        result = nve_drift(calculator, atoms, **options, seed=seed, check_bonds=bonds, progress=True)
        seconds = time.perf_counter() - began
    row = {key: value for key, value in dataclasses.asdict(result).items() if not isinstance(value, np.ndarray)}
    row |= {"system": system, "path": path, "seed": seed, "seconds": seconds}
    np.savez(work / f"{name}.npz", times_ps=result.times_ps, total_energy_ev=result.total_energy_ev)
    (work / f"{name}.json").write_text(json.dumps(row, indent=1))
    print(json.dumps(row), flush=True)


def average(rows: list[Document], system: str, path: str) -> Document | None:
    """Mean drift of the seeds in `rows`; its error is from their scatter or, for one seed, from blocks of the run."""
    runs = [row for row in rows if (row["system"], row["path"]) == (system, path)]
    if not runs:
        return None
    return {
        "system": system,
        "path": path,
        "n_atoms": runs[0]["n_atoms"],
        "runs": len(runs),
        "duration_ps": runs[0]["duration_ps"],
        **mean_of_runs(runs),
    }


def table(work: Path) -> None:
    """Write the result file and the figure and print the table, for the runs in the working directory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        row for s in SYSTEMS for p in PATHS for n in SEEDS if (row := load_json(work / f"{run_name(s, p, n)}.json"))
    ]
    means = [mean for s in SYSTEMS for p in PATHS if (mean := average(rows, s, p))]
    write_result("engine_nve", rows, work=work, means=means)
    figure, axes = pyplot.subplots(1, len(SYSTEMS), figsize=(9, 3.2), layout="constrained")
    for axis, system in zip(axes, SYSTEMS, strict=True):
        for path in PATHS:
            file = work / f"{run_name(system, path, 0)}.npz"
            if file.exists():
                run = np.load(file)
                energy = 1e3 * (run["total_energy_ev"] - run["total_energy_ev"][0])
                axis.plot(run["times_ps"], energy, label=path, linewidth=0.8)
        axis.set(title=system, xlabel="time, ps", ylabel="total energy, meV from the start")
        axis.legend()
    figure.savefig(RESULTS / "engine_nve.png", dpi=150)
    shown = [
        {
            "system": row["system"],
            "path": row["path"],
            "atoms": row["n_atoms"],
            "ps": f"{row['runs']} x {row['duration_ps']:g}",
            "drift, meV/atom/ps": f"{row['drift_mev_per_atom_per_ps']:.4f} ± {row['standard_error']:.4f}",
            "drift x time / std kinetic": f"{row['drift_over_std_kinetic']:.3f}",
        }
        for row in means
    ]
    print(markdown_table(shown, list(shown[0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--system", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--path", nargs="*", default=list(PATHS), choices=PATHS)
    parser.add_argument("--seed", type=int, nargs="*", default=[0], choices=SEEDS, help="of the velocities")
    parser.add_argument("--table", action="store_true", help="only gather results of earlier runs")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if not args.table:
        for system in args.system:
            for path in args.path:
                for seed in args.seed:
                    simulate(args.work, system, path, seed)
    table(args.work)


if __name__ == "__main__":
    main()
