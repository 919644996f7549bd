"""Train small MACE models of dense periodic matter: an alloy, water, a salt, and one model of 18 elements.

    python benchmarks/dense_models.py --work DIR [--rounds 4] [--quantize] [alloy water salt many]

Data are made here: alloys with ASE's EMT, water, salts and oxides with GFN1-xTB (package tblite). Training is the stock
``mace_run_train`` in rounds of some epochs. After each round DIR/NAME.model is the model so far, beside
DIR/NAME_train.xyz and DIR/NAME_test.xyz; the test structures are never trained on. Run the command again to train
further: data that exist are kept, training resumes from its last checkpoint. results/dense_models.json says how far
each model has come; ``--rounds 0`` only writes that. With ``--quantize``, ``gaq quantize`` then quantizes each model on
24 of its test cells at most, and the result has its gates and times.

`many` joins both methods. No element occurs in both, so the isolated-atom energies take up what differs between them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import CalculationFailed, Calculator
from ase.calculators.emt import EMT
from ase.io import write
from common import write_result

METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")
CATIONS = {"Li": 0.76, "Na": 1.02, "K": 1.38, "Mg": 0.72, "Ca": 1.00}  # ionic radii in Å (Shannon, six-fold)
ANIONS = {"F": 1.33, "Cl": 1.81, "Br": 1.96, "O": 1.40, "S": 1.84}
Rng = np.random.Generator


def distorted(atoms: Atoms, rng: Rng, displacement: float, strain: float) -> Atoms:
    """Strain the cell and displace the atoms; standard deviations in relative length and in Å."""
    atoms.set_cell(atoms.cell @ (np.eye(3) + rng.normal(0, strain, (3, 3))), scale_atoms=True)
    atoms.positions += rng.normal(0, displacement, atoms.positions.shape)
    return atoms


def alloy(rng: Rng, repeat: tuple[int, int, int], elements: tuple[str, ...]) -> Atoms:
    """A random solid solution on a distorted fcc lattice."""
    atoms = bulk("Cu", "fcc", a=rng.uniform(3.75, 4.1)).repeat(repeat)
    atoms.symbols[:] = rng.choice(elements, len(atoms))
    return distorted(atoms, rng, rng.uniform(0.03, 0.15), 0.01)


def copper(rng: Rng, repeat: tuple[int, int, int]) -> Atoms:
    """Copper on a distorted fcc lattice, compressed and stretched around EMT's lattice constant of 3.59 Å."""
    return distorted(bulk("Cu", "fcc", a=rng.uniform(3.4, 3.8)).repeat(repeat), rng, rng.uniform(0.02, 0.12), 0.01)


def salt(rng: Rng, repeat: tuple[int, int, int], cations: dict[str, float], anions: dict[str, float]) -> Atoms:
    """A rocksalt of one or two cations and one or two anions."""
    some_cations = rng.choice(list(cations), min(2, len(cations)), replace=False)
    some_anions = rng.choice(list(anions), min(2, len(anions)), replace=False)
    symbols = [str(rng.choice(some)) for some in (some_cations, some_anions) for _ in range(4 * int(np.prod(repeat)))]
    radii = {**cations, **anions}
    spacing = 2 * 2 * np.mean([radii[symbol] for symbol in symbols])
    atoms = bulk("NaCl", "rocksalt", a=spacing * rng.uniform(0.98, 1.04), cubic=True).repeat(repeat)
    first = atoms.symbols == "Na"
    numbers = Atoms(symbols).numbers
    atoms.numbers[first], atoms.numbers[~first] = np.split(numbers, 2)
    return distorted(atoms, rng, rng.uniform(0.03, 0.15), 0.01)


