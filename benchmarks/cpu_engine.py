"""The fused CPU engine against stock MACE: time of a step, growth with size, share of each operation, memory.

    python benchmarks/cpu_engine.py --work DIR [--stage time|growth|memory|table|all] [--repeats 11]

`time` alternates step by step between stock MACECalculator (eager, and compile_mode="default"), the engine with the
same FP32 weights, and the engine with quantized models, on the same structures, with 1 thread and with all. It takes
the ratio of each pair and quotes the median, with the ratio of the sums, which includes the steps that make new
neighbour lists. The structures are those of a simulation of 1 fs steps at 300 K (azobenzene by the trained model among
the shared data, water by TIP3P); every second one is timed. `memory` runs each size in a separate process and reads its
peak.
With symmetrix installed (a C++ MACE engine), `--symmetrix DIR` adds it to the table. DIR holds fp32-1-6-7.json and
fp32-1-8.json, which `symmetrix_extract_mace -m DIR/fp32.model -Z ...` makes of the FP32 model.
The model has random weights and the size of a foundation model (128x0e+128x1o, l <= 3, correlation 3, 2 layers). A
second model has density-normalised blocks, distances scaled by covalent radii and ZBL repulsion, as later foundation
models do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import flops
import mace
import numpy as np
import torch
from ase import Atoms, units
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from common import SHARED, load_json, write_result
from mace.calculators import MACECalculator
from mace_speed import big_model, water_box

import gaq
from gaq import settings
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document
from gaq_mace.engine import Engine, accelerate, engine_of

PRESETS = ("w8", "gaq")
STOCK, COMPILED, SYMMETRIX = "stock eager", "stock compiled", "symmetrix, float32"


def model_files(work: Path, density: bool = False) -> dict[str, Path]:
    """Files of the FP32 model and its quantized forms, made at the first call."""
    prefix = "density_" if density else ""
    presets = ("gaq",) if density else PRESETS
    files = {name: work / f"{prefix}{name}.model" for name in ("fp32", *presets)}
    if not files["fp32"].exists():
        torch.save(big_model([1, 6, 7, 8], density), files["fp32"])
    for preset in presets:
        if not files[preset].exists():
            spec = {"preset": preset, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
            model = gaq.prepare(gaq.load(files["fp32"]), spec)
            gaq.calibrate(model, [water_box(8)], progress=False)
            gaq.save(gaq.convert(model), files[preset])
    return files


def calculator(files: dict[str, Path], kind: str) -> MACECalculator:
    name = kind.removeprefix("engine ") if kind.startswith("engine") else "fp32"
    options: Document = {"compile_mode": "default"} if kind == COMPILED else {}
    calc = MACECalculator(model_paths=str(files[name]), device="cpu", default_dtype="float32", **options)
    if kind == "engine fp32":
        accelerate(calc.models[0])
    return calc


def symmetrix(file: Path) -> Any:
    """The calculator of symmetrix, by Kokkos in float32."""
    from symmetrix import Symmetrix  # type: ignore[import-not-found]

    return Symmetrix(str(file), use_kokkos=True, dtype="float32")


def trajectory(structure: Atoms, frames: int, work: Path) -> list[Atoms]:
    """Structures of a simulation without thermostat, 1 fs apart, after 0.5 ps at 300 K with a thermostat."""
    path = work / f"trajectory_{structure.get_chemical_formula()}_{frames}.xyz"
    if path.exists():
        return list(read(path, ":"))
    atoms = structure.copy()
    if atoms.pbc.any():
        from ase.calculators.tip3p import TIP3P
        from ase.constraints import FixBondLengths

        # TIP3P is for rigid molecules, and constraints need molecules that the cell does not cut.
        for first in range(0, len(atoms), 3):
            bonds = atoms.get_distances(first, [first + 1, first + 2], mic=True, vector=True)
            atoms.positions[first + 1 : first + 3] = atoms.positions[first] + bonds
        pairs = [(first + i, first + (i + 1) % 3) for first in range(0, len(atoms), 3) for i in range(3)]
        atoms.set_constraint(FixBondLengths(pairs))
        atoms.calc = TIP3P(rc=4.5)
    else:
        trained = SHARED / "models/mace_azobenzene.model"
        atoms.calc = MACECalculator(model_paths=str(trained), device="cpu", default_dtype="float32")
    rng = np.random.default_rng(0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=rng)
    Langevin(atoms, 1 * units.fs, temperature_K=300, friction=0.02 / units.fs, rng=rng).run(500)
    structures: list[Atoms] = []
    dynamics = VelocityVerlet(atoms, 1 * units.fs)
    for _ in range(frames):
        dynamics.run(1)
        structures.append(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc))
    write(path, structures)
    return structures


def step(calc: Any, atoms: Atoms) -> float:
    start = time.perf_counter()
    calc.calculate(atoms, ["energy", "forces"])
    return time.perf_counter() - start


def stage_time(files: dict[str, Path], work: Path, repeats: int, compiled: bool, other: Path | None) -> None:
    kinds = [STOCK, *([COMPILED] if compiled else []), "engine fp32", *(f"engine {p}" for p in PRESETS)]
    rows = []
    azobenzene = read(SHARED / "data/rmd17/azobenzene_test_01.xyz", 0)
    density = model_files(work, density=True)
    extracted = {"azobenzene": "fp32-1-6-7.json", "water box": "fp32-1-8.json"}
    cases = (
        ("azobenzene", azobenzene, files, kinds),
        ("water box", water_box(64), files, kinds),
        ("water box, density model", water_box(64), density, [STOCK, "engine fp32", "engine gaq"]),
    )
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for label, structure, files_by_kind, kinds in cases:
            calculators: Document = {kind: calculator(files_by_kind, kind) for kind in kinds}
            if other is not None and threads == 1 and label in extracted:
                calculators[SYMMETRIX] = symmetrix(other / extracted[label])
            graphs = []
            times: dict[str, list[float]] = {kind: [] for kind in calculators}
            forces: dict[str, np.ndarray] = {}
            frames = trajectory(structure, 2 * (repeats + 2), work)
            for repeat, (before, atoms) in enumerate(zip(frames[::2], frames[1::2], strict=True)):
                begin = time.perf_counter()
                calculators[STOCK]._atoms_to_batch(atoms)
                graphs.append(time.perf_counter() - begin)
                for kind, calc in calculators.items():
                    last, atoms_of_kind = before.copy(), atoms.copy()
                    if kind == SYMMETRIX and not atoms.pbc.any():
                        # It needs a cell even here; MACE would spend its time on the empty space of one.
                        last.set_cell([100.0] * 3)
                        atoms_of_kind.set_cell([100.0] * 3)
                    step(calc, last)
                    seconds = step(calc, atoms_of_kind)
                    if repeat >= 2:
                        times[kind].append(seconds)
                    forces[kind] = np.asarray(calc.results["forces"])
            base = np.array(times[STOCK])
            for kind, values in times.items():
                row: Document = {
                    "structure": f"{label}, {len(structure)} atoms",
                    "threads": threads,
                    "kind": kind,
                    "median_seconds_per_step": float(np.median(values)),
                    "median_seconds_of_the_graph": float(np.median(graphs)),
                    "median_speedup_over_stock_eager": float(np.median(base / np.array(values))),
                    "speedup_of_the_sum_over_stock_eager": float(base.sum() / np.sum(values)),
                    "largest_force_difference_to_stock_ev_per_angstrom": float(
                        np.abs(forces[kind] - forces[STOCK]).max()
                    ),
                }
                if COMPILED in times:
                    base_compiled = np.array(times[COMPILED])
                    row["median_speedup_over_stock_compiled"] = float(np.median(base_compiled / np.array(values)))
                rows.append(row)
                print(row, flush=True)
    (work / "time.json").write_text(json.dumps(rows))


def operation_shares(calc: MACECalculator, atoms: Atoms) -> dict[str, float]:
    """Self CPU time of the longest operations in one step, in milliseconds, and of all."""
    from torch.profiler import profile

    step(calc, atoms)
    with profile() as profiler:
        step(calc, atoms)
    totals = {event.key: event.self_cpu_time_total / 1000 for event in profiler.key_averages()}
    kept = sorted(totals.items(), key=lambda item: -item[1])
    return {name: value for name, value in kept[:12] if value > 0} | {"all": sum(totals.values())}


def machine_limits() -> dict[str, float]:
    """Limits of one thread: float32 matrix product in GFLOP/s, copy of 64 MiB in GB/s (read and write counted)."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source, target = torch.randn(16 << 20), torch.empty(16 << 20)
    products, copies = [], []
    for _ in range(9):
        start = time.perf_counter()
        a @ b
        products.append(2 * 1024**3 / (time.perf_counter() - start) / 1e9)
        start = time.perf_counter()
        target.copy_(source)
        copies.append(2 * source.numel() * 4 / (time.perf_counter() - start) / 1e9)
    return {"sgemm_gflops": float(np.median(products)), "copy_gbytes_per_second": float(np.median(copies))}


