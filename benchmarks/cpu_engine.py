"""The fused CPU engine against stock MACE and other engines: time of a step, growth, operations, memory.

    python benchmarks/cpu_engine.py --work DIR [--stage time|growth|memory|table|all] [--repeats 11] [--threads 1 2]

`time` takes turns, step by step, between stock MACECalculator (eager, and compile_mode="default"), the engine with
the same FP32 weights, the engine with quantized models, and the other engines that are installed, on the same
structures. It takes the ratio of each pair and quotes the median, for wall and for processor time, with the ratio of
the sums, which includes the steps that make new neighbour lists. The structures are those of a simulation of 1 fs steps
at 300 K (azobenzene by the trained model among the shared data, water by TIP3P; the box of 1536 atoms is the one of 192
repeated); every second one is timed. Each number of threads has a process of its own. `memory` runs each size in a
separate process and reads its peak.
The other engines are symmetrix-xl (kernels generated for the model; both profiles, in float32) and fastatomstruct
(XLA, float32). Each is used from the stock checkpoint as its documentation says; what is not installed is said, and
left out. `load_seconds` is the time until the calculator exists, compilers included where the caches of an engine are
empty.
The models have random weights and sizes of foundation models (l <= 3, correlation 3, 2 layers): A 128x0e+128x1o,
B 128x0e, and C 128x0e with density-normalised blocks, distances scaled by covalent radii (Agnesi) and ZBL repulsion.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import distributions, version
from importlib.util import find_spec
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
from e3nn import o3
from mace.calculators import MACECalculator
from mace_speed import big_model, water_box

import gaq
from gaq import settings
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document
from gaq_mace.engine import Engine, accelerate, engine_of

PRESETS = ("w8", "gaq")
STOCK, COMPILED = "stock eager", "stock compiled"
PROFILES = ("capacity", "speed")
RIVALS = {f"symmetrix-xl, {profile}": "symmetrix" for profile in PROFILES} | {"fastatomstruct": "fastatomstruct"}
WARM_UP = 30
"""Steps of a small structure before the first that is timed."""
MODELS = {"A": "128x0e+128x1o", "B": "128x0e", "C": "128x0e, density, Agnesi, ZBL"}


def model_files(work: Path, model: str = "A") -> dict[str, Path]:
    """Files of an FP32 model and of its quantized forms, made at the first call."""
    files = {name: work / f"{model}_{name}.model" for name in ("fp32", *PRESETS)}
    if not files["fp32"].exists():
        changes = {} if model == "A" else {"hidden_irreps": o3.Irreps("128x0e")}
        torch.save(big_model([1, 6, 7, 8], density=model == "C", **changes).float(), files["fp32"])
    for preset in PRESETS:
        if not files[preset].exists():
            spec = {"preset": preset, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
            quantized = gaq.prepare(gaq.load(files["fp32"]), spec)
            gaq.calibrate(quantized, [water_box(8)], progress=False)
            gaq.save(gaq.convert(quantized), files[preset])
    return files


class Fastatomstruct:
    """The interface of ASE over the calculator of fastatomstruct."""

    def __init__(self, file: Path) -> None:
        from fastatomstruct import MACECalculator as Calculator  # type: ignore[import-not-found]

        self.calculator = Calculator(str(file), device="cpu", default_dtype="float32", backend="rust")
        self.results: Document = {}

    def calculate(self, atoms: Atoms, properties: list[str]) -> None:
        self.results = {"forces": np.asarray(self.calculator.calculate(atoms).forces)}


def calculator(files: dict[str, Path], kind: str) -> Any:
    """The calculator of a kind; `kind` is "engine ..." for ours, a rival's name, or one of stock's two forms."""
    if kind.startswith("symmetrix"):
        from symmetrix import Symmetrix  # type: ignore[import-not-found]

        return Symmetrix(str(files["fp32"]), dtype="float32", execution_profile=kind.split(", ")[1])
    if kind == "fastatomstruct":
        return Fastatomstruct(files["fp32"])
    name = kind.removeprefix("engine ") if kind.startswith("engine") else "fp32"
    options: Document = {"compile_mode": "default"} if kind == COMPILED else {}
    calc = MACECalculator(model_paths=str(files[name]), device="cpu", default_dtype="float32", **options)
    if kind == "engine fp32":
        accelerate(calc.models[0])
    return calc


def trajectory(structure: Atoms, frames: int, work: Path) -> list[Atoms]:
    """Structures of a simulation without thermostat, 1 fs apart, after a start at 300 K with a thermostat.

    The start is 0.5 ps, of water 20 fs: TIP3P with its constraints takes seconds a step.
    """
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
    Langevin(atoms, 1 * units.fs, temperature_K=300, friction=0.02 / units.fs, rng=rng).run(
        20 if atoms.pbc.any() else 500
    )
    structures: list[Atoms] = []
    dynamics = VelocityVerlet(atoms, 1 * units.fs)
    for _ in range(frames):
        dynamics.run(1)
        structures.append(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc))
    write(path, structures)
    return structures


def step(calc: Any, atoms: Atoms) -> tuple[float, float]:
    """Wall and processor time of a step, in seconds."""
    start, begin = time.perf_counter(), time.process_time()
    calc.calculate(atoms, ["energy", "forces"])
    return time.perf_counter() - start, time.process_time() - begin


def kinds_of(model: str, atoms: int, compiled: bool) -> list[str]:
    """What takes part: what is many times slower than stock's rivals not on the largest box or every model."""
    installed = [rival for rival, module in RIVALS.items() if find_spec(module) is not None]
    small = model == "A" and atoms < 1000
    return [
        STOCK,
        *([COMPILED] if compiled and small else []),
        *(rival for rival in installed if small or rival != "fastatomstruct"),
        *(f"engine {name}" for name in ("fp32", *PRESETS)),
    ]


