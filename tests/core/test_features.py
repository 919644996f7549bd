"""Rounding of features: error bounds, symmetry, and the tracers it must pass."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from features import (
    FIXED,
    LAYOUTS,
    MUL_IR,
    PATHS,
    SCHEMES,
    VECTORS,
    angle,
    angle_bound,
    join,
    length_bound,
    limits,
    make,
    random_features,
    split,
    width,
)
from torch import Tensor

from gaq.checks.rotations import random_rotation
from gaq.config.parse import ScalarConfig, VectorConfig
from gaq.quantizers.features import FeatureLayout, FeatureQuantizer
from gaq.quantizers.magnitudes import atom_range
from gaq.quantizers.weights import largest_code

# Error bounds.


@LAYOUTS
@PATHS
@SCHEMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_stay_within_the_bounds(
    layout: FeatureLayout, plain: bool, vectors: dict[str, Any], dtype: torch.dtype
) -> None:
    channels = sum(m for m, _ in layout.pieces)
    quantizer = make(layout, vectors, {"bits": 8}, torch.linspace(1.0, 6.0, channels), plain)
    config = VectorConfig(**{**FIXED, **vectors})
    x = random_features(layout, dtype=dtype)
    # All sizes, down to a thousandth.
    x[:100] *= torch.logspace(0, -3, 100, dtype=dtype).view(-1, *[1] * (x.dim() - 1))
    rounded = quantizer(x)
    assert rounded.shape == x.shape
    assert rounded.dtype == dtype
    noise = 1e-6 if dtype == torch.float32 else 1e-12
    saturated = 0
    for old, new, limit in zip(split(layout, x), split(layout, rounded), limits(layout, quantizer), strict=True):
        old, new = old.double(), new.double()
        dimension = old.shape[-1]
        if dimension == 1 or config.scheme == "components":
            bits = 8 if dimension == 1 else config.magnitude_bits
            inside = old.abs() <= limit
            error = (new - old).abs()
            allowed = (0.5 * limit / largest_code(bits) + noise * old.abs()).expand_as(error)
            assert (error <= allowed)[inside].all()
            assert error[inside].max() > 0.2 * limit.min() / largest_code(bits)
            assert torch.allclose(new.abs()[~inside], limit.expand_as(old)[~inside], rtol=1e-6)
            saturated += int((~inside).sum())
            continue
        length, new_length = old.norm(dim=-1, keepdim=True), new.norm(dim=-1, keepdim=True)
        inside = length <= limit
        error = (new_length - length).abs()
        assert (error <= length_bound(config, limit) + noise * length)[inside].all()
        assert torch.allclose(new_length[~inside], limit.expand_as(length)[~inside], rtol=1e-6)
        saturated += int((~inside).sum())
        present = new_length > 0
        assert present.any()
        turned = angle(old, new)[present]
        assert (turned <= angle_bound(config, dimension) + noise).all()
        assert turned.max() > 0.4 * angle_bound(config, dimension)
    assert saturated > 50


@pytest.mark.parametrize("bits", range(4, 25))
def test_scalars_lie_on_a_symmetric_grid(bits: int) -> None:
    layout = FeatureLayout(((5, 1),))
    quantizer = make(layout, scalars={"bits": bits}, limit=2.0)
    x = 1.5 * random_features(layout, 500, torch.float64)
    codes = quantizer(x) * largest_code(bits) / 2.0
    # Codes above 2^22 have no digits left for 1e-9.
    assert torch.allclose(codes, codes.round(), atol=max(1e-9, 1e-15 * largest_code(bits)))
    assert codes.round().abs().max() == largest_code(bits)
    assert torch.equal(quantizer(-x), -quantizer(x))
    assert torch.allclose(quantizer(quantizer(x)), quantizer(x), rtol=1e-15, atol=0)


@pytest.mark.parametrize("bits", [8, 16, 17, 20, 22, 23, 24])
@pytest.mark.parametrize("plain", [True, False])
def test_codes_of_scalars_are_exact_in_float32(bits: int, plain: bool) -> None:
    """Float32 holds all integers up to 2^24, so all codes of 24 bits; what it lacks are digits of the quotient.

    From 23 bits on the largest quotients are known to a quarter or half a step only. Then a code near a tie may be that
    of the neighbour, and an error is at most a step and a half.
    """
    layout = FeatureLayout(((64, 1),))
    quantizer = FeatureQuantizer(layout, ScalarConfig(bits), VectorConfig(), 1.0)
    quantizer.differentiable_twice = plain
    top = largest_code(bits)
    x = random_features(layout, 2000) * torch.logspace(-3, 3, 2000)[:, None]
    rounded = quantizer(x)
    step = atom_range(x[:, :, None].abs()) / top
    codes = torch.round(rounded.double() / step.double())
    assert codes.abs().max() <= top
    # The values are the codes times the step, as float32 multiplies them.
    assert torch.equal(codes.float() * step, rounded)
    exact = x.double() / step.double()
    assert (codes - exact).abs().max() <= 0.5 + 2.0 ** (bits - 25)
    error = (rounded.double() - x.double()).abs() / step.double()
    assert error.max() <= 0.5 + 2.0 ** (bits - 24)


@PATHS
def test_switches_and_nulls_leave_features_alone(plain: bool) -> None:
    x = random_features(MUL_IR)
    scalar_pieces = {0, 4}
    cases = {
        "none": (make(MUL_IR, {"magnitude_bits": None}, {"bits": None}, plain=plain), set()),
        "scalars": (make(MUL_IR, {"magnitude_bits": None}, {"bits": 4}, plain=plain), scalar_pieces),
        "vectors": (make(MUL_IR, {"magnitude_bits": 4}, {"bits": None}, plain=plain), {1, 2, 3}),
    }
    for off in ("scalars", "vectors"):
        quantizer = make(MUL_IR, {"magnitude_bits": 4}, {"bits": 4}, plain=plain)
        quantizer(x)
        setattr(quantizer, f"{off}_enabled", False)
        cases[f"{off} off"] = (quantizer, {1, 2, 3} if off == "scalars" else scalar_pieces)
    for name, (quantizer, rounds) in cases.items():
        for i, (old, new) in enumerate(zip(split(MUL_IR, x), split(MUL_IR, quantizer(x)), strict=True)):
            assert torch.equal(old, new) == (i not in rounds), name


@PATHS
@SCHEMES
def test_vector_range_factor_widens_the_range_of_vectors_only(vectors: dict[str, Any], plain: bool) -> None:
    x = random_features(MUL_IR)
    narrow, wide = make(MUL_IR, vectors, limit=1.0, plain=plain), make(MUL_IR, vectors, limit=2.0, plain=plain)
    narrow_result, wide_result = narrow(x), wide(x)
    narrow.vector_range_factor = 2.0
    for i, pieces in enumerate(zip(*(split(MUL_IR, y) for y in (narrow(x), narrow_result, wide_result)), strict=True)):
        assert torch.equal(pieces[0], pieces[1 if MUL_IR.pieces[i][1] == 1 else 2])


# Zeros, empty batches, unread pieces, memory layouts.


@LAYOUTS
@PATHS
@SCHEMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_stay_zero(layout: FeatureLayout, plain: bool, vectors: dict[str, Any], dtype: torch.dtype) -> None:
    quantizer = make(layout, vectors, plain=plain)
    zero = torch.zeros(3, *width(layout), dtype=dtype, requires_grad=True)
    rounded = quantizer(zero)
    assert not rounded.any()
    (gradient,) = torch.autograd.grad(rounded.sum(), zero)
    # Without a direction to project on, the gradient passes unchanged.
    assert torch.equal(gradient, torch.ones_like(zero))

    # Single vectors among others, and single components of vectors, which a table knows nothing of.
    x = random_features(layout, dtype=dtype)
    for piece in split(layout, x):
        piece[::2, 0] = 0.0
        if piece.shape[-1] != 3 or "codebook" not in vectors:
            piece[1::2, 1, 0] = 0.0
    x.requires_grad_()
    rounded = quantizer(x)
    assert rounded.isfinite().all()
    assert not rounded[x == 0].any()
    (gradient,) = torch.autograd.grad(rounded.square().sum(), x)
    assert gradient.isfinite().all()


@LAYOUTS
@PATHS
@SCHEMES
def test_empty_batches(layout: FeatureLayout, plain: bool, vectors: dict[str, Any]) -> None:
    quantizer = make(layout, vectors, plain=plain)
    quantizer.observing = True
    before = quantizer.ranges()
    x = torch.zeros(0, *width(layout), requires_grad=True)
    rounded = quantizer(x)
    assert rounded.shape == x.shape
    assert torch.equal(quantizer.ranges(), before)
    (gradient,) = torch.autograd.grad(rounded.sum(), x)
    assert gradient.shape == x.shape


@LAYOUTS
@PATHS
def test_pieces_that_no_weight_reads_pass_through(layout: FeatureLayout, plain: bool) -> None:
    marked = tuple((-m if i % 2 else m, d) for i, (m, d) in enumerate(layout.pieces))
    marked_layout = FeatureLayout(marked, layout.channels_first)
    settings = {"vectors": {"magnitude_bits": 4, "direction_bits": 4}, "scalars": {"bits": 4}, "plain": plain}
    x = random_features(layout)
    full, partial = make(layout, **settings)(x), make(marked_layout, **settings)(x)
    for i, pieces in enumerate(zip(*(split(layout, y) for y in (x, full, partial)), strict=True)):
        assert torch.equal(pieces[2], pieces[0 if i % 2 else 1])
        assert not torch.equal(pieces[0], pieces[1])


@PATHS
def test_adjacent_pieces_may_be_written_apart_or_together(plain: bool) -> None:
    apart, together = FeatureLayout(((2, 1), (3, 1), (2, 3), (1, 3))), FeatureLayout(((5, 1), (3, 3)))
    x = random_features(together)
    sizes = torch.rand(8, generator=torch.Generator().manual_seed(0)) + 1
    first, second = make(apart, limit=sizes, plain=plain), make(together, limit=sizes, plain=plain)
    assert torch.equal(first(x), second(x))


@LAYOUTS
@PATHS
@pytest.mark.parametrize("vectors", [VECTORS[1], VECTORS[-1]], ids=["mddq", "components"])
def test_memory_layout_does_not_matter(layout: FeatureLayout, plain: bool, vectors: dict[str, Any]) -> None:
    quantizer = make(layout, vectors, plain=plain)
    x = random_features(layout)
    expected = quantizer(x)
    strided = torch.stack((x, torch.full_like(x, math.nan)), -1)[..., 0]
    assert not strided.is_contiguous()
    transposed = x.movedim(0, -1).contiguous().movedim(-1, 0)
    repeated = x[:1].expand(5, *x.shape[1:])
    for view in (strided, transposed):
        assert torch.allclose(quantizer(view), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(quantizer(repeated), expected[:1].expand_as(repeated), rtol=1e-5, atol=1e-6)
    assert torch.equal(x, random_features(layout))


@LAYOUTS
@SCHEMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_paths_give_the_same(layout: FeatureLayout, vectors: dict[str, Any], dtype: torch.dtype) -> None:
    x = random_features(layout, dtype=dtype).requires_grad_()
    upstream = random_features(layout, dtype=dtype, seed=1)
    values, gradients = [], []
    for plain in (True, False):
        rounded = make(layout, vectors, limit=2.0, plain=plain)(x)
        values.append(rounded)
        gradients.append(torch.autograd.grad((rounded * upstream).sum(), x)[0])
    # Two ways to the same length may lie on either side of a rounding decision.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    agree = (values[0] - values[1]).abs() <= tolerance
    assert agree.double().mean() > (0.99 if dtype == torch.float32 else 0.9999)
    # Magnitudes that round to zero are apart: one path lets their whole gradient pass, the other the radial part.
    kept = join(layout, [v.norm(dim=-1, keepdim=True).expand_as(v) for v in split(layout, values[0].detach())]) > 0
    same = (gradients[0] - gradients[1]).abs() <= 10 * tolerance * (1 + gradients[0].abs())
    assert same[agree & kept].all()


# Symmetry.


@PATHS
@pytest.mark.parametrize("codebook", ["octahedral", "geodesic"])
def test_rotations_change_directions_by_the_code_only(plain: bool, codebook: str) -> None:
    layout = FeatureLayout(((4, 1), (4, 3)))
    bits = {"octahedral": 8, "geodesic": 6}[codebook]
    vectors = {"magnitude_bits": 8, "direction_bits": bits, "codebook": codebook}
    quantizer = make(layout, vectors, {"bits": 8}, plain=plain)
    scalars, v = split(layout, random_features(layout, dtype=torch.float64))
    rounded_scalars, rounded = split(layout, quantizer(join(layout, [scalars, v])))
    bound = angle_bound(VectorConfig(**{**FIXED, **vectors}), 3)
    for seed in range(3):
        rotation = random_rotation(generator=torch.Generator().manual_seed(seed))
        turned_scalars, turned = split(layout, quantizer(join(layout, [scalars, v @ rotation.t()])))
        assert torch.equal(turned_scalars, rounded_scalars)
        # Lengths are invariant: no rotation changes their codes.
        assert torch.allclose(turned.norm(dim=-1), rounded.norm(dim=-1), rtol=1e-12, atol=1e-12)
        present = rounded.norm(dim=-1) > 0
        error = angle(turned[present], (rounded @ rotation.t())[present])
        assert bound < error.max() <= 2 * bound


def test_components_are_not_rotation_invariant() -> None:
    # What the split is for: the length of a vector rounded by components depends on how it lies.
    layout = FeatureLayout(((4, 3),))
    v = random_features(layout, dtype=torch.float64)
    rotation = random_rotation(generator=torch.Generator().manual_seed(0))
    turned = (v.unflatten(1, (4, 3)) @ rotation.t()).flatten(1)
    changes = {}
    for scheme in ("mddq", "components"):
        quantizer = make(layout, {"scheme": scheme, "magnitude_bits": 8})
        lengths = [quantizer(x).unflatten(1, (4, 3)).norm(dim=-1) for x in (v, turned)]
        changes[scheme] = float((lengths[0] - lengths[1]).abs().max())
    assert changes["mddq"] < 1e-12
    assert changes["components"] > 5e-3


@pytest.mark.parametrize("scheme", ["mddq", "components"])
@pytest.mark.parametrize("bits", [4, 8, 12, 16])
def test_rounding_commutes_with_the_octahedral_group(scheme: str, bits: int) -> None:
    layout = FeatureLayout(((4, 3),))
    quantizer = make(layout, {"scheme": scheme, "magnitude_bits": bits, "direction_bits": bits}, plain=False)
    plain = make(layout, {"scheme": scheme, "magnitude_bits": bits, "direction_bits": bits}, plain=True)
    v = random_features(layout, dtype=torch.float64).unflatten(1, (4, 3))
    rounded, plainly = (q(v.flatten(1)).unflatten(1, (4, 3)) for q in (quantizer, plain))
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            flip = torch.tensor(signs, dtype=torch.float64)
            moved = (v[..., list(order)] * flip).flatten(1)
            assert torch.equal(quantizer(moved).unflatten(1, (4, 3)), rounded[..., list(order)] * flip)
            # The straight-through sum of the plain path is good to the last bits only.
            again = plain(moved).unflatten(1, (4, 3))
            assert torch.allclose(again, plainly[..., list(order)] * flip, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dimension", [5, 7])
def test_higher_orders_commute_with_flips_and_permutations_of_components(dimension: int) -> None:
    layout = FeatureLayout(((3, dimension),))
    quantizer = make(layout, {"magnitude_bits": 8, "direction_bits": 6}, plain=False)
    v = random_features(layout, dtype=torch.float64).unflatten(1, (3, dimension))
    rounded = quantizer(v.flatten(1)).unflatten(1, (3, dimension))
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(dimension, generator=generator)
        flip = torch.randint(0, 2, (dimension,), generator=generator) * 2.0 - 1.0
        moved = quantizer((v[..., order] * flip).flatten(1)).unflatten(1, (3, dimension))
        assert torch.allclose(moved, rounded[..., order] * flip, rtol=0, atol=1e-15)


# TorchScript.


@LAYOUTS
@SCHEMES
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_gives_the_same(layout: FeatureLayout, vectors: dict[str, Any]) -> None:
    quantizer = make(layout, vectors)
    x = random_features(layout).requires_grad_()
    scripted = torch.jit.script(quantizer)
    for tensor in (x, x.detach().double().requires_grad_(), torch.zeros(0, *width(layout), requires_grad=True)):
        expected, got = quantizer(tensor), scripted(tensor)
        assert torch.equal(got, expected)
        (first,) = torch.autograd.grad(expected.square().sum(), tensor)
        (second,) = torch.autograd.grad(got.square().sum(), tensor)
        assert torch.allclose(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_after_use_in_inference() -> None:
    quantizer = make(MUL_IR, plain=False)
    x = random_features(MUL_IR)
    fused = quantizer(x)
    assert (torch.jit.script(quantizer)(x) - fused).abs().max() < 1e-4


@LAYOUTS
@PATHS
def test_compiles_as_one_graph(layout: FeatureLayout, plain: bool) -> None:
    # Traced as torch.compile traces it; what the graph is then turned into is Inductor's business.
    quantizer = make(layout, plain=plain)
    x = random_features(layout).requires_grad_()
    compiled = torch.compile(quantizer, backend="eager", fullgraph=True)
    assert (compiled(x) - quantizer(x)).abs().max() < 1e-4


@pytest.mark.slow
def test_inductor_gives_the_same() -> None:
    # With the derivative: of the forward pass alone Inductor makes other, simpler code.
    quantizer = make(MUL_IR, {"frame": "local", "granularity": "per_atom"}, {"granularity": "per_atom"}, plain=False)
    x = random_features(MUL_IR, 20, torch.float64).requires_grad_()
    weight = random_features(MUL_IR, 31, torch.float64)

    def layer(x: Tensor) -> Tensor:
        return quantizer(torch.tanh(x @ weight.T @ weight)) @ weight.T

    assert (torch.compile(layer, fullgraph=True)(x) - layer(x)).abs().max() < 1e-9
