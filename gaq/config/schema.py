"""The quantization configuration as data: one frozen dataclass tree, and the presets.

The parser stands apart, in `gaq.config.parse`: a packaged model embeds the modules that its quantizers import, and this
one needs nothing but the standard library.
"""

# No postponed annotations here: `dataclasses` looks them up in sys.modules, which lacks the modules of a package.
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gaq.untyped import Document, ReadOnlyDocument

__all__ = [
    "GROUPED_BITS",
    "MOST_SCALAR_BITS",
    "PRESETS",
    "REMOVED",
    "REMOVED_VALUES",
    "STATIC",
    "TEMPERATURES",
    "VERSION",
    "AttentionConfig",
    "CalibrationConfig",
    "ConfigError",
    "DistillationConfig",
    "EquivarianceLossConfig",
    "QuantizationConfig",
    "RemovedKey",
    "ScalarConfig",
    "TrainingConfig",
    "VectorConfig",
    "WeightConfig",
    "preset_of",
]

VERSION = 3
"""Version of the keys below and of the presets; a configuration of a later one is refused.

1: scalars had 16 bits at most, and the presets that round features finely rounded them so.
2: the presets rounded vectors from epoch 10 on, however long the run was; see `EARLIER_EPOCHS`.
"""

MOST_SCALAR_BITS = {1: 16, 2: 24, 3: 24}
"""Most bits of scalars in each version."""

EARLIER_EPOCHS = (10, 5)
"""``vectors.start_epoch`` and ``anneal_epochs`` of presets before version 3; ``naive_w8a8`` had 0 and 0."""

GROUPED_BITS = 5
"""Most bits at which scales per group of inputs are worth their bytes: 2 bytes per 32 weights are half a bit each."""

GRANULARITIES = ("per_tensor", "per_channel", "per_group")
STATIC = ("per_tensor", "per_channel")
"""Granularities of features whose ranges are observed in calibration."""
FEATURE_GRANULARITIES = (*STATIC, "per_atom")


class ConfigError(ValueError):
    """Invalid quantization configuration; the message names the key path."""


Width = TypeVar("Width", int, int | None)
Number = TypeVar("Number", int, float, int | None, float | None)


def _choice(default: str, *choices: str) -> str:
    """A field that takes one of a few words; the default need not be the first."""
    return field(default=default, metadata={"choices": choices})


def preset_of(name: str, version: int) -> "QuantizationConfig":
    """Return a preset as it was in a version of the configuration."""
    preset = PRESETS[name]
    if version == VERSION:
        return preset
    bits = preset.scalars.bits
    if bits is not None and bits > MOST_SCALAR_BITS[version]:
        preset = dataclasses.replace(preset, scalars=dataclasses.replace(preset.scalars, bits=16))
    start, anneal = EARLIER_EPOCHS if preset.vectors.start > 0 else (0, 0)
    vectors = dataclasses.replace(preset.vectors, start_epoch=start, anneal_epochs=anneal)
    preset = dataclasses.replace(preset, vectors=vectors)
    return dataclasses.replace(preset, version=version)


def _bits(default: Width, most: int = 16) -> Width:
    """A field for the width of codes, from 2 bits to `most`: 16, two int8 planes, for all that is stored."""
    return field(default=default, metadata={"bits": tuple(range(2, most + 1))})


def _at_least(minimum: float, default: Number) -> Number:
    """A field for a number with a lower bound."""
    return field(default=default, metadata={"minimum": minimum})


def _share(default: float) -> float:
    """A field for a share: 0 or more and below 1."""
    return field(default=default, metadata={"minimum": 0.0, "below": 1.0})


