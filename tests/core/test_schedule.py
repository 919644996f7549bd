"""The schedule of training: scalars at once, vectors later and with a range that shrinks."""

from __future__ import annotations

import pytest

from gaq.config.parse import PRESETS, VectorConfig
from gaq.training.schedule import BranchState, branch_state


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
