"""Branch-separated schedule of quantization-aware training: scalars first, vectors later.

The schedule is relative to the length of the run, so that it means the same in a fine-tuning of eight epochs as in a
training of eight hundred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gaq.config.effect import changed_keys
from gaq.config.schema import ConfigError, QuantizationConfig, VectorConfig, preset_of
from gaq.model.state import SCHEDULE, ModelState, feature_quantizers

__all__ = [
    "DEPLOYED",
    "BranchState",
    "Schedule",
    "branch_state",
    "check_reached",
    "describe_branches",
    "describe_schedule",
    "never_reached",
    "noted_schedule",
    "schedule_of",
    "set_branches",
    "settle_schedule",
]

UNKNOWN_LENGTH = 50
"""Epochs for which the shares of a run count whose length is not set: vectors are rounded from epoch 10 on."""

ANNEAL_STEPS = 5
"""Most values that the range takes before its final one: NequIP's train-time compilation makes a graph for each."""

FIRST_RELATIVE_VERSION = 3
"""Version of the configuration whose presets are the first with a relative schedule."""


@dataclass(frozen=True)
class Schedule:
    """When l > 0 features are rounded in a run.

    Attributes:
        start: first epoch in which they are rounded; None if they never are.
        anneal: epochs from then on over which their range shrinks.
    """

    start: int | None
    anneal: int = 0


@dataclass(frozen=True)
class BranchState:
    """Which features are rounded in one epoch.

    Attributes:
        vectors: whether l > 0 features are rounded.
        vector_range_factor: ratio of their range to the observed range.
    """

    vectors: bool
    vector_range_factor: float


def schedule_of(vectors: VectorConfig, epochs: int | None) -> Schedule:
    """Return the schedule of a run.

    Scalars come first for at least one epoch, unless ``start`` is 0 or the run has one epoch only.

    Args:
        vectors: configuration of l > 0 features.
        epochs: length of the run; None if it is not set, and the run ends by another criterion.
    """
    if vectors.magnitude_bits is None:
        return Schedule(None)
    length = UNKNOWN_LENGTH if epochs is None else epochs
    start, anneal = vectors.start_epoch, vectors.anneal_epochs
    if start is None:
        # Less than a rounding error of the product, so that a fifth of ten epochs is two.
        start = max(0, min(math.ceil(vectors.start * length - 1e-9), length - 1))
    return Schedule(start, round(vectors.anneal * length) if anneal is None else anneal)


def check_reached(config: QuantizationConfig, epochs: int | None) -> None:
    """Refuse an epoch that a run does not reach; presets of earlier versions gave one to all runs.

    Args:
        config: configuration of the run.
        epochs: length of the run; None if it is not set.

    Raises:
        ConfigError: saying what to write.
    """
    start = schedule_of(config.vectors, epochs).start
    if epochs and start is not None and start >= epochs and config.version >= FIRST_RELATIVE_VERSION:
        raise ConfigError(
            f"quantization.vectors.start_epoch: {start} has no effect, because the run ends after {epochs} epochs, so "
            "vectors would never be rounded in training. Write vectors.start, the share of the run after which they "
            "are rounded (0.2 if left out), or a smaller epoch."
        )


def settle_schedule(state: ModelState, first: int, epochs: int | None) -> Schedule:
    """Return the schedule of a run, and note it in the state of the model.

    A run that goes on from a checkpoint in which vectors were rounded already keeps the schedule of that checkpoint,
    so that a longer run does not switch them off again.

    Args:
        state: of a prepared model; its notes are those of the checkpoint if the run goes on from one.
        first: first epoch of the run.
        epochs: length of the run, counted from epoch 0; None if it is not set.
    """
    schedule = schedule_of(state.config.vectors, epochs)
    noted = noted_schedule(state) if state.resumed else Schedule(None)
    if schedule.start is not None and noted.start is not None and noted.start < first:
        schedule = noted
    state.notes[SCHEDULE] = [schedule.start, schedule.anneal]
    return schedule


def noted_schedule(state: ModelState) -> Schedule:
    """Return the schedule that `settle_schedule` noted; of a model without one, vectors are never rounded."""
    return Schedule(*state.notes.get(SCHEDULE, [None]))


def branch_state(schedule: Schedule, epoch: int) -> BranchState:
    """Return the state of the branches in an epoch of training.

    Scalars and weights are rounded from the first step. Vectors follow with twice their observed range; it shrinks
    linearly to the observed range, in at most `ANNEAL_STEPS` steps, so that few vectors saturate while the rest of the
    model still changes.
    """
    if schedule.start is None or epoch < schedule.start:
        return BranchState(False, 1.0)
    if schedule.anneal == 0:
        return BranchState(True, 1.0)
    progress = min(1.0, (epoch - schedule.start) / schedule.anneal)
    if schedule.anneal > ANNEAL_STEPS:
        progress = math.floor(progress * ANNEAL_STEPS) / ANNEAL_STEPS
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


def describe_branches(config: QuantizationConfig, schedule: Schedule, epochs: int | None) -> str:
    """Say in one line for the training log when each branch is rounded.

    Args:
        config: configuration of the model.
        schedule: of the run.
        epochs: length of the run; None if it is not set.
    """
    length = "" if epochs is None else f" of {epochs}"
    starts = []
    if config.weights.bits is not None:
        starts.append("weights " + ("when training is over" if config.rounds_weights_at_end else "from epoch 0"))
    if config.scalars.bits is not None:
        starts.append("scalars from epoch 0")
    if schedule.start is not None:
        annealed = f", with a range that shrinks over {schedule.anneal} epochs" if schedule.anneal else ""
        starts.append(f"vectors (l > 0) from epoch {schedule.start}{length}{annealed}")
    if not starts:
        return "Nothing is rounded in training"
    return f"Rounded in training: {'; '.join(starts)}. Validation always rounds all features"


def never_reached(schedule: Schedule, last: int) -> str | None:
    """Return a warning if training ended before vectors were rounded; `last` is the last epoch that was trained."""
    if schedule.start is None or last >= schedule.start:
        return None
    return (
        f"Training ended with epoch {last}, before vectors were rounded (epoch {schedule.start}): the model was never "
        "trained with rounded vectors, though its vectors are rounded in use. Write a smaller vectors.start, or "
        "vectors.start_epoch, in the key quantization."
    )


def describe_schedule(config: QuantizationConfig) -> list[str]:
    """Describe a configuration for the training log: its bits, and what happens besides `describe_branches`."""
    vectors = config.vectors
    lines = [
        f"Preset {config.preset}: weights {_bits(config.weights.bits)}, scalars {_bits(config.scalars.bits)}, "
        f"vectors {_bits(vectors.magnitude_bits)}"
    ]
    if config.rounds_weights_at_end:
        lines.append(
            "Weights are trained in float and rounded when training is over, by calibration on the training structures "
            "(training.round_weights: throughout rounds them all the while)"
        )
    elif idle := _idle_in_training(config):
        lines.append(
            f"Weights are rounded all the while, so these keys have no part in this run: {', '.join(idle)} "
            "(training.round_weights: at_end gives them one)"
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


def _idle_in_training(config: QuantizationConfig) -> list[str]:
    """Return the keys that act only where weights are rounded after training."""
    changed = changed_keys(config, preset_of(config.preset, config.version))
    return [key for key in changed if key.startswith("distillation.") or key == "weights.rounding"]
