"""Time of the fused convolution by the width of its chunks, for features whose number differs by l.

    python benchmarks/convolution_chunks.py [--rounds 9]

The convolution of NequIP with l_max 2 and parity, forward and backward, on random edges: filled up to the largest
number of channels (one chunk a block), and cut into shorter and shorter chunks (`gaq.kernels.chunks`). Times are
processor times of one thread, the widths in turn.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from common import write_result
from e3nn import o3

from gaq.kernels import chunks, convolution, harmonics, radial
from gaq.reporting.tables import markdown_table

LMAX, R_MAX, ATOMS, NEIGHBOURS = 2, 5.0, 60, 30
CASES = {(64, 32, 16): (64, 32, 16), (128, 64, 32): (128, 64, 32, 16), (24, 12, 8): (24, 32, 16), (10, 6, 3): (10, 16)}
"""Channels for each l, and widths of chunks to compare; the first fills up to the largest number of channels."""


def spherical(directions: torch.Tensor) -> torch.Tensor:
    return o3.spherical_harmonics(list(range(LMAX + 1)), directions, True, "component")


def made(multiplicities: tuple[int, ...], width: int) -> chunks.ChunkedConvolution:
    """NequIP's tensor product of features of both parities with the spherical harmonics."""
    irreps = o3.Irreps([(multiplicities[l], (l, p)) for l in range(LMAX + 1) for p in (1, -1)])  # noqa: E741
    triples = [
        (block, edge.l, out)
        for block, (_, ir) in enumerate(irreps)
        for _, edge in o3.Irreps.spherical_harmonics(LMAX)
        for out in ir * edge
        if out in irreps
    ]
    triples.sort(key=lambda triple: triple[2])
    groups = sorted({out for _, _, out in triples})
    paths, starts, start = [], [], 0
    for block, degree, out in triples:
        w3j = o3.wigner_3j(irreps[block].ir.l, degree, out.l, dtype=torch.float64)
        paths.append(convolution.Path(block, degree, groups.index(out), w3j))
        starts.append(start)
        start += irreps[block].mul
    degrees = [ir.l for _, ir in irreps]
    sh = harmonics.fit(spherical, LMAX)
    return chunks.ChunkedConvolution.make(
        [mul for mul, _ in irreps], degrees, [g.l for g in groups], paths, starts, sh, R_MAX, [width]
    )


def step_times(multiplicities: tuple[int, ...], widths: tuple[int, ...], rounds: int) -> dict[int, np.ndarray]:
    """Seconds of a forward and backward pass by width."""
    generator = torch.Generator().manual_seed(0)
    receiver = torch.arange(ATOMS).repeat_interleave(NEIGHBOURS)
    graph = convolution.Graph(torch.randint(0, ATOMS, receiver.shape, generator=generator), receiver)
    vectors = torch.nn.functional.normalize(torch.randn(len(receiver), 3, generator=generator))
    vectors *= 1.0 + (R_MAX - 1.1) * torch.rand(len(receiver), 1, generator=generator)
    cases, times = {}, {width: [] for width in widths}
    for width in widths:
        case = made(multiplicities, width)
        frequency = 1.0 + torch.arange(case.columns.max() + 1, dtype=torch.float64).remainder(7)

        def weights(lengths: torch.Tensor, frequency: torch.Tensor = frequency) -> torch.Tensor:
            return torch.cos(0.3 * lengths[:, None] * frequency)

        coefficients = radial.tabulate(weights, R_MAX).coefficients[0]
        table = case.weights(coefficients, case.columns).permute(2, 0, 1, 3).float().contiguous()
        dimension = sum(m * (2 * l + 1) for m, l in zip(case.multiplicities, case.degrees, strict=True))  # noqa: E741
        features = torch.randn(ATOMS, dimension, generator=torch.Generator().manual_seed(1))
        cases[width] = case.problem, case.rows(features).contiguous(), table
    for _ in range(rounds + 1):
        for width, (problem, features, table) in cases.items():
            x, r = features.clone().requires_grad_(), vectors.clone().requires_grad_()
            start = time.process_time()
            message = convolution.convolution(problem, graph, x, r, table)
            torch.autograd.grad(message, [x, r], torch.ones_like(message))
            times[width].append(time.process_time() - start)
    return {width: np.array(values[1:]) for width, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for multiplicities, widths in CASES.items():
        times = step_times(multiplicities, widths, args.rounds)
        for width, seconds in times.items():
            rows.append(
                {
                    "channels_by_l": list(multiplicities),
                    "width": width,
                    "microseconds_per_edge": float(1e6 * np.median(seconds) / (ATOMS * NEIGHBOURS)),
                    "times_faster_than_filled_up": float(np.median(times[widths[0]] / seconds)),
                }
            )
    write_result("convolution_chunks", rows)
    print(markdown_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
