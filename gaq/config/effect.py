"""Under which conditions each key of the configuration acts.

A key that changes the configuration and cannot act is an error: the user believes something that is not so. The
conditions that follow from the configuration stand here as tables; which keys act on a site of a model stands in
`gaq.model.effect`. What a preset sets is never an error, and neither is a value that holds anyway, so that a mapping
with all keys written out can be copied. null asks for nothing, so it is no error either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gaq.config.schema import (
    GROUPED_BITS,
    STATIC,
    AttentionConfig,
    ConfigError,
    QuantizationConfig,
    preset_of,
)

__all__ = [
    "CONDITIONS",
    "OF_THE_MODEL",
    "TRAINING_ONLY",
    "Condition",
    "belongs_to",
    "changed_keys",
    "check_keys",
    "training_only_note",
    "value_of",
]


@dataclass(frozen=True)
class Condition:
    """When a key acts.

    Attributes:
        holds: the test.
        why: what is so where the test fails, following "because".
        write: what to write for the key to act.
    """

    holds: Callable[[QuantizationConfig], bool]
    why: str
    write: str


def _observes(config: QuantizationConfig) -> bool:
    """Whether ranges of activations are observed: those that are static, and those of gates."""
    scalars, vectors, attention = config.scalars, config.vectors, config.attention
    static_scalars = scalars.bits is not None and scalars.granularity in STATIC
    static_vectors = vectors.magnitude_bits is not None and vectors.granularity in STATIC
    return static_scalars or static_vectors or (attention is not None and attention.gate_limit is None)


def _draws(config: QuantizationConfig) -> bool:
    """Whether structures are drawn: for ranges, calibrated rounding or distillation."""
    weights = config.weights
    calibrates = weights.bits is not None and (weights.rounding == "gptq" or config.distillation.steps > 0)
    return _observes(config) or calibrates


def _at_least_bits(group: str) -> Condition:
    """The bits of a group can only add to ``weights.bits``."""

    def holds(config: QuantizationConfig) -> bool:
        bits, group_bits = config.weights.bits, getattr(config.weights, group)
        return bits is None or group_bits is None or group_bits >= bits

    return Condition(holds, "no weights have fewer than weights.bits", "at least weights.bits, or a lower weights.bits")


_WEIGHTS = Condition(lambda c: c.weights.bits is not None, "weights.bits is null", "weights.bits")
_SCALARS = Condition(lambda c: c.scalars.bits is not None, "scalars.bits is null", "scalars.bits")
_VECTORS = Condition(
    lambda c: c.vectors.magnitude_bits is not None, "vectors.magnitude_bits is null", "vectors.magnitude_bits"
)
_SPLIT = Condition(
    lambda c: c.vectors.scheme == "mddq",
    "vectors.scheme is components, which has no directions",
    "vectors.scheme: mddq",
)
_DISTILS = Condition(lambda c: c.distillation.steps > 0, "distillation.steps is 0", "distillation.steps")

CONDITIONS: dict[str, tuple[Condition, ...]] = {
    "weights": (_WEIGHTS,),
    "weights.granularity": (
        Condition(
            lambda c: c.weights.granularity != "per_group" or (c.weights.bits or 0) <= GROUPED_BITS,
            f"weights of more than {GROUPED_BITS} bits have a scale per channel",
            f"weights.bits: {GROUPED_BITS} or fewer",
        ),
    ),
    "weights.group_size": (
        Condition(
            lambda c: c.weights.granularity == "per_group" and (c.weights.bits or 0) <= GROUPED_BITS,
            "inputs share scales with per_group only",
            f"weights.granularity: per_group and weights.bits: {GROUPED_BITS} or fewer",
        ),
    ),
    "weights.sensitive_bits": (_at_least_bits("sensitive_bits"),),
    "weights.first_bits": (_at_least_bits("first_bits"),),
    "weights.mixing_bits": (_at_least_bits("mixing_bits"),),
    "scalars": (_SCALARS,),
    "vectors": (_VECTORS,),
    "vectors.direction_bits": (_SPLIT,),
    "vectors.codebook": (_SPLIT,),
    "vectors.frame": (_SPLIT,),
    "vectors.start": (
        Condition(lambda c: c.vectors.start_epoch is None, "vectors.start_epoch is given", "one of the two"),
    ),
    "vectors.anneal": (
        Condition(lambda c: c.vectors.anneal_epochs is None, "vectors.anneal_epochs is given", "one of the two"),
    ),
    "radial_activations": (
        Condition(lambda c: c.scalars.bits is not None or not c.radial_activations, _SCALARS.why, _SCALARS.write),
    ),
    "calibration": (
        Condition(_draws, "nothing is calibrated on structures", "weights.rounding: gptq, or a static granularity"),
    ),
    "calibration.headroom": (
        Condition(
            _observes,
            "ranges are those of each atom and nothing else is bounded",
            "scalars.granularity or vectors.granularity: per_channel or per_tensor",
        ),
    ),
    "distillation": (_WEIGHTS, _DISTILS),
    "distillation.steps": (
        Condition(lambda c: c.weights.bits is not None or c.distillation.steps == 0, _WEIGHTS.why, _WEIGHTS.write),
    ),
    "training": (_WEIGHTS,),
    "equivariance_loss.rotations": (
        Condition(
            lambda c: c.equivariance_loss.weight > 0, "equivariance_loss.weight is 0", "equivariance_loss.weight"
        ),
    ),
}
"""Conditions of keys, and of all keys of a section except the one that turns it on or off (`_SWITCHES`)."""

_SWITCHES = ("weights.bits", "scalars.bits", "vectors.magnitude_bits", "distillation.steps")
"""Keys that turn a section on or off, for which the conditions of their section do not count."""

OF_THE_MODEL = (
    "weights.rounding",
    "weights.least_compression",
    "vectors.start",
    "vectors.anneal",
    "vectors.start_epoch",
    "vectors.anneal_epochs",
    "attention.normalize",
    "attention.temperature",
    "attention.messages",
    "calibration.frames",
    "calibration.seed",
    "distillation",
    "training",
    "equivariance_loss",
)
"""Keys and sections that belong to the complete model and do not act in ``overrides``."""

TRAINING_ONLY = (
    "vectors.start",
    "vectors.anneal",
    "vectors.start_epoch",
    "vectors.anneal_epochs",
    "training",
    "equivariance_loss",
)
"""Keys and sections that have no part in quantization after training."""


def value_of(config: QuantizationConfig, path: str) -> object:
    """Return the value at a key path such as ``weights.bits``; None where a section is off."""
    value: object = config
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def changed_keys(config: QuantizationConfig, base: QuantizationConfig) -> Iterator[str]:
    """Yield the paths of the keys whose values differ from those of a base, without values that are null.

    The section ``attention`` counts as a key where the base is without it; its keys are compared with the defaults.
    """
    for field in dataclasses.fields(config):
        value, before = getattr(config, field.name), getattr(base, field.name)
        if field.name in ("version", "preset", "overrides") or value is None or value == before:
            continue
        if before is None:
            yield field.name
            before = AttentionConfig()
        if not dataclasses.is_dataclass(value):
            yield field.name
            continue
        for key in dataclasses.fields(value):
            new = getattr(value, key.name)
            if new is not None and new != getattr(before, key.name):
                yield f"{field.name}.{key.name}"


def belongs_to(key: str, group: tuple[str, ...]) -> bool:
    """Whether a key, or its section, is in a group of key paths."""
    return key in group or key.split(".")[0] in group


def training_only_note(config: QuantizationConfig) -> str | None:
    """Return a line that names the keys a user wrote which have no part in quantization after training, if any.

    They are no error: one file may serve the training and the quantization of a trained model.
    """
    changed = changed_keys(config, preset_of(config.preset, config.version))
    idle = [f"quantization.{key}" for key in changed if belongs_to(key, TRAINING_ONLY)]
    return f"no part in quantization after training, only in training: {', '.join(idle)}" if idle else None


def check_keys(config: QuantizationConfig, path: str, base: QuantizationConfig | None = None) -> None:
    """Refuse keys that cannot act, whatever the model.

    Args:
        config: configuration of a model, or of the modules of an override.
        path: key path of the configuration in what the user wrote, for messages.
        base: what an override changes; None for the configuration of a model, which changes its preset.

    Raises:
        ConfigError: naming the key, the reason, and what to write instead.
    """
    start = preset_of(config.preset, config.version) if base is None else base
    for key in changed_keys(config, start):
        value = value_of(config, key)
        if base is not None and belongs_to(key, OF_THE_MODEL):
            raise ConfigError(
                f"{path}.{key}: {value!r} has no effect in overrides, because the key is one of the complete model. "
                f"Write it under quantization.{key.split('.')[0]}, or leave it out."
            )
        section = () if key in _SWITCHES else CONDITIONS.get(key.split(".")[0], ())
        of_key = CONDITIONS.get(key, ()) if "." in key else ()
        for condition in (*section, *of_key):
            if not condition.holds(config):
                raise ConfigError(
                    f"{path}.{key}: {value!r} has no effect, because {condition.why}. Write {condition.write}, "
                    "or leave this key out."
                )