@dataclass(frozen=True)
class WeightConfig:
    """How weights are stored.

    Attributes:
        bits: 2 to 16 (more than 8: two int8 planes); None leaves all weights in float.
        granularity: one scale per tensor, per output channel, or per group of inputs.
        group_size: inputs that share a scale when the granularity is ``per_group``.
        range: ``absmax`` (the largest weight sets the scale) or ``error`` (the scale that minimises
            the squared rounding error, by search).
        rounding: post-training only: ``nearest``, or ``gptq`` (Frantar et al. 2023, arXiv 2210.17323).
        sensitive_bits: bits of the few tensors whose errors reach the complete model (species embeddings and the linear
            layers that act on nothing else, first radial layers, symmetric contractions, readouts); None gives them
            ``bits`` like the rest.
        first_bits: bits of the other weights of the first interaction: their errors pass through all later layers and
            are the larger part of the cost of rounding. The product with species belongs to them while it is no larger
            than the others together. None gives them ``bits`` like the rest.
        mixing_bits: bits of the weights of later interactions that act on everything that passes through: linear layers
            of node features, hidden layers of radial networks, and the product with species where there are many
            species. None gives them ``bits`` like the rest.
        species_bits: NequIP: bits of the self-connection, if its embedding has at least four times as many numbers as
            there are species. Its codes are chosen together (`gaq.quantizers.species`), so few bits suffice. None
            rounds it like the rest.
        compression: raise the bits of all groups above ``bits``, most for the groups that lose most by rounding, while
            the weights stay this many times smaller than FP32 (`gaq.model.bits`; in MACE, the file, which holds more
            than weights). A group with given bits keeps them. Without room, nothing is raised.
        least_compression: MACE: smallest allowed ratio of the FP32 file's size to this file's. If the bits above give a
            larger file (models of many elements), the bits of all groups follow from this ratio instead. Given bits
            turn it off. NequIP ignores it: weights are the smaller part of its packages.
    """

    bits: int | None = _bits(8)
    granularity: str = _choice("per_channel", *GRANULARITIES)
    group_size: int = _at_least(2, 32)
    range: str = _choice("error", "absmax", "error")
    rounding: str = _choice("gptq", "nearest", "gptq")
    sensitive_bits: int | None = _bits(16)
    first_bits: int | None = _bits(None)
    mixing_bits: int | None = _bits(None)
    species_bits: int | None = _bits(None)
    compression: float | None = _at_least(2.0, None)
    least_compression: float | None = _at_least(2.0, None)


@dataclass(frozen=True)
class ScalarConfig:
    """How invariant (l = 0) features are rounded.

    Attributes:
        bits: code width, 2 to 24; None leaves the features in float. Codes of more than 16 bits are three int8 planes
            in integer products, and float32 holds every integer of 24 bits. The default is the least width with which
            the energy noise of dense matter is a tenth of that with 16 bits (benchmarks/scalar_bits.py).
        granularity: the range that the steps divide: ``per_atom`` (the largest feature of the atom or edge; needs no
            calibration and cannot saturate), or a static one, ``per_channel`` or ``per_tensor``.
    """

    bits: int | None = _bits(24, most=24)
    granularity: str = _choice("per_atom", *FEATURE_GRANULARITIES)


@dataclass(frozen=True)
class VectorConfig:
    """How l > 0 features are rounded.

    Attributes:
        scheme: ``mddq`` splits a vector into magnitude and direction; ``components`` rounds the
            components with one scale per channel.
        magnitude_bits: bits of the magnitude (``mddq``) or of each component (``components``);
            None leaves l > 0 features in float.
        direction_bits: bits per angle of the direction code (``mddq``).
        codebook: code of l = 1 directions: ``octahedral``, or ``geodesic``, a table with the icosahedron's symmetry;
            l >= 2 always uses the cube code.
        frame: axes of the direction code (``mddq``): ``local`` takes them from mixtures of the features of the same
            atom, which makes rounding exactly equivariant; ``fixed`` are the axes of the laboratory.
        granularity: the range that the steps of the magnitude divide, as for scalars.
        start: in training, the share of the run's epochs after which vectors are rounded; see `gaq.training.schedule`.
        anneal: share of the epochs over which their range then shrinks from twice the observed range to that range.
        start_epoch: the epoch from which vectors are rounded, in place of ``start``, for runs whose length is not known
            beforehand.
        anneal_epochs: number of epochs in place of ``anneal``.
    """

    scheme: str = _choice("mddq", "mddq", "components")
    magnitude_bits: int | None = _bits(16)
    direction_bits: int = _bits(16)
    codebook: str = _choice("octahedral", "octahedral", "geodesic")
    frame: str = _choice("local", "local", "fixed")
    granularity: str = _choice("per_atom", *FEATURE_GRANULARITIES)
    start: float = _share(0.2)
    anneal: float = _share(0.1)
    start_epoch: int | None = _at_least(0, None)
    anneal_epochs: int | None = _at_least(0, None)


TEMPERATURES = (0.25, 8.0)
"""Bounds of the temperature of attention; logits lie between minus and plus the upper bound."""


@dataclass(frozen=True)
class AttentionConfig:
    """How weights of neighbours and gates are bounded and rounded; see `gaq.quantizers.attention`.

    Attributes:
        bits: code width of logits, density weights, attention weights and inputs of gates; None bounds them without
            rounding. The default is 16 if the preset rounds scalars, else None.
        normalize: True for logits that are the temperature times the cosine of query and key, False for a dot product
            that a tanh keeps in the same range. For models trained with attention from scratch.
        temperature: ``learned``, or a fixed number between `TEMPERATURES`.
        gate_limit: gates are the identity up to this size and stay below twice this size; None takes the limit from
            calibration, which leaves a trained model the same function.
        messages: NequIP, training from scratch: give the interaction blocks attention over messages. (In MACE that is a
            separate interaction block.)
    """

    bits: int | None = _bits(16)
    normalize: bool = True
    temperature: str | float = "learned"
    gate_limit: float | None = _at_least(1e-3, None)
    messages: bool = False