def stage_time(work: Path, models: Sequence[str], repeats: int, compiled: bool) -> None:
    """Time a step of every kind with the threads that torch has in this process."""
    for rival, module in RIVALS.items():
        if find_spec(module) is None:
            print(f"{rival}: the package {module!r} is not installed, left out", flush=True)
    azobenzene = read(SHARED / "data/rmd17/azobenzene_test_01.xyz", 0)
    for model in models:
        rows = []
        files = model_files(work, model)
        calculators: Document = {}
        load: dict[str, float] = {}
        for size in (24, 192, 1536):
            pairs = repeats + 2 if size < 1000 else max(3, repeats // 3) + 1
            frames = trajectory(azobenzene if size == 24 else water_box(64), 2 * (repeats + 2), work)[: 2 * pairs]
            if size == 1536:
                frames = [atoms.repeat((2, 2, 2)) for atoms in frames]
            kinds = kinds_of(model, size, compiled)
            for kind in kinds:
                if kind not in calculators:
                    begin = time.perf_counter()
                    calculators[kind] = calculator(files, kind)
                    load[kind] = time.perf_counter() - begin
            rows += time_steps(model, frames, {kind: calculators[kind] for kind in kinds}, load)
        (work / f"time_{torch.get_num_threads()}_{model}.json").write_text(json.dumps(rows))


def time_steps(model: str, frames: list[Atoms], calculators: Document, load: dict[str, float]) -> list[Document]:
    """Rows of one model on one structure: medians over pairs of steps that follow each other."""
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in calculators}
    forces: dict[str, np.ndarray] = {}
    graphs = []
    warm = 2 if len(frames[0]) < 1000 else 1
    for kind, calc in calculators.items():
        # Radial tables of pairs of species are made when they pay, some steps of a small structure after the first.
        for _ in range(WARM_UP if kind != STOCK and len(frames[0]) < 100 else 0):
            atoms = frames[0].copy()
            if kind.startswith("symmetrix"):
                atoms.set_cell([100.0] * 3)
            step(calc, atoms)
    for repeat, (before, atoms) in enumerate(zip(frames[::2], frames[1::2], strict=True)):
        begin = time.perf_counter()
        calculators[STOCK]._atoms_to_batch(atoms)
        graphs.append(time.perf_counter() - begin)
        for kind, calc in calculators.items():
            last, atoms_of_kind = before.copy(), atoms.copy()
            if kind.startswith("symmetrix") and not atoms.pbc.any():
                # It needs a cell even here; MACE would spend its time on the empty space of one.
                last.set_cell([100.0] * 3)
                atoms_of_kind.set_cell([100.0] * 3)
            step(calc, last)
            seconds = step(calc, atoms_of_kind)
            if repeat >= warm:
                times[kind].append(seconds)
            forces[kind] = np.asarray(calc.results["forces"])
    measured = {kind: np.array(values) for kind, values in times.items()}
    rows = []
    for kind, seconds in measured.items():
        row: Document = {
            "model": model,
            "irreps": MODELS[model],
            "atoms": len(frames[0]),
            "threads": torch.get_num_threads(),
            "kind": kind,
            "load_seconds": load[kind],
            "median_seconds_per_step": float(np.median(seconds[:, 0])),
            "median_processor_seconds_per_step": float(np.median(seconds[:, 1])),
            "median_seconds_of_the_graph": float(np.median(graphs)),
            "speedup_of_the_sum_over_stock_eager": float(measured[STOCK][:, 0].sum() / seconds[:, 0].sum()),
            "largest_force_difference_to_stock_ev_per_angstrom": float(np.abs(forces[kind] - forces[STOCK]).max()),
        }
        for name, other in (("stock_eager", STOCK), ("stock_compiled", COMPILED), ("engine_gaq", "engine gaq")):
            if other in measured:
                wall, processor = np.median(measured[other] / seconds, axis=0)
                row[f"median_speedup_over_{name}"] = float(wall)
                row[f"median_processor_speedup_over_{name}"] = float(processor)
        rows.append(row)
        print(row, flush=True)
    return rows


