"""The CPU kernels against their references in plain torch, float64, over random problems."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dependent_mixtures import nearly_dependent
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq.config.schema import ScalarConfig, VectorConfig
from gaq.kernels import contraction, convolution, harmonics, product, radial, rounding
from gaq.kernels.cpu import native
from gaq.quantizers.features import FeatureLayout, FeatureQuantizer
from gaq.quantizers.weights import largest_code

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")

R_MAX = 4.0


def cartesian_harmonics(directions: Tensor) -> Tensor:
    """l = 0 to 2 with component normalisation, in the order x, y, z."""
    x, y, z = directions.unbind(-1)
    one = torch.ones_like(x)
    second = [
        math.sqrt(15) * x * z,
        math.sqrt(15) * x * y,
        math.sqrt(5) * (y * y - 0.5 * (x * x + z * z)),
        math.sqrt(15) * y * z,
        0.5 * math.sqrt(15) * (z * z - x * x),
    ]
    return torch.stack([one, *(math.sqrt(3) * c for c in (x, y, z)), *second], dim=-1)


SH = tuple(harmonics.fit(cartesian_harmonics, 2))


@st.composite
def problems(draw: Any) -> tuple[convolution.ConvolutionProblem, torch.Generator]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    blocks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    groups = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    count = draw(st.integers(1, 5))
    paths = []
    for _ in range(count):
        block, l2 = draw(st.integers(0, len(blocks) - 1)), draw(st.integers(0, 2))
        group = draw(st.integers(0, len(groups) - 1))
        shape = (2 * blocks[block] + 1, 2 * l2 + 1, 2 * groups[group] + 1)
        coefficients = torch.randn(shape, generator=generator, dtype=torch.float64)
        coefficients[torch.rand(shape, generator=generator) < 0.4] = 0.0
        paths.append(convolution.Path(block, l2, group, coefficients))
    channels = draw(st.sampled_from([1, 3, 8, 10, 16, 33]))
    rows = draw(st.sampled_from([(), (0,) * len(blocks), tuple(range(1, len(blocks) + 1))]))
    problem = convolution.ConvolutionProblem(channels, tuple(blocks), tuple(groups), tuple(paths), SH, R_MAX, rows)
    return problem, generator


def factors_of(problem: convolution.ConvolutionProblem, edges: int) -> Tensor | None:
    """Factors of the edges, with a gradient; None for a problem without."""
    if not problem.scale_rows:
        return None
    generator = torch.Generator().manual_seed(edges)
    factors = torch.randn(edges, problem.scales, problem.channels, generator=generator, dtype=torch.float64)
    return factors.requires_grad_()


def random_graph(atoms: int, degree: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Edges with up to `degree` neighbours of an atom; some atoms have none, some edges lie beyond the cutoff."""
    degrees = torch.randint(0, degree + 1, (atoms,), generator=generator)
    degrees[0] = degree
    degrees[-1] = 0
    receiver = torch.arange(atoms).repeat_interleave(degrees)
    receiver = receiver[torch.randperm(receiver.numel(), generator=generator)]
    sender = torch.randint(0, atoms, receiver.shape, generator=generator)
    vectors = torch.randn(receiver.numel(), 3, generator=generator, dtype=torch.float64) * 1.5
    return sender, receiver, vectors


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(2, 9), st.sampled_from([0, 1, 5, 30, 200]), st.booleans())
@pytest.mark.smoke
def test_convolution_is_the_reference(
    drawn: tuple[convolution.ConvolutionProblem, torch.Generator], atoms: int, degree: int, tabulated: bool
) -> None:
    problem, generator = drawn
    sender, receiver, vectors = random_graph(atoms, degree, generator)
    graph = convolution.Graph(sender, receiver)
    shape = (len(problem.paths), 17, radial.COEFFICIENTS) if tabulated else (vectors.shape[0], len(problem.paths))
    weights = torch.randn(*shape, problem.channels, generator=generator, dtype=torch.float64)
    # Every other row of a larger tensor: not contiguous.
    features = torch.randn(2 * atoms, problem.rows_in, problem.channels, generator=generator, dtype=torch.float64)[::2]
    results = []
    for function in (convolution.convolution, convolution.reference):
        x, r, w = features.detach().requires_grad_(), vectors.clone().requires_grad_(), weights.clone()
        inputs = [x, r] if tabulated else [x, r, w.requires_grad_()]
        factors = factors_of(problem, len(vectors))
        inputs += [] if factors is None else [factors]
        out = function(problem, graph, x, r, w, tabulated, factors)
        probe = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view_as(out)
        grads = torch.autograd.grad((out * probe).sum(), inputs, allow_unused=True)
        results.append(
            [out.detach(), *(torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True))]
        )
    for ours, theirs in zip(*results, strict=True):
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12 * max(scale, 1.0))


