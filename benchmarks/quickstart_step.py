"""What a step of the quickstart's MACE models takes on its molecule, and on larger cells of it.

    python benchmarks/quickstart_step.py [--repeats 25]

A model of the quickstart's shape with random weights, on which time does not depend, and the same with preset `gaq`,
run in the stock `MACECalculator` on the molecule and on periodic cells of 8 and 27 of it, step by step in turn, on one
thread, in processor time: other work on the machine changes that less than the clock.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase import Atoms
from common import ROOT, write_result
from e3nn import o3
from mace import modules
from mace.calculators import MACECalculator

import gaq

sys.path.insert(0, str(ROOT / "examples"))
from xtb_dataset import trans_azobenzene

NAMES = ("fp32", "gaq")


def write_models(folder: Path) -> None:
    """Write ``fp32.model`` and ``gaq.model`` of the shape that `mace_run_train` makes of the quickstart's file."""
    torch.manual_seed(0)
    model = modules.ScaleShiftMACE(
        r_max=4.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
        num_interactions=2,
        num_elements=3,
        hidden_irreps=o3.Irreps("16x0e + 16x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(3),
        avg_num_neighbors=12.0,
        atomic_numbers=[1, 6, 7],
        correlation=2,
        radial_type="bessel",
        radial_MLP=[64, 64, 64],
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )
    torch.save(model, folder / "fp32.model")
    spec = {"preset": "gaq", "weights": {"rounding": "nearest"}, "distillation": {"steps": 0}}
    gaq.save(gaq.quantize(copy.deepcopy(model), [trans_azobenzene()], spec, progress=False), folder / "gaq.model")


def cells(molecule: Atoms) -> list[Atoms]:
    """The molecule, and 8 and 27 of it in a periodic cell."""
    box = molecule.copy()
    box.center(vacuum=1.5)
    box.pbc = True
    return [molecule, *(box.repeat(n) for n in (2, 3))]


def seconds(calculators: dict[str, MACECalculator], atoms: Atoms, repeats: int) -> dict[str, float]:
    """Median processor time of a step by model; positions change by 1 mÅ before each."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in calculators}
    for repeat in range(repeats + 3):
        positions = atoms.positions + 1e-3 * rng.standard_normal(atoms.positions.shape)
        for name, calculator in calculators.items():
            moved = Atoms(atoms.symbols, positions, cell=atoms.cell, pbc=atoms.pbc, calculator=calculator)
            start = time.process_time()
            moved.get_forces()
            if repeat >= 3:
                times[name].append(time.process_time() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options: dict[str, Any] = {"device": "cpu", "default_dtype": "float32"}
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name))
        calculators = {kind: MACECalculator(str(Path(name) / f"{kind}.model"), **options) for kind in NAMES}
    rows = []
    for atoms in cells(trans_azobenzene()):
        times = seconds(calculators, atoms, arguments.repeats)
        row = {
            "atoms": len(atoms),
            "stock_ms": 1e3 * times["fp32"],
            "gaq_ms": 1e3 * times["gaq"],
            "times_faster": times["fp32"] / times["gaq"],
        }
        rows.append(row)
        print("  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    print(write_result("quickstart_step", rows))


if __name__ == "__main__":
    main()
