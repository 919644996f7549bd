"""Foundation shapes through the product's own commands: accepted, size, time, memory, speed and exactness.

    python benchmarks/foundation.py --work DIR [--cells 20] [--config gaq] [--repeats 7] [--only NAME ...]

For each of `foundation_shapes.SHAPES` (random weights, 64-atom cells, one thread) three processes run one after the
other: one writes the model and the cells; one is ``gaq quantize`` on the cells; one loads the stock file and ours and
runs MACE's calculator on both, step by step in turn. A row that DIR/rows.json holds is not measured again, and a model
that DIR holds is not quantized again. The energy scale of the random models is set to forces of 1 eV/Å.

Times are of the processor, with the wall clock's beside them in the result file: other work on the machine changes them
less. Memory is the peak of the process (ru_maxrss). With random weights the force difference shows what rounding does
to these weights, and the gates of `gaq quantize` may fail where a trained model's pass; --force writes the file then.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foundation_shapes
import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase.io import read, write
from common import load_json, write_result
from foundation_shapes import SHAPES, cells

from gaq.reporting.tables import markdown_table
from gaq_mace.evaluate import energy_and_forces, make_batches

COLUMNS = [
    "shape",
    "accepted",
    "size",
    "quantize s",
    "quantize GiB",
    "load s",
    "stock load s",
    "first call s",
    "stock first s",
    "first ten s",
    "step ms",
    "stock step ms",
    "speed-up",
    "force difference",
]
FORCE = 1.0
"""Root mean square of a force component on a distorted cell, eV/Å: what trained models give."""

SETTLING = 9
"""Calls between the first call and those that are timed as steps."""

STAGES = ("make", "quantize", "measure")


def make(name: str, folder: Path, count: int, channels: int | None = None, side: int = 4) -> None:
    """Write ``float.model``, ``cells.xyz`` to calibrate on and ``steps.xyz`` to time.

    The model's energy scale is set so that its forces are `FORCE` on the cells: some bounds of gates are absolute.
    """
    made = cells(name, count + 1, side)
    model = foundation_shapes.build(SHAPES[name], channels)
    batch = make_batches(model, made[-1:], 1)[0]
    forces = energy_and_forces(model, batch)[1]
    model.scale_shift.scale *= FORCE / forces.pow(2).mean().sqrt()
    torch.save(model, folder / "float.model")
    write(folder / "cells.xyz", made[:-1])
    write(folder / "steps.xyz", made[-1])


def quantize_command(folder: Path, config: str) -> list[str]:
    """The arguments of ``gaq`` that make ``gaq.model``."""
    paths = [str(folder / name) for name in ("float.model", "cells.xyz", "gaq.model")]
    return ["quantize", paths[0], "--calibration", paths[1], "-o", paths[2], "--config", config, "--force"]


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result of a call, and the seconds it took of the processor and of the wall clock."""
    wall, processor = time.perf_counter(), time.process_time()
    result = call()
    return result, {"s": time.process_time() - processor, "wall_s": time.perf_counter() - wall}


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Load, first call, steps in turn and the difference of forces, through MACE's calculator.

    A tiny model is loaded and called first, stock and quantized: imports and compiled helpers are not a model's cost.
    """
    from mace.calculators import MACECalculator

    def calculator(path: Path) -> Any:
        options = {"head": "default"} if "MH" in path.parent.name else {}
        return MACECalculator(model_paths=str(path), device="cpu", default_dtype="float32", **options)

    warm_up(folder)
    atoms = read(folder / "steps.xyz")
    row: dict[str, Any] = {}
    calculators: dict[str, Any] = {}
    for kind, path in (("stock", folder / "float.model"), ("ours", folder / "gaq.model")):
        calculators[kind], row[f"{kind}_load"] = timed(lambda path=path: calculator(path))  # type: ignore[misc]
    rng = np.random.default_rng(0)
    # Tables of species pairs are made within the first calls; then ours is as it stays.
    settling = []
    steps: dict[str, list[float]] = {kind: [] for kind in calculators}
    walls: dict[str, list[float]] = {kind: [] for kind in calculators}
    differences = []
    for repeat in range(repeats + 1):
        moved = atoms.copy()
        moved.positions += rng.normal(scale=0.01 * repeat, size=moved.positions.shape)
        forces = {}
        for kind, one in calculators.items():
            _, taken = timed(lambda one=one, moved=moved: one.calculate(moved, ["energy", "forces"]))  # type: ignore[misc]
            forces[kind] = one.results["forces"]
            if repeat == 0:
                row[f"{kind}_first_call"] = taken
                if kind == "ours":
                    settling = [settled(one, atoms, rng)["s"] for _ in range(SETTLING)]
            else:
                steps[kind].append(taken["s"])
                walls[kind].append(taken["wall_s"])
        differences.append(relative(forces["ours"], forces["stock"]))
    for kind in calculators:
        row[f"{kind}_step"] = {"s": float(np.median(steps[kind])), "wall_s": float(np.median(walls[kind]))}
    row["ours_settling"] = {"calls": SETTLING, "s": sum(settling)}
    row["speed_up"] = float(np.median(np.array(steps["stock"]) / np.array(steps["ours"])))
    row["relative_force_difference"] = float(np.median(differences))
    row["float_bytes"] = (folder / "float.model").stat().st_size
    row["bytes"] = (folder / "gaq.model").stat().st_size
    return row | state_of_file(calculators["ours"].models[0])


def settled(calculator: Any, atoms: Any, rng: np.random.Generator) -> dict[str, float]:
    """Call the calculator on moved atoms; the seconds it took."""
    moved = atoms.copy()
    moved.positions += rng.normal(scale=0.01, size=moved.positions.shape)
    return timed(lambda: calculator.calculate(moved, ["energy", "forces"]))[1]


def state_of_file(model: Any) -> dict[str, Any]:
    """What the quantized file says of itself: failed gates, and whether the fused kernels serve it."""
    from gaq.model.state import require_state
    from gaq_mace import engine

    notes = require_state(model).notes
    return {"failed_gates": notes.get("failed_gates"), "fused": engine.serves(model, {})}


def warm_up(folder: Path) -> None:
    """Load and call a model of a few channels, stock and quantized."""
    from mace.calculators import MACECalculator

    import gaq

    small = folder.parent / "warm_up"
    small.mkdir(exist_ok=True)
    files = [small / "float.model", small / "gaq.model"]
    if not files[1].exists():
        make("MP-0 medium", small, 1, channels=4, side=2)
        spec = {"preset": "gaq", "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
        model = gaq.quantize(gaq.load(files[0]), [read(small / "steps.xyz")], spec, progress=False)
        gaq.save(model, files[1])
    for path in files:
        one = MACECalculator(model_paths=str(path), device="cpu", default_dtype="float32")
        one.calculate(read(small / "steps.xyz"), ["energy", "forces"])


def relative(ours: np.ndarray, stock: np.ndarray) -> float:
    """Norm of the difference by the norm."""
    return float(np.linalg.norm(ours - stock) / np.linalg.norm(stock))


WATCHED = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
row = {"exit_code": code, "s": used.ru_utime + used.ru_stime, "wall_s": time.perf_counter() - start}
json.dump({**row, "peak_gib": used.ru_maxrss / 2**20}, open(sys.argv[1], "w"))
"""
"""A process that starts another one and watches it. It is small: Linux counts the memory of the process that forks."""


