"""Time of the fused convolution in C++, in Numba, and in plain torch compiled by Inductor: how C++ was chosen.

    pip install numba
    python benchmarks/cpu_languages.py [--repeats 11]

The second convolution of the benchmark model (128x0e+128x1o, l <= 3) on a box of 192 atoms, forward, float32, one
thread; the implementations alternate in one run. Numba gets the matrices B of the edges and their places in the radial
table precomputed, and one specialised function for each shape of path; C++ computes both. Inductor gets the reference,
which gathers, multiplies and scatters. The table also has the time of the first call, compilation included.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numba
import numpy as np
import torch
from common import write_result
from mace_speed import big_model, water_box

import gaq
from gaq.kernels import convolution, harmonics, radial
from gaq.kernels.cpu import native
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document
from gaq_mace.engine import Engine
from gaq_mace.evaluate import make_batches


def path_function(d1: int, d3: int) -> Callable[..., None]:
    """The channel loops of one shape of path; d1 and d3 are constants of the compiled code."""

    @numba.njit(fastmath=True, cache=False)
    def accumulate(first, sender, row_in, b, h, table, intervals, t, path, out):  # type: ignore[no-untyped-def]
        channels = h.shape[2]
        sums = np.zeros((d3, channels), dtype=np.float32)
        w = np.empty(channels, dtype=np.float32)
        x = np.empty(channels, dtype=np.float32)
        for atom in range(first.shape[0] - 1):
            sums[:] = 0.0
            for e in range(first[atom], first[atom + 1]):
                k, s = intervals[e], t[e]
                for c in range(channels):
                    value = table[path, k, radial.COEFFICIENTS - 1, c]
                    for i in range(radial.COEFFICIENTS - 2, -1, -1):
                        value = value * s + table[path, k, i, c]
                    w[c] = value
                for m in range(d1):
                    for c in range(channels):
                        x[c] = w[c] * h[sender[e], row_in + m, c]
                    for n in range(d3):
                        factor = b[e, n, m]
                        for c in range(channels):
                            sums[n, c] += factor * x[c]
            for n in range(d3):
                for c in range(channels):
                    out[atom, n, c] = sums[n, c]

    return accumulate  # type: ignore[no-any-return]


class Numba:
    """The messages of all paths, by one function a shape."""

    def __init__(self, problem: Any, graph: Any, vectors: torch.Tensor, table: torch.Tensor) -> None:
        lengths = vectors.norm(dim=-1)
        keep = ((lengths > 0) & (lengths < problem.r_max)).nonzero()[:, 0]
        keep = keep[torch.argsort(graph.receiver[keep], stable=True)]
        lengths = lengths[keep]
        sh = harmonics.evaluate(list(problem.harmonics), vectors[keep] / lengths[:, None])
        self.sender = graph.sender[keep].numpy()
        counts = torch.bincount(graph.receiver[keep], minlength=int(graph.receiver.max()) + 1)
        self.first = np.concatenate([[0], counts.cumsum(0).numpy()]).astype(np.int64)
        position = lengths / (problem.r_max / table.shape[1])
        interval = position.long().clamp(max=table.shape[1] - 1)
        self.intervals, self.t = interval.numpy(), (position - interval).numpy()
        self.table = table.numpy()
        self.paths = []
        starts = np.cumsum([0] + [2 * l + 1 for l in problem.blocks])  # noqa: E741
        for number, path in enumerate(problem.paths):
            y = sh[:, path.edge_degree**2 : (path.edge_degree + 1) ** 2]
            b = torch.einsum("xyz,ey->ezx", path.coefficients.float(), y).contiguous().numpy()
            function = path_function(b.shape[2], b.shape[1])
            out = np.zeros((len(self.first) - 1, b.shape[1], problem.channels), dtype=np.float32)
            self.paths.append((number, int(starts[path.block]), b, function, out))

    def __call__(self, features: torch.Tensor) -> list[np.ndarray]:
        h = features.numpy()
        for number, row, b, function, out in self.paths:
            function(self.first, self.sender, row, b, h, self.table, self.intervals, self.t, number, out)
        return [out for *_, out in self.paths]


def second_layer(model: Any) -> tuple[Any, torch.Tensor]:
    """The convolution of the second layer, a `ConvolutionProblem`, and its radial table."""
    engine = Engine(model)
    pairs = engine.compositions.pairs
    assert pairs is not None
    return engine.layers[1].problem, pairs.made.tables[1][0]


def compare(
    kinds: dict[str, Callable[[], Any]], first: dict[str, float], repeats: int
) -> tuple[Document, dict[str, list[float]]]:
    """Call the implementations once each, then in turn.

    Args:
        kinds: the implementations by name.
        first: seconds of compilation so far, by name; the time of the first call is added.
        repeats: calls that are timed; the one before them is dropped by the caller.

    Returns:
        Results of the first call, and seconds of each later call.
    """
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    results = {}
    with torch.no_grad():
        for kind, function in kinds.items():
            start = time.perf_counter()
            results[kind] = function()
            first[kind] = first.get(kind, 0.0) + time.perf_counter() - start
        for _ in range(repeats + 1):
            for kind, function in kinds.items():
                start = time.perf_counter()
                function()
                times[kind].append(time.perf_counter() - start)
    return results, times


def check_equal(problem: Any, results: Document, paths: list[Any], atoms: int) -> None:
    """Raise AssertionError unless all implementations give the same messages."""
    groups = problem.split(results["C++"], atoms)
    for number, _, _, _, out in paths:
        group = problem.paths[number].group
        paths_of_group = problem.group_paths(group)
        messages = groups[group].view(atoms, -1, len(paths_of_group), problem.channels)
        expected = messages[:, :, paths_of_group.index(number)]
        torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(
        results["Inductor"], results["C++"], rtol=1e-3, atol=1e-4 * float(results["C++"].abs().max())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model: Any = gaq.convert(gaq.calibrate(gaq.prepare(big_model([1, 8]), SPEC), [water_box(8)], progress=False))
    problem, table = second_layer(model)
    batch = make_batches(model, [water_box(64)], 1)[0]
    sender, receiver = batch["edge_index"]
    graph = convolution.Graph(sender.contiguous(), receiver.contiguous())
    vectors = batch["positions"][receiver] - batch["positions"][sender] + batch["shifts"]
    features = torch.randn(batch["positions"].shape[0], problem.rows_in, problem.channels)

    compiled = torch.compile(
        lambda x: convolution.reference(problem, graph, x, vectors, table), dynamic=False, fullgraph=False
    )
    start = time.perf_counter()
    native.library()
    first = {"C++": time.perf_counter() - start}
    in_numba = Numba(problem, graph, vectors, table)
    kinds: dict[str, Callable[[], Any]] = {
        "C++": lambda: convolution.convolution(problem, graph, features, vectors, table),
        "Inductor": lambda: compiled(features),
        "Numba": lambda: in_numba(features),
    }
    results, times = compare(kinds, first, args.repeats)
    check_equal(problem, results, in_numba.paths, features.shape[0])
    base = np.array(times["C++"][1:])
    rows = [
        {
            "implementation": kind,
            "median_ms": float(1e3 * np.median(values[1:])),
            "ratio_to_cpp": float(np.median(np.array(values[1:]) / base)),
            "first_call_seconds": first[kind],
        }
        for kind, values in times.items()
    ]
    write_result("cpu_languages", rows, edges=len(vectors), paths=len(problem.paths), numba=numba.__version__)
    shown = [{k: f"{v:.2f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    print(markdown_table(shown, list(shown[0])))


SPEC = {"preset": "w8", "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}

if __name__ == "__main__":
    main()
