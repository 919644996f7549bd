"""Weight quantization: layouts, scales, codes, gradients, and rounding that knows the layer's inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq.quantizers.weights import (
    Block,
    QuantizedTensor,
    WeightLayout,
    WeightQuantizer,
    dequantize,
    gptq_round,
    largest_code,
    search_range,
)

BITS = (2, 3, 4, 5, 6, 7, 8, 16)
GRANULARITIES = ("per_tensor", "per_channel", "per_group")


@st.composite
def layouts(draw: st.DrawFn) -> WeightLayout:
    """One to four arrays of two or three axes, end to end in a flat weight or alone in their own shape."""
    blocks: list[Block] = []
    offset = 0
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
        blocks.append(Block(offset, shape, draw(st.integers(0, len(shape) - 1))))
        offset += blocks[-1].numel
    if len(blocks) == 1 and draw(st.booleans()):
        return WeightLayout.single(blocks[0].shape, blocks[0].input_axis)
    return WeightLayout((offset,), tuple(blocks))


def random_weight(layout: WeightLayout, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sizes over several orders of magnitude, and some blocks of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(layout.numel, generator=generator, dtype=dtype)
    weight *= 10.0 ** (3 * torch.rand(layout.numel, generator=generator, dtype=dtype) - 1.5)
    if seed % 3 == 0:
        weight[: layout.numel // 2] = 0.0
    return (weight * 10.0 ** (seed % 9 - 4)).view(layout.shape)


cases = {
    "layout": layouts(),
    "bits": st.sampled_from(BITS),
    "granularity": st.sampled_from(GRANULARITIES),
    "group_size": st.integers(2, 6),
    "seed": st.integers(0, 10_000),
}


def test_largest_codes_fit_their_storage() -> None:
    assert [largest_code(bits) for bits in BITS] == [1, 3, 7, 15, 31, 63, 127, 127 * 256 + 127]


# Layouts.


@settings(deadline=None)
@given(layout=layouts(), granularity=st.sampled_from(GRANULARITIES), group_size=st.integers(2, 6))
def test_segments_cover_the_weight_and_agree_with_the_index(
    layout: WeightLayout, granularity: str, group_size: int
) -> None:
    segments = layout.segments(granularity, group_size)
    index = layout.scale_index(granularity, group_size)
    assert index.shape == (layout.numel,)
    assert index.dtype == torch.int64
    end, scale_end = 0, 0
    for offset, shape, scale_offset, scale_shape in segments:
        assert (offset, scale_offset) == (end, scale_end)
        end, scale_end = offset + math.prod(shape), scale_offset + math.prod(scale_shape)
        indices = torch.arange(scale_offset, scale_end).view(scale_shape).expand(shape)
        assert torch.equal(index[offset:end].view(shape), indices)
    assert end == layout.numel
    # Every scale has weights.
    assert torch.equal(index.unique(), torch.arange(scale_end))


def test_scales_are_shared_over_the_inputs() -> None:
    index = WeightLayout.single((3, 2)).scale_index("per_channel", 32)
    assert index.tolist() == [0, 1, 0, 1, 0, 1]
    index = WeightLayout.single((3, 2), input_axis=1).scale_index("per_channel", 32)
    assert index.tolist() == [0, 0, 1, 1, 2, 2]
    assert WeightLayout.single((3, 2)).scale_index("per_tensor", 32).tolist() == [0] * 6
    # Five inputs in groups of two: two whole groups and one of the remainder.
    index = WeightLayout.single((5, 2)).scale_index("per_group", 2)
    assert index.view(5, 2).tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5]]
    # Inputs elsewhere, or too few: one scale a channel.
    for layout in (WeightLayout.single((2, 5), input_axis=1), WeightLayout.single((2, 3))):
        assert torch.equal(
            layout.scale_index("per_group", 2 + layout.blocks[0].input_axis), layout.scale_index("per_channel", 2)
        )
    two = WeightLayout((10,), (Block(0, (2, 2)), Block(4, (3, 2))))
    assert two.scale_index("per_channel", 32).tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 2, 3]


# Codes and scales.


@settings(max_examples=150, deadline=None)
@given(**cases)
def test_rounding_to_nearest(layout: WeightLayout, bits: int, granularity: str, group_size: int, seed: int) -> None:
    weight = random_weight(layout, seed)
    quantizer = WeightQuantizer(layout, bits, granularity, group_size)
    for method in ("absmax", "error"):
        quantizer.search(weight, method)
        stored = quantizer.quantized(weight)
        rounded = quantizer(weight)
        assert rounded.shape == weight.shape
        assert rounded.dtype == torch.float32
        assert rounded.isfinite().all()

        # What a file holds gives the same weights, bit for bit.
        assert torch.equal(stored.dequantize(), rounded)
        assert torch.equal(dequantize(stored.codes, stored.scale, quantizer.scale_index), rounded)
        assert stored.codes.dtype == torch.int32
        assert stored.codes.shape == weight.shape
        assert stored.codes.abs().max() <= largest_code(bits)
        assert stored.scale.dtype == torch.float32
        assert stored.scale.shape == (quantizer.groups,)
        assert (stored.scale > 0).all()
        if bits <= 8:
            assert torch.equal(stored.scale.bfloat16().float(), stored.scale)

        # Half a step inside the range, to the rounding of float32; all of it is inside for absmax.
        step = stored.scale.double()[quantizer.scale_index].view(weight.shape)
        limit = step * largest_code(bits)
        inside = weight.abs() <= limit
        error = (weight - rounded).abs().double()
        assert (error <= 0.5 * step + 2e-7 * weight.abs())[inside].all()
        assert torch.equal(rounded.abs()[~inside].double(), limit[~inside].float().double())
        if method == "absmax":
            assert (weight.abs() <= limit * (1 + 1e-6 * (bits == 16))).all()
            # Rounding the scale up to bfloat16 costs one unit in its last place at most.
            largest = torch.zeros(quantizer.groups).scatter_reduce(
                0, quantizer.scale_index, weight.abs().reshape(-1), "amax"
            )
            used = largest > 1e-28
            assert (stored.scale[used] <= largest[used] / largest_code(bits) * (1 + 2**-7 + 1e-6)).all()


@settings(max_examples=100, deadline=None)
@given(**cases)
def test_rounded_weights_stay_where_they_are(
    layout: WeightLayout, bits: int, granularity: str, group_size: int, seed: int
) -> None:
    weight = random_weight(layout, seed)
    quantizer = WeightQuantizer(layout, bits, granularity, group_size)
    quantizer.search(weight, "error")
    quantizer.fix_scale(weight)
    once = quantizer.quantized(weight)
    again = quantizer.quantized(once.dequantize())
    assert torch.equal(again.codes, once.codes)
    assert torch.equal(again.scale, once.scale)
    assert torch.equal(quantizer(quantizer(weight)), quantizer(weight))


@settings(max_examples=100, deadline=None)
@given(**cases)
def test_searched_ranges_are_never_worse(
    layout: WeightLayout, bits: int, granularity: str, group_size: int, seed: int
) -> None:
    weight = random_weight(layout, seed)
    quantizer = WeightQuantizer(layout, bits, granularity, group_size)

    def group_errors(method: str) -> Tensor:
        quantizer.search(weight, method)
        squares = (quantizer(weight) - weight).double().square().reshape(-1)
        return torch.zeros(quantizer.groups, dtype=torch.float64).index_add(0, quantizer.scale_index, squares)

    absmax, searched = group_errors("absmax"), group_errors("error")
    # The search adds up in float32.
    assert (searched <= absmax * (1 + 1e-5)).all()
    ratio = quantizer.range_ratio
    assert ((ratio > 0.29) & (ratio <= 1)).all()
    if bits == 16:
        assert (ratio == 1).all()


@pytest.mark.parametrize(("bits", "gain"), [(3, 1.52), (4, 1.18), (8, 1.00)])
def test_searched_ranges_pay_at_few_bits(bits: int, gain: float) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(WeightLayout.single((64, 256)), bits, "per_channel", 32)
    absmax = (quantizer(weight) - weight).square().mean()
    quantizer.search(weight, "error")
    searched = (quantizer(weight) - weight).square().mean()
    assert (absmax / searched).item() == pytest.approx(gain, abs=0.02)


def test_search_by_hand() -> None:
    # Two groups at 2 bits: the codes are -1, 0, 1. In the first all sizes are the same, in the second one
    # weight is an outlier among many that only a smaller range can tell from zero.
    weight = torch.cat((torch.ones(8), torch.full((99,), 0.4), torch.ones(1)))
    index = torch.cat((torch.zeros(8), torch.ones(100))).long()
    assert search_range(weight, index, 2, 2).tolist() == pytest.approx([1.0, 0.4], abs=0.011)
    assert search_range(weight, index, 2, 16).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_stay_zero(bits: int, granularity: str, dtype: torch.dtype) -> None:
    layout = WeightLayout.single((7, 3))
    weight = torch.zeros(7, 3, dtype=dtype, requires_grad=True)
    quantizer = WeightQuantizer(layout, bits, granularity, 4)
    for method in ("absmax", "error"):
        quantizer.search(weight, method)
        rounded = quantizer(weight)
        assert not rounded.any()
        rounded.sum().backward()
        assert torch.equal(weight.grad, torch.ones_like(weight))
        weight.grad = None
        stored = quantizer.quantized(weight)
        assert not stored.codes.any()
        assert stored.scale.isfinite().all()
    # Zeros among others.
    mixed = torch.randn(7, 3, dtype=dtype)
    mixed[:, 1] = 0
    assert not quantizer(mixed)[:, 1].any()


def test_tiny_and_huge_weights_stay_finite() -> None:
    layout = WeightLayout.single((4, 2))
    for size in (1e-38, 1e-30, 1e-20, 1e20, 1e30):
        weight = size * torch.tensor([[1.0, -0.3], [0.5, 0.2], [-1.0, 1.0], [0.0, 0.7]])
        for bits in BITS:
            quantizer = WeightQuantizer(layout, bits, "per_channel", 32)
            rounded = quantizer(weight)
            assert rounded.isfinite().all()
            step = quantizer.current_scale(weight)[quantizer.scale_index].view(4, 2)
            assert ((rounded - weight).abs() <= 0.5 * step + 2e-7 * weight.abs()).all()


def test_finer_scales_and_ranges_by_error_round_better() -> None:
    weight = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    layout = WeightLayout.single((40, 6))

    def stored(granularity: str, method: str) -> QuantizedTensor:
        quantizer = WeightQuantizer(layout, 4, granularity, 32)
        quantizer.search(weight, method)
        return quantizer.quantized(weight)

    errors = {}
    for granularity, scales in (("per_tensor", 1), ("per_channel", 6), ("per_group", 12)):
        tensor = stored(granularity, "absmax")
        assert tensor.scale.shape == (scales,)
        assert (tensor.bits, tensor.granularity, tensor.group_size) == (4, granularity, 32)
        errors[granularity] = float((tensor.dequantize() - weight).square().mean())
    assert errors["per_group"] < errors["per_channel"] < errors["per_tensor"]
    clipped = stored("per_channel", "error").dequantize()
    assert float((clipped - weight).square().mean()) < errors["per_channel"]


def test_an_adopted_scale_is_the_one_that_is_found_again() -> None:
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    weight[:, 3] = 0.0
    quantizer = WeightQuantizer(WeightLayout.single((16, 8)), 4, "per_channel", 32)
    scale = torch.linspace(0.05, 0.2, 8)
    quantizer.fix_scale(weight, scale=scale)
    quantizer.adopt_scale(weight)
    quantizer.refresh_scale(weight)
    keep = torch.arange(8) != 3
    # As bfloat16 keeps it, rounded up.
    torch.testing.assert_close(quantizer.fixed_step[keep], scale[keep], rtol=0.01, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_double_precision_keeps_its_dtype(bits: int) -> None:
    layout = WeightLayout.single((12, 5))
    weight = random_weight(layout, 1, torch.float64)
    quantizer = WeightQuantizer(layout, bits, "per_channel", 32)
    rounded = quantizer(weight)
    assert rounded.dtype == torch.float64
    assert quantizer.current_scale(weight).dtype == torch.float64
    stored = quantizer.quantized(weight)
    # The scales are those of float32, so that the codes and the weights are the file's, to its rounding.
    assert torch.equal(quantizer.current_scale(weight).float().double(), quantizer.current_scale(weight))
    assert torch.allclose(rounded, stored.dequantize().double(), rtol=1e-7, atol=0)


def test_scales_follow_the_weights_until_they_are_fixed() -> None:
    layout = WeightLayout.single((12, 5))
    weight = torch.randn(12, 5, generator=torch.Generator().manual_seed(2))
    quantizer = WeightQuantizer(layout, 8, "per_channel", 32)
    assert torch.equal(quantizer(4 * weight), 4 * quantizer(weight))
    quantizer.fix_scale(weight)
    before = quantizer.current_scale(weight)
    assert torch.equal(quantizer.current_scale(4 * weight), before)
    assert torch.equal(quantizer(4 * weight).abs().amax(0), 127 * before)
    quantizer.fix_scale(weight, 2 * before)
    assert torch.equal(quantizer.current_scale(weight), 2 * before)
    quantizer.enabled = False
    assert quantizer(weight) is weight


def test_state_dict_holds_nothing_of_ours() -> None:
    quantizer = WeightQuantizer(WeightLayout.single((4, 4)), 8, "per_channel", 32)
    quantizer.search(torch.randn(4, 4), "error")
    quantizer.fix_scale(torch.randn(4, 4))
    assert not quantizer.state_dict()
    assert not list(quantizer.parameters())


# Gradients.


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fixed", [False, True])
def test_gradient_is_straight_through_inside_and_zero_outside(bits: int, fixed: bool) -> None:
    layout = WeightLayout.single((30, 8))
    weight = torch.randn(30, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    quantizer = WeightQuantizer(layout, bits, "per_channel", 32)
    quantizer.range_ratio.fill_(0.6)
    if fixed:
        quantizer.fix_scale(weight)
    weight.requires_grad_()
    upstream = torch.randn(30, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (quantizer(weight) * upstream).sum().backward()
    limit = quantizer.current_scale(weight) * largest_code(bits)
    inside = weight.detach().abs() <= limit
    assert inside.any()
    assert not inside.all()
    assert torch.allclose(weight.grad, upstream * inside, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scale_gradient_is_that_of_lsq(bits: int, granularity: str) -> None:
    # Esser et al. 2020, equation 3: round(v) - v inside the range, the extreme code outside, v = w / s.
    layout = WeightLayout((46,), (Block(0, (10, 3)), Block(30, (4, 4))))
    weight = torch.randn(46, generator=torch.Generator().manual_seed(5))
    quantizer = WeightQuantizer(layout, bits, granularity, 4)
    quantizer.range_ratio.fill_(0.7)
    quantizer.fix_scale(weight)
    quantizer.fixed_step.requires_grad_()
    upstream = torch.randn(46, generator=torch.Generator().manual_seed(6))
    (quantizer(weight) * upstream).sum().backward()
    top = largest_code(bits)
    v = weight / quantizer.fixed_step.detach()[quantizer.scale_index]
    single = torch.where(v.abs() <= top, v.round() - v, v.sign() * top)
    expected = torch.zeros(quantizer.groups).index_add(0, quantizer.scale_index, single * upstream)
    assert (v.abs() > top).any()
    assert torch.allclose(quantizer.fixed_step.grad, expected, rtol=1e-4, atol=1e-4)


def test_scales_are_stored_in_bfloat16_and_never_reach_zero() -> None:
    weight = torch.randn(8, 3)
    quantizer = WeightQuantizer(WeightLayout.single((8, 3)), 4, "per_channel", 32)
    quantizer.fix_scale(weight, torch.tensor([0.1234567, -1.0, 0.0]))
    scale = quantizer.current_scale(weight)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert scale[0] >= 0.1234567
    assert (scale > 0).all()
    assert quantizer(weight).isfinite().all()
    assert torch.equal(quantizer.quantized(weight).dequantize(), quantizer(weight))


@pytest.mark.parametrize("fixed", [False, True])
def test_second_derivatives_are_finite(fixed: bool) -> None:
    # As in training on forces: the derivative with respect to x depends on the weights.
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    quantizer = WeightQuantizer(WeightLayout.single((6, 4)), 4, "per_channel", 32)
    leaves = [weight, x]
    if fixed:
        quantizer.fix_scale(weight)
        leaves.append(quantizer.fixed_step.requires_grad_())
    energy = torch.tanh(x @ quantizer(weight)).square().sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    for gradient in torch.autograd.grad(force.square().sum(), leaves):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchscript_gives_the_same(bits: int, granularity: str, dtype: torch.dtype) -> None:
    layout = WeightLayout((46,), (Block(0, (10, 3)), Block(30, (4, 4))))
    weight = random_weight(layout, 1, dtype)
    quantizer = WeightQuantizer(layout, bits, granularity, 4)
    quantizer.search(weight, "error")
    assert torch.equal(torch.jit.script(quantizer)(weight), quantizer(weight))
    quantizer.fix_scale(weight)
    scripted = torch.jit.script(quantizer)
    assert torch.equal(scripted(weight), quantizer(weight))
    assert torch.equal(scripted(3 * weight), quantizer(3 * weight))


# Rounding that keeps the products.


def correlated_inputs(count: int, inputs: int, seed: int = 0) -> Tensor:
    """Rows with a spectrum that falls over two orders of magnitude, as features of a network have."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64))
    generator.manual_seed(seed + 1)
    spectrum = torch.logspace(0, -2, inputs, dtype=torch.float64)
    return torch.randn(count, inputs, generator=generator, dtype=torch.float64) * spectrum @ basis