def water(rng: Rng, repeat: tuple[int, int, int]) -> Atoms:
    """Water near 1 g/cm³: molecules on a cubic grid, each turned at random, with bent and stretched bonds."""
    spacing = rng.uniform(3.05, 3.25)
    box = Atoms(cell=spacing * np.array(repeat), pbc=True)
    for index in np.ndindex(*repeat):
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.translate(spacing * (np.array(index) + 0.5) - one.get_center_of_mass() + rng.normal(0, 0.15, 3))
        box += one
    return distorted(box, rng, rng.uniform(0.02, 0.06), 0.01)


def xtb() -> Calculator:
    from tblite.ase import TBLite

    return TBLite(method="GFN1-xTB", accuracy=0.1, verbosity=0)


@dataclass(frozen=True)
class Kind:
    """One model: how structures are made, who labels them, how it is trained.

    `small` structures are for training: forces are local, so small cells teach as much as large ones. `large` ones,
    60 to 81 atoms, are held out, and a few are trained on.
    """

    small: Callable[[Rng], Atoms]
    large: Callable[[Rng], Atoms]
    label: Callable[[], Calculator]
    frames: tuple[int, int, int] = (120, 8, 12)  # small and large for training, large for tests
    irreps: str = "64x0e + 64x1o"
    options: dict[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ()  # names of kinds whose data this one joins to its own
    shares: int = 1  # the training data are cut into so many shares, and an epoch takes one of them, in turn


def _cells(*choices: tuple[int, int, int]) -> Callable[[Rng], tuple[int, int, int]]:
    return lambda rng: choices[rng.integers(len(choices))]


BINARY = _cells((3, 3, 3), (2, 3, 4))
FEW = ("Ni", "Cu", "Pd", "Ag", "Au")
KINDS = {
    "alloy": Kind(
        lambda rng: alloy(rng, BINARY(rng), FEW),
        lambda rng: alloy(rng, _cells((4, 4, 4), (3, 4, 5), (4, 4, 5))(rng), FEW),
        EMT,
        frames=(400, 20, 40),
    ),
    # Small, for uses.py: a crystal whose phonons and equation of state are smooth.
    "copper": Kind(
        lambda rng: copper(rng, BINARY(rng)),
        lambda rng: copper(rng, (4, 4, 4)),
        EMT,
        frames=(80, 4, 8),
        irreps="32x0e + 32x1o",
        options={"max_ell": "2", "correlation": "2"},
    ),
    "water": Kind(lambda rng: water(rng, (2, 2, 2)), lambda rng: water(rng, _cells((3, 3, 2), (3, 2, 4))(rng)), xtb),
    "salt": Kind(
        lambda rng: salt(rng, _cells((1, 1, 2), (1, 2, 2))(rng), {"Na": 1.02, "K": 1.38}, {"Cl": 1.81, "Br": 1.96}),
        lambda rng: salt(rng, (2, 2, 2), {"Na": 1.02, "K": 1.38}, {"Cl": 1.81, "Br": 1.96}),
        xtb,
        options={"r_max": "6.0"},
    ),
    "many": Kind(
        lambda rng: salt(rng, _cells((1, 1, 2), (1, 2, 2))(rng), CATIONS, ANIONS),
        lambda rng: salt(rng, (2, 2, 2), CATIONS, ANIONS),
        xtb,
        frames=(300, 20, 30),
        irreps="128x0e + 128x1o",
        options={"r_max": "5.0"},
        parts=("metals", "water"),
        shares=6,
    ),
    "metals": Kind(
        lambda rng: alloy(rng, BINARY(rng), METALS),
        lambda rng: alloy(rng, (4, 4, 4), METALS),
        EMT,
        frames=(400, 20, 30),
    ),
}
SEEDS = {"alloy": 0, "many": 1, "metals": 2, "salt": 3, "water": 4, "copper": 5}
"""Seeds of the data."""
TRAINED = ("alloy", "copper", "water", "salt", "many")  # `metals` is data for `many`


def labelled(make: Callable[[Rng], Atoms], calculator: Calculator, rng: Rng, count: int) -> list[Atoms]:
    """`count` structures with energy (eV), forces (eV/Å) and stress (eV/Å³).

    What the calculator cannot converge, and what has a force above 15 eV/Å, is made anew.
    """
    structures: list[Atoms] = []
    while len(structures) < count:
        atoms = make(rng)
        atoms.calc = calculator
        try:
            forces = atoms.get_forces()
            energy, stress = atoms.get_potential_energy(), atoms.get_stress(voigt=False)
        except CalculationFailed as error:
            print(f"left out: {atoms.get_chemical_formula()}: {str(error).splitlines()[0]}", flush=True)
            continue
        atoms.calc = None
        if np.abs(forces).max() > 15.0:
            continue
        atoms.info.update(REF_energy=energy, REF_stress=stress, config_type="Default")
        atoms.arrays["REF_forces"] = forces
        structures.append(atoms)
    return structures


def make_data(name: str, work: Path) -> None:
    """Write ``NAME_train.xyz``, ``NAME_valid.xyz`` and ``NAME_test.xyz`` unless they exist."""
    if (work / f"{name}_test.xyz").is_file():
        return
    kind = KINDS[name]
    rng = np.random.default_rng(SEEDS[name])
    small, large, held_out = kind.frames
    calculator = kind.label()
    train = labelled(kind.small, calculator, rng, small) + labelled(kind.large, calculator, rng, large)
    valid = labelled(kind.small, calculator, rng, max(small // 10, 2))
    test = labelled(kind.large, calculator, rng, held_out)
    for part in kind.parts:
        from ase.io import read

        make_data(part, work)
        for structures, split in ((train, "train"), (valid, "valid"), (test, "test")):
            structures.extend(read(work / f"{part}_{split}.xyz", ":"))
    for split, structures in (("train", train), ("valid", valid), ("test", test)):
        write(work / f"{name}_{split}.part", structures, format="extxyz")
        (work / f"{name}_{split}.part").replace(work / f"{name}_{split}.xyz")


def last_epoch(folder: Path, name: str) -> int:
    """The epoch of the newest checkpoint, -1 without one."""
    epochs = [int(path.stem.split("-")[-1]) for path in folder.glob(f"{name}_run-*_epoch-*.pt")]
    return max(epochs, default=-1)


def share_of_data(name: str, work: Path, epoch: int) -> Path:
    """File of the structures of an epoch: all, or one share of them after the other."""
    from ase.io import read

    shares, whole = KINDS[name].shares, work / f"{name}_train.xyz"
    if shares == 1:
        return whole
    part = work / f"{name}_train_{epoch % shares}.xyz"
    write(part, list(read(whole, ":"))[epoch % shares :: shares], format="extxyz")
    return part


def train_round(name: str, work: Path, epochs: int) -> None:
    """Train for `epochs` more epochs with MACE's own command and publish ``NAME.model``."""
    kind, folder = KINDS[name], work / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "name": name,
        "work_dir": str(folder),
        "train_file": str(share_of_data(name, work, last_epoch(folder / "checkpoints", name) + 1)),
        "valid_file": str(work / f"{name}_valid.xyz"),
        "model": "ScaleShiftMACE",
        "interaction_first": "RealAgnosticResidualInteractionBlock",
        "hidden_irreps": kind.irreps,
        "max_ell": "3",
        "correlation": "3",
        "num_interactions": "2",
        "r_max": "4.5",
        "E0s": "average",
        "energy_key": "REF_energy",
        "forces_key": "REF_forces",
        "stress_key": "REF_stress",
        "loss": "universal",
        "energy_weight": "1",
        "forces_weight": "10",
        "stress_weight": "1",
        "compute_stress": "True",
        "lr": "0.005",
        "ema_decay": "0.99",
        "scheduler_patience": "10",
        "batch_size": "4",
        "valid_batch_size": "8",
        "default_dtype": "float32",
        "max_num_epochs": str(last_epoch(folder / "checkpoints", name) + 1 + epochs),
        "patience": "100000",
        "error_table": "PerAtomMAE",
        "plot": "False",
        "skip_evaluate_heads": "Default",  # its tables at the end of each round take longer than a share
        "seed": "1",
        **kind.options,
    }
    command = [sys.executable, "-m", "mace.cli.run_train", "--ema", "--amsgrad", "--restart_latest"]
    command += [f"--{key}={value}" for key, value in options.items()]
    with open(folder / "log.txt", "a") as log:
        subprocess.run(command, check=True, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))
    written = folder / f"{name}.model"
    written.replace(work / f"{name}.model")


def progress(name: str, work: Path) -> dict[str, Any] | None:
    """Epochs, hours of training by the wall clock and errors on the validation structures; None before an epoch."""
    log = work / "runs" / name / "results" / f"{name}_run-1_train.txt"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    epochs = [entry for entry in entries if entry["mode"] == "eval" and entry["epoch"] is not None]
    if not epochs:
        return None
    return {
        "model": name,
        "irreps": KINDS[name].irreps,
        "epochs": epochs[-1]["epoch"] + 1,
        "hours_of_training": sum(entry["time"] for entry in entries if entry["mode"] == "opt") / 3600,
        "force_mae_mev_per_angstrom": 1e3 * epochs[-1]["mae_f"],
        "force_rmse_mev_per_angstrom": 1e3 * epochs[-1]["rmse_f"],
        "force_rmse_over_force_rms": epochs[-1]["rel_rmse_f"] / 100,
        "energy_mae_mev_per_atom": 1e3 * epochs[-1]["mae_e_per_atom"],
    }


def quantize(name: str, work: Path) -> None:
    """Quantize a model by the command, on one thread, and keep what it prints in ``NAME_gaq.json``."""
    from ase.io import read

    cells = list(read(work / f"{name}_test.xyz", ":"))
    write(work / f"{name}_cells.xyz", cells[:: -(-len(cells) // 24)], format="extxyz")
    gaq = "import sys; from gaq.cli import main; sys.exit(main())"
    command = [sys.executable, "-W", "ignore", "-c", gaq, "quantize", str(work / f"{name}.model"), "--calibration"]
    command += [str(work / f"{name}_cells.xyz"), "-o", str(work / f"{name}_gaq.model"), "--json"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = json.loads(done.stdout)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    kept = {
        "processor_s": seconds,
        "wall_s": time.perf_counter() - start,
        "times_smaller": printed["times_smaller"],
        "failed_gates": printed["failed_gates"],
        "gates": {gate: value["value"] for gate, value in printed["gates"].items() if value["passed"] is not None},
    }
    (work / f"{name}_gaq.json").write_text(json.dumps(kept))


def report(work: Path) -> None:
    rows = [row for name in TRAINED if (row := progress(name, work)) is not None]
    for row in rows:
        kept = work / f"{row['model']}_gaq.json"
        row["quantized"] = json.loads(kept.read_text()) if kept.is_file() else None
    write_result("dense_models", rows, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TRAINED)}; all if none is given")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and models")
    parser.add_argument("--rounds", type=int, default=1, help="how often each model is trained further, in turn")
    parser.add_argument("--quantize", action="store_true", help="quantize the models after training")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of a round")
    arguments = parser.parse_args()
    names = arguments.names or TRAINED
    unknown = sorted(set(names) - set(TRAINED))
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; allowed: {', '.join(TRAINED)}")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for _ in range(arguments.rounds):
        for name in names:
            make_data(name, work)
            train_round(name, work, arguments.epochs)
            print(
                f"{work / name}.model: {last_epoch(work / 'runs' / name / 'checkpoints', name) + 1} epochs", flush=True
            )
            report(work)
    if arguments.quantize:
        for name in names:
            if (work / f"{name}.model").is_file():
                quantize(name, work)
    report(work)


if __name__ == "__main__":
    main()
