"""What a quantized model is good for: what users do with a potential, beside the float model.

    python benchmarks/uses.py --work DIR [--systems azobenzene acac copper] [--presets w8 gaq w4a16]
    python benchmarks/uses.py --work DIR --table

Geometry optimisation to 1e-3 eV/Å, harmonic frequencies (of a cell at the centre of its Brillouin zone), energies along
paths, and the equation of state, by the functions of `gaq report` and with its bounds (`gaq.checks.uses`). The paths:
azobenzene, one phenyl turned about its bond to nitrogen by up to 90 degrees; acetylacetone, the published dihedral scan
and hydrogen transfer; copper, a cell of 32 atoms sheared by up to 5 %. Drift and distances at 300 K are those of
results/nanosecond.json.

DIR is the folder of benchmarks/nanosecond.py, whose quantized models are used. The model of copper is trained by
benchmarks/dense_models.py on EMT: ``python benchmarks/dense_models.py copper --work DIR/dense --epochs 30``. Without it
the system is left out. `--table` gathers what was measured into results/uses.json.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import read
from common import RESULTS, SHARED, load_json, write_result
from dense_models import progress
from nanosecond import command, model_file
from presets import store

from gaq.checks.potential import energies_of
from gaq.checks.relaxation import relaxed
from gaq.checks.uses import USES, fitness_line, judged
from gaq.reporting import open_file
from gaq.reporting.subject import Subject
from gaq.reporting.tables import format_number, markdown_table
from gaq.reporting.uses import of_minimum, profile_error
from gaq.untyped import Document

SYSTEMS = {"azobenzene": "azobenzene", "acac": "water", "copper": ""}
"""Systems, with the names of those of benchmarks/nanosecond.py that have the same model."""
PRESETS = ("w8", "gaq", "w4a16")


def files(work: Path, system: str, preset: str) -> tuple[Path, Path]:
    """The quantized model, made at the first call, and the float model."""
    if SYSTEMS[system]:
        return model_file(work, SYSTEMS[system], preset), model_file(work, SYSTEMS[system], "fp32")
    source, path = work / "dense/copper.model", work / f"copper_{preset}.model"
    if not path.exists():
        data = work / "dense/copper_train.xyz"
        command("quantize", source, "--config", preset, "--calibration", data, "-o", path, "--force")
    return path, source


def structure(system: str) -> Atoms:
    """The structure to optimise, away from its minimum."""
    if system == "copper":
        atoms = bulk("Cu", a=3.62, cubic=True).repeat(2)
        atoms.rattle(0.05, seed=0)
        return atoms
    data = {"azobenzene": "rmd17/azobenzene_test_01.xyz", "acac": "acac/test_MD_300K.xyz"}[system]
    atoms = read(SHARED / "data" / data, 0)
    return Atoms(atoms.symbols, atoms.positions)


def paths(system: str, reference: Subject) -> dict[str, list[Atoms]]:
    """Structures along the paths of a system."""
    if system == "acac":
        names = {"dihedral": "test_dihedral", "hydrogen transfer": "test_H_transfer"}
        return {path: list(read(SHARED / f"data/acac/{name}.xyz", ":")) for path, name in names.items()}
    minimum = relaxed(reference.potential, structure(system)).atoms
    if system == "copper":
        return {"shear": [sheared(minimum, strain) for strain in np.linspace(-0.05, 0.05, 41)]}
    # The phenyl at nitrogen 0: carbon 8 and all that is bonded to it but not to nitrogen 1.
    nitrogen, carbon, other = 0, 8, 1
    turned = attached(minimum, carbon, nitrogen)
    across = next(atom for atom in turned if minimum.get_distance(atom, carbon) < 1.5 and atom != carbon)
    start = minimum.get_dihedral(other, nitrogen, carbon, across)
    frames = []
    for angle in np.arange(-90.0, 91.0, 5.0):
        copy = minimum.copy()
        copy.set_dihedral(other, nitrogen, carbon, across, start + angle, indices=turned)
        frames.append(copy)
    return {"phenyl torsion": frames}


def sheared(atoms: Atoms, strain: float) -> Atoms:
    copy = atoms.copy()
    copy.set_cell(
        atoms.cell.array @ (np.eye(3) + strain * np.eye(3)[[1, 0, 2]] * np.array([1, 1, 0])), scale_atoms=True
    )
    return copy


def attached(atoms: Atoms, first: int, fixed: int) -> list[int]:
    """Atoms that hang together with `first`, without those behind `fixed`."""
    distances = atoms.get_all_distances()
    group, front = {first}, [first]
    while front:
        near = {int(atom) for atom in np.flatnonzero(distances[front.pop()] < 1.6)} - group - {fixed}
        group |= near
        front += near
    return sorted(group)


def measure(work: Path, system: str, preset: str) -> None:
    """Take the measures of one model and leave them in the working directory."""
    key = f"uses_{system}_{preset}"
    if (work / f"row_{key}.json").exists():
        return
    quantized, source = files(work, system, preset)
    subject, reference = open_file(quantized), open_file(source)
    measures: Document = of_minimum(subject, reference, structure(system))
    errors = {}
    for path, structures in paths(system, reference).items():
        energies, ideal = (np.asarray(energies_of(one.exact, structures)) for one in (subject, reference))
        errors[path] = {"profile_error_mev": profile_error(energies, ideal), "height_mev": 1e3 * float(np.ptp(ideal))}
    measures["profile_error_mev"] = max(error["profile_error_mev"] for error in errors.values())
    store(work, key, {"system": system, "preset": preset, "measures": measures, "paths": errors})


def of_simulations(system: str, preset: str) -> dict[str, float | None]:
    """Drift and distances from the finished nanosecond runs of one system."""
    result = load_json(RESULTS / "nanosecond.json")
    rows = [row for row in result.get("rows", ()) if row["system"] == SYSTEMS[system] and row["ps"] == row["of_ps"]]
    of_preset = [row for row in rows if row["preset"] == preset]
    ideal = [row for row in rows if row["preset"] == "fp32"]
    moved = [row["beside_fp32"]["distances"] for row in of_preset if row["beside_fp32"]]
    seeds = [pair["distances"] for pair in result.get("fp32_apart", ()) if pair["runs"][0].startswith(SYSTEMS[system])]
    measures: dict[str, float | None] = {"distances_moved_beside_seeds": None}
    if moved and seeds:
        measures["distances_moved_beside_seeds"] = float(np.mean(moved) / np.mean(seeds))
    if of_preset and ideal:
        means = [np.mean([row["drift_mev_per_atom_per_ps"] for row in some]) for some in (of_preset, ideal)]
        error = np.mean([row["standard_error"] for row in ideal]) * math.sqrt(1 / len(of_preset) + 1 / len(ideal))
        measures["drift_in_standard_errors"] = float(abs(means[0] - means[1]) / error)
    return measures


def cell(uses: Sequence[Document], use: str) -> str:
    """The verdict of several systems on one use, with the number that is nearest to its bound or farthest beyond.

    The force at which an optimisation ends counts where it is too large only: else it is anywhere below its bound.
    """
    entries = [
        (one["value"] / one["bound"], one)
        for of_system in uses
        for measure, one in of_system[use]["criteria"].items()
        if one["value"] is not None and not (measure == "force_left_ev_per_angstrom" and one["holds"])
    ]
    if not entries:
        return "not measured"
    worst = max(entries, key=lambda entry: entry[0])[1]
    fits = [of_system[use]["fit"] for of_system in uses]
    word = "no" if False in fits else "yes"
    return f"{word}: {format_number(worst['value'])} of {format_number(worst['bound'])} {worst['unit']}".strip()


def table(work: Path) -> None:
    """Write results/uses.json with the matrix, and print it."""
    rows: list[Document] = []
    for system in SYSTEMS:
        for preset in PRESETS:
            row = load_json(work / f"row_uses_{system}_{preset}.json")
            if row:
                row["measures"] |= of_simulations(system, preset) if SYSTEMS[system] else {}
                row["uses"] = judged(row["measures"])
                row["line"] = fitness_line(row["uses"])
                rows.append(row)
    matrix: list[Document] = []
    for use in USES:
        entry: Document = {"use": use}
        for preset in PRESETS:
            entry[preset] = cell([row["uses"] for row in rows if row["preset"] == preset], use)
        matrix.append(entry)
    criteria: Any = {use: [vars(criterion) for criterion in some] for use, some in USES.items()}
    copper = progress("copper", work / "dense")
    print(write_result("uses", rows, work, good_for=matrix, criteria=criteria, training_of_copper=copper))
    print(markdown_table(matrix, ["use", *PRESETS]))
    for row in rows:
        print(row["system"], row["preset"], row["line"], json.dumps(row["measures"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of benchmarks/nanosecond.py")
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--table", action="store_true", help="only gather what was measured")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if not args.table:
        for system in args.systems:
            if not SYSTEMS[system] and not (args.work / "dense/copper.model").exists():
                continue
            for preset in args.presets:
                measure(args.work, system, preset)
    table(args.work)


if __name__ == "__main__":
    main()
