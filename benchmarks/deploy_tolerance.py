"""By how much the forces of a quantized model depend on the order in which it sums: what `gaq deploy` has to allow.

    python benchmarks/deploy_tolerance.py --work DIR

A deployed file sums in another order than the model it was made of. Where features are rounded, a number on the edge
between two steps may then fall to the other side. How much that moves the forces is seen without the file: the model
itself sums in another order when the atoms of a structure are listed in another one. For both, the table has the
largest difference of a force component, relative to the largest force of the structure, over the structures that `gaq
deploy` compares on, beside its bound (`gaq.deployed.check`). Models are made by ``gaq quantize`` and kept in DIR.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase import Atoms
from common import write_result
from nanosecond import FP32, command
from uses import files

import gaq
from gaq.adapter import adapter_for
from gaq.ase import Calculator as DeployedCalculator
from gaq.deployed.check import default_tolerance, relative_tolerance, structures_for
from gaq.reporting.tables import format_number, markdown_table
from gaq.untyped import Calculator, Document

SYSTEMS = ("azobenzene", "acac", "copper")
PRESETS = (FP32, "w8", "gaq", "w4a16")
ORDERS = 8
"""Random orders of the atoms."""


def forces(calculator: Calculator, atoms: Atoms) -> np.ndarray:
    """Forces in eV/Å, (atoms, 3)."""
    atoms = atoms.copy()
    atoms.calc = calculator
    return np.array(atoms.get_forces())


def permuted(calculator: Calculator, atoms: Atoms, rng: np.random.Generator) -> np.ndarray:
    """Forces that are computed with the atoms in another order, and returned in the order of `atoms`."""
    order = rng.permutation(len(atoms))
    result = np.empty((len(atoms), 3))
    result[order] = forces(calculator, atoms[order])
    return result


def measure(work: Path, system: str, preset: str) -> Document:
    """One row: a model."""
    quantized, source = files(work, system, preset if preset != FP32 else "w8")
    path = source if preset == FP32 else quantized
    deployed = work / f"{system}_{preset}.gaq"
    if not deployed.exists():
        # The bound of the command does not matter here.
        command("deploy", path, deployed, "--tolerance", "1e9")
    model = gaq.load(path)
    adapter = adapter_for(model)
    config = adapter.config(model)
    calculator = adapter.calculator(path, "cpu", "float32", None, None)
    file = DeployedCalculator(deployed)
    rng = np.random.default_rng(0)
    of_orders, of_files, absolute = [], [], []
    for atoms in structures_for(adapter.elements(model), float(model.r_max)):
        expected = forces(calculator, atoms)
        largest = np.abs(expected).max()
        if not largest > 0:  # single atoms
            continue
        differences = [np.abs(permuted(calculator, atoms, rng) - expected).max() for _ in range(ORDERS)]
        of_orders += [difference / largest for difference in differences]
        of_files.append(np.abs(forces(file, atoms) - expected).max() / largest)
        absolute += [1e3 * difference for difference in differences]
    return {
        "model": system,
        "preset": preset,
        "orders_median": float(np.median(of_orders)),
        "orders_largest": float(np.max(of_orders)),
        "orders_largest_mev_per_angstrom": float(np.max(absolute)),
        "file_largest": float(np.max(of_files)),
        "relative_bound": relative_tolerance(config),
        "bound_mev_per_angstrom": default_tolerance(config),
    }


def shown(value: object) -> str:
    return format_number(value) if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of benchmarks/nanosecond.py, for models")
    parser.add_argument("--systems", nargs="*", default=SYSTEMS, choices=SYSTEMS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work = arguments.work.resolve()
    rows = [measure(work, system, preset) for system in arguments.systems for preset in PRESETS]
    write_result("deploy_tolerance", rows, work, orders=ORDERS)
    columns = ["model", "preset", "orders_median", "orders_largest", "file_largest", "relative_bound"]
    printed = [
        {key: format_number(row[key]) if key not in ("model", "preset") else row[key] for key in columns}
        for row in rows
    ]
    print(markdown_table(printed, columns))


if __name__ == "__main__":
    main()
