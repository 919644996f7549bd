"""Speed and memory of pair styles in LAMMPS, by size of the box, ranks and threads.

    python benchmarks/lammps_speed.py --work DIR --file float=A.gaq --file gaq=B.gaq
    python benchmarks/lammps_speed.py --work DIR --mliap fp32=A-mliap_lammps.pt
    python benchmarks/lammps_speed.py --work DIR --plugin PAIR_MACE.so --style "mace=mace; A-lammps.pt"

It runs NVE on boxes of water at the density of the liquid, or of the cell of `--cell` repeated, in the LAMMPS of this
environment or that of `--lammps`. A row has steps per second of the loop after a first run that warms up, the median of
`--repeats` runs between which all others take their turns, and the largest resident memory of a rank; rows of other
calls stay in the result file. Files of `--file` also run in ASE, on
one rank, with the same time step. `--mliap` runs files for ML-IAP through lammps_mliap.py, on one rank and one thread.
Other pair styles come from `--plugin` (see lammps_check.py) with `--style NAME=STYLE; FILE`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io import read, write
from common import RESULTS, load_json, write_result

from gaq.lammps import build
from gaq.lammps.installation import Installation, find
from gaq.lammps.simulation import write_data
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document

SIZES = (192, 1536, 12288)
SCRIPT = """{plugins}
units metal
newton on
atom_style atomic
boundary p p p
box tilt large
read_data {data}
{pair}
neighbor 1.0 bin
velocity all create 300 4711 mom yes rot yes
fix nve all nve
timestep 0.0005
run {warm_up}
run {steps}
"""
# Runs a command as a rank, and appends its largest resident memory to a file.
RANK = """import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:], close_fds=False)
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(usage.ru_maxrss) + "\\n")
sys.exit(os.waitstatus_to_exitcode(status))
"""
# The same in ASE: file, structure, steps that warm up, steps, threads.
IN_ASE = """import sys, time
import torch
from ase import units
from ase.io import read
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from gaq.ase import Calculator
torch.set_num_threads(int(sys.argv[5]))
atoms = read(sys.argv[2])
atoms.calc = Calculator(sys.argv[1])
MaxwellBoltzmannDistribution(atoms, temperature_K=300)
dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
dynamics.run(int(sys.argv[3]))
begin = time.perf_counter()
dynamics.run(int(sys.argv[4]))
print("Loop time of", time.perf_counter() - begin, "on", sys.argv[5], "procs for", sys.argv[4], "steps")
"""
KEYS = ("name", "style", "atoms", "ranks", "threads")


def pair_lines(style: str, path: str, elements: list[str], cutoff: float) -> str:
    if style == "mliap":
        pair = f"pair_style zero {cutoff} full\npair_coeff * *\nfix model all external pf/callback 1 1\n"
        return pair + "fix_modify model energy yes virial yes"
    return f"pair_style {style}\npair_coeff * * {Path(path).resolve()} {' '.join(elements)}"


def boxes(args: argparse.Namespace) -> dict[int, Atoms]:
    """Structures by their number of atoms: water, or the given cell repeated along its axes in turn."""
    if args.cell is None:
        from mace_speed import water_box

        small = water_box(64)
        return {size: small.repeat({192: 1, 1536: 2, 12288: 4}[size]) for size in args.sizes}
    made, atoms, axis = {}, read(args.cell), 0
    for size in sorted(args.sizes):
        while len(atoms) < size:
            atoms = atoms.repeat([2 if i == axis % 3 else 1 for i in range(3)])
            axis += 1
        made[size] = atoms
    return made


def measure(
    lammps: Installation,
    row: Document,
    path: str,
    plugins: list[Path],
    data: Path,
    elements: list[str],
    args: argparse.Namespace,
) -> Document:
    """Run one case, and return its row."""
    work = args.work / "run"
    work.mkdir(exist_ok=True)
    memory, log, source = work / "memory", work / "log", work / "in.run"
    memory.unlink(missing_ok=True)
    steps = max(2, min(args.steps, int(args.atom_steps / row["atoms"])))
    loaded = "\n".join(f"plugin load {plugin}" for plugin in plugins if row["style"] != "mliap")
    values = {
        "data": data,
        "pair": pair_lines(row["style"], path, elements, args.cutoff),
        "warm_up": max(1, steps // 5),
        "steps": steps,
    }
    source.write_text(f"log {log}\n" + SCRIPT.format(plugins=loaded, **values))
    command = [str(lammps.program), "-in", str(source), "-nocite"]
    if row["style"] == "mliap":
        command = [
            sys.executable,
            str(Path(__file__).with_name("lammps_mliap.py")),
            str(Path(path).resolve()),
            str(source),
            str(args.cutoff),
        ]
        command += [] if args.mliap_with_gaq else ["--without-gaq"]
    if row["style"] == "ase":
        counts = [str(number) for number in (max(1, steps // 5), steps, row["threads"])]
        command = [sys.executable, "-W", "ignore", "-c", IN_ASE, path, str(data.with_suffix(".xyz")), *counts]
    command = [sys.executable, "-c", RANK, str(memory), *command]
    if row["ranks"] > 1:
        command = [str(lammps.launcher), "-n", str(row["ranks"]), *command]
    environment = {**lammps.environment, "OMP_NUM_THREADS": str(row["threads"])}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if row["style"] == "ase":
        log.write_text(done.stdout)
    if done.returncode:
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        return {**row, "failed": (errors or ["no message"])[-1]}
    loops = re.findall(r"Loop time of (\S+) on (\d+) procs for (\d+) steps", log.read_text())
    seconds, processors, counted = loops[-1]
    assert (int(processors), int(counted)) == (row["ranks"] * row["threads"], steps)
    return {
        **row,
        "steps": steps,
        "steps_per_second": steps / float(seconds),
        "mib_per_rank": max(json.loads(line) for line in memory.read_text().splitlines()) / 1024,
    }


def median_of(runs: list[Document]) -> Document:
    """The row of a case: the median speed, its range and the largest memory of its runs."""
    speeds = [run["steps_per_second"] for run in runs]
    return {
        **runs[0],
        "steps_per_second": statistics.median(speeds),
        "slowest_and_fastest": [min(speeds), max(speeds)],
        "mib_per_rank": max(run["mib_per_rank"] for run in runs),
        "runs": len(runs),
    }


def cases(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Name, style and file of each."""
    found = [(*text.split("=", 1), "gaq") for text in args.file] + [
        (*text.split("=", 1), "mliap") for text in args.mliap
    ]
    listed = [(name, style, str(Path(path).resolve())) for name, path, style in found]
    listed += [(name, "ase", str(Path(path).resolve())) for name, path, style in found if style == "gaq"]
    for text in args.style:
        name, rest = text.split("=", 1)
        style, path = rest.split(";")
        listed.append((name, style.strip(), path.strip()))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--lammps", help="see `gaq lammps build`")
    parser.add_argument("--file", action="append", default=[], metavar="NAME=FILE", help="for pair_style gaq")
    parser.add_argument("--mliap", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--mliap-with-gaq", action="store_true", help="let files for ML-IAP use this package")
    parser.add_argument("--style", action="append", default=[], metavar="NAME=STYLE;FILE")
    parser.add_argument("--plugin", type=Path, action="append", default=[])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--cell", type=Path, help="structure to repeat in place of water (any format ASE reads)")
    parser.add_argument("--cutoff", type=float, default=5.0, help="cutoff of models for ML-IAP, Å")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=200, help="most steps of a case")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--atom-steps", type=float, default=2e4, help="most steps times atoms of a case")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    lammps = find(args.lammps)
    plugins = [build.obtain(lammps), *(plugin.resolve() for plugin in args.plugin)]
    structures = boxes(args)
    rows = {tuple(row[key] for key in KEYS): row for row in load_json(RESULTS / "lammps_speed.json").get("rows", [])}
    for size in args.sizes:
        data = args.work / f"{size}.data"
        atoms = structures[size]
        elements = sorted(set(atoms.get_chemical_symbols()))
        write_data(atoms, elements, data)
        write(data.with_suffix(".xyz"), atoms)
        measured: dict[tuple[Any, ...], list[Document]] = {}
        for repeat in range(args.repeats):
            for name, style, path in cases(args):
                for ranks, threads in itertools.product(args.ranks, args.threads):
                    if (style == "mliap" and ranks * threads > 1) or (style == "ase" and ranks > 1):
                        continue
                    row = dict(zip(KEYS, (name, style, len(atoms), ranks, threads), strict=True))
                    row = measure(lammps, row, path, plugins, data, elements, args)
                    print(repeat, row, flush=True)
                    measured.setdefault(tuple(row[key] for key in KEYS), []).append(row)
        for key, runs in measured.items():
            failed = [run for run in runs if "failed" in run]
            rows[key] = failed[0] if failed else median_of(runs)
        write_result("lammps_speed", list(rows.values()), args.work, lammps=lammps.version)
    table = []
    for row in rows.values():
        line = {key: row[key] for key in KEYS}
        line["steps/s"] = row["failed"] if "failed" in row else f"{row['steps_per_second']:.3g}"
        line["MiB a rank"] = "" if "failed" in row else f"{row['mib_per_rank']:.0f}"
        table.append(line)
    print(markdown_table(table, [*KEYS, "steps/s", "MiB a rank"]))
    print(RESULTS / "lammps_speed.json")


if __name__ == "__main__":
    main()