@dataclass(frozen=True)
class CalibrationConfig:
    """Which structures set the activation ranges.

    Attributes:
        frames: number of structures, drawn with ``seed`` from the data given.
        seed: seed of the draw.
        headroom: ratio of a static range to the largest observed value, so that a simulation that leaves the
            calibration set does not saturate (a saturated feature has no force).
    """

    frames: int = _at_least(1, 64)
    seed: int = _at_least(0, 0)
    headroom: float = _at_least(1.0, 2.0)


@dataclass(frozen=True)
class DistillationConfig:
    """Post-training self-distillation: reproduce the float model's forces on the calibration data.

    No reference labels are used. It runs only where calibrated rounding leaves the forces too far from the float
    model's, and ends where they are near, or no longer come nearer (`gaq.training.distillation`). ``steps: 0`` turns it
    off.

    Attributes:
        steps: most optimiser steps.
        batch_atoms: most atoms of a step; a larger structure is a step of its own.
        learning_rate: Adam's learning rate of the weights, relative to their root mean square; it holds from 8 bits on
            and doubles for every bit less.
        max_structures: most structures that the float model labels.
    """

    steps: int = _at_least(0, 300)
    batch_atoms: int = _at_least(1, 120)
    learning_rate: float = _at_least(0.0, 3e-4)
    max_structures: int = _at_least(1, 1000)


@dataclass(frozen=True)
class TrainingConfig:
    """How quantization-aware training proceeds.

    Attributes:
        round_weights: when weights are rounded; features are rounded in training in any case. ``throughout``: in every
            step. ``at_end``: after training, by calibration on the training structures with the forces of the trained
            float weights as labels (``weights.rounding`` and ``distillation`` apply). The presets of 4 bits use
            ``at_end``: with reference labels some gradient remains and keeps weights jumping over thresholds, with
            those forces it does not. ``auto``: ``at_end`` if all weights get at least 14 bits (species products, whose
            codes are chosen together, do not count), since training then has nothing to adapt to; else ``throughout``.
        average_rounded: if the framework keeps an average of the parameters (EMA), average the rounded weights, which
            are deployed, instead of the float weights beneath the rounding (see `gaq.training.averaging`).
    """

    round_weights: str = _choice("auto", "auto", "throughout", "at_end")
    average_rounded: bool = True


@dataclass(frozen=True)
class EquivarianceLossConfig:
    """Optional training loss: ``weight`` times the squared rotation error of the forces (eV²/Å²)."""

    weight: float = _at_least(0.0, 0.0)
    rotations: int = _at_least(1, 1)


@dataclass(frozen=True)
class QuantizationConfig:
    """A resolved configuration; `to_dict` gives what is stored in a model.

    Fields carry what is allowed in them as metadata: ``choices``, ``bits``, ``minimum`` or ``below``;
    `gaq.config.parse` checks what a user writes against it.
    """

    version: int = _at_least(1, VERSION)
    preset: str = "gaq"
    weights: WeightConfig = field(default_factory=WeightConfig)
    scalars: ScalarConfig = field(default_factory=ScalarConfig)
    vectors: VectorConfig = field(default_factory=VectorConfig)
    radial_activations: bool = False
    attention: AttentionConfig | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    equivariance_loss: EquivarianceLossConfig = field(default_factory=EquivarianceLossConfig)
    overrides: Document = field(default_factory=dict)

    def to_dict(self) -> Document:
        """Return a plain nested dictionary, which `gaq.config.parse.parse_config` accepts."""
        plain = dataclasses.asdict(self)
        if plain["attention"] is None:
            # Files from before this key existed lack it; a model without attention stores the same form.
            del plain["attention"]
        return plain

    @property
    def rounds_weights_at_end(self) -> bool:
        """Whether weights are rounded at the end of training only."""
        return self.weights.bits is not None and self.training.round_weights == "at_end"

    @property
    def rounds_activations(self) -> bool:
        """Whether anything that depends on positions is rounded."""
        attention = self.attention is not None and self.attention.bits is not None
        return attention or self.scalars.bits is not None or self.vectors.magnitude_bits is not None


def _weight_only(bits: int, **weights: Any) -> QuantizationConfig:
    """Return a configuration that rounds weights and leaves features in float."""
    return QuantizationConfig(
        weights=WeightConfig(bits=bits, **weights),
        scalars=ScalarConfig(bits=None),
        vectors=VectorConfig(magnitude_bits=None),
    )


