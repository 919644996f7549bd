"""What a step of the quickstart's models takes, and which part of it no kernel can make faster.

    python examples/quickstart_mace.py                     # writes quickstart/fp32.model and quickstart/gaq.model
    python benchmarks/quickstart_step.py --work quickstart [--repeats 15]

Both models run in the stock `MACECalculator` on the quickstart's molecule and on larger periodic cells of it, step by
step in turn, on one thread, in processor time: other work on the machine changes that less than the clock. `outside` is
the part of a step before and after the model: neighbour lists, tensors, the calculator. In the stock calculator it is
measured by itself, with a model that computes nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase import Atoms
from ase.io import read
from common import write_result
from mace.calculators import MACECalculator

NAMES = ("fp32", "gaq")


def cells(molecule: Atoms) -> list[Atoms]:
    """The molecule, and 8 and 27 of it in a periodic cell."""
    box = molecule.copy()
    box.center(vacuum=1.5)
    box.pbc = True
    return [molecule, *(box.repeat(n) for n in (2, 3))]


class Nothing(torch.nn.Module):
    """A model that returns zeros, with what the calculator asks of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        for name in ("r_max", "atomic_numbers", "heads"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        self.weight = next(model.parameters())

    def forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Zeros for what the calculator reads."""
        atoms, dtype = len(batch["positions"]), batch["positions"].dtype
        energy = torch.zeros(1, dtype=dtype)
        output: dict[str, Any] = dict.fromkeys(("stress", "virials", "dipole", "charges"))
        return output | {
            "energy": energy,
            "interaction_energy": energy,
            "node_energy": torch.zeros(atoms, dtype=dtype),
            "forces": torch.zeros(atoms, 3, dtype=dtype),
        }


def seconds(calculators: dict[str, MACECalculator], atoms: Atoms, repeats: int) -> dict[str, float]:
    """Median processor time of a step by calculator, measured in turn; positions change by 1 mÅ before each."""
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
    parser.add_argument("--work", type=Path, required=True, help="folder of the quickstart")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = {"device": "cpu", "default_dtype": "float32"}
    calculators = {name: MACECalculator(str(arguments.work / f"{name}.model"), **options) for name in NAMES}
    calculators["outside"] = MACECalculator(models=[Nothing(calculators["fp32"].models[0])], **options)
    rows = []
    for atoms in cells(read(arguments.work / "test.xyz", "0")):
        times = seconds(calculators, atoms, arguments.repeats)
        inside = {name: times[name] - times["outside"] for name in NAMES}
        row = {
            "atoms": len(atoms),
            **{f"{name}_ms": 1e3 * value for name, value in times.items()},
            "times_faster": times["fp32"] / times["gaq"],
            "times_faster_inside": inside["fp32"] / inside["gaq"],
        }
        rows.append(row)
        print("  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    print(write_result("quickstart_step", rows, work=arguments.work))


if __name__ == "__main__":
    main()
