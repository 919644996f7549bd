"""What a step of the quickstart's models takes on its molecule, and on larger cells of it.

    python examples/quickstart_mace.py && python benchmarks/quickstart_step.py --framework mace [--repeats 25]

The files that the quickstart of a framework made, float and with preset `gaq`, run in the stock calculator on the
molecule and on periodic cells of 8 and 27 of it; the latter also as `gaq deploy` writes it, in `gaq.ase.Calculator`.
They take turns step by step, on one thread, in processor time: other work on the machine changes that less than the
clock.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from common import ROOT, write_result

import gaq.ase

sys.path.insert(0, str(ROOT / "examples"))
from comparison import MODELS
from xtb_dataset import trans_azobenzene

DEPLOYED = "deployed"
FOLDERS = {"mace": Path("quickstart"), "nequip": Path("quickstart/nequip")}


def calculator(framework: str, folder: Path, name: str) -> Calculator:
    """The stock calculator of a model of the quickstart."""
    if framework == "mace":
        from mace.calculators import MACECalculator

        return MACECalculator(str(folder / f"{name}.model"), device="cpu", default_dtype="float32")
    from nequip.integrations.ase import NequIPCalculator

    file = str(folder / f"{name}.nequip.pt2")
    return NequIPCalculator.from_compiled_model(file, device="cpu", chemical_species_to_atom_type_map=True)


def deployed(framework: str, folder: Path, work: Path) -> Calculator:
    """The calculator of the quantized model as one file of C++ operations."""
    path = work / "model.gaq"
    if not gaq.deploy(folder / ("gaq.model" if framework == "mace" else "gaq/best.ckpt"), path).written:
        raise SystemExit("the deployed file does not agree with the model")
    return gaq.ase.Calculator(path)


def cells(molecule: Atoms) -> list[Atoms]:
    """The molecule, and 8 and 27 of it in a periodic cell."""
    box = molecule.copy()
    box.center(vacuum=1.5)
    box.pbc = True
    return [molecule, *(box.repeat(n) for n in (2, 3))]


def seconds(calculators: dict[str, Calculator], atoms: Atoms, repeats: int) -> dict[str, float]:
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


def row(calculators: dict[str, Calculator], atoms: Atoms, repeats: int) -> dict[str, float]:
    """Measure and print a row of the result."""
    times = seconds(calculators, atoms, repeats)
    made = {
        "atoms": len(atoms),
        "stock_ms": 1e3 * times["fp32"],
        "gaq_ms": 1e3 * times["gaq"],
        "times_faster": times["fp32"] / times["gaq"],
        "deployed_ms": 1e3 * times[DEPLOYED],
        "deployed_times_faster": times["fp32"] / times[DEPLOYED],
    }
    print("  ".join(f"{key} {value:.3g}" for key, value in made.items()))
    return made


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("mace", "nequip"), required=True)
    parser.add_argument("--quickstart", type=Path, help="its folder; default: the one that it writes to")
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = arguments.quickstart or FOLDERS[arguments.framework]
    load = os.getloadavg()[0]
    calculators = {name: calculator(arguments.framework, folder, name) for name in MODELS}
    with tempfile.TemporaryDirectory() as work:
        calculators[DEPLOYED] = deployed(arguments.framework, folder, Path(work))
        rows = [row(calculators, atoms, arguments.repeats) for atoms in cells(trans_azobenzene())]
    print(write_result(f"quickstart_step_{arguments.framework}", rows, load=load))


if __name__ == "__main__":
    main()
