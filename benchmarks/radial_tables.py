"""Radial tables: accuracy, time and memory of a pair of species, float32 forces, and first calls beside stock MACE's.

    python benchmarks/radial_tables.py [--before CHECKOUT] [--repeats 5]

Models of random weights (128x0e+128x1o, l <= 3) on cells of 64 atoms, one thread, processor time. Force errors are root
mean squares against stock MACE in float64. With another checkout, steps through its kernels and through these
alternate in separate processes, and so do first calls. `many_species` has a bound of what tables of
the last hidden layer would save where pairs are too many for tables: the hidden values cost nothing there. `files` has
what tables in a packed file would take, and the time of making them and of reading them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from common import ROOT, write_result
from mace_speed import big_model

import gaq
from gaq.reporting.tables import markdown_table
from gaq.untyped import AnyModule, Document
from gaq_mace.engine import Engine, accelerate
from gaq_mace.evaluate import make_batches

SPECIES = [8, 12, 13, 22, 26, 28, 40]
MANY = [3, 8, 11, 12, 13, 14, 19, 20, 22, 23, 24, 25, 26, 27, 28, 29, 30, 38, 39, 40, 41, 42, 47, 50]
FULL = "density, Agnesi, ZBL"
SHAPES: dict[str, Document] = {
    "plain": {},
    "density": {"density": True, "distance_transform": "None", "pair_repulsion": False},
    "Agnesi": {"distance_transform": "Agnesi"},
    "ZBL": {"pair_repulsion": True},
    FULL: {"density": True},
    f"{FULL}, cutoff after the network": {"density": True, "apply_cutoff": False},
}


def model_of(shape: str, species: list[int]) -> AnyModule:
    """A model of a shape for some species, in float32."""
    return big_model(species, **SHAPES[shape]).float()


def cell(species: list[int]) -> Atoms:
    """64 atoms of some species on distorted sites of a cubic crystal."""
    atoms = bulk("Ni", "fcc", a=3.7, cubic=True) * (2, 2, 4)
    atoms.numbers = np.array(species)[np.random.default_rng(0).integers(0, len(species), len(atoms))]
    atoms.rattle(0.05, seed=1)
    return atoms


def data_of(model: AnyModule, species: list[int], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A batch of `cell` in a dtype."""
    batch = make_batches(model, [cell(species)], 1)[0]
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


OLD_AND_NEW = ("plain", FULL)
TWO = [13, 28]  # an older checkout takes seconds for each pair


def worker(repeats: int) -> None:
    """Write the median time of a step of some shapes for every line that is read; tables are made before."""
    made = []
    for shape in OLD_AND_NEW:
        model = model_of(shape, TWO)
        engine, data = Engine(model), data_of(model, TWO)
        for _ in range(20):
            step(engine, data)
        made.append((engine, data))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps([float(np.median([step(*m)[1] for _ in range(repeats)])) for m in made]), flush=True)


def first(kind: str) -> None:
    """Write the times of the first call, and of the first ten, of stock MACE or of an accelerated model."""
    model = model_of(FULL, SPECIES)
    data = data_of(model, SPECIES)
    start = time.process_time()
    if kind == "engine":
        model = accelerate(model)
    times = [time.process_time() - start]
    times += [step(model, data)[1] for _ in range(10)]
    print(json.dumps([sum(times[:2]), sum(times)]), flush=True)


