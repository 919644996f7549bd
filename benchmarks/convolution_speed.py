"""Time of the fused convolution alone on the CPU, an edge at a time, beside another checkout's.

    python benchmarks/convolution_speed.py [--before CHECKOUT] [--rounds 9] [--atoms 24,64,192,1536]

Layers of a model with 128 channels and l <= 3 on random edges, 54 neighbours of an atom within 5 Å: the first one
(128x0e, no gradient by features), one of scalars with that gradient, and the second one of 128x0e+128x1o; with one
radial table, and with a table for each pair of seven species. Times are processor times of one thread, forward and
backward apart; the checkouts compute in separate processes, in turn. Beside them stands the rate of a float32 matrix
product, measured in the same run. Results of both checkouts are compared. At the end stand whole steps (energy and
forces by the calculator) of a MACE model with 128x0e+128x1o and random float weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gaq.untyped import Document

CHANNELS, LMAX, R_MAX, NEIGHBOURS, INTERVALS = 128, 3, 5.0, 54, 64
LAYERS = ("first", "scalars", "vectors", "vectors, 28 tables")
ROOT = Path(__file__).resolve().parent.parent


class Case:
    """A layer on a random structure.

    Args:
        layer: one of `LAYERS`.
        atoms: number of atoms.
    """

    def __init__(self, layer: str, atoms: int) -> None:
        import mace  # noqa: F401  (before e3nn)
        import torch
        from e3nn import o3

        from gaq.kernels import convolution, harmonics, radial

        self.convolution = convolution.convolution
        generator = torch.Generator().manual_seed(0)
        blocks = (0, 1) if layer.startswith("vectors") else (0,)
        triples = [
            (l3, block, l2)
            for l3 in range(LMAX + 1)
            for block, l1 in enumerate(blocks)
            for l2 in range(LMAX + 1)
            if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0
        ]
        paths = tuple(
            convolution.Path(block, l2, l3, o3.wigner_3j(blocks[block], l2, l3, dtype=torch.float64))
            for l3, block, l2 in triples
        )
        sh = harmonics.fit(
            lambda u: o3.spherical_harmonics(list(range(LMAX + 1)), u, True, "component"),
            LMAX,
        )
        self.problem = convolution.ConvolutionProblem(CHANNELS, blocks, tuple(range(LMAX + 1)), paths, tuple(sh), R_MAX)
        receiver = torch.arange(atoms).repeat_interleave(NEIGHBOURS)
        steps = torch.randint(-60, 60, receiver.shape, generator=generator)
        lengths = R_MAX * (0.02 + 0.98 * torch.rand(len(receiver), 1, generator=generator)) ** (1 / 3)
        tables = 28 if layer.endswith("tables") else 1
        numbers = torch.randint(0, tables, receiver.shape, generator=generator) if tables > 1 else None
        self.graph = convolution.Graph((receiver + steps) % atoms, receiver, numbers)
        self.vectors = torch.nn.functional.normalize(torch.randn(len(receiver), 3, generator=generator)) * lengths
        self.features = torch.randn(atoms, self.problem.rows_in, CHANNELS, generator=generator)
        rows = tables * len(paths)
        self.table = torch.randn(rows, INTERVALS, radial.COEFFICIENTS, CHANNELS, generator=generator)
        self.of_features = layer != "first"

    def run(self) -> tuple[float, float, list[Document]]:
        """Seconds of the forward and of the backward pass, and sums over the results."""
        import torch

        x, r = self.features.clone().requires_grad_(self.of_features), self.vectors.clone().requires_grad_()
        start = time.process_time()
        message = self.convolution(self.problem, self.graph, x, r, self.table)
        middle = time.process_time()
        grads = torch.autograd.grad(message, [x, r] if self.of_features else [r], torch.ones_like(message))
        end = time.process_time()
        results = [message.detach(), *grads]
        return middle - start, end - middle, [float(t.double().square().mean().sqrt()) for t in results]


STEPS = ("water, 24 atoms", "diamond cell, 64 atoms", "water, 192 atoms")


class Step:
    """Steps of MACE's calculator through the fused kernels; `name` is one of `STEPS`."""

    def __init__(self, name: str) -> None:
        import mace  # noqa: F401  (before the others)
        from ase.build import bulk
        from mace.calculators import MACECalculator
        from mace_speed import big_model, water_box

        from gaq_mace.engine import accelerate

        if name.startswith("water"):
            self.atoms = water_box(int(name.split()[1]) // 3)
        else:
            self.atoms = bulk("C", "diamond", a=4.2, cubic=True) * (2, 2, 2)
        self.calculator = MACECalculator(
            models=[big_model([1, 6, 7, 8]).float()], device="cpu", default_dtype="float32"
        )
        accelerate(self.calculator.models[0])
        self.rng = np.random.default_rng(0)
        self.energy = 0.0
        self.run()

    def run(self) -> float:
        """Processor time of a step in seconds, after all atoms have moved a little."""
        atoms = self.atoms.copy()
        atoms.positions += 1e-3 * self.rng.normal(size=atoms.positions.shape)
        start = time.process_time()
        self.calculator.calculate(atoms, ["energy", "forces"])
        return time.process_time() - start


def serve() -> None:
    """Answer the cases named on standard input with medians of their times, one line of JSON each."""
    import torch

    torch.set_num_threads(1)
    cases: dict[tuple[str, int], Case] = {}
    steps: dict[str, Step] = {}
    answers, sys.stdout = sys.stdout, sys.stderr  # MACE prints to the former
    for line in sys.stdin:
        layer, atoms, repeats = json.loads(line)
        if layer in STEPS:
            steps[layer] = steps.get(layer) or Step(layer)
            print(json.dumps(steps[layer].run()), file=answers, flush=True)
            continue
        if layer == "matrix product":
            a = torch.randn(768, 768)
            b = torch.mm(a, a)
            start = time.process_time()
            for _ in range(4):
                torch.mm(a, a, out=b)
            print(json.dumps(4 * 2 * 768**3 / (time.process_time() - start) * 1e-9), file=answers, flush=True)
            continue
        if (layer, atoms) not in cases:
            cases[layer, atoms] = Case(layer, atoms)
        case = cases[layer, atoms]
        runs = [case.run() for _ in range(repeats)]
        print(json.dumps([*np.median([run[:2] for run in runs], axis=0), runs[0][2]]), file=answers, flush=True)


def start(checkout: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--serve"]
    return subprocess.Popen(
        command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: subprocess.Popen[str], *question: object) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def measure(layer: str, atoms: int, processes: dict[str, subprocess.Popen[str]], rounds: int) -> list[Document]:
    """A row for each checkout."""
    edges = atoms * NEIGHBOURS
    repeats = max(1, 4096 // edges)
    times: dict[str, list[list[float]]] = {name: [] for name in processes}
    results = {}
    for turn in range(rounds + 1):
        names = list(processes) if turn % 2 else list(processes)[::-1]
        for name in names:
            *seconds, results[name] = ask(processes[name], layer, atoms, repeats)
            times[name].append(seconds)
    kept = {name: np.array(values[1:]) for name, values in times.items()}
    rows = []
    for name, values in kept.items():
        row: Document = {"layer": layer, "atoms": atoms, "checkout": name}
        for k, direction in enumerate(("forward", "backward")):
            row[f"{direction}_microseconds_per_edge"] = float(1e6 * np.median(values[:, k]) / edges)
            if "before" in kept:
                row[f"{direction}_before_over_this"] = float(np.median(kept["before"][:, k] / values[:, k]))
        row["largest_difference"] = max(abs(a - b) / abs(b) for a, b in zip(results[name], results["now"], strict=True))
        rows.append(row)
    return rows


def measure_step(name: str, processes: dict[str, subprocess.Popen[str]], rounds: int) -> Document:
    """Processor times of whole steps."""
    times: dict[str, list[float]] = {checkout: [] for checkout in processes}
    for turn in range(rounds + 2):
        for checkout in list(processes) if turn % 2 else list(processes)[::-1]:
            times[checkout].append(ask(processes[checkout], name, 0, 0))
    kept = {checkout: np.array(values[2:]) for checkout, values in times.items()}
    row: Document = {"step": name, **{f"{checkout}_ms": float(1e3 * np.median(v)) for checkout, v in kept.items()}}
    if "before" in kept:
        row["before_over_now"] = float(np.median(kept["before"] / kept["now"]))
    return row


def main() -> None:
    from common import write_result

    from gaq.reporting.tables import markdown_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--atoms", default="24,64,192,1536")
    parser.add_argument("--layers", default=";".join(LAYERS), help="separated by semicolons")
    parser.add_argument("--no-result", action="store_true", help="print only")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    checkouts = {"now": ROOT, **({"before": args.before.resolve()} if args.before else {})}
    processes = {name: start(path) for name, path in checkouts.items()}
    rates, rows = [], []
    for layer in args.layers.split(";"):
        for atoms in map(int, args.atoms.split(",")):
            rates.append(ask(processes["now"], "matrix product", 0, 0))
            rows += measure(layer, atoms, processes, args.rounds)
            print(markdown_table(rows[-len(processes) :], list(rows[-1])), flush=True)
    steps = [measure_step(name, processes, args.rounds) for name in STEPS]
    print(markdown_table(steps, list(steps[0])))
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    print(f"float32 matrix product: {np.median(rates):.0f} GFLOP/s")
    if not args.no_result:
        write_result("convolution_speed", rows, args.before, steps=steps, matrix_product_gflops=float(np.median(rates)))


if __name__ == "__main__":
    main()
