"""The GPU convolution against the float64 reference, through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from traced import printed

from gaq.kernels import convolution, harmonics, radial
from gaq.kernels.convolution import ConvolutionProblem, Graph, neighbours

R_MAX = 4.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def real_harmonics(directions: Tensor) -> Tensor:
    """l = 0 to 3 with component normalisation."""
    x, y, z = directions.unbind(-1)
    one = torch.ones_like(x)
    second = [
        math.sqrt(15) * x * z,
        math.sqrt(15) * x * y,
        math.sqrt(5) * (y * y - 0.5 * (x * x + z * z)),
        math.sqrt(15) * y * z,
        0.5 * math.sqrt(15) * (z * z - x * x),
    ]
    third = [
        math.sqrt(35 / 8) * x * (3 * z * z - x * x),
        math.sqrt(105) * x * y * z,
        math.sqrt(21 / 8) * x * (4 * y * y - x * x - z * z),
        math.sqrt(7) / 2 * y * (2 * y * y - 3 * x * x - 3 * z * z),
        math.sqrt(21 / 8) * z * (4 * y * y - x * x - z * z),
        math.sqrt(105) / 2 * y * (z * z - x * x),
        math.sqrt(35 / 8) * z * (z * z - 3 * x * x),
    ]
    return torch.stack([one, *(math.sqrt(3) * c for c in (x, y, z)), *second, *third], dim=-1)


SH = tuple(harmonics.fit(real_harmonics, 3))


def make(
    channels: int,
    blocks: tuple[int, ...],
    groups: tuple[int, ...],
    links: list[tuple[int, int, int]],
    generator: torch.Generator,
    zeros: float = 0.4,
    scale_rows: tuple[int, ...] = (),
) -> ConvolutionProblem:
    """Problem with random coefficients; links are (block, edge degree, group)."""
    paths = []
    for block, l2, group in links:
        shape = (2 * blocks[block] + 1, 2 * l2 + 1, 2 * groups[group] + 1)
        coefficients = torch.randn(shape, generator=generator, dtype=torch.float64)
        coefficients[torch.rand(shape, generator=generator) < zeros] = 0.0
        paths.append(convolution.Path(block, l2, group, coefficients))
    return ConvolutionProblem(channels, blocks, groups, tuple(paths), SH, R_MAX, scale_rows)


@st.composite
def problems(draw: Any) -> tuple[ConvolutionProblem, torch.Generator]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    blocks = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=2)))
    groups = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=2)))
    link = st.tuples(st.integers(0, len(blocks) - 1), st.integers(0, 3), st.integers(0, len(groups) - 1))
    links = draw(st.lists(link, min_size=1, max_size=3))
    channels = draw(st.sampled_from([1, 3, 8, 10, 33]))
    rows = draw(st.sampled_from([(), (0,) * len(blocks), tuple(range(1, len(blocks) + 1))]))
    return make(channels, blocks, groups, links, generator, scale_rows=rows), generator


def random_edges(atoms: int, degree: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Edges: up to `degree` for an atom, none for one atom, with lengths of the cutoff and beyond."""
    degrees = torch.randint(0, degree + 1, (atoms,), generator=generator)
    degrees[0] = degree
    degrees[-1] = 0
    receiver = torch.arange(atoms).repeat_interleave(degrees)
    receiver = receiver[torch.randperm(receiver.numel(), generator=generator)]
    sender = torch.randint(0, max(1, atoms - 2), receiver.shape, generator=generator)
    vectors = torch.randn(receiver.numel(), 3, generator=generator, dtype=torch.float64) * 1.3
    if receiver.numel() > 3:
        vectors[1] = torch.tensor([0.0, R_MAX, 0.0])
        vectors[2] = torch.tensor([R_MAX, 1.0, -2.0])
    return sender, receiver, vectors


def factors_of(problem: ConvolutionProblem, edges: int, device: torch.device) -> Tensor | None:
    """Factors of the edges, with a gradient; None for a problem without."""
    if not problem.scale_rows:
        return None
    generator = torch.Generator().manual_seed(edges)
    factors = torch.randn(edges, problem.scales, problem.channels, generator=generator, dtype=torch.float64)
    return factors.to(device).requires_grad_()


