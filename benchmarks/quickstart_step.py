"""What a step of the quickstart's models takes on its molecule, and on larger cells of it.

    python benchmarks/quickstart_step.py --framework mace|nequip [--repeats 25]

Models of the quickstart's shape, float and with preset `gaq`, on whose weights time does not depend: MACE's are random,
NequIP's are trained for one epoch on 20 structures and compiled, by the quickstart's own functions. They run in the
stock calculators on the molecule and on periodic cells of 8 and 27 of it, step by step in turn, on one thread, in
processor time: other work on the machine changes that less than the clock.
"""

from __future__ import annotations

import argparse
import copy
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
from ase.calculators.emt import EMT
from ase.io import write
from common import ROOT, write_result

import gaq

sys.path.insert(0, str(ROOT / "examples"))
from comparison import MODELS
from xtb_dataset import trans_azobenzene


def mace_calculators(folder: Path) -> dict[str, Calculator]:
    """Calculators of the shape that `mace_run_train` makes of the quickstart's file."""
    import mace  # noqa: F401  (before e3nn)
    from e3nn import o3
    from mace import modules
    from mace.calculators import MACECalculator

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
    return {
        name: MACECalculator(str(folder / f"{name}.model"), device="cpu", default_dtype="float32") for name in MODELS
    }


def write_structures(path: Path) -> None:
    """Write 20 structures, every atom displaced by 0.05 Å in each direction, with labels of EMT."""
    rng, structures = np.random.default_rng(0), []
    for _ in range(20):
        atoms = trans_azobenzene()
        atoms.positions += 0.05 * rng.standard_normal(atoms.positions.shape)
        atoms.calc = EMT()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = None
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = energy, forces
        structures.append(atoms)
    write(path, structures, format="extxyz")


def nequip_calculators(folder: Path) -> dict[str, Calculator]:
    """Calculators of the quickstart's compiled files, after one epoch on 20 structures."""
    import quickstart_nequip
    from nequip.integrations.ase import NequIPCalculator

    write_structures(folder / "train.xyz")
    configs = quickstart_nequip.write_training_files(folder, epochs=1, device="cpu", seed=0)
    files = {name: quickstart_nequip.deploy(quickstart_nequip.train(configs[name], 1), "cpu") for name in MODELS}
    return {
        name: NequIPCalculator.from_compiled_model(str(file), device="cpu", chemical_species_to_atom_type_map=True)
        for name, file in files.items()
    }


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


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("mace", "nequip"), required=True)
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    make = mace_calculators if arguments.framework == "mace" else nequip_calculators
    with tempfile.TemporaryDirectory() as name:
        calculators = make(Path(name))
    load, rows = os.getloadavg()[0], []
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
    print(write_result(f"quickstart_step_{arguments.framework}", rows, load=load))


if __name__ == "__main__":
    main()
