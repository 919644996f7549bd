"""Ranges of features: observed, kept and carried over."""

from __future__ import annotations

import copy

import pytest
import torch
from features import (
    FIXED,
    LAYOUTS,
    MUL_IR,
    PATHS,
    STATIC,
    VECTORS,
    make,
    random_features,
    split,
)

from gaq.config.parse import ScalarConfig, VectorConfig
from gaq.quantizers.features import OBSERVER_DECAY, FeatureLayout, FeatureQuantizer


@LAYOUTS
@PATHS
@pytest.mark.parametrize("scheme", ["mddq", "components"])
def test_ranges_are_the_largest_sizes_seen(layout: FeatureLayout, plain: bool, scheme: str) -> None:
    quantizer = FeatureQuantizer(layout, ScalarConfig(**STATIC), VectorConfig(**FIXED, scheme=scheme), headroom=2.0)
    quantizer.differentiable_twice = plain
    quantizer.load_ranges(torch.full_like(quantizer.observed, 100.0))
    quantizer.start_observing()
    batches = [random_features(layout, 30, seed=seed) for seed in range(3)]
    for batch in batches:
        quantizer(batch)
    expected = [
        (piece.norm(dim=-1) if scheme == "mddq" else piece.abs().amax(-1)).amax(0)
        for piece in split(layout, torch.cat(batches))
    ]
    assert torch.allclose(quantizer.ranges(), torch.cat(expected), rtol=1e-6)
    assert torch.allclose(quantizer.limit, 2.0 * torch.cat(expected), rtol=1e-6)
    # Nothing that was seen saturates, and nothing is observed any more once it is switched off.
    quantizer.observing = False
    before = quantizer.ranges()
    quantizer(100 * batches[0])
    assert torch.equal(quantizer.ranges(), before)
    assert (quantizer(batches[0]) - batches[0]).abs().max() < 1e-2


def test_ranges_do_not_depend_on_the_batching() -> None:
    x = random_features(MUL_IR, 60)
    complete, parts = make(MUL_IR), make(MUL_IR)
    for quantizer, size in ((complete, 60), (parts, 7)):
        quantizer.start_observing()
        for batch in x.split(size):
            quantizer(batch)
    assert torch.equal(complete.ranges(), parts.ranges())
    # And rounding one row does not look at the others.
    complete.observing = False
    assert torch.equal(complete(x)[:7], complete(x[:7]))


def test_ranges_in_training_forget_slowly() -> None:
    quantizer = make(FeatureLayout(((1, 1),)), limit=1.0)
    quantizer.observing = True
    for _ in range(10):
        quantizer(torch.full((1, 1), 0.5))
    assert float(quantizer.ranges()) == pytest.approx(OBSERVER_DECAY**10)
    quantizer(torch.full((1, 1), -4.0))
    assert float(quantizer.ranges()) == 4.0


def test_silent_channels_get_a_small_range() -> None:
    layout = FeatureLayout(((3, 1), (2, 3), (2, 5)))
    quantizer = FeatureQuantizer(layout, ScalarConfig(**STATIC), VectorConfig(**FIXED), headroom=1.5)
    quantizer.load_ranges(torch.tensor([0.0, 6.4, 0.01, 3.2, 0.0, 0.0, 0.0]))
    assert torch.allclose(quantizer.limit, 1.5 * torch.tensor([0.1, 6.4, 0.1, 3.2, 0.05, 1 / 1.5, 1 / 1.5]))
    assert torch.equal(quantizer.ranges(), torch.tensor([0.0, 6.4, 0.01, 3.2, 0.0, 0.0, 0.0]))


def test_one_range_for_a_tensor() -> None:
    layout = FeatureLayout(((2, 1), (2, 3), (1, 1), (1, 5)))
    observed = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    def limit(scalars: str, vectors: str) -> list[float]:
        configs = ScalarConfig(granularity=scalars), VectorConfig(granularity=vectors)
        quantizer = FeatureQuantizer(layout, *configs, headroom=1.0)
        quantizer.load_ranges(observed)
        return quantizer.limit.tolist()

    assert limit("per_channel", "per_channel") == [1, 2, 3, 4, 5, 6]
    assert limit("per_tensor", "per_channel") == [5, 5, 3, 4, 5, 6]
    assert limit("per_channel", "per_tensor") == [1, 2, 6, 6, 5, 6]
    assert limit("per_tensor", "per_tensor") == [6] * 6


def test_a_silent_piece_does_not_set_the_range_of_a_tensor() -> None:
    layout = FeatureLayout(((2, 1), (2, 3), (1, 1)))
    for vectors in ("per_channel", "per_tensor"):
        configs = ScalarConfig(granularity="per_tensor"), VectorConfig(granularity=vectors)
        quantizer = FeatureQuantizer(layout, *configs, headroom=1.0)
        quantizer.load_ranges(torch.tensor([0.1, 0.05, 0.0, 0.0, 0.0]))
        assert torch.allclose(quantizer.limit[[0, 1, 4]], torch.tensor(0.1))


def test_ranges_are_carried_over() -> None:
    layout = FeatureLayout(((2, 1), (2, 3)))
    first, second = make(layout, limit=torch.tensor([1.0, 2.0, 3.0, 4.0])), make(layout)
    second.load_ranges(first.ranges())
    assert torch.equal(second.limit, first.limit)
    assert not first.state_dict()
    # One head of two was cut out: the larger range of either serves.
    second.load_ranges(torch.tensor([1.0, 5.0, 2.0, 6.0, 3.0, 4.0, 7.0, 0.0]))
    assert second.ranges().tolist() == [3.0, 5.0, 7.0, 6.0]
    for wrong in (1, 3, 6):
        with pytest.raises(ValueError, match=f"ranges for {wrong} channels do not fit a layer of 4 channels"):
            second.load_ranges(torch.ones(wrong))
    assert second.ranges().tolist() == [3.0, 5.0, 7.0, 6.0]


@PATHS
def test_new_ranges_take_effect_at_once(plain: bool) -> None:
    x = random_features(MUL_IR)
    quantizer = make(MUL_IR, VECTORS[0], {"bits": 4}, limit=1.0, plain=plain)
    first = quantizer(x)
    quantizer.load_ranges(torch.full_like(quantizer.observed, 5.0))
    assert torch.equal(quantizer(x), make(MUL_IR, VECTORS[0], {"bits": 4}, limit=5.0, plain=plain)(x))
    assert not torch.equal(quantizer(x), first)
    # Nor does a copy share them, or another precision keep those of the first.
    other = copy.deepcopy(quantizer)
    other.load_ranges(torch.full_like(quantizer.observed, 1.0))
    assert torch.equal(other(x), first)
    assert not torch.equal(quantizer(x), first)
    assert quantizer(x.double()).dtype == torch.float64
