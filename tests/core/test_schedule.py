"""The schedule of training: scalars at once, vectors later and with a range that shrinks, by the run's length."""

from __future__ import annotations

import pytest

from gaq.config.parse import PRESETS, ConfigError, VectorConfig, parse_config
from gaq.model.state import SCHEDULE, ModelState
from gaq.training.schedule import (
    BranchState,
    Schedule,
    branch_state,
    check_reached,
    describe_branches,
    describe_schedule,
    never_reached,
    schedule_of,
    settle_schedule,
)


@pytest.mark.parametrize(
    ("epochs", "start", "anneal"),
    [(1, 0, 0), (2, 1, 0), (3, 1, 0), (5, 1, 0), (8, 2, 1), (10, 2, 1), (50, 10, 5), (1000, 200, 100), (None, 10, 5)],
)
def test_vectors_join_after_a_share_of_the_run(epochs: int | None, start: int, anneal: int) -> None:
    """Scalars come first in every run of two epochs or more; none is too short for vectors."""
    assert schedule_of(PRESETS["gaq"].vectors, epochs) == Schedule(start, anneal)


def test_shares_and_epochs_can_be_given() -> None:
    assert schedule_of(VectorConfig(start=0.5, anneal=0.25), 8) == Schedule(4, 2)
    assert schedule_of(VectorConfig(start=0.0, anneal=0.0), 8) == Schedule(0, 0)
    assert schedule_of(PRESETS["naive_w8a8"].vectors, 100) == Schedule(0, 0)
    assert schedule_of(VectorConfig(start_epoch=3, anneal_epochs=7), 8) == Schedule(3, 7)
    for share in (0.1, 0.2, 0.3, 0.6, 0.7):  # products of these are a rounding error above the integer
        assert schedule_of(VectorConfig(start=share), 30).start == round(30 * share)
    assert schedule_of(VectorConfig(magnitude_bits=None), 8) == Schedule(None)


def test_the_range_shrinks_linearly() -> None:
    states = [branch_state(Schedule(10, 5), epoch) for epoch in range(20)]
    assert all(state == BranchState(False, 1.0) for state in states[:10])
    assert all(state.vectors for state in states[10:])
    factors = [state.vector_range_factor for state in states[10:]]
    assert factors == pytest.approx([2.0, 1.8, 1.6, 1.4, 1.2, *[1.0] * 5])
    assert factors[5:] == [1.0] * 5
    assert branch_state(Schedule(10, 5), 10_000) == BranchState(True, 1.0)


def test_a_long_shrinking_takes_few_steps() -> None:
    """Each step is a new graph in train-time compilation."""
    factors = [branch_state(Schedule(0, 100), epoch).vector_range_factor for epoch in range(200)]
    assert factors == sorted(factors, reverse=True)
    assert sorted(set(factors)) == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    assert factors[100:] == [1.0] * 100


def test_without_annealing_the_range_is_its_own_from_the_start() -> None:
    assert [branch_state(Schedule(3), epoch).vectors for epoch in (2, 3, 4)] == [False, True, True]
    assert branch_state(Schedule(3), 3) == BranchState(True, 1.0)


@pytest.mark.parametrize("epoch", [0, 10, 1000])
def test_vectors_left_in_float_never_join(epoch: int) -> None:
    assert branch_state(Schedule(None), epoch) == BranchState(False, 1.0)


def test_an_epoch_that_the_run_does_not_reach_is_refused() -> None:
    config = parse_config({"vectors": {"start_epoch": 10}})
    with pytest.raises(ConfigError, match=r"start_epoch: 10 has no effect.*ends after 3 epochs.*vectors\.start"):
        check_reached(config, 3)
    check_reached(config, 11)
    check_reached(config, None)
    for epochs in (0, 1, 2, 3):
        check_reached(PRESETS["gaq"], epochs)
    # Presets of files of before gave every run an epoch.
    check_reached(parse_config({"version": 2}), 3)


def test_a_run_that_goes_on_does_not_switch_vectors_off_again() -> None:
    state = ModelState(PRESETS["gaq"])
    assert settle_schedule(state, 0, 10) == Schedule(2, 1)
    state.resumed = True
    assert settle_schedule(state, 5, 100) == Schedule(2, 1)
    assert state.notes[SCHEDULE] == [2, 1]
    # Where they were not rounded yet, the new length counts.
    assert settle_schedule(state, 2, 100) == Schedule(20, 10)


def test_the_log_says_in_one_line_when_each_branch_starts() -> None:
    config = parse_config({"training": {"round_weights": "throughout"}})
    assert describe_branches(config, Schedule(2, 1), 10) == (
        "Rounded in training: weights from epoch 0; scalars from epoch 0; vectors (l > 0) from epoch 2 of 10, with a "
        "range that shrinks over 1 epochs. Validation always rounds all features"
    )
    line = describe_branches(parse_config("w4"), Schedule(None), None)
    assert line.startswith("Rounded in training: weights when training is over. ")
    assert never_reached(Schedule(2), 2) is None
    assert "Training ended with epoch 1, before vectors were rounded (epoch 2)" in str(never_reached(Schedule(2), 1))


def test_keys_without_a_part_in_the_run_are_named() -> None:
    spec = {"weights": {"rounding": "nearest"}, "distillation": {"steps": 4}}
    throughout = parse_config({**spec, "training": {"round_weights": "throughout"}})
    (line,) = describe_schedule(throughout)[1:]
    assert "no part in this run: weights.rounding, distillation.steps" in line
    at_end = parse_config({**spec, "training": {"round_weights": "at_end"}})
    assert not any("no part" in line for line in describe_schedule(at_end))
