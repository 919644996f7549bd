"""Blocks of different numbers of channels, cut into chunks of one number: the same convolution."""

from __future__ import annotations

import pytest
import torch
from test_kernels import R_MAX, SH, random_graph
from torch import Tensor

from gaq.kernels import chunks, convolution, harmonics
from gaq.kernels.cpu import native

MULTIPLICITIES, DEGREES, GROUPS = (20, 9, 4), (0, 1, 2), (0, 1, 2)
TRIPLES = ((0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1), (2, 1, 1), (2, 0, 2))
"""Input block, l of the harmonic and output group of each path, sorted by group."""


def made(widths: range | tuple[int, ...]) -> chunks.ChunkedConvolution:
    generator = torch.Generator().manual_seed(0)
    paths, starts = [], []
    for number, (block, degree, group) in enumerate(TRIPLES):
        shape = [2 * DEGREES[block] + 1, 2 * degree + 1, 2 * GROUPS[group] + 1]
        paths.append(
            convolution.Path(block, degree, group, torch.randn(shape, generator=generator, dtype=torch.float64))
        )
        # Weights in an order of their own: as if the paths had been sorted.
        starts.append(sum(MULTIPLICITIES[TRIPLES[k][0]] for k in range(number + 1, len(TRIPLES))))
    return chunks.ChunkedConvolution.make(MULTIPLICITIES, DEGREES, GROUPS, paths, starts, SH, R_MAX, widths)


def uncut(made: chunks.ChunkedConvolution, graph: convolution.Graph, x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """The convolution in e3nn's layout, path by path."""
    lengths = r.norm(dim=-1, keepdim=True)
    inside = ((lengths > 0) & (lengths < R_MAX))[:, 0]
    sh = harmonics.evaluate(list(SH), r[inside] / lengths[inside])
    parts, block_starts = [], (0, 20, 47)
    coefficients = {(p.edge_degree, p.group, p.coefficients.shape[0]): p.coefficients for p in made.problem.paths}
    for number, (block, degree, group) in enumerate(TRIPLES):
        m, d = MULTIPLICITIES[block], 2 * DEGREES[block] + 1
        of_block = x[:, block_starts[block] : block_starts[block] + m * d].view(-1, m, d)[graph.sender[inside]]
        start = sum(MULTIPLICITIES[TRIPLES[k][0]] for k in range(number + 1, len(TRIPLES)))
        scaled = of_block * w[inside][:, start : start + m, None]
        y = sh[:, degree**2 : (degree + 1) ** 2]
        edge = torch.einsum("xyz,ecx,ey->ecz", coefficients[degree, group, d], scaled, y).flatten(1)
        parts.append(edge.new_zeros(len(x), edge.shape[1]).index_add(0, graph.receiver[inside], edge))
    return torch.cat(parts, dim=1)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler here")
@pytest.mark.parametrize("width", [4, 8, 20, 24])
@pytest.mark.smoke
def test_chunks_are_the_convolution(width: int) -> None:
    """Kernel and reference, values and gradients: padded, cut into equal parts, and both."""
    problem = made((width,))
    assert problem.problem.channels == width
    generator = torch.Generator().manual_seed(1)
    sender, receiver, vectors = random_graph(6, 20, generator)
    graph = convolution.Graph(sender, receiver)
    total = sum(MULTIPLICITIES[block] for block, _, _ in TRIPLES)
    inputs = [torch.randn(6, 67, generator=generator), vectors, torch.randn(len(vectors), total, generator=generator)]
    results = []
    for function in (convolution.convolution, convolution.reference, None):
        x, r, w = (t.double().requires_grad_() for t in inputs)
        if function is None:
            out = uncut(problem, graph, x, r, w)
        else:
            message = function(
                problem.problem, graph, problem.rows(x), r, problem.weights(w, problem.columns), tabulated=False
            )
            out = problem.mul_ir(message, 6)
        probe = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view_as(out)
        results.append([out, *torch.autograd.grad((out * probe).sum(), [x, r, w])])
    for ours, theirs in zip(results[0] + results[1], results[2] * 2, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_chunks_of_a_path_share_their_coefficients() -> None:
    """The CPU kernel takes them together: its plan has as many paths as the tensor product."""
    problem = made((4,)).problem
    assert len(problem.paths) == 5 + 3 + 5 + 3 + 1 + 1
    ints, _ = problem.plan(0)
    spans = ints[8 : 8 + 12 * len(TRIPLES)].view(-1, 12)[:, 10].tolist()
    assert spans == [5, 3, 5, 3, 1, 1]


def test_the_width_costs_least() -> None:
    def width(*multiplicities: int, dtype: torch.dtype = torch.float32) -> int:
        return chunks.chunk_width([(m, 1.0) for m in multiplicities], chunks.cpu_widths(multiplicities, dtype))

    assert width(64, 64) == 64
    assert width(64, 32, 16) == 16
    assert width(128, 64) == 64
    assert width(320, 96, 64, 32) == 32
    assert width(10, 6, 3) == 16
    assert width(10, 6, 3, dtype=torch.float64) == 8
    assert chunks.chunk_width([(64, 1.0), (16, 5.0)], chunks.GPU_WIDTHS) == 32
