"""Branch-separated schedule of quantization-aware training: scalars first, vectors later."""

from __future__ import annotations

from dataclasses import dataclass

from gaq.schema import VectorConfig

__all__ = ["BranchState", "branch_state"]


@dataclass(frozen=True)
class BranchState:
    """What is on in one epoch.

    Attributes:
        vectors: whether l > 0 features are rounded.
        vector_range_factor: their range, relative to the observed one.
    """

    vectors: bool
    vector_range_factor: float


def branch_state(vectors: VectorConfig, epoch: int) -> BranchState:
    """The state of the branches in an epoch of training.

    Scalars and weights are rounded from the first step. Vectors join at ``start_epoch`` with twice their
    observed range, which shrinks linearly to the observed one over ``anneal_epochs``: at first few of
    them saturate while the rest of the model still moves.
    """
    if vectors.magnitude_bits is None or epoch < vectors.start_epoch:
        return BranchState(False, 1.0)
    if vectors.anneal_epochs == 0:
        return BranchState(True, 1.0)
    progress = min(1.0, (epoch - vectors.start_epoch) / vectors.anneal_epochs)
    return BranchState(True, 2.0 - progress)
