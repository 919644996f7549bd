"""Robust attention and bounded gates: ranges by construction, smoothness at the cutoff, derivatives of both orders."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq.config.schema import AttentionConfig
from gaq.quantizers.attention import (
    EPSILON,
    T_MAX,
    T_MIN,
    BoundedGate,
    GridQuantizer,
    LearnedEnvelope,
    RobustAttention,
    neighbour_weights,
    soft_bound,
    unit,
)
from gaq.quantizers.features import FeatureLayout
from gaq.quantizers.weights import largest_code

DOUBLE = torch.float64


def cutoff(r: Tensor, r_max: float = 1.0) -> Tensor:
    """The polynomial cutoff of MACE and NequIP, p = 6 (Gasteiger et al. 2020): two derivatives vanish at r_max."""
    x = r / r_max
    return torch.where(x < 1, 1 - 28 * x**6 + 48 * x**7 - 21 * x**8, torch.zeros_like(x))


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def graph(atoms: int = 5, edges: int = 12, heads: int = 2, dim: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    """Queries, keys, envelope and receivers; the last atom has no neighbours and the one before a single one."""
    generator = torch.Generator().manual_seed(seed)
    receiver = torch.randint(0, atoms - 2, (edges - 1,), generator=generator)
    receiver = torch.cat([receiver, torch.tensor([atoms - 2])])
    u = torch.rand(edges, generator=generator, dtype=DOUBLE)
    return random(atoms, heads, dim, seed=seed), random(edges, heads, dim, seed=seed + 1), u, receiver


def attention(heads: int = 2, temperature: float = 3.0, bits: int | None = None) -> RobustAttention:
    module = RobustAttention(heads, temperature).double()
    if bits is not None:
        module.input_quantizer = GridQuantizer(heads, bits).double()
    return module


# -- normalisation and temperature --


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3),
    st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3),
    st.floats(-60, 60),
    st.booleans(),
    st.sampled_from([None, 2, 8, 16]),
)
def test_logits_lie_within_the_temperature(
    q: list[float], k: list[float], theta: float, normalize: bool, bits: int | None
) -> None:
    module = attention(1, bits=bits)
    module.normalize = normalize
    torch.nn.init.constant_(module.theta, theta)
    t = float(module.temperature().detach())
    assert T_MIN <= t <= T_MAX
    logits = module.logits(
        torch.tensor([[q]], dtype=DOUBLE), torch.tensor([[k]], dtype=DOUBLE), torch.tensor([0])
    ).detach()
    assert bool((logits.abs() <= t * (1 + 1e-12)).all())


def test_pinned_numbers() -> None:
    q, k = torch.tensor([[[3.0, 4.0]]], dtype=DOUBLE), torch.tensor([[[4.0, 3.0]], [[-3.0, -4.0]]], dtype=DOUBLE)
    module = attention(1, 2.0)
    norm = 25.0 + EPSILON
    logits = module.logits(q, k, torch.tensor([0, 0])).detach()[:, 0]
    torch.testing.assert_close(logits, torch.tensor([2 * 24.0 / norm, -2 * 25.0 / norm], dtype=DOUBLE))
    weights = module(q, k, torch.tensor([0.5, 1.0], dtype=DOUBLE), torch.tensor([0, 0])).detach()[:, 0]
    first, second = 0.5 * math.exp(48.0 / norm), math.exp(-50.0 / norm)
    total = 1 + first + second
    torch.testing.assert_close(weights, torch.tensor([first / total, second / total], dtype=DOUBLE))
    assert float(weights[0]) == pytest.approx(0.75024, abs=1e-5)
    rounded = attention(1, 2.0, bits=3)  # codes -3 .. 3
    logits = rounded.logits(q, k, torch.tensor([0, 0])).detach()[:, 0]
    torch.testing.assert_close(logits, torch.tensor([2.0, -2.0], dtype=DOUBLE))


def test_unit_vectors_are_smooth_at_zero() -> None:
    zero = torch.zeros(2, 3, dtype=DOUBLE, requires_grad=True)
    assert not bool(unit(zero).detach().any())
    slope = torch.autograd.functional.jacobian(unit, zero[0].detach())
    torch.testing.assert_close(slope, torch.eye(3, dtype=DOUBLE) / EPSILON**0.5)
    near = zero.detach() + 1e-9 * random(2, 3)
    near.requires_grad_()
    assert torch.autograd.gradcheck(unit, near, eps=1e-7)
    assert torch.autograd.gradgradcheck(unit, near, eps=1e-7)
    x = random(100, 4, scale=1e3)
    assert float(unit(x).norm(dim=-1).max()) < 1.0
    assert float(unit(x).norm(dim=-1).min()) > 0.9999


@pytest.mark.parametrize("theta", [-20.0, -5.0, 0.0, 5.0, 20.0])
def test_temperature_keeps_a_gradient(theta: float) -> None:
    module = attention(1)
    torch.nn.init.constant_(module.theta, theta)
    module.temperature().backward()
    assert float(module.theta.grad) > 0  # type: ignore[arg-type]  # not None


def test_temperatures_are_set_and_held() -> None:
    module = RobustAttention(3, 2.5)
    torch.testing.assert_close(module.temperature().detach(), torch.full((3,), 2.5))
    module.configure(AttentionConfig(temperature=4.0, normalize=False))
    torch.testing.assert_close(module.temperature().detach(), torch.full((3,), 4.0))
    assert not module.theta.requires_grad
    assert not module.normalize
    module.configure(AttentionConfig())
    assert module.theta.requires_grad
    for wrong in (T_MIN, T_MAX, 0.0, 100.0):
        with pytest.raises(ValueError, match=r"between 0\.25 and 8"):
            RobustAttention(1, wrong)


# -- weights of neighbours --


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 4, 16]), st.booleans())
def test_weights_are_shares(seed: int, bits: int | None, normalize: bool) -> None:
    module = attention(bits=bits)
    module.normalize = normalize
    q, k, u, receiver = graph(seed=seed)
    weights = module(q, k, u, receiver).detach()
    total = torch.zeros(5, 2, dtype=DOUBLE).index_add(0, receiver, weights)
    assert bool((weights >= 0).all())
    assert bool((total < 1).all())
    assert not bool(total[4].any())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 8]))
def test_permutation_of_edges_and_atoms(seed: int, bits: int | None) -> None:
    module = attention(bits=bits)
    q, k, u, receiver = graph(seed=seed)
    weights = module(q, k, u, receiver).detach()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(module(q, k[order], u[order], receiver[order]).detach(), weights[order])
    names = torch.randperm(5, generator=torch.Generator().manual_seed(seed + 1))
    moved = torch.empty_like(q)
    moved[names] = q
    torch.testing.assert_close(module(moved, k, u, names[receiver]).detach(), weights)


def test_weights_are_extensive() -> None:
    module = attention(bits=16)
    first, second = graph(seed=1), graph(atoms=4, edges=7, seed=2)
    both = [torch.cat([a, b]) for a, b in zip(first[:3], second[:3], strict=True)]
    receiver = torch.cat([first[3], second[3] + 5])
    together = module(*both, receiver).detach()
    torch.testing.assert_close(together, torch.cat([module(*first), module(*second)]).detach())


def test_no_edges_and_no_atoms() -> None:
    module = attention()
    empty = torch.zeros(0, dtype=torch.int64)
    for atoms in (0, 3):
        q = torch.zeros(atoms, 2, 3, dtype=DOUBLE, requires_grad=True)
        weights = module(q, torch.zeros(0, 2, 3, dtype=DOUBLE), torch.zeros(0, dtype=DOUBLE), empty)
        assert weights.shape == (0, 2)
        (slope,) = torch.autograd.grad(weights.sum(), q, create_graph=True)
        assert not bool(slope.any())


def test_largest_logits_do_not_overflow() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        logits = torch.full((20, 1), T_MAX, dtype=dtype)
        weights = neighbour_weights(logits, torch.ones(20, dtype=dtype), torch.zeros(20, dtype=torch.int64), 1)
        assert bool(weights.isfinite().all())
        assert float(weights.sum()) == pytest.approx(1.0, abs=0.05)


def message(module: RobustAttention, distances: Tensor, seed: int = 0) -> Tensor:
    """A toy message of one atom: neighbours send numbers, weighted; distances have to be smooth parameters of it."""
    edges = distances.shape[0]
    q, k = random(1, 2, 3, seed=seed), random(edges, 2, 3, seed=seed + 1)
    k = k * (1 + 0.3 * distances.cos()[:, None, None])
    values = random(edges, 2, seed=seed + 2) * (1 + distances[:, None] ** 2)
    weights = module(q, k, cutoff(distances), torch.zeros(edges, dtype=torch.int64))
    return (weights * values).sum()


@pytest.mark.parametrize("others", [0, 1, 3])
@pytest.mark.parametrize("bits", [None, 16, 8])
def test_continuous_at_the_cutoff(others: int, bits: int | None) -> None:
    """The last of `others` + 1 neighbours leaves: value and force tend to those without it."""
    module = attention(2, 6.0, bits)
    fixed = torch.linspace(0.4, 0.7, others, dtype=DOUBLE)
    gaps = []
    for h in (1e-2, 1e-3, 1e-4):
        results = []
        for r in (1.0 - h, 1.0 + h):
            distances = torch.cat([fixed, torch.tensor([r], dtype=DOUBLE)]).requires_grad_()
            value = message(module, distances)
            (force,) = torch.autograd.grad(value, distances)
            results.append((value.detach(), force))
        gaps.append((float((results[0][0] - results[1][0]).abs()), float((results[0][1] - results[1][1]).abs().max())))
    # u goes as h^3 and its slope as h^2; a softmax without the constant would leave a gap of order one.
    for power, numbers in ((3, [g[0] for g in gaps]), (2, [g[1] for g in gaps])):
        for coarse, fine in itertools.pairwise(numbers):
            assert fine < 2 * coarse * 10.0**-power
    assert gaps[-1][0] < 1e-7
    assert gaps[-1][1] < 1e-3


def test_a_plain_softmax_with_the_envelope_inside_jumps() -> None:
    """Why there is a constant in the denominator: without it the only neighbour weighs 1 up to the cutoff."""
    u = cutoff(torch.tensor([1.0 - 1e-4], dtype=DOUBLE))
    plain = u / u.sum()
    weights = neighbour_weights(torch.zeros(1, 1, dtype=DOUBLE), u, torch.tensor([0]), 1)
    assert float(plain) == 1.0
    assert float(weights) < 1e-9


@pytest.mark.parametrize("normalize", [True, False])
def test_first_and_second_derivatives(normalize: bool) -> None:
    module = attention(2, 3.0)
    module.normalize = normalize
    q, k, u, receiver = graph(atoms=4, edges=6, seed=3)
    q[0] = 0.0  # a zero query among them

    def run(q: Tensor, k: Tensor, u: Tensor, theta: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"theta": theta}, (q, k, u, receiver))

    arguments = [x.clone().requires_grad_() for x in (q, k, u, module.theta.detach())]
    assert torch.autograd.gradcheck(run, arguments, eps=1e-7, atol=1e-4)
    assert torch.autograd.gradgradcheck(run, arguments, eps=1e-7, atol=1e-3)


def test_gradients_pass_through_rounded_logits() -> None:
    q, k, u, receiver = graph(seed=4)
    slopes = []
    for bits in (None, 16):
        leaf = q.clone().requires_grad_()
        (slope,) = torch.autograd.grad(attention(bits=bits)(leaf, k, u, receiver).square().sum(), leaf)
        slopes.append(slope)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-5)


# -- grids --


@settings(max_examples=60, deadline=None)
@given(st.floats(-1, 1), st.sampled_from([2, 4, 8, 12, 16]))
def test_grid_is_symmetric_even_and_holds_its_ends(x: float, bits: int) -> None:
    grid = GridQuantizer(1, bits).double()
    top = largest_code(bits)
    value = torch.tensor([[x], [-x], [1.0], [0.0]], dtype=DOUBLE)
    rounded = grid(value)[:, 0]
    assert float(rounded[0]) == -float(rounded[1])
    assert float((rounded[0] - x).abs()) <= 0.5 / top * (1 + 1e-12)
    assert float(rounded[2]) == pytest.approx(1.0)
    assert float(rounded[3]) == 0.0
    codes = rounded * top
    torch.testing.assert_close(codes, codes.round())


def test_unsigned_grid_and_switches() -> None:
    grid = GridQuantizer(2, 4, limit=1.0, signed=False, what="density")
    x = torch.tensor([[0.0, 0.49], [1.0, 0.52]])
    torch.testing.assert_close(grid(x) * 15, (x * 15).round())
    assert not grid.needs_ranges
    assert grid.describe() == "density: 4 bits"
    grid.start_observing()
    grid(100 * x)
    grid.load_ranges(torch.tensor([7.0, 7.0]))
    torch.testing.assert_close(grid(x) * 15, (x * 15).round())
    grid.scalars_enabled = False
    assert torch.equal(grid(x), x)


# -- gates --


@settings(max_examples=80, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e3))
def test_soft_bound_is_the_identity_and_then_a_bound(x: float, limit: float) -> None:
    value = float(soft_bound(torch.tensor(x, dtype=DOUBLE), torch.tensor(limit, dtype=DOUBLE)))
    if abs(x) <= limit:
        assert value == x
    else:
        assert limit < abs(value) <= 2 * limit
        assert value * x > 0


def test_soft_bound_has_two_continuous_derivatives_and_no_dead_end() -> None:
    limit = torch.tensor(2.0, dtype=DOUBLE)
    x = torch.tensor([-4.0, -2.0 - 1e-5, -2.0, -2.0 + 1e-5, 0.0, 2.0 - 1e-5, 2.0, 2.0 + 1e-5, 4.0], dtype=DOUBLE)
    x.requires_grad_()
    (first,) = torch.autograd.grad(soft_bound(x, limit).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first[1:-1].detach(), torch.ones(7, dtype=DOUBLE), atol=1e-9, rtol=0)
    torch.testing.assert_close(second[1:-1], torch.zeros(7, dtype=DOUBLE), atol=1e-4, rtol=0)
    assert float(first.detach().min()) > 0.1
    away = torch.tensor([-5.0, -2.3, 0.4, 1.9, 2.4, 6.0], dtype=DOUBLE, requires_grad=True)
    bounded: Callable[[Tensor], Tensor] = lambda y: soft_bound(y, limit)  # noqa: E731
    assert torch.autograd.gradcheck(bounded, away)
    assert torch.autograd.gradgradcheck(bounded, away)


LAYOUT = FeatureLayout(((3, 1), (-2, 3), (2, 1), (-1, 1)))


def calibrated(bits: int | None, x: Tensor) -> BoundedGate:
    gate = BoundedGate(LAYOUT, bits, headroom=2.0).to(x.dtype)
    gate.start_observing()
    gate(x)
    gate.observing = False
    return gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gate_is_exact_on_what_it_was_calibrated_for(dtype: torch.dtype) -> None:
    x = random(50, 12, seed=5).to(dtype)
    gate = calibrated(None, x)
    assert gate.needs_ranges
    assert gate.calibrated
    assert torch.equal(gate(x), x)
    assert torch.equal(gate(1.9 * x), 1.9 * x)
    outside = gate(100 * x)
    limits = 2 * gate.limit[[0, 1, 2, 5, 6]]
    assert bool((outside[:, [0, 1, 2, 9, 10]].abs() <= limits).all())
    # Vectors, and scalars that no weight reads, pass.
    assert torch.equal(outside[:, [3, 4, 5, 6, 7, 8, 11]], 100 * x[:, [3, 4, 5, 6, 7, 8, 11]])


@pytest.mark.parametrize(("bits", "share"), [(16, 1 / 32639), (8, 1 / 127)])
def test_gate_rounds_to_half_a_step_of_twice_its_limit(bits: int, share: float) -> None:
    x = random(50, 12, seed=6)
    gate = calibrated(bits, x)
    error = (gate(x) - x).abs()[:, [0, 1, 2, 9, 10]]
    assert bool((error <= gate.limit[[0, 1, 2, 5, 6]] * share * (1 + 1e-9)).all())
    assert float(error.max()) > 0
    gate.scalars_enabled = False
    assert torch.equal(gate(1000 * x), 1000 * x)


def test_gate_does_nothing_before_calibration_and_keeps_its_ranges() -> None:
    x = random(9, 12, seed=7)
    fresh = BoundedGate(LAYOUT, 16, headroom=2.0).double()
    assert torch.equal(fresh(100 * x), 100 * x)
    gate = calibrated(16, x)
    fresh.load_ranges(gate.ranges().double())
    torch.testing.assert_close(fresh(5 * x), gate(5 * x), rtol=1e-6, atol=1e-6)
    fresh.load_ranges(torch.zeros(8))
    assert not fresh.calibrated
    silent = copy.deepcopy(gate)
    assert torch.equal(silent(x), gate(x))


def test_gate_by_construction() -> None:
    gate = BoundedGate(LAYOUT, None, headroom=2.0, limit=3.0).double()
    assert not gate.needs_ranges
    x = random(40, 12, seed=8, scale=10.0)
    gate.scalars_enabled = False  # an architecture, not a rounding: there in the float model too
    out = gate(x)[:, [0, 1, 2, 9, 10]]
    assert float(out.abs().max()) <= 6.0
    gate.load_ranges(torch.full((8,), 100.0))
    assert torch.equal(gate(x)[:, [0, 1, 2, 9, 10]], out)
    with pytest.raises(ValueError, match="last dimension"):
        BoundedGate(FeatureLayout(((3, 1),), channels_first=True), 16, 2.0)


# -- envelope --


def test_learned_envelope() -> None:
    envelope = LearnedEnvelope(4).double()
    r = torch.linspace(0.1, 1.2, 300, dtype=DOUBLE)
    n = torch.arange(1, 5, dtype=DOUBLE)
    basis = 2**0.5 * torch.sin(n * math.pi * r[:, None]) / r[:, None] * cutoff(r)[:, None]
    u = envelope(basis).detach()
    assert bool((u >= 0).all())
    assert bool((u < 1 + 1e-12).all())
    assert bool((u[r < 0.95] > 0).all())
    assert not bool(u[r >= 1].any())
    leaf = random(5, 4, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(envelope, leaf)
    assert torch.autograd.gradgradcheck(envelope, leaf)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.smoke
def test_torchscript(bits: int | None) -> None:
    q, k, u, receiver = graph(seed=10)
    module = attention(bits=bits)
    scripted = torch.jit.script(module)
    assert torch.equal(scripted(q, k, u, receiver), module(q, k, u, receiver))
    x = random(20, 12, seed=11)
    gate = calibrated(bits, x)
    assert torch.equal(torch.jit.script(gate)(3 * x), gate(3 * x))
    assert torch.equal(torch.jit.script(LearnedEnvelope(12).double())(x), LearnedEnvelope(12).double()(x))