@pytest.mark.parametrize("tabulated", [True, False])
def test_an_edge_of_length_zero_makes_its_receiver_nan(tabulated: bool) -> None:
    """It has no direction, so no finite number is right; the messages of other atoms stay as they are."""
    generator = torch.Generator().manual_seed(3)
    coefficients = torch.randn(1, 3, 3, generator=generator, dtype=torch.float64)
    paths = (convolution.Path(0, 1, 0, coefficients), convolution.Path(0, 0, 1, torch.ones(1, 1, 1)))
    problem = convolution.ConvolutionProblem(8, (0,), (1, 0), paths, SH, R_MAX)
    sender, receiver, vectors = random_graph(5, 9, generator)
    graph, at = convolution.Graph(sender, receiver), int((receiver == receiver[0]).nonzero()[-1])
    shape = (2, 17, radial.COEFFICIENTS) if tabulated else (len(vectors), 2)
    weights = torch.randn(*shape, 8, generator=generator, dtype=torch.float64)
    features = torch.randn(5, 1, 8, generator=generator, dtype=torch.float64)
    others = torch.arange(5) != receiver[at]
    for function in (convolution.convolution, convolution.reference):
        before = function(problem, graph, features, vectors, weights, tabulated)
        r = vectors.clone()
        r[at] = 0.0
        r.requires_grad_()
        out = function(problem, graph, features, r, weights, tabulated)
        vector_rows, expected = (problem.split(m, 5)[0].reshape(5, -1) for m in (out.detach(), before))
        assert vector_rows[~others].isnan().all()
        torch.testing.assert_close(vector_rows[others], expected[others], rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(out.nansum(), r)
        assert gradient[at].isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 3, 8, 10, 16, 33]),
    st.tuples(*(st.integers(1, 5) for _ in range(4))),
    st.integers(2, 9),
    st.sampled_from([0, 1, 5, 30, 200]),
)
@pytest.mark.smoke
def test_product_is_the_reference(
    seed: int, channels: int, shape: tuple[int, int, int, int], atoms: int, degree: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(shape, generator=generator, dtype=torch.float64)
    coefficients[torch.rand(shape, generator=generator) < 0.6] = 0.0
    problem = product.ProductProblem.make(channels, coefficients)
    # In no order, with atoms that have no edges.
    _, centre, _ = random_graph(atoms, degree, generator)
    edges = centre.numel()
    # Every other row of a larger tensor: not contiguous.
    wide = torch.randn(2 * edges, channels, shape[1], generator=generator, dtype=torch.float64)[::2]
    weights = torch.randn(channels, shape[0], generator=generator, dtype=torch.float64)
    features = torch.randn(atoms, channels, shape[2], generator=generator, dtype=torch.float64)
    results = []
    for function in (product.product, product.reference):
        x, y = wide.detach().requires_grad_(), features.clone().requires_grad_()
        out = function(problem, x, y, weights, centre)
        probe = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view_as(out)
        results.append([out.detach(), *torch.autograd.grad((out * probe).sum(), [x, y])])
    for ours, theirs in zip(*results, strict=True):
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12 * max(scale, 1.0))


def test_product_threads_and_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    problem = product.ProductProblem.make(20, torch.randn(2, 3, 3, 3, generator=generator, dtype=torch.float64))
    centre = torch.randint(0, 12, (150,), generator=generator)
    inputs = [torch.randn(n, 20, 3, generator=generator, dtype=torch.float64) for n in (150, 12)]
    weights = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.float64):
                x, y = (t.to(dtype).requires_grad_() for t in inputs)
                out = product.product(problem, x, y, weights.to(dtype), centre)
                results[threads, dtype] = [out.detach(), *torch.autograd.grad(out.square().sum(), [x, y])]
    finally:
        torch.set_num_threads(before)
    for dtype in (torch.float32, torch.float64):
        assert all(torch.equal(a, b) for a, b in zip(results[1, dtype], results[3, dtype], strict=True))
    for ours, theirs in zip(results[1, torch.float32], results[1, torch.float64], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-6 * float(theirs.abs().max()))