def compare(
    problem: ConvolutionProblem,
    graph: Graph,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tabulated: bool,
    of_features: bool = True,
) -> None:
    """Values and every derivative, relative to the largest."""
    results = []
    for function, device in ((convolution.convolution, DEVICE), (convolution.reference, torch.device("cpu"))):
        x = features.detach().to(device).requires_grad_(of_features)
        r, w = vectors.detach().to(device).requires_grad_(), weights.detach().to(device)
        inputs = [r] + ([x] if of_features else []) + ([] if tabulated else [w.requires_grad_()])
        factors = factors_of(problem, len(vectors), device)
        inputs += [] if factors is None else [factors]
        tables = None if graph.tables is None else graph.tables.to(device)
        device_graph = Graph(graph.sender.to(device), graph.receiver.to(device), tables, graph.receivers)
        out = function(problem, device_graph, x, r, w, tabulated, factors)
        probe = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view_as(out).to(device)
        grads = torch.autograd.grad((out * probe).sum(), inputs, allow_unused=True)
        derivatives = [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)]
        results.append([t.detach().cpu() for t in (out, *derivatives)])
    for ours, theirs in zip(*results, strict=True):
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12 * max(scale, 1.0))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill outputs with NaN before the kernels write to them."""
    from gaq.kernels.gpu import convolution as gpu_convolution

    monkeypatch.setattr(gpu_convolution, "_empty", lambda like, *shape: like.new_full(shape, math.nan))


@settings(max_examples=12, deadline=None)
@given(problems(), st.integers(2, 5), st.sampled_from([0, 1, 4]), st.booleans(), st.booleans())
def test_the_reference_over_random_problems(
    drawn: tuple[ConvolutionProblem, torch.Generator], atoms: int, degree: int, tabulated: bool, of_features: bool
) -> None:
    problem, generator = drawn
    sender, receiver, vectors = random_edges(atoms, degree, generator)
    shape = (len(problem.paths), 9, radial.COEFFICIENTS) if tabulated else (vectors.shape[0], len(problem.paths))
    weights = torch.randn(*shape, problem.channels, generator=generator, dtype=torch.float64)
    # Every other row of a larger tensor: not contiguous.
    features = torch.randn(2 * atoms, problem.rows_in, problem.channels, generator=generator, dtype=torch.float64)[::2]
    compare(problem, Graph(sender, receiver), features, vectors, weights, tabulated, of_features)


@pytest.mark.parametrize("channels", [130, 128])
@pytest.mark.parametrize("tabulated", [True, False])
def test_blocks_of_channels_and_several_programs_of_paths(channels: int, tabulated: bool) -> None:
    """More channels and more paths than one program serves."""
    generator = torch.Generator().manual_seed(2)
    links = [(0, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 2, 1), (0, 2, 2), (1, 1, 2), (1, 3, 2), (0, 3, 3)]
    links += [(1, 2, 3), (1, 3, 3), (1, 3, 3)]
    problem = make(channels, (0, 1), (0, 1, 2, 3), links, generator, zeros=0.8)
    from gaq.kernels.gpu.convolution import source

    assert problem.rows_out > 48
    assert "part == 1" in source(problem, tabulated)
    sender, receiver, vectors = random_edges(4, 3, generator)
    shape = (len(links), 9, radial.COEFFICIENTS) if tabulated else (vectors.shape[0], len(links))
    weights = torch.randn(*shape, channels, generator=generator, dtype=torch.float64)
    features = torch.randn(4, 4, channels, generator=generator, dtype=torch.float64)
    compare(problem, Graph(sender, receiver), features, vectors, weights, tabulated)


@settings(max_examples=5, deadline=None)
@given(problems(), st.integers(1, 4), st.sampled_from([0, 1, 5]))
def test_several_tables(drawn: tuple[ConvolutionProblem, torch.Generator], tables: int, degree: int) -> None:
    problem, generator = drawn
    sender, receiver, vectors = random_edges(4, degree, generator)
    graph = Graph(sender, receiver, torch.randint(0, tables, sender.shape, generator=generator))
    table = torch.randn(
        tables * len(problem.paths), 5, radial.COEFFICIENTS, problem.channels, generator=generator, dtype=torch.float64
    )
    features = torch.randn(4, problem.rows_in, problem.channels, generator=generator, dtype=torch.float64)
    compare(problem, graph, features, vectors, table, True)


@pytest.mark.parametrize("of_features", [True, False])
def test_one_atom_of_many_neighbours(of_features: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    problem = make(4, (1,), (1,), [(0, 1, 0)], generator)
    sender, receiver, vectors = random_edges(3, 200, generator)
    vectors = vectors[receiver == 0]
    sender, receiver = sender[receiver == 0], receiver[receiver == 0]
    assert receiver.numel() == 200
    features = torch.randn(3, 3, 4, generator=generator, dtype=torch.float64)
    table = torch.randn(1, 1, radial.COEFFICIENTS, 4, generator=generator, dtype=torch.float64)  # one interval only
    compare(problem, Graph(sender, receiver), features, vectors, table, True, of_features)


@pytest.mark.parametrize("tabulated", [True, False])
def test_an_edge_of_length_zero_makes_its_receiver_nan(tabulated: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    problem = make(5, (0, 1), (1,), [(0, 1, 0), (1, 0, 0)], generator, zeros=0.0)
    sender, receiver, vectors = random_edges(4, 3, generator)
    vectors[-1] = 0.0
    shape = (2, 9, radial.COEFFICIENTS) if tabulated else (len(vectors), 2)
    weights = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
    features = torch.randn(4, 4, 5, generator=generator, dtype=torch.float64)
    r = vectors.to(DEVICE).requires_grad_()
    graph = Graph(sender.to(DEVICE), receiver.to(DEVICE))
    with np.errstate(divide="ignore", invalid="ignore"):  # of Triton's interpreter
        out = convolution.convolution(problem, graph, features.to(DEVICE), r, weights.to(DEVICE), tabulated)
        (gradient,) = torch.autograd.grad(out.nansum(), r)
    by_atom = problem.split(out.detach().cpu(), 4)[0].reshape(4, 3, 2, 5)
    alike = torch.arange(4) != receiver[-1]
    assert by_atom[~alike][:, :, 0].isnan().all()
    assert by_atom[alike].isfinite().all()
    assert gradient[-1].isnan().all()


@pytest.mark.parametrize("tabulated", [True, False])
def test_no_edges_and_one_atom(tabulated: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    problem = make(5, (0, 1), (1,), [(0, 1, 0), (1, 0, 0)], generator)
    none = torch.zeros(0, dtype=torch.int64)
    for atoms in (1, 3):
        features = torch.randn(atoms, 4, 5, generator=generator, dtype=torch.float64)
        weights = torch.randn(
            *((2, 9, radial.COEFFICIENTS) if tabulated else (0, 2)), 5, generator=generator, dtype=torch.float64
        )
        vectors = torch.zeros(0, 3, dtype=torch.float64)
        compare(problem, Graph(none, none), features, vectors, weights, tabulated)


@pytest.mark.parametrize("of_features", [True, False])
def test_atoms_that_only_send(of_features: bool) -> None:
    """One atom receives of five, and two do."""
    generator = torch.Generator().manual_seed(9)
    problem = make(3, (0, 1), (0, 1), [(0, 0, 0), (1, 1, 0), (1, 0, 1)], generator)
    sender, receiver, vectors = random_edges(5, 3, generator)
    features = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64)
    table = torch.randn(3, 9, radial.COEFFICIENTS, 3, generator=generator, dtype=torch.float64)
    for receivers in (1, 2):
        graph = Graph(sender, receiver % receivers, None, receivers)
        compare(problem, graph, features, vectors, table, True, of_features)


def test_a_path_without_coefficients() -> None:
    generator = torch.Generator().manual_seed(6)
    problem = make(3, (0, 1), (0, 1), [(0, 0, 0), (1, 1, 1), (1, 2, 1)], generator)
    problem.paths[1].coefficients.zero_()
    sender, receiver, vectors = random_edges(3, 3, generator)
    features = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    for tabulated in (True, False):
        shape = (3, 9, radial.COEFFICIENTS) if tabulated else (vectors.shape[0], 3)
        weights = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
        compare(problem, Graph(sender, receiver), features, vectors, weights, tabulated)


def test_float32() -> None:
    generator = torch.Generator().manual_seed(7)
    problem = make(24, (0, 1), (0, 1), [(0, 0, 0), (0, 1, 1), (1, 1, 0), (1, 2, 1)], generator)
    sender, receiver, vectors = random_edges(5, 6, generator)
    graph = Graph(sender.to(DEVICE), receiver.to(DEVICE))
    features = torch.randn(5, 4, 24, generator=generator, dtype=torch.float64)
    table = torch.randn(4, 17, radial.COEFFICIENTS, 24, generator=generator, dtype=torch.float64)
    results = {}
    for dtype in (torch.float32, torch.float64):
        x, r = (t.to(DEVICE, dtype).requires_grad_() for t in (features, vectors))
        out = convolution.convolution(problem, graph, x, r, table.to(DEVICE, dtype))
        assert out.dtype == dtype
        results[dtype] = [out.detach(), *torch.autograd.grad(out.square().sum(), [x, r])]
    for ours, theirs in zip(results[torch.float32], results[torch.float64], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("lmax", [1, *(pytest.param(lmax, marks=pytest.mark.slow) for lmax in (2, 3))])
def test_the_jacobian_of_the_force_is_symmetric(lmax: int) -> None:
    """Forces of a smooth energy of the messages of two layers: a kernel whose derivative is not that of its value,
    or belongs to another edge, gives a field with a curl."""
    generator = torch.Generator().manual_seed(lmax)
    links = [(0, 0, 0), *((0, l, 1) for l in range(1, lmax + 1)), (1, lmax, 0), (1, lmax - 1, 1)]  # noqa: E741
    problem = make(3, (0, 1), (0, 1), links, generator, zeros=0.0)
    features = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64).to(DEVICE)
    table = 0.2 * torch.randn(len(links), 4, radial.COEFFICIENTS, 3, generator=generator, dtype=torch.float64)
    # Coefficients fall as those of smooth functions do, so that differences of forces are exact enough.
    table = (table * 0.2 ** torch.arange(radial.COEFFICIENTS)[:, None]).to(DEVICE)
    sender, receiver = torch.tensor([1, 2, 0, 2, 0, 1]).to(DEVICE), torch.tensor([0, 0, 1, 1, 2, 2]).to(DEVICE)
    # Far from the ends of intervals (at 0, 1, 2, 3 and 4), where these tables are not continuous.
    start = torch.tensor([[0.0, 0, 0], [1.2, 0.6, 0.5], [-0.6, 1.1, 1.0]], dtype=torch.float64).to(DEVICE)
    mix = torch.randn(problem.rows_out, 4, generator=generator, dtype=torch.float64).to(DEVICE)

    def forces(positions: Tensor) -> Tensor:
        positions = positions.detach().requires_grad_()
        vectors = positions[sender] - positions[receiver]
        x = features
        for _ in range(2):
            message = convolution.convolution(problem, Graph(sender, receiver), x, vectors, table)
            x = torch.tanh(torch.einsum("rac,rk->akc", message.view(problem.rows_out, 3, 3), mix))
        (grad,) = torch.autograd.grad(x.square().sum(), positions)
        return -grad.flatten()

    # In the plane of three random directions: a curl has no reason to vanish there.
    directions = torch.linalg.qr(torch.randn(9, 3, generator=generator, dtype=torch.float64))[0].T.to(DEVICE)
    step, rows = 1e-4, []
    for direction in directions:
        moved = step * direction.view(3, 3)
        rows.append(directions @ (forces(start + moved) - forces(start - moved)) / (2 * step))
    jacobian = torch.stack(rows)
    assert float(jacobian.abs().max()) > 0.1
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-6 * float(jacobian.abs().max()))


def test_once_differentiable_and_no_gradient_of_tables() -> None:
    generator = torch.Generator().manual_seed(8)
    problem = make(4, (0,), (0,), [(0, 0, 0)], generator, zeros=0.0)
    graph = Graph(torch.tensor([0, 1]).to(DEVICE), torch.tensor([1, 0]).to(DEVICE))
    vectors = torch.tensor([[1.0, 0, 0], [-1, 0, 0]], dtype=torch.float64, device=DEVICE, requires_grad=True)
    features, table = torch.ones(2, 1, 4).to(vectors), torch.ones(1, 9, radial.COEFFICIENTS, 4).to(vectors)
    out = convolution.convolution(problem, graph, features, vectors, table)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), vectors, create_graph=True)
    out = convolution.convolution(problem, graph, features, vectors, table.requires_grad_())
    with pytest.raises(RuntimeError, match="has no gradient"):
        out.sum().backward()


def test_lists_of_edges() -> None:
    atom, other = torch.tensor([2, 0, 2, 4, 0]), torch.tensor([1, 1, 3, 0, 2])
    first, edges = neighbours(atom, other, 6)
    assert first.tolist() == [0, 2, 2, 4, 4, 5, 5]
    assert edges.tolist() == [[1, 4, 0, 2, 3], [1, 2, 1, 3, 0]]
    graph = Graph(other, atom)
    assert graph.by_receiver(6)[1] is graph.by_receiver(6)[1]
    assert graph.by_sender(6)[0].tolist() == [0, 1, 3, 4, 5, 5, 5]


def test_the_source_is_that_of_the_problem() -> None:
    from gaq.kernels.gpu.convolution import register, source

    problem = make(4, (0,), (1,), [(0, 1, 0)], torch.Generator().manual_seed(9))
    same = dataclasses.replace(problem, plans={}, sources={})
    assert register(problem, True) == register(same, True)
    assert register(problem, True) != register(problem, False)
    assert source(problem, True) != source(dataclasses.replace(problem, r_max=5.0, sources={}), True)


TRACED = """
import torch
from gaq.kernels import convolution
from gaq.kernels.gpu import convolution as gpu_convolution
from gaq.kernels.harmonics import fit
import gaq.kernels.gpu as gpu

