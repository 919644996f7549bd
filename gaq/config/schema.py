"""The quantization configuration as data: one frozen dataclass tree, and the presets.

Kept apart from `gaq.config.parse`, which reads what a user writes: a packaged model embeds the modules its quantizers
import, and these need nothing but the standard library.
"""

# No postponed annotations here: `dataclasses` looks them up in sys.modules, where those of a package are not.
import dataclasses
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "PRESETS",
    "TEMPERATURES",
    "AttentionConfig",
    "CalibrationConfig",
    "DistillationConfig",
    "EquivarianceLossConfig",
    "QuantizationConfig",
    "ScalarConfig",
    "VectorConfig",
    "WeightConfig",
]


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
        sensitive_bits: bits of the few tensors that sit where every error passes (species embeddings and
            the linear layers that act on nothing else, first radial layers, symmetric contractions, readouts);
            None gives them ``bits`` like the rest.
        first_bits: bits of the other weights of the first interaction: the errors they make pass through all that
            follows, and are the larger part of what rounding costs. Its product with species is among them while it is
            no larger than the rest of them. None gives them ``bits`` like the rest.
        mixing_bits: bits of the weights of later interactions that act on everything that passes through, linear layers
            of node features and hidden layers of radial networks, and of that product where there are many species.
            None gives them ``bits`` like the rest.
        species_bits: NequIP: bits of the self-connection, where the embedding it meets has at least four times as many
            numbers as there are species: its codes are chosen together (`gaq.quantizers.species`), so that few bits
            serve. None rounds it like the rest.
        compression: raise the bits of all groups above ``bits``, those most that lose most by rounding, as far as the
            weights stay this many times smaller than FP32 (`gaq.model.bits`; of MACE, whose files hold more than
            weights, the file). A group whose bits are given keeps them. Where there is no room, nothing is raised.
        least_compression: MACE: where all this would leave the file less than this many times smaller than FP32's, the
            bits of all groups follow from that size instead (models of many elements). Bits that are given turn it
            off. Of NequIP's packages weights are the smaller part.
    """

    bits: int | None = 8
    granularity: str = "per_channel"
    group_size: int = 32
    range: str = "error"
    rounding: str = "gptq"
    sensitive_bits: int | None = 16
    first_bits: int | None = None
    mixing_bits: int | None = None
    species_bits: int | None = None
    compression: float | None = None
    least_compression: float | None = None


@dataclass(frozen=True)
class ScalarConfig:
    """How invariant (l = 0) features are rounded.

    Attributes:
        bits: None leaves them in float.
        granularity: whose range the steps divide: ``per_atom`` (the largest feature of the atom or edge itself; nothing
            to calibrate, nothing saturates), or a static one, ``per_channel`` or ``per_tensor``.
    """

    bits: int | None = 16
    granularity: str = "per_atom"


@dataclass(frozen=True)
class VectorConfig:
    """How l > 0 features are rounded.

    Attributes:
        scheme: ``mddq`` splits a vector into magnitude and direction; ``components`` rounds the
            components with one scale per channel.
        magnitude_bits: bits of the magnitude (``mddq``) or of each component (``components``);
            None leaves l > 0 features in float.
        direction_bits: bits per angle of the direction code (``mddq``).
        codebook: ``octahedral``, ``geodesic`` or ``fibonacci``; l >= 2 always uses the pyramid code,
            which is the octahedral one in more dimensions.
        frame: ``local`` lays the axes of the direction code along mixtures of the features of the same atom, so that
            rounding is exactly equivariant; ``fixed`` along those of the laboratory (``mddq``).
        magnitude: ``linear`` or ``log`` steps of the magnitude (``mddq``).
        granularity: whose range the steps of the magnitude divide, as for scalars.
        start_epoch: in training, the epoch from which vectors are quantized.
        anneal_epochs: epochs over which their range shrinks from twice the observed one to its own.
    """

    scheme: str = "mddq"
    magnitude_bits: int | None = 16
    direction_bits: int = 16
    codebook: str = "octahedral"
    frame: str = "local"
    magnitude: str = "linear"
    granularity: str = "per_atom"
    start_epoch: int = 10
    anneal_epochs: int = 5


TEMPERATURES = (0.25, 8.0)
"""Bounds of the temperature of attention; logits lie within plus and minus the upper one."""


@dataclass(frozen=True)
class AttentionConfig:
    """How weights of neighbours and gates are bounded and rounded; see `gaq.quantizers.attention`.

    Attributes:
        bits: of logits, of density and attention weights, and of what enters a gate; None bounds and does not round.
            If the key is not given: 16 where the preset rounds scalars, None where it does not.
        normalize: logits are the temperature times the cosine of query and key; if not, a dot product held to the same
            range by a tanh. For models that are trained with attention from scratch.
        temperature: ``learned``, or a number between `TEMPERATURES` that is kept.
        gate_limit: gates are the identity up to here and never reach twice as much; None takes the range from
            calibration, which leaves a trained model the function it is.
        messages: NequIP, from scratch: give the interaction blocks attention over messages. (In MACE it is an
            interaction block of its own.)
    """

    bits: int | None = 16
    normalize: bool = True
    temperature: str | float = "learned"
    gate_limit: float | None = None
    messages: bool = False


@dataclass(frozen=True)
class CalibrationConfig:
    """Which structures set the activation ranges.

    Attributes:
        frames: number of structures, drawn with ``seed`` from the data given.
        seed: of that draw.
        headroom: a static range is this many times the largest value seen, so that a simulation which
            wanders past the calibration set does not saturate (a saturated feature has no force).
    """

    frames: int = 64
    seed: int = 0
    headroom: float = 2.0


@dataclass(frozen=True)
class DistillationConfig:
    """Post-training self-distillation: reproduce the float model's forces on the calibration data.

    No reference labels are used. ``steps: 0`` turns it off.

    Attributes:
        steps: optimiser steps.
        batch_size: structures per step.
        learning_rate: of Adam, on the weights, relative to their root mean square; at 8 bits or more, and twice as much
            for every bit less.
        max_structures: at most this many of the structures given serve as teacher input.
        features: weight of what interactions hand on, beside the forces: with 1 a relative error of these features
            counts as much as one of the forces. The features of all structures are kept in memory.
    """

    steps: int = 300
    batch_size: int = 5
    learning_rate: float = 3e-4
    max_structures: int = 1000
    features: float = 0.0


@dataclass(frozen=True)
class TrainingConfig:
    """How a quantization-aware training goes.

    `warm_start` and `learned_scales` are about weights that are rounded throughout, and about models that are trained
    already (fine-tuning). A model that is trained from scratch has no use for either: its weights still have to find
    their sizes, and scales follow them from epoch to epoch.

    Attributes:
        round_weights: ``throughout``, or ``at_end``: features are rounded in training, weights once it is over, by
            calibration on the training structures with the forces of the weights just trained as labels (with
            ``weights.rounding`` and ``distillation``). The presets of 4 bits do the latter: labels leave gradients that
            keep weights hopping over thresholds, those forces do not. ``auto``: ``at_end`` where a model has room for
            at least 14 bits in all weights (but species products, whose codes are chosen together), since training has
            nothing to adapt to then, else ``throughout``.
        warm_start: calibrate rounding and scales on the training structures before the first epoch, as `gaq quantize`
            does and with the same settings (``weights.rounding``, ``distillation``); no labels are used. Training then
            starts near the float model and not from plain rounding.
        learned_scales: train the scales of the weights with the weights (see `gaq.training.learned_scales`).
        average_rounded: where the host keeps an average of the parameters (EMA), average the rounded weights, those
            that are deployed, and not the ones beneath the rounding (see `gaq.training.averaging`).
        anneal_epochs: epochs over which the ranges of weights shrink from the largest weight, with which none is
            clipped, to what ``weights.range`` finds. For weights that are rounded throughout and scales that follow
            them; the best epoch should come later.
    """

    round_weights: str = "auto"
    warm_start: bool = False
    learned_scales: bool = False
    average_rounded: bool = True
    anneal_epochs: int = 0


@dataclass(frozen=True)
class EquivarianceLossConfig:
    """Optional training term: ``weight`` times the squared rotation error of the forces (eV²/Å²)."""

    weight: float = 0.0
    rotations: int = 1


@dataclass(frozen=True)
class QuantizationConfig:
    """A resolved configuration; `to_dict` gives what is stored in a model."""

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
    overrides: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A plain nested dictionary, accepted back by `parse_config`."""
        plain = dataclasses.asdict(self)
        if plain["attention"] is None:
            # As in files from before there was the key.
            del plain["attention"]
        return plain

    @property
    def rounds_weights_at_end(self) -> bool:
        """Whether weights are rounded when training is over, and not before."""
        return self.weights.bits is not None and self.training.round_weights == "at_end"

    @property
    def rounds_activations(self) -> bool:
        """Whether anything that depends on positions is rounded."""
        attention = self.attention is not None and self.attention.bits is not None
        return attention or self.scalars.bits is not None or self.vectors.magnitude_bits is not None