def run(command: list[str], log: Path) -> dict[str, Any]:
    """Run a process; its exit code, seconds and peak memory. The output goes to a file."""
    result = log.with_suffix(".json")
    with open(log, "w") as stream:
        watched = [sys.executable, "-c", WATCHED, str(result), *command]
        subprocess.run(watched, stdout=stream, stderr=subprocess.STDOUT, check=True)
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured


def shape_row(name: str, work: Path, count: int, repeats: int, config: str) -> dict[str, Any]:
    """The row of one shape; what fails is in it, with the last line that the process printed."""
    folder = work / re.sub(r"[^A-Za-z0-9-]+", "_", name)
    folder.mkdir(parents=True, exist_ok=True)
    this = [sys.executable, "-W", "ignore", __file__, "--work", str(folder), "--cells", str(count)]
    row: dict[str, Any] = {"shape": name, "cells": count, "config": config}
    if not (folder / "steps.xyz").exists():
        run([*this, "--stage", "make", "--only", name], folder / "make.log")
    gaq = [sys.executable, "-W", "ignore", "-c", "import sys; from gaq.cli import main; sys.exit(main())"]
    quantized = folder / "quantize.json"
    if not quantized.exists():
        run([*gaq, *quantize_command(folder, config)], folder / "quantize.log")
    row["quantize"] = json.loads(quantized.read_text())
    row["accepted"] = (folder / "gaq.model").exists()
    if not row["accepted"]:
        return row | {"reason": last_line(folder / "quantize.log")}
    measured = run([*this, "--stage", "measure", "--repeats", str(repeats)], folder / "measure.log")
    if measured["exit_code"]:
        return row | {"reason": last_line(folder / "measure.log")}
    return row | {"measure": measured} | json.loads((folder / "measured.json").read_text())