_GROUPED: Document = {
    "granularity": "per_group",
    "group_size": 32,
    "sensitive_bits": None,
    "species_bits": 3,
    "compression": 7.0,
}
_FOUR_BITS: Document = {"training": TrainingConfig(round_weights="at_end")}

# The first interaction and the sensitive tensors cause nine tenths of the error at 8 bits; see
# benchmarks/sensitivity.py.
_EIGHT_BITS: Document = {"first_bits": 16, "species_bits": 4, "compression": 5.0, "least_compression": 4.0}

PRESETS: dict[str, QuantizationConfig] = {
    "w8a16": QuantizationConfig(preset="w8a16", weights=WeightConfig(**_EIGHT_BITS)),
    "w4a16": QuantizationConfig(
        preset="w4a16",
        weights=WeightConfig(bits=4, **_GROUPED),
        **_FOUR_BITS,
    ),
    "w8": dataclasses.replace(_weight_only(8, **_EIGHT_BITS), preset="w8"),
    "w4": dataclasses.replace(_weight_only(4, **_GROUPED), preset="w4", **_FOUR_BITS),
    "w8a8": QuantizationConfig(
        preset="w8a8",
        weights=WeightConfig(**_EIGHT_BITS),
        scalars=ScalarConfig(bits=8),
        vectors=VectorConfig(magnitude_bits=8, direction_bits=12),
    ),
    "w4a8": QuantizationConfig(
        preset="w4a8",
        weights=WeightConfig(bits=4, **_GROUPED),
        scalars=ScalarConfig(bits=8),
        vectors=VectorConfig(magnitude_bits=8, direction_bits=12),
        **_FOUR_BITS,
    ),
    "naive_w8a8": QuantizationConfig(
        preset="naive_w8a8",
        weights=WeightConfig(bits=8, granularity="per_tensor", range="absmax", rounding="nearest", sensitive_bits=None),
        scalars=ScalarConfig(bits=8, granularity="per_tensor"),
        vectors=VectorConfig(scheme="components", magnitude_bits=8, granularity="per_tensor", start=0.0, anneal=0.0),
        radial_activations=True,
        calibration=CalibrationConfig(headroom=1.0),
        distillation=DistillationConfig(steps=0),
    ),
}
"""Named configurations; ``gaq`` is another name for the default, ``w8a16``."""
PRESETS["gaq"] = PRESETS["w8a16"]


@dataclass(frozen=True)
class RemovedKey:
    """A key of earlier versions that was removed.

    Attributes:
        advice: what to write instead.
        no_effect: the value that had no effect; files with this value still load.
        acts: when other values had an effect: ``always``; ``until_rounded``, until the weights of a model are rounded
            for good; or ``throughout``, in training that rounds weights throughout.
    """

    advice: str
    no_effect: object
    acts: str = "always"


_AT_END = (
    "leave it out; fine-tuning at few bits does better with training.round_weights: at_end, which the presets of "
    "4 bits have"
)
REMOVED: dict[str, RemovedKey] = {
    "vectors.magnitude": RemovedKey("leave it out; steps of the magnitude are linear", "linear"),
    "distillation.batch_size": RemovedKey(
        "write distillation.batch_atoms, the most atoms of a step", 5, "until_rounded"
    ),
    "distillation.features": RemovedKey("leave it out; distillation fits forces and energies", 0.0, "until_rounded"),
    "training.warm_start": RemovedKey(_AT_END, False, "throughout"),
    "training.learned_scales": RemovedKey(_AT_END, False, "throughout"),
    "training.anneal_epochs": RemovedKey(_AT_END, 0, "throughout"),
}
"""Keys of earlier versions, by key path. docs/method.md says what each achieved."""

REMOVED_VALUES: dict[tuple[str, str], str] = {
    ("vectors.codebook", "fibonacci"): "write geodesic for a table, or octahedral, which needs none",
}
"""Values of earlier versions, by key path and value, with what to write instead."""


def without_removed(config: ReadOnlyDocument) -> Document:
    """Drop the removed keys that have no effect from a configuration of any version, as plain data."""
    kept: Document = {}
    for section, keys in config.items():
        if section == "overrides" and isinstance(keys, Mapping):
            keys = {
                pattern: without_removed(override) if isinstance(override, Mapping) else override
                for pattern, override in keys.items()
            }
        elif isinstance(keys, Mapping):
            keys = {
                key: value
                for key, value in keys.items()
                if (gone := REMOVED.get(f"{section}.{key}")) is None or value != gone.no_effect
            }
        kept[section] = keys
    return kept
