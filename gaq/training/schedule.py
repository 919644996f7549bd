"""Branch-separated schedule of quantization-aware training: scalars first, vectors later."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gaq.config.schema import QuantizationConfig, VectorConfig
from gaq.model.state import feature_quantizers

__all__ = ["DEPLOYED", "BranchState", "branch_state", "describe_schedule", "set_branches"]


@dataclass(frozen=True)
class BranchState:
    """Which features are rounded in one epoch.

    Attributes:
        vectors: whether l > 0 features are rounded.
        vector_range_factor: ratio of their range to the observed range.
    """

    vectors: bool
    vector_range_factor: float


def branch_state(vectors: VectorConfig, epoch: int) -> BranchState:
    """Return the state of the branches in an epoch of training.

    Scalars and weights are rounded from the first step. Vectors follow at ``start_epoch``, with twice their observed
    range; it shrinks linearly to the observed range over ``anneal_epochs``, so that few vectors saturate while the rest
    of the model still changes.
    """
    if vectors.magnitude_bits is None or epoch < vectors.start_epoch:
        return BranchState(False, 1.0)
    if vectors.anneal_epochs == 0:
        return BranchState(True, 1.0)
    progress = min(1.0, (epoch - vectors.start_epoch) / vectors.anneal_epochs)
    return BranchState(True, 2.0 - progress)


DEPLOYED = BranchState(True, 1.0)
"""Everything rounded, as in validation and in saved models."""


def set_branches(model: torch.nn.Module, branches: BranchState, observing: bool) -> None:
    """Switch the branches of all feature quantizers of a model; those with static ranges observe if told to."""
    for quantizer in feature_quantizers(model).values():
        quantizer.vectors_enabled = branches.vectors
        quantizer.vector_range_factor = branches.vector_range_factor
        quantizer.observing = observing and quantizer.needs_ranges


def _bits(bits: int | None) -> str:
    return "in float" if bits is None else f"{bits} bits"


def describe_schedule(config: QuantizationConfig) -> list[str]:
    """Describe a configuration for the training log: its bits, and when each branch starts."""
    vectors = config.vectors
    lines = [
        f"Preset {config.preset}: weights {_bits(config.weights.bits)}, scalars {_bits(config.scalars.bits)}, "
        f"vectors {_bits(vectors.magnitude_bits)}"
    ]
    at_end = config.rounds_weights_at_end
    branches = [("weights", None if at_end else config.weights.bits), ("scalars", config.scalars.bits)]
    at_once = " and ".join(name for name, bits in branches if bits is not None)
    if at_once:
        lines.append(f"{at_once.capitalize()} are rounded from the first epoch")
    if at_end:
        lines.append(
            "Weights are trained in float and rounded when training is over, by calibration on the training structures "
            "(training.round_weights: throughout rounds them all the while)"
        )
    if vectors.magnitude_bits is not None:
        annealed = f", with a range that shrinks to the observed one over {vectors.anneal_epochs} epochs"
        lines.append(
            f"Vectors (l > 0) are rounded from epoch {vectors.start_epoch}"
            f"{annealed if vectors.anneal_epochs else ''}; validation always rounds everything"
        )
    attention = config.attention
    if attention is not None:
        temperature = attention.temperature
        lines.append(
            f"Gates, attention and density weights are bounded, {_bits(attention.bits)}; attention, where there is "
            f"any: {'normalised' if attention.normalize else 'dot products'}, temperature "
            f"{temperature if isinstance(temperature, str) else format(temperature, 'g')}"
        )
    loss = config.equivariance_loss
    if loss.weight > 0:
        lines.append(f"Equivariance loss: weight {loss.weight:g}, {loss.rotations} rotations a step")
    return lines