@pytest.mark.parametrize(("bits", "factor"), [(3, 2.3), (4, 2.3), (8, 2.3)])
def test_gptq_keeps_the_products_better_than_nearest(bits: int, factor: float) -> None:
    inputs = correlated_inputs(2000, 64)
    matrix = torch.randn(64, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = matrix.abs().amax(0) / largest_code(bits)
    nearest = torch.round(matrix / scale) * scale
    codes = gptq_round(matrix, inputs.t() @ inputs, scale, bits)
    assert codes.dtype == torch.int32
    assert codes.abs().max() <= largest_code(bits)

    # Also on inputs it was not made with.
    fresh = correlated_inputs(2000, 64, seed=1)

    def rms(rounded: Tensor) -> float:
        return float((fresh @ (rounded - matrix)).square().mean().sqrt())

    assert rms(nearest) / rms(codes * scale) == pytest.approx(factor, rel=0.03)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 6),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_gptq_is_nearest_for_inputs_that_are_not_correlated(rows: int, columns: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    scale = 0.8 * matrix.abs().amax(0, keepdim=True) / largest_code(bits) + 1e-6
    hessian = torch.diag(torch.rand(rows, generator=generator) * 100)
    # Inputs that were always zero change nothing.
    hessian[seed % rows, seed % rows] = 0.0
    top = largest_code(bits)
    expected = torch.round(matrix.double() / scale.double()).clamp(-top, top).to(torch.int32)
    assert torch.equal(gptq_round(matrix, hessian, scale, bits), expected)


def test_gptq_takes_inputs_that_span_too_little() -> None:
    # Fewer rows than inputs, two of them equal and one silent: the Hessian is singular.
    inputs = correlated_inputs(5, 12)
    inputs[:, 3] = inputs[:, 7]
    inputs[:, 5] = 0.0
    matrix = torch.randn(12, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scale = matrix.abs().amax(0) / 7
    codes = gptq_round(matrix, inputs.t() @ inputs, scale, 4)
    assert codes.abs().max() <= 7
    nearest = torch.round(matrix / scale)
    assert torch.equal(codes[5].double(), nearest[5])
    assert (inputs @ (codes * scale - matrix)).norm() < (inputs @ (nearest * scale - matrix)).norm()
    assert torch.equal(gptq_round(matrix, torch.zeros(12, 12), scale, 4).double(), nearest)