def operation_shares(calc: MACECalculator, atoms: Atoms, repeats: int = 9) -> dict[str, float]:
    """Median wall time of each kind of the program's operations in a step, and of the whole step, in milliseconds."""
    engine = engine_of(calc.models[0])
    assert engine is not None
    assert engine.compiled is not None
    rows = []
    for _ in range(repeats):
        program = engine.compiled.program
        program.seconds = {}
        seconds, _ = step(calc, atoms)
        rows.append(program.seconds | {"step": seconds})
        program.seconds = None
    medians = {name: 1000 * float(np.median([row[name] for row in rows])) for name in rows[0]}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def program_against_kernels(calc: MACECalculator, atoms: Atoms, repeats: int = 15) -> float:
    """Processor time of a step by the program over that by the same kernels called one by one: median of pairs."""
    engine = engine_of(calc.models[0])
    assert engine is not None
    compiled, ratios = engine.compiled, []
    for repeat in range(repeats + 2):
        _, program = step(calc, atoms)
        engine.compiled = None
        _, kernels = step(calc, atoms)
        engine.compiled = compiled
        if repeat >= 2:
            ratios.append(program / kernels)
    return float(np.median(ratios))


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
        "convolution": forward / 1e9,
        "convolution_back": backward / 1e9,
        "contraction": polynomial / 1e9,
        "contraction_back": polynomial_back / 1e9,
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
        seconds = float(np.median([step(calc, atoms)[0] for _ in range(repeats)]))
        row: Document = {"atoms": len(atoms), "engine_gaq_seconds": seconds}
        if molecules <= 216:
            step(stock, atoms)
            row["stock_eager_seconds"] = float(np.median([step(stock, atoms)[0] for _ in range(3)]))
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
    against = {len(b): program_against_kernels(calc, b) for b in (water_box(8), box)}
    result = {"rows": rows, "shares_ms": shares, "edges": edges, "limits": limits, "rates": rates}
    result["program_over_kernels_one_by_one"] = against
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