def floating_point_operations(engine: Engine, atoms: int, edges: int) -> dict[str, float]:
    """Operations that each kind of kernel needs at least in a step (see flops.py), in units of 1e9."""
    forward = backward = polynomial = polynomial_back = 0.0
    layer: Any
    for layer in engine.layers:
        ahead, back = flops.of_convolution(layer.problem, edges)
        forward, backward = forward + ahead, backward + back
        ahead, back = flops.of_contraction(layer.polynomial, atoms, layer.problem.channels)
        polynomial, polynomial_back = polynomial + ahead, polynomial_back + back
    return {
        "GeneratedBackwardFor_gaq_edge_convolution_default": forward / 1e9,
        "gaq::edge_convolution_backward": backward / 1e9,
        "_Contraction": polynomial / 1e9,
        "_ContractionBackward": polynomial_back / 1e9,
    }


def stage_growth(files: dict[str, Path], work: Path) -> None:
    torch.set_num_threads(1)
    calc = calculator(files, "engine gaq")
    stock = calculator(files, STOCK)
    rows = []
    for molecules in (8, 64, 216, 1000, 3375):
        atoms = water_box(molecules)
        repeats = 7 if molecules <= 216 else 3
        step(calc, atoms)
        seconds = float(np.median([step(calc, atoms) for _ in range(repeats)]))
        row: Document = {"atoms": len(atoms), "engine_gaq_seconds": seconds}
        if molecules <= 216:
            step(stock, atoms)
            row["stock_eager_seconds"] = float(np.median([step(stock, atoms) for _ in range(3)]))
        rows.append(row)
        print(row, flush=True)
    box = water_box(64)
    shares = operation_shares(calc, box)
    edges = int(calc._atoms_to_batch(box)["edge_index"].shape[1])
    engine = engine_of(calc.models[0])
    assert engine is not None
    limits = machine_limits()
    work_done = floating_point_operations(engine, len(box), edges)
    rates = {
        name: {
            "gflops": amount / (shares[name] / 1000),
            "share_of_sgemm": amount / (shares[name] / 1000) / limits["sgemm_gflops"],
        }
        for name, amount in work_done.items()
        if name in shares
    }
    result = {"rows": rows, "shares_ms": shares, "edges": edges, "limits": limits, "rates": rates}
    print(json.dumps(result, indent=1), flush=True)
    (work / "growth.json").write_text(json.dumps(result))