def test_product_refuses_what_does_not_fit() -> None:
    problem = product.ProductProblem.make(4, torch.ones(2, 3, 3, 1))
    x, y, w, centre = torch.ones(5, 4, 3), torch.ones(2, 4, 3), torch.ones(4, 2), torch.tensor([0, 1, 0, 1, 0])
    for wrong in ((x[:4], y, w), (x, y[:, :, :2], w), (x, y, w.T)):
        with pytest.raises(ValueError, match="of shape"):
            product.product(problem, *wrong, centre)
    with pytest.raises(TypeError, match="dtypes differ"):
        product.product(problem, x, y.double(), w, centre)
    with pytest.raises(ValueError, match=r"\(paths, i, j, k\)"):
        product.ProductProblem.make(4, torch.ones(3, 3, 1))
    with pytest.raises(RuntimeError, match="have no gradient"):
        product.product(problem, x, y, w.requires_grad_(), centre).sum().backward()
    out = product.product(problem, x.requires_grad_(), y, w.detach(), centre)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@settings(max_examples=15, deadline=None)
@given(problems(), st.integers(1, 4), st.sampled_from([0, 1, 30]))
def test_convolution_with_several_tables_is_the_reference(
    drawn: tuple[convolution.ConvolutionProblem, torch.Generator], tables: int, degree: int
) -> None:
    problem, generator = drawn
    sender, receiver, vectors = random_graph(6, degree, generator)
    graph = convolution.Graph(sender, receiver, torch.randint(0, tables, sender.shape, generator=generator))
    rows = tables * len(problem.paths)
    weights = torch.randn(rows, 17, radial.COEFFICIENTS, problem.channels, generator=generator, dtype=torch.float64)
    features = torch.randn(6, problem.rows_in, problem.channels, generator=generator, dtype=torch.float64)
    results = []
    for function in (convolution.convolution, convolution.reference):
        x, r = features.clone().requires_grad_(), vectors.clone().requires_grad_()
        out = function(problem, graph, x, r, weights, scales=factors_of(problem, len(vectors)))
        probe = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view_as(out)
        grads = torch.autograd.grad((out * probe).sum(), [x, r], allow_unused=True)
        results.append(
            [out.detach(), *(torch.zeros_like(i) if g is None else g for g, i in zip(grads, [x, r], strict=True))]
        )
    for ours, theirs in zip(*results, strict=True):
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12 * max(scale, 1.0))


@pytest.mark.parametrize("threads", [1, 3])
def test_convolution_of_atoms_that_only_send(threads: int) -> None:
    """Nine atoms receive, and 31 more send: ghosts of a simulation on parts of space."""
    generator = torch.Generator().manual_seed(2)
    paths = tuple(
        convolution.Path(0, l, group, torch.randn(3, 2 * l + 1, 2 * l3 + 1, generator=generator, dtype=torch.float64))
        for group, (l, l3) in enumerate([(1, 0), (1, 1)])  # noqa: E741
    )
    problem = convolution.ConvolutionProblem(20, (1,), (0, 1), paths, SH, R_MAX)
    sender, receiver, vectors = random_graph(40, 20, generator)
    receiver = receiver % 9
    features = torch.randn(40, 3, 20, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 33, radial.COEFFICIENTS, 20, generator=generator, dtype=torch.float64)
    before = torch.get_num_threads()
    results = []
    try:
        torch.set_num_threads(threads)
        for function, receivers in (
            (convolution.convolution, 9),
            (convolution.reference, 9),
            (convolution.reference, None),
        ):
            x, r = features.clone().requires_grad_(), vectors.clone().requires_grad_()
            out = function(problem, convolution.Graph(sender, receiver, None, receivers), x, r, weights)
            parts = [
                part.view(-1, part.shape[1])[: 9 * l]
                for part, l in zip(  # noqa: E741
                    problem.split(out, receivers or 40), (1, 3), strict=True
                )
            ]
            assert receivers is None or len(out) == problem.rows_out * 9
            results.append([*parts, *torch.autograd.grad(sum(part.square().sum() for part in parts), [x, r])])
    finally:
        torch.set_num_threads(before)
    for ours, theirs, all_receive in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(ours, all_receive, rtol=1e-11, atol=1e-11)