def last_line(log: Path) -> str:
    return (log.read_text().strip().splitlines() or ["no output"])[-1]


def printed(row: dict[str, Any]) -> dict[str, str]:
    """A row as the table shows it."""
    quantize = row["quantize"]
    cost = {"quantize s": f"{quantize['s']:.0f}", "quantize GiB": f"{quantize['peak_gib']:.1f}"}
    if "reason" in row:
        return dict.fromkeys(COLUMNS, "") | cost | {"shape": row["shape"], "accepted": f"no: {row['reason']}"}
    gates = f"yes, but not {', '.join(row['failed_gates'])}" if row["failed_gates"] else "yes"
    return cost | {
        "shape": row["shape"],
        "accepted": gates,
        "size": f"{row['float_bytes'] / 1e6:.1f} -> {row['bytes'] / 1e6:.1f} MB, "
        f"{row['float_bytes'] / row['bytes']:.1f}x",
        "load s": f"{row['ours_load']['s']:.2f}",
        "stock load s": f"{row['stock_load']['s']:.2f}",
        "first call s": f"{row['ours_first_call']['s']:.2f}",
        "stock first s": f"{row['stock_first_call']['s']:.2f}",
        "first ten s": f"{row['ours_first_call']['s'] + row['ours_settling']['s']:.2f}",
        "step ms": f"{1e3 * row['ours_step']['s']:.0f}",
        "stock step ms": f"{1e3 * row['stock_step']['s']:.0f}",
        "speed-up": f"{row['speed_up']:.2f}x" + ("" if row["fused"] else " (not fused)"),
        "force difference": f"{row['relative_force_difference']:.1e}",
    }


def table(rows: list[dict[str, Any]]) -> str:
    return markdown_table([printed(row) for row in rows], COLUMNS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, logs and finished rows")
    parser.add_argument("--cells", type=int, default=20, help="64-atom cells to calibrate on")
    parser.add_argument("--config", default="gaq", help="what gaq quantize is given as --config")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps after the first call")
    parser.add_argument("--only", nargs="*", metavar="NAME", help=f"shapes; all of {', '.join(SHAPES)} by default")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # one process of a row
    return parser


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    work, names = arguments.work.resolve(), arguments.only or list(SHAPES)
    if unknown := [name for name in names if name not in SHAPES]:
        parser.error(f"unknown shape {unknown[0]!r}; allowed: {', '.join(SHAPES)}")
    torch.set_num_threads(1)
    if arguments.stage == "make":
        return make(names[0], work, arguments.cells)
    if arguments.stage == "measure":
        (work / "measured.json").write_text(json.dumps(measure(work, arguments.repeats), indent=1))
        return None
    work.mkdir(parents=True, exist_ok=True)
    rows = load_json(work / "rows.json")
    for name in names:
        if name not in rows:
            rows[name] = shape_row(name, work, arguments.cells, arguments.repeats, arguments.config)
            (work / "rows.json").write_text(json.dumps(rows, indent=1))
            print(table([rows[name]]), flush=True)
    finished = [rows[name] for name in SHAPES if name in rows]
    write_result("foundation", finished, work, threads=1)
    print(table(finished))
    return None


if __name__ == "__main__":
    main()