def peak(files: dict[str, Path], kind: str, molecules: int) -> None:
    """Print the peak memory of two steps, in bytes; called in a separate process."""
    torch.set_num_threads(1)
    calc = calculator(files, kind)
    for _ in range(2):
        step(calc, water_box(molecules))
    # Not getrusage, which reports the peak of the parent process if that was larger.
    status = Path("/proc/self/status").read_text()
    kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    print(json.dumps({"peak": 1024 * kib, "atoms": 3 * molecules}))


def stage_memory(work: Path) -> None:
    memory = []
    for kind, sizes in ((STOCK, (8, 27, 64)), ("engine gaq", (64, 512, 1728))):
        rows = []
        for molecules in sizes:
            command = [sys.executable, __file__, "--work", str(work), "--peak", kind, "--molecules", str(molecules)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(kind, rows[-1], flush=True)
        slope, start = np.polyfit([r["atoms"] for r in rows], [r["peak"] for r in rows], 1)
        memory.append(
            {
                "kind": kind,
                "measured": rows,
                "bytes_per_atom": float(slope),
                "atoms_in_8_gib": int((8 * 2**30 - start) / slope),
            }
        )
        print(memory[-1], flush=True)
    (work / "memory.json").write_text(json.dumps(memory))


def stage_table(work: Path) -> None:
    times, growth, memory = (load_json(work / f"{name}.json") for name in ("time", "growth", "memory"))
    path = write_result("cpu_engine", times, work=work, growth=growth, memory=memory, mace=mace.__version__)
    shown = [
        {
            "structure": row["structure"],
            "threads": row["threads"],
            "": row["kind"],
            "ms": f"{1000 * row['median_seconds_per_step']:.1f}",
            "x eager": f"{row['median_speedup_over_stock_eager']:.1f}",
            "x compiled": f"{row['median_speedup_over_stock_compiled']:.1f}"
            if "median_speedup_over_stock_compiled" in row
            else "-",
        }
        for row in times
    ]
    print(markdown_table(shown, list(shown[0])))
    figure(times, growth, path.with_suffix(".png"))


def figure(times: list[Document], growth: Document, path: Path) -> None:
    """Plot the speed-up of each kind, and growth with the number of atoms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    single_thread = [row for row in times if row["threads"] == 1]
    structures = list(dict.fromkeys(row["structure"] for row in single_thread))
    kinds = list(dict.fromkeys(row["kind"] for row in single_thread))
    for i, kind in enumerate(kinds):
        speedups = {r["structure"]: r["median_speedup_over_stock_eager"] for r in single_thread if r["kind"] == kind}
        places = [structures.index(name) + 0.14 * i for name in speedups]
        left.bar(places, list(speedups.values()), 0.14, label=kind)
    names = [name.replace(", ", ",\n") for name in structures]
    left.set_xticks(np.arange(len(structures)) + 0.07 * (len(kinds) - 1), names, fontsize=7)
    left.set_ylabel("times faster than stock eager, 1 thread")
    left.legend(fontsize=7)
    atoms = [row["atoms"] for row in growth["rows"]]
    right.loglog(atoms, [row["engine_gaq_seconds"] for row in growth["rows"]], "o-", label="engine gaq")
    stock = [row for row in growth["rows"] if "stock_eager_seconds" in row]
    right.loglog([row["atoms"] for row in stock], [row["stock_eager_seconds"] for row in stock], "s-", label=STOCK)
    right.set_xlabel("atoms (water)")
    right.set_ylabel("seconds per step, 1 thread")
    right.legend(fontsize=7)
    drawing.tight_layout()
    drawing.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and partial results")
    parser.add_argument("--stage", choices=("time", "growth", "memory", "table", "all"), default="all")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--no-compiled", action="store_true", help="leave stock's compile_mode out (minutes to compile)"
    )
    parser.add_argument("--symmetrix", type=Path, metavar="DIR", help="files that symmetrix extracted")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--molecules", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    files = model_files(args.work)
    if args.peak:
        peak(files, args.peak, args.molecules)
        return
    if args.stage in ("time", "all"):
        stage_time(files, args.work, args.repeats, not args.no_compiled, args.symmetrix)
    if args.stage in ("growth", "all"):
        # A single structure would never need another neighbour list.
        with settings.override(skin=0.0):
            stage_growth(files, args.work)
    if args.stage in ("memory", "all"):
        stage_memory(args.work)
    if args.stage in ("table", "all"):
        stage_table(args.work)


if __name__ == "__main__":
    main()
