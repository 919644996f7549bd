"""Radial tables: accuracy, time and memory of a pair of species, and float32 forces through them beside stock MACE's.

    python benchmarks/radial_tables.py [--before CHECKOUT] [--repeats 5]

Models of random weights (128x0e+128x1o, l <= 3) on a cell of 64 atoms of seven species, one thread, processor time.
Force errors are root mean squares against stock MACE in float64. With another checkout, steps through its kernels and
through these alternate, each checkout in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from common import ROOT, write_result
from mace_speed import big_model

from gaq.reporting.tables import markdown_table
from gaq.untyped import AnyModule, Document
from gaq_mace.engine import Engine
from gaq_mace.evaluate import make_batches

SPECIES = [8, 12, 13, 22, 26, 28, 40]
SHAPES = {"plain": False, "density, Agnesi, ZBL": True}


def cell() -> Atoms:
    """64 atoms of seven species on distorted sites of a cubic crystal."""
    atoms = bulk("Ni", "fcc", a=3.7, cubic=True) * (2, 2, 4)
    atoms.numbers = np.array(SPECIES)[np.random.default_rng(0).integers(0, len(SPECIES), len(atoms))]
    atoms.rattle(0.05, seed=1)
    return atoms


def data_of(model: AnyModule, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A batch of `cell` in a dtype."""
    batch = make_batches(model, [cell()], 1)[0]
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in dict(batch).items()
        if torch.is_tensor(value)
    }


def step(model: AnyModule, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Forces, and seconds of processor time."""
    start = time.process_time()
    forces: torch.Tensor = model({name: value.clone() for name, value in data.items()})["forces"].detach()
    return forces, time.process_time() - start


def worker(repeats: int) -> None:
    """Write the median time of a step of each shape for every line that is read; tables are made before."""
    made = []
    for density in SHAPES.values():
        model = big_model(SPECIES, density).float()
        engine, data = Engine(model), data_of(model, torch.float32)
        for _ in range(20):
            step(engine, data)
        made.append((engine, data))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps([float(np.median([step(*m)[1] for _ in range(repeats)])) for m in made]), flush=True)


def ratios(before: Path, repeats: int) -> list[float]:
    """Time of a step here over that in another checkout, of each shape: the median of interleaved pairs."""
    processes = []
    for tree in (before, ROOT):
        environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--worker", "--repeats", str(repeats)]
        processes.append(
            subprocess.Popen(
                command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
    times: list[list[list[float]]] = [[], []]
    for process in processes:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            pass
    for _ in range(repeats):
        for number, process in enumerate(processes):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            times[number].append(json.loads(process.stdout.readline()))
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return np.median(np.array(times[1]) / np.array(times[0]), axis=0).tolist()


def measure(density: bool, repeats: int) -> Document:
    """Tables and forces of one shape."""
    model = big_model(SPECIES, density).float()
    data = data_of(model, torch.float32)
    exact = step(copy.deepcopy(model).double(), data_of(model, torch.float64))[0]
    stock = step(model, data)[0]
    engine = Engine(model)
    pairs = engine.compositions.pairs
    assert pairs is not None
    layers = pairs.layers
    evaluated = [step(engine, data) for _ in range(3)] if pairs.by_species else []
    if pairs.by_species:
        pairs.of_species(range(len(SPECIES)))
    codes = [divmod(code, len(SPECIES)) for code in pairs.made.codes]
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        for layer in layers:
            layer.make(codes)
        seconds.append((time.process_time() - start) / len(codes))
    tabulated = [step(engine, data) for _ in range(repeats + 1)]

    def error(forces: torch.Tensor) -> float:
        return float((forces.double() - exact).square().mean().sqrt())

    return {
        "pairs": len(codes),
        "intervals": [layer.intervals for layer in layers],
        "table_error": max(layer.error for layer in layers),
        "ms_a_pair": 1e3 * min(seconds),
        "mib_a_pair": sum(layer.bytes_of_pair() for layer in layers) / 2**20,
        "pairs_in_1_gib": 2**30 // sum(layer.bytes_of_pair() for layer in layers),
        "force_error_stock": error(stock),
        "force_error_tables": error(tabulated[-1][0]),
        "force_error_evaluated": error(evaluated[-1][0]) if evaluated else None,
        "ms_step_tables": 1e3 * float(np.median([s for _, s in tabulated[1:]])),
        "ms_step_evaluated": 1e3 * evaluated[-1][1] if evaluated else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, for the ratio of times of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.worker:
        return worker(args.repeats)
    rows = [{"shape": shape, **measure(density, args.repeats)} for shape, density in SHAPES.items()]
    if args.before is not None:
        for row, ratio in zip(rows, ratios(args.before, args.repeats), strict=True):
            row["step_ratio_to_before"] = ratio
    sys.argv = [a if a != str(args.before) else "CHECKOUT" for a in sys.argv]
    write_result("radial_tables", rows)
    print(markdown_table([{k: str(v) for k, v in row.items()} for row in rows], list(rows[0])))


if __name__ == "__main__":
    main()