gpu_convolution.why_not = lambda: None  # nothing is launched here
c = torch.ones(1, 1, 1, dtype=torch.float64)
problem = convolution.ConvolutionProblem(
    4, (0,), (0,), (convolution.Path(0, 0, 0, c),), tuple(fit(lambda d: torch.ones_like(d[:, :1]), 0)), 4.0
)
key = gpu_convolution.register(problem, True)


def step(features, vectors, table, sender, receiver):
    received = convolution.neighbours(receiver, sender, features.shape[0])
    sent = convolution.neighbours(sender, receiver, features.shape[0])
    out = gpu_convolution.operation(features * 2, vectors, table, None, None, *received, *sent, key)
    return torch.autograd.grad(out.square().sum(), [features, vectors])


from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

inputs = [torch.ones(3, 1, 4, requires_grad=True), torch.ones(5, 3, requires_grad=True), torch.ones(1, 9, 6, 4)]
inputs += [torch.zeros(5, dtype=torch.int64)] * 2
graph = make_fx(step, tracing_mode="symbolic")(*inputs)
names = [str(node.target) for node in graph.graph.nodes]
print(sum("edge_convolution_triton.default" in name for name in names))
print(sum("edge_convolution_triton_backward.default" in name for name in names))

from torch._functorch.aot_autograd import aot_export_module


class Module(torch.nn.Module):
    def forward(self, features, vectors, table, sender, receiver):
        received = convolution.neighbours(receiver, sender, features.shape[0])
        return (gpu_convolution.operation(features, vectors, table, None, None, *received, None, None, key),)


exported, _ = aot_export_module(Module(), [t.detach() for t in inputs], trace_joint=False)
print(sum("triton_kernel_wrapper" in str(node.target) for node in exported.graph.nodes))
"""


def test_traces_see_the_kernels(tmp_path: Path) -> None:
    # As operations for `torch.export`, and as kernels for the compiler.
    assert printed(TRACED, tmp_path) == ["1", "1", "1"]