def first_calls(repeats: int) -> Document:
    """First calls of both, in processes that alternate."""
    times: dict[str, list[list[float]]] = {"stock": [], "engine": []}
    for _ in range(repeats):
        for kind, found in times.items():
            done = subprocess.run(
                [sys.executable, __file__, "--first", kind], check=True, stdout=subprocess.PIPE, text=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
    ratios = np.array(times["engine"]) / np.array(times["stock"])
    result: Document = {f"{kind}_first_s": float(np.median([t[0] for t in found])) for kind, found in times.items()}
    result |= {f"{kind}_ten_calls_s": float(np.median([t[1] for t in found])) for kind, found in times.items()}
    return {**result, "first_ratio": float(np.median(ratios[:, 0])), "ten_calls_ratio": float(np.median(ratios[:, 1]))}


@contextlib.contextmanager
def hidden_for_nothing(engine: AnyModule) -> Iterator[None]:
    """Take the values before the last radial layers from memory. Gradients reach them, and go no further."""
    kept: dict[int, torch.Tensor] = {}
    networks = [network for layer in engine.layers for network in (layer.network, layer.density) if network is not None]
    for network in networks:

        def remembered(basis: torch.Tensor, *rest: torch.Tensor | None, network: AnyModule = network) -> torch.Tensor:
            if id(network) not in kept:
                kept[id(network)] = type(network).before_last(network, basis, *rest).detach()
            return kept[id(network)] + 0 * basis[:, :1]

        network.before_last = remembered
    yield
    for network in networks:
        del network.before_last


def many_species(repeats: int) -> Document:
    """A cell of more species than tables have room for."""
    model = model_of(FULL, MANY)
    engine, data = Engine(model), data_of(model, MANY)
    evaluated, without = [], []
    for _ in range(repeats + 1):
        evaluated.append(step(engine, data)[1])
        with hidden_for_nothing(engine):
            step(engine, data)
            without.append(step(engine, data)[1])
    stock = [step(model, data)[1] for _ in range(5)]
    return {
        "species": len(set(cell(MANY).numbers)),
        "pairs_with_tables": len(engine.compositions.pairs.made.codes),
        "ms_step_stock": 1e3 * min(stock),
        "ms_step_evaluated": 1e3 * float(np.median(evaluated[1:])),
        "ratio_if_hidden_layers_cost_nothing": float(np.median(np.array(without[1:]) / np.array(evaluated[1:]))),
    }


def files(repeats: int) -> Document:
    """Tables of all pairs of four elements, made and read from a file, beside the packed file of the model."""
    from gaq_mace.engine.pair_tables import PairTables

    elements = SPECIES[:4]
    model = model_of(FULL, elements)
    pairs = Engine(model).compositions.pairs
    assert pairs is not None
    made, loaded = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(repeats):
            pairs = PairTables(pairs.layers, torch.device("cpu"))
            start = time.process_time()
            pairs.of_species(range(len(elements)))
            made.append(time.process_time() - start)
            torch.save(pairs.made.tables, folder / "tables")
            start = time.process_time()
            torch.load(folder / "tables")
            loaded.append(time.process_time() - start)
        options = {"preset": "w8", "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
        prepared = gaq.prepare(model, options)
        gaq.calibrate(prepared, [cell(elements)], progress=False)
        gaq.save(gaq.convert(prepared), folder / "packed.model")
        sizes = {n: (folder / n).stat().st_size / 2**20 for n in ("packed.model", "tables")}
    return {
        "pairs": len(pairs.made.codes),
        "ms_made": 1e3 * min(made),
        "ms_read": 1e3 * min(loaded),
        "mib_packed": sizes["packed.model"],
        "mib_tables": sizes["tables"],
    }


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


def measure(shape: str, repeats: int) -> Document:
    """Tables and forces of one shape."""
    from gaq_mace.engine.pair_tables import PairTables  # not at the top, because older checkouts have no such module

    model = model_of(shape, SPECIES)
    data = data_of(model, SPECIES)
    exact = step(copy.deepcopy(model).double(), data_of(model, SPECIES, torch.float64))[0]
    stock = step(model, data)[0]
    engine = Engine(model)
    pairs = engine.compositions.pairs
    assert pairs is not None
    evaluated = [step(engine, data) for _ in range(3)] if pairs.by_species else []
    seconds = []
    if pairs.by_species:
        pairs.of_species(range(len(SPECIES)))
        for _ in range(repeats):
            anew = PairTables(pairs.layers, pairs.device)
            start = time.process_time()
            anew.of_species(range(len(SPECIES)))
            seconds.append(time.process_time() - start)
    codes = pairs.made.codes
    tabulated = [step(engine, data) for _ in range(repeats + 1)]
    size = sum(layer.bytes_of_pair() for layer in pairs.layers)

    def error(forces: torch.Tensor) -> float:
        return float((forces.double() - exact).square().mean().sqrt())

    return {
        "pairs": len(codes),
        "intervals": [layer.intervals for layer in pairs.layers],
        "table_error": max(layer.error for layer in pairs.layers),
        "ms_a_pair": 1e3 * min(seconds) / len(codes) if seconds else None,
        "mib_a_pair": size / 2**20,
        "pairs_in_1_gib": 2**30 // size,
        "force_error_stock": error(stock),
        "force_error_tables": error(tabulated[-1][0]),
        "force_error_ratio": error(tabulated[-1][0]) / error(stock),
        "force_error_evaluated": error(evaluated[-1][0]) if evaluated else None,
        "ms_step_tables": 1e3 * float(np.median([s for _, s in tabulated[1:]])),
        "ms_step_evaluated": 1e3 * evaluated[-1][1] if evaluated else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, for the ratio of times of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", choices=["stock", "engine"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.worker:
        return worker(args.repeats)
    if args.first:
        return first(args.first)
    rows = [{"shape": shape, **measure(shape, args.repeats)} for shape in SHAPES]
    print(markdown_table([{k: str(v) for k, v in row.items()} for row in rows], list(rows[0])), flush=True)
    extra = {"many_species": many_species(args.repeats), "files": files(args.repeats)}
    extra["first_calls"] = first_calls(min(2, args.repeats))
    if args.before is not None:
        before = ratios(args.before, args.repeats)
        extra["step_ratio_to_before"] = dict(zip(OLD_AND_NEW, before, strict=True))
        print(extra, flush=True)
    sys.argv = [a if a != str(args.before) else "CHECKOUT" for a in sys.argv]
    write_result("radial_tables", rows, load_average=os.getloadavg()[0], **extra)


if __name__ == "__main__":
    main()