def test_convolution_threads_and_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    path = convolution.Path(0, 1, 0, torch.randn(3, 3, 3, generator=generator, dtype=torch.float64))
    problem = convolution.ConvolutionProblem(24, (1,), (1,), (path,), SH, R_MAX)
    sender, receiver, vectors = random_graph(40, 20, generator)
    graph = convolution.Graph(sender, receiver)
    features = torch.randn(40, 3, 24, generator=generator, dtype=torch.float64)
    weights = torch.randn(1, 33, radial.COEFFICIENTS, 24, generator=generator, dtype=torch.float64)
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.float64):
                x, r = features.to(dtype).requires_grad_(), vectors.to(dtype).requires_grad_()
                out = convolution.convolution(problem, graph, x, r, weights.to(dtype))
                results[threads, dtype] = [out.detach(), *torch.autograd.grad(out.square().sum(), [x, r])]
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(results[1, torch.float64], results[3, torch.float64], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(results[1, torch.float32], results[1, torch.float64], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))


def test_convolution_is_differentiable_once_only() -> None:
    path = convolution.Path(0, 0, 0, torch.ones(1, 1, 1, dtype=torch.float64))
    problem = convolution.ConvolutionProblem(4, (0,), (0,), (path,), SH, R_MAX)
    graph = convolution.Graph(torch.tensor([0, 1]), torch.tensor([1, 0]))
    vectors = torch.tensor([[1.0, 0, 0], [-1, 0, 0]], dtype=torch.float64, requires_grad=True)
    out = convolution.convolution(
        problem,
        graph,
        torch.ones(2, 1, 4, dtype=torch.float64),
        vectors,
        torch.ones(1, 9, radial.COEFFICIENTS, 4, dtype=torch.float64),
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), vectors, create_graph=True)


@pytest.mark.parametrize("wrong", ["features", "weights", "dtype"])
def test_convolution_refuses_what_does_not_fit(wrong: str) -> None:
    path = convolution.Path(0, 0, 0, torch.ones(1, 1, 1, dtype=torch.float64))
    problem = convolution.ConvolutionProblem(4, (0,), (0,), (path,), SH, R_MAX)
    graph = convolution.Graph(torch.tensor([0]), torch.tensor([1]))
    features, weights = torch.ones(2, 1, 4), torch.ones(1, 9, radial.COEFFICIENTS, 4)
    if wrong == "features":
        features = features[:, :, :3]
    elif wrong == "weights":
        weights = weights[:, :, :2]
    else:
        features = features.double()
    with pytest.raises((ValueError, TypeError), match=r"fit|shape|dtypes"):
        convolution.convolution(problem, graph, features, torch.ones(1, 3), weights)


def test_problem_refuses_wrong_coefficients() -> None:
    with pytest.raises(ValueError, match="coefficients of shape"):
        convolution.ConvolutionProblem(1, (0,), (1,), (convolution.Path(0, 1, 0, torch.ones(1, 3, 1)),), SH, R_MAX)


@st.composite
def polynomials(draw: Any) -> tuple[contraction.Polynomial, int]:
    rows_in, rows_out = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    monomial = st.lists(st.integers(0, rows_in - 1), min_size=1, max_size=4).map(lambda m: tuple(sorted(m)))
    occurring = draw(st.lists(st.tuples(monomial, st.integers(0, rows_out - 1)), min_size=1, max_size=12))
    return contraction.Polynomial.make(rows_in, rows_out, occurring), draw(st.integers(0, 2**31))