def _weight_only(bits: int, **weights: Any) -> QuantizationConfig:
    return QuantizationConfig(
        weights=WeightConfig(bits=bits, **weights),
        scalars=ScalarConfig(bits=None),
        vectors=VectorConfig(magnitude_bits=None),
    )


_GROUPED = {
    "granularity": "per_group",
    "group_size": 32,
    "sensitive_bits": None,
    "species_bits": 3,
    "compression": 7.0,
}
# Four bits are further away from the float model, and need more and longer steps to come back to it.
_FOUR_BITS: dict[str, Any] = {
    "distillation": DistillationConfig(steps=1000),
    "training": TrainingConfig(round_weights="at_end", warm_start=True, learned_scales=True),
}

# With the sensitive tensors it makes nine tenths of the error of 8 bits; see benchmarks/sensitivity.py.
_EIGHT_BITS: dict[str, Any] = {"first_bits": 16, "species_bits": 4, "compression": 5.0, "least_compression": 4.0}

PRESETS: dict[str, QuantizationConfig] = {
    "w8a16": QuantizationConfig(preset="w8a16", weights=WeightConfig(**_EIGHT_BITS)),
    "w4a16": QuantizationConfig(
        preset="w4a16",
        weights=WeightConfig(bits=4, **_GROUPED),  # type: ignore[arg-type]
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
        weights=WeightConfig(bits=4, **_GROUPED),  # type: ignore[arg-type]
        scalars=ScalarConfig(bits=8),
        vectors=VectorConfig(magnitude_bits=8, direction_bits=12),
        **_FOUR_BITS,
    ),
    "naive_w8a8": QuantizationConfig(
        preset="naive_w8a8",
        weights=WeightConfig(bits=8, granularity="per_tensor", range="absmax", rounding="nearest", sensitive_bits=None),
        scalars=ScalarConfig(bits=8, granularity="per_tensor"),
        vectors=VectorConfig(
            scheme="components", magnitude_bits=8, granularity="per_tensor", start_epoch=0, anneal_epochs=0
        ),
        radial_activations=True,
        calibration=CalibrationConfig(headroom=1.0),
        distillation=DistillationConfig(steps=0),
    ),
}
"""Named configurations; ``gaq`` is another name of the default, ``w8a16``."""
PRESETS["gaq"] = PRESETS["w8a16"]
