"""The schedule of training: scalars at once, vectors later and with a range that shrinks."""

from __future__ import annotations

import pytest
import torch

from gaq.config.parse import PRESETS, ConfigError, TrainingConfig, VectorConfig, parse_config
from gaq.quantizers.weights import WeightLayout, WeightQuantizer, stored_scale
from gaq.training.schedule import BranchState, anneal_ranges, branch_state, describe_schedule


def test_vectors_join_later_with_a_range_that_shrinks_linearly() -> None:
    vectors = VectorConfig(start_epoch=10, anneal_epochs=5)
    states = [branch_state(vectors, epoch) for epoch in range(20)]
    assert all(state == BranchState(False, 1.0) for state in states[:10])
    assert all(state.vectors for state in states[10:])
    factors = [state.vector_range_factor for state in states[10:]]
    assert factors == pytest.approx([2.0, 1.8, 1.6, 1.4, 1.2, *[1.0] * 5])
    assert factors[5:] == [1.0] * 5
    assert branch_state(vectors, 10_000) == BranchState(True, 1.0)


def test_without_annealing_the_range_is_its_own_from_the_start() -> None:
    vectors = VectorConfig(start_epoch=3, anneal_epochs=0)
    assert [branch_state(vectors, epoch) for epoch in (2, 3, 4)] == [
        BranchState(False, 1.0),
        BranchState(True, 1.0),
        BranchState(True, 1.0),
    ]
    assert branch_state(PRESETS["naive_w8a8"].vectors, 0) == BranchState(True, 1.0)


@pytest.mark.parametrize("epoch", [0, 10, 1000])
def test_vectors_left_in_float_never_join(epoch: int) -> None:
    assert branch_state(VectorConfig(magnitude_bits=None, start_epoch=0), epoch) == BranchState(False, 1.0)


def test_ranges_of_weights_shrink_to_their_own() -> None:
    weight = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    model = WeightQuantizer(WeightLayout.single((64, 3)), 3, "per_channel", 0)
    model.search(weight, "error")
    own, largest = model.current_scale(weight), weight.abs().amax(0) / 3
    assert (own < 0.95 * largest).all()
    training = TrainingConfig(anneal_epochs=4)
    for epoch, progress in [(0, 0.0), (1, 0.25), (2, 0.5), (4, 1.0), (9, 1.0), (None, 1.0)]:
        anneal_ranges(model, training, epoch)
        model.refresh_scale(weight)
        ratio = 1 + progress * (model.range_ratio - 1)
        assert torch.equal(model.fixed_step, stored_scale(ratio * largest))
    assert torch.equal(model.fixed_step, own)
    # In the first epoch nothing is clipped.
    anneal_ranges(model, training, 0)
    model.refresh_scale(weight)
    assert (model(weight) - weight).abs().amax() <= 0.5 * model.fixed_step.max() * 1.02
    anneal_ranges(model, TrainingConfig(), 0)
    model.refresh_scale(weight)
    assert torch.equal(model.fixed_step, own)


@pytest.mark.parametrize(
    ("training", "what"),
    [
        ({"anneal_epochs": 3}, "learned_scales: false"),
        ({"anneal_epochs": 3, "learned_scales": False}, "round_weights: throughout"),
    ],
)
def test_ranges_shrink_where_weights_are_rounded_by_ranges(training: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=f"training.anneal_epochs: 3 epochs of shrinking ranges need {what}"):
        parse_config({"preset": "w4", "training": training})
    allowed = {"anneal_epochs": 3, "learned_scales": False, "round_weights": "throughout"}
    lines = describe_schedule(parse_config({"preset": "w4", "training": allowed}))
    assert "Ranges of weights shrink to their own over 3 epochs" in lines