@settings(max_examples=40, deadline=None)
@given(polynomials(), st.integers(0, 7), st.sampled_from([1, 7, 8, 20]), st.integers(1, 4))
@pytest.mark.smoke
def test_contraction_is_the_reference(
    drawn: tuple[contraction.Polynomial, int], atoms: int, channels: int, species: int
) -> None:
    polynomial, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(atoms, channels, polynomial.rows_in, generator=generator, dtype=torch.float64).transpose(
        1, 2
    )
    kinds = torch.randint(0, species, (atoms,), generator=generator)
    coefficients = torch.randn(species, len(polynomial.terms), channels, generator=generator, dtype=torch.float64)
    results = []
    for function in (contraction.contraction, contraction.reference):
        x = features.detach().clone().requires_grad_()
        out = function(polynomial, x, kinds, coefficients)
        probe = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view_as(out)
        results.append([out.detach(), *torch.autograd.grad((out * probe).sum(), [x])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_fold_adds_up_equal_monomials() -> None:
    generator = torch.Generator().manual_seed(0)
    second = torch.randn(2, 3, 3, 4, generator=generator, dtype=torch.float64)
    first = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    weights = [torch.randn(2, k, 5, generator=generator, dtype=torch.float64) for k in (4, 2)]
    polynomial, coefficients = contraction.fold([(second, weights[0], 0), (first, weights[1], 0)], 3, 2)
    # 3 linear and 6 quadratic monomials, in each of 2 outputs.
    assert (len(polynomial.monomials), len(polynomial.terms)) == (9, 18)
    x = torch.randn(6, 3, 5, generator=generator, dtype=torch.float64)
    species = torch.tensor([0, 1, 1, 0, 1, 0])
    expected = torch.einsum("oijk,nkc,nic,njc->noc", second, weights[0][species], x, x)
    expected = expected + torch.einsum("oik,nkc,nic->noc", first, weights[1][species], x)
    torch.testing.assert_close(contraction.contraction(polynomial, x, species, coefficients), expected)


def test_contraction_refuses_unknown_species() -> None:
    polynomial = contraction.Polynomial.make(1, 1, [((0,), 0)])
    with pytest.raises(ValueError, match="species outside 0 to 1"):
        contraction.contraction(polynomial, torch.ones(2, 1, 3), torch.tensor([0, 2]), torch.ones(2, 1, 3))


def smooth(lengths: Tensor) -> Tensor:
    x = lengths[:, None] * torch.arange(1, 7, dtype=lengths.dtype)
    return torch.sin(x) / x * (1 - lengths[:, None] / R_MAX) ** 3


# Six functions as three channels of two paths.
AS_THEY_ARE = torch.eye(6, dtype=torch.float64).view(6, 2, 3).transpose(0, 1)


def value_and_slope(coefficients: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Of all paths and channels, (lengths, 6)."""
    ones = torch.ones_like(lengths)
    value, slope = torch.func.jvp(lambda r: radial.evaluate(coefficients, r, R_MAX), (lengths,), (ones,))
    return value.flatten(1), slope.flatten(1)


@pytest.mark.parametrize("tolerance", [radial.TOLERANCE, radial.DOUBLE_TOLERANCE, 1e-4])
def test_radial_table_states_its_error(tolerance: float) -> None:
    table = radial.tabulate(smooth, R_MAX, tolerance, last=AS_THEY_ARE)
    assert table.coefficients.shape[::2] == (2, radial.COEFFICIENTS)
    assert table.error <= tolerance
    assert table.slope_error <= radial.SLOPE_FACTOR * tolerance
    lengths = torch.linspace(radial.NEAREST, R_MAX - 1e-6, 4001, dtype=torch.float64)
    exact, exact_slope = torch.func.jvp(smooth, (lengths,), (torch.ones_like(lengths),))
    value, slope = value_and_slope(table.coefficients, lengths)
    # The error is measured at one place in each interval, where it is as large as anywhere.
    assert float((value - exact).abs().max() / exact.abs().max()) <= 1.2 * table.error
    # The slope's is not measured, but follows from it.
    slope_error = float((slope - exact_slope).abs().max() / exact_slope.abs().max())
    assert 0.6 * table.slope_error <= slope_error <= 1.2 * table.slope_error


def test_radial_table_in_float32_is_as_exact_as_float32() -> None:
    table = radial.tabulate(smooth, R_MAX, last=AS_THEY_ARE)
    lengths = torch.linspace(radial.NEAREST, R_MAX - 1e-6, 4001)
    exact, exact_slope = torch.func.jvp(smooth, (lengths.double(),), (torch.ones(4001, dtype=torch.float64),))
    value, slope = value_and_slope(table.coefficients.float(), lengths)
    assert float((value - exact).abs().max() / exact.abs().max()) <= 5e-7
    assert float((slope - exact_slope).abs().max() / exact_slope.abs().max()) <= 1.5e-6
    # With more intervals the slope gets no worse: it is not a difference of rounded values.
    fine = radial.interpolate(smooth, R_MAX, 1024, AS_THEY_ARE)
    _, slope = value_and_slope(fine.coefficients.float(), lengths)
    assert float((slope - exact_slope).abs().max() / exact_slope.abs().max()) <= 1e-6


def test_radial_table_is_continuous_and_ends_at_the_cutoff() -> None:
    table = radial.tabulate(smooth, R_MAX, last=AS_THEY_ARE)
    intervals = table.coefficients.shape[1]
    for dtype, jump in ((torch.float64, 5e-15), (torch.float32, 2e-7)):
        coefficients = table.coefficients.to(dtype)
        # (paths, inner ends, channels), from the interval below and from the one above.
        below, above = coefficients[:, :-1].sum(2), coefficients[:, 1:, 0]
        assert float((below - above).abs().max() / above.abs().max()) <= jump
    powers = torch.arange(radial.COEFFICIENTS, dtype=torch.float64)
    below, above = torch.einsum("pikc,k->pic", table.coefficients[:, :-1], powers), table.coefficients[:, 1:, 1]
    # At ends of two intervals above `NEAREST`, where the error of the slope is measured.
    far = torch.arange(intervals - 1) * R_MAX / intervals > radial.NEAREST
    largest = float(
        value_and_slope(table.coefficients, torch.linspace(0.5, 4.0, 99, dtype=torch.float64))[1].abs().max()
    )
    jump = float((below - above)[:, far].abs().max()) * intervals / R_MAX
    assert jump <= 2.2 * table.slope_error * largest
    assert float(table.coefficients[:, -1].sum(1).abs().max()) <= 1e-15
    lengths = torch.tensor([R_MAX, 7.0], dtype=torch.float64)
    assert float(radial.evaluate(table.coefficients, lengths, R_MAX).abs().max()) == 0.0


def test_radial_tables_of_several_functions_at_once() -> None:
    """The tables are those of each function alone, and the errors the largest."""

    def several(lengths: Tensor) -> Tensor:
        return torch.stack([smooth(lengths), 100 * smooth(lengths).square()])

    both = radial.interpolate(several, R_MAX, 40, AS_THEY_ARE)
    alone = [radial.interpolate(lambda r, i=i: several(r)[i], R_MAX, 40, AS_THEY_ARE) for i in range(2)]  # type: ignore[misc]
    torch.testing.assert_close(both.coefficients, torch.stack([table.coefficients for table in alone]))
    assert both.error == pytest.approx(max(table.error for table in alone), rel=1e-3)
    # Without a last layer, the functions are the channels of one path.
    plain = radial.interpolate(smooth, R_MAX, 40)
    torch.testing.assert_close(plain.coefficients[0], alone[0].coefficients.permute(1, 2, 0, 3).flatten(2))
    lengths = torch.tensor([0.7, 1.3, 3.9], dtype=torch.float64)
    numbers = torch.tensor([1, 0, 1])
    found = radial.evaluate_several(both.coefficients.flatten(0, 1), lengths, R_MAX, numbers, 2)
    expected = [radial.evaluate(both.coefficients[n], lengths, R_MAX)[i] for i, n in enumerate(numbers.tolist())]
    assert torch.equal(found, torch.stack(expected))


def test_radial_table_refuses_a_jump() -> None:
    def step(lengths: Tensor) -> Tensor:
        return torch.sigmoid((lengths[:, None] - 2.0) * 1e5)

    with pytest.raises(ValueError, match="cannot be tabulated"):
        radial.tabulate(step, R_MAX)
    with pytest.raises(ValueError, match="cannot be tabulated"):
        radial.tabulate(lambda lengths: lengths[:, None].log() * math.nan, R_MAX)


def test_harmonics_fit_refuses_other_functions() -> None:
    with pytest.raises(ValueError, match="not spherical harmonics"):
        harmonics.fit(lambda d: cartesian_harmonics(d)[:, :4].abs(), 1)
    directions = torch.nn.functional.normalize(torch.randn(10, 3, dtype=torch.float64), dim=-1)
    torch.testing.assert_close(harmonics.evaluate(list(SH), directions), cartesian_harmonics(directions))


@pytest.mark.parametrize("frame", ["local", "fixed"])
@pytest.mark.parametrize("channels", [5, 32])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.smoke
def test_rounding_is_the_quantizer(frame: str, channels: int, threads: int) -> None:
    layout = FeatureLayout(((channels, 1), (channels, 1), (channels, 3), (-channels, 3), (channels, 5), (channels, 7)))
    quantizer = FeatureQuantizer(layout, ScalarConfig(), VectorConfig(frame=frame), 1.0)
    quantizer.differentiable_twice = False
    pieces, row = [], 0
    total = 20
    for d in (1, 1, 3, 3, 5, 7):
        pieces.append(rounding.Piece(d, channels, row * channels, total * channels, channels))
        row += d
    plan = rounding.plan(quantizer, pieces)
    assert plan is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, total, channels, generator=generator, dtype=torch.float64)
    x[3] = 0.0
    x[4, 2:5] = 0.0
    x[5, 2:5, 1:] = 0.0  # one direction only: two axes are not spanned
    x.requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rounded = rounding.round_features(x, plan, 30)
    finally:
        torch.set_num_threads(before)
    expected = rounding.reference(x, quantizer, pieces, 30)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-12)
    assert not torch.equal(rounded, x)
    torch.testing.assert_close(rounded[:, 5:8], x[:, 5:8], rtol=0, atol=0)
    (grad,) = torch.autograd.grad((rounded * expected.detach()).sum(), x)
    torch.testing.assert_close(grad, expected.detach())


@pytest.mark.parametrize(
    ("layout", "frame"),
    [
        # NequIP's: components of a channel side by side, two scalar pieces to merge, one piece that is not read.
        (FeatureLayout(((4, 1), (3, 1), (20, 3), (-5, 3), (20, 5), (6, 7))), "local"),
        (FeatureLayout(((4, 1), (20, 3), (17, 9))), "fixed"),
        # Allegro's: all components of a channel side by side, scalars of both parities separate.
        (FeatureLayout(((20, 1), (20, 1), (20, 3), (20, 3), (20, 5)), channels_first=True), "local"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_rounding_in_the_layout_of_the_host(layout: FeatureLayout, frame: str, threads: int) -> None:
    quantizer = FeatureQuantizer(layout, ScalarConfig(), VectorConfig(frame=frame), 1.0)
    quantizer.differentiable_twice = False
    plan = rounding.plan(quantizer, rounding.own_layout(quantizer))
    assert plan is not None
    shape = [sum(abs(m) * d for m, d in layout.pieces)]
    if layout.channels_first:
        shape = [20, sum(d for _, d in layout.pieces)]
    generator = torch.Generator().manual_seed(0)
    # Enough of them for two threads.
    x = torch.randn(400, *shape, generator=generator, dtype=torch.float64)
    x[3] = 0.0
    x.requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rounded = rounding.rounded(x, plan.ints, plan.reals)
    finally:
        torch.set_num_threads(before)
    expected = quantizer(x)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-12)
    assert not torch.equal(rounded, x)
    (grad,) = torch.autograd.grad((rounded * expected.detach()).sum(), x)
    torch.testing.assert_close(grad, expected.detach())
    # Nothing to round.
    assert rounding.rounded(x[:0].detach(), plan.ints, plan.reals).shape == (0, *shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [16, 17, 20, 22, 23, 24])
def test_scalars_of_any_width_are_those_of_the_quantizer(bits: int, dtype: torch.dtype) -> None:
    """Bit for bit, ties and the largest codes included: nothing but a division and a product stands around the code."""
    quantizer = FeatureQuantizer(FeatureLayout(((37, 1),)), ScalarConfig(bits), VectorConfig(), 1.0)
    quantizer.differentiable_twice = False
    plan = rounding.plan(quantizer, rounding.own_layout(quantizer))
    assert plan is not None
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(400, 37, generator=generator, dtype=torch.float64) * torch.logspace(-4, 4, 400)[:, None]
    x[0] = 0.0
    # Half steps, in range of the largest codes and of the smallest.
    top = largest_code(bits)
    step = 1.000001 / top
    x[1], x[2] = (top - 0.5 - torch.arange(37)) * step / 1.000001, (torch.arange(37) - 18.5) * step
    x[2, 0] = 1.0
    x = x.to(dtype)
    rounded = rounding.rounded(x, plan.ints, plan.reals)
    assert torch.equal(rounded, quantizer(x))
    assert torch.equal(rounded, rounding.reference(x, quantizer, rounding.own_layout(quantizer), 400))
    assert not torch.equal(rounded, x)


@pytest.mark.smoke
def test_rounding_can_be_traced() -> None:
    quantizer = FeatureQuantizer(FeatureLayout(((4, 1), (4, 3))), ScalarConfig(), VectorConfig(), 1.0)
    quantizer.differentiable_twice = False
    plan = rounding.plan(quantizer, rounding.own_layout(quantizer))
    assert plan is not None
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    # The gradient is not checked: that of the step function is zero or infinite, the straight-through one is one.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.gaq.rounded.default, (x, plan.ints, plan.reals), test_utils=checks)


def test_the_gpu_kernel_refuses_channels_that_lie_apart() -> None:
    quantizer = FeatureQuantizer(FeatureLayout(((4, 3),)), ScalarConfig(), VectorConfig(), 1.0)
    quantizer.differentiable_twice = False
    plan = rounding.plan(quantizer, rounding.own_layout(quantizer))
    assert plan is not None
    with pytest.raises(ValueError, match="side by side"):
        plan.tables(torch.device("cpu"))


@pytest.mark.parametrize("d", [3, 5, 7, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", [0.0, 1e-7, 1e-5, 1e-3])
def test_rounding_loses_no_component_where_mixtures_are_dependent(d: int, dtype: torch.dtype, left: float) -> None:
    quantizer = FeatureQuantizer(FeatureLayout(((16, d),)), ScalarConfig(), VectorConfig(), 1.0)
    quantizer.differentiable_twice = False
    plan = rounding.plan(quantizer, [rounding.Piece(d, 16, 0, 16 * d, 16)])
    assert plan is not None
    x = nearly_dependent(d, 16, 1, left).transpose(1, 2).contiguous()
    rounded = rounding.round_features(x.to(dtype), plan, len(x))
    assert (rounded - x).abs().max() < 1e-3 * float(x.abs().max())


def test_rounding_leaves_coarse_steps_to_the_quantizer() -> None:
    layout = FeatureLayout(((4, 1),))
    pieces = [rounding.Piece(1, 4, 0, 4, 4)]
    for bits, granularity, served in ((16, "per_atom", True), (8, "per_atom", False), (16, "per_channel", False)):
        quantizer = FeatureQuantizer(layout, ScalarConfig(bits, granularity), VectorConfig(), 1.0)
        quantizer.differentiable_twice = False
        assert (rounding.plan(quantizer, pieces) is not None) == served


def test_a_missing_compiler_is_explained(tmp_path: Path) -> None:
    code = "from gaq.kernels.cpu import native; print(native.available()); print(native.why_not())"
    environment = {**os.environ, "CXX": "no-such-compiler", "GAQ_CACHE": str(tmp_path / "cache")}
    environment["TMPDIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")
    assert "CXX=no-such-compiler" in done.stdout
    assert "apt install g++" in done.stdout
    assert not list((tmp_path / "cache").iterdir())


def test_a_failing_compiler_is_explained(tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'it does not work' >&2\nexit 1\n")
    compiler.chmod(0o755)
    code = "from gaq.kernels.cpu import native; print(native.why_not())"
    environment = {**os.environ, "CXX": str(compiler), "GAQ_CACHE": str(tmp_path / "cache")}
    environment["TMPDIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "could not compile the kernels" in done.stdout
    assert "it does not work" in done.stdout
    assert not list((tmp_path / "cache").iterdir())