def installed(name: str) -> bool:
    """Whether a distribution is installed."""
    return any(found.metadata["Name"] == name for found in distributions(name=name))


def stage_table(work: Path) -> None:
    times = [row for path in sorted(work.glob("time_*.json")) for row in json.loads(path.read_text())]
    growth, memory = (load_json(work / f"{name}.json") for name in ("growth", "memory"))
    rivals = {name: version(name) for name in ("symmetrix-xl", "fastatomstruct") if installed(name)}
    path = write_result(
        "cpu_engine", times, work=work, growth=growth, memory=memory, mace=mace.__version__, rivals=rivals
    )
    shown = [
        {
            "model": row["model"],
            "atoms": row["atoms"],
            "threads": row["threads"],
            "": row["kind"],
            "ms": f"{1000 * row['median_seconds_per_step']:.1f}",
            "processor ms": f"{1000 * row['median_processor_seconds_per_step']:.1f}",
            "x eager": f"{row['median_speedup_over_stock_eager']:.1f}",
            "processor": f"{row['median_processor_speedup_over_stock_eager']:.1f}",
            "x gaq": f"{row['median_speedup_over_engine_gaq']:.2f}",
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

    drawing, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(2, 1))
    single_thread = [row for row in times if row["threads"] == 1]
    name_of = "{model}, {atoms} atoms".format_map
    structures = list(dict.fromkeys(name_of(row) for row in single_thread))
    kinds = list(dict.fromkeys(row["kind"] for row in single_thread))
    for i, kind in enumerate(kinds):
        speedups = {name_of(r): r["median_speedup_over_stock_eager"] for r in single_thread if r["kind"] == kind}
        places = [structures.index(name) + 0.1 * i for name in speedups]
        left.bar(places, list(speedups.values()), 0.1, label=kind)
    names = [name.replace(", ", ",\n") for name in structures]
    left.set_xticks(np.arange(len(structures)) + 0.05 * (len(kinds) - 1), names, fontsize=6)
    left.set_ylabel("times faster than stock eager, 1 thread")
    left.legend(fontsize=6)
    atoms = [row["atoms"] for row in growth["rows"]]
    right.loglog(atoms, [row["engine_gaq_seconds"] for row in growth["rows"]], "o-", label="engine gaq")
    stock = [row for row in growth["rows"] if "stock_eager_seconds" in row]
    right.loglog([row["atoms"] for row in stock], [row["stock_eager_seconds"] for row in stock], "s-", label=STOCK)
    right.set_xlabel("atoms (water)")
    right.set_ylabel("seconds per step, 1 thread")
    right.legend(fontsize=7)
    drawing.tight_layout()
    drawing.savefig(path, dpi=130)


def private_folder(path: Path) -> Path:
    """A folder for the user alone, as symmetrix-xl asks of its cache."""
    path.mkdir(mode=0o700, exist_ok=True)
    return path.resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and partial results")
    parser.add_argument("--stage", choices=("time", "growth", "memory", "table", "all"), default="all")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--no-compiled", action="store_true", help="leave stock's compile_mode out (minutes to compile)"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="models to time")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of threads to time with")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--molecules", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    files = model_files(args.work)
    if args.peak:
        peak(files, args.peak, args.molecules)
        return
    if args.one:
        stage_time(args.work, args.models, args.repeats, not args.no_compiled)
        return
    if args.stage in ("time", "all"):
        for threads in args.threads:
            # Engines read the number of threads when they start, each from the environment.
            count = str(threads)
            environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), count)
            environment |= {"SYMMETRIX_JIT_CACHE": str(private_folder(args.work / "symmetrix_cache"))}
            environment |= {"FASTATOMSTRUCT_NO_TELEMETRY": "1"}
            if find_spec("symmetrix_backend_cpu_avx512") is not None:
                environment |= {"SYMMETRIX_BACKEND": "cpu-avx512"}
            subprocess.run([sys.executable, *sys.argv, "--one"], env=os.environ | environment, check=True)
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
