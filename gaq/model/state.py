"""State, quantizers and weight codes of a quantized model, the same in every framework."""

import base64
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

import gaq
from gaq.config.schema import MOST_SCALAR_BITS, QuantizationConfig, without_removed
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.species import SpeciesWeightQuantizer
from gaq.quantizers.weights import QuantizedTensor, WeightLayout, WeightQuantizer, dequantize, largest_code
from gaq.untyped import Document, ReadOnlyDocument

__all__ = [
    "FORMAT",
    "SCHEDULE",
    "TRAINED",
    "UNFINISHED",
    "FixedWeight",
    "ModelFileError",
    "ModelState",
    "StoredState",
    "check_format",
    "describe_other_grid",
    "differing_grid",
    "exact_features",
    "feature_quantizers",
    "finish_features",
    "fixed_codes",
    "is_kind",
    "keep_earlier_preset",
    "require_state",
    "round_weights",
    "same_grid",
    "settle_codes",
    "state_of",
    "unquantized",
    "warn_if_unfinished",
]

Kind = TypeVar("Kind", bound=torch.nn.Module)

FORMAT = 3
"""Version of the stored form; files of a later version are refused.

2: safetensors files hold all codes in one tensor and all scales in another.
3: safetensors files hold a checksum of everything in them.
"""


UNFINISHED = "weights_unrounded"
"""Note in the state of a model from a run that rounds its weights at its end, and has not ended."""

TRAINED = "trained"
"""Note in the state of a model that a framework's command trained with the key ``quantization``."""

SCHEDULE = "schedule"
"""Note in the state of a model in training: its `gaq.training.schedule.Schedule`, for runs that go on from here."""

logger = logging.getLogger(__name__)


class ModelFileError(ValueError):
    """A model file that cannot be used; the message says which and why."""


@dataclass
class FixedWeight:
    """What recovers the codes of one converted weight: ``codes = weight / scale``."""

    bits: int
    granularity: str
    group_size: int
    scale: Tensor


@dataclass
class ModelState:
    """What a quantized model stores about its quantization.

    Attributes:
        config: the resolved configuration.
        status: ``training`` (every forward pass rounds the weights), ``converted`` (the weights are rounded for good)
            or ``frozen`` (only their codes are left).
        weights: how the weights of a converted model are rounded, by parameter name.
        notes: plain data kept with the model: versions, gate results.
        resumed: whether the ranges came from a checkpoint of the same configuration; not stored.
        holds_scales: whether the training loop refreshes the scales of the weights when it chooses to; otherwise an
            evaluation takes them from the present weights. Not stored.
        last_epoch: last epoch that was trained in this process. Not stored.
        conflict: why a checkpoint was refused that was loaded last; empty if it was not. Not stored.
    """

    config: QuantizationConfig
    status: str = "training"
    weights: dict[str, FixedWeight] = field(default_factory=dict)
    notes: Document = field(default_factory=dict)
    resumed: bool = False
    holds_scales: bool = False
    last_epoch: int = -1
    conflict: str = ""


def state_of(model: torch.nn.Module) -> ModelState | None:
    """Return the quantization state of a model, None for a float model."""
    return model.__dict__.get("gaq_state")


def require_state(model: torch.nn.Module) -> ModelState:
    """Return the quantization state of a model.

    Raises:
        ValueError: if the model is not quantized.
    """
    state = state_of(model)
    if state is None:
        raise ValueError("this model is not quantized: call gaq.prepare(model, 'gaq') first.")
    return state


def warn_if_unfinished(state: ModelState) -> None:
    """Log a warning if weights are about to be rounded to nearest because their training run is unfinished."""
    if state.status == "training" and state.notes.get(UNFINISHED):
        logger.warning(
            "The run this checkpoint is of rounds its weights when it is over, and it is not over: the weights are now "
            "rounded to nearest, which costs accuracy. Let the run end (restart it), or train with "
            "`training: {round_weights: throughout}`."
        )


def check_format(meta: ReadOnlyDocument, where: str = "this model") -> None:
    """Refuse a stored form that is newer than the formats this version reads.

    Raises:
        ModelFileError: naming both versions.
    """
    if int(meta.get("format", 0)) > FORMAT:
        raise ModelFileError(
            f"{where} was written by gaq {meta.get('gaq', '?')} (format {meta['format']}); this is gaq "
            f"{gaq.__version__}, which reads formats up to {FORMAT}. Upgrade with: pip install -U gaq"
        )


def is_kind(module: torch.nn.Module | None, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a module is of one of our classes, by name: a packaged model has its own copies of the classes."""
    return isinstance(module, kind) or any(base.__name__ == kind.__name__ for base in type(module).__mro__)


def feature_quantizers(model: torch.nn.Module) -> dict[str, FeatureQuantizer]:
    """Return the feature quantizers of a model, by site name."""
    return {
        name.removesuffix(".input_quantizer"): module
        for name, module in model.named_modules()
        if is_kind(module, FeatureQuantizer)
    }


def finish_features(model: torch.nn.Module) -> None:
    """Set every feature quantizer to its deployed form: ranges fixed, all branches on, no second derivative."""
    for quantizer in feature_quantizers(model).values():
        quantizer.observing = False
        quantizer.scalars_enabled = quantizer.vectors_enabled = True
        quantizer.vector_range_factor = 1.0
        quantizer.differentiable_twice = False


def round_weights(model: torch.nn.Module, rounded: bool) -> None:
    """Switch the rounding of all weights of a model on or off."""
    for module in model.modules():
        if is_kind(module, WeightQuantizer):
            module.enabled = rounded


def settle_codes(model: torch.nn.Module) -> None:
    """Record that the weights of a model lie on their grids: their codes are not chosen again."""
    for module in model.modules():
        if is_kind(module, SpeciesWeightQuantizer):
            module.settle()


@contextmanager
def exact_features(quantizers: Iterable[FeatureQuantizer]) -> Iterator[None]:
    """Switch off the rounding of the quantizers within this context."""
    before = [(q, q.scalars_enabled, q.vectors_enabled) for q in quantizers]
    for q, _, _ in before:
        q.scalars_enabled = q.vectors_enabled = False
    try:
        yield
    finally:
        for q, scalars, vectors in before:
            q.scalars_enabled, q.vectors_enabled = scalars, vectors


@contextmanager
def unquantized(model: torch.nn.Module) -> Iterator[None]:
    """Compute in float within this context, with the unrounded weights of the model.

    The weights of a converted model are rounded already; only its activations become exact.
    """
    weights = [m for m in model.modules() if is_kind(m, WeightQuantizer)]
    features = [m for m in model.modules() if is_kind(m, FeatureQuantizer)]
    weight_flags = [quantizer.enabled for quantizer in weights]
    feature_flags = [(q.scalars_enabled, q.vectors_enabled, q.observing) for q in features]
    try:
        for weight in weights:
            weight.enabled = False
        for feature in features:
            feature.scalars_enabled = feature.vectors_enabled = feature.observing = False
        yield
    finally:
        for weight, enabled in zip(weights, weight_flags, strict=True):
            weight.enabled = enabled
        for feature, flags in zip(features, feature_flags, strict=True):
            feature.scalars_enabled, feature.vectors_enabled, feature.observing = flags


def fixed_codes(weight: Tensor, fixed: FixedWeight, layout: WeightLayout) -> QuantizedTensor | None:
    """Recover the codes of a converted weight exactly; None if the weight has changed since."""
    if weight.numel() != layout.numel:
        return None
    index = layout.scale_index(fixed.granularity, fixed.group_size)
    if int(index.max()) + 1 != fixed.scale.numel():
        return None
    value = weight.detach().cpu().float()
    scale = fixed.scale.float().cpu()
    codes = torch.round(value.reshape(-1).double() / scale.double()[index]).to(torch.int32).view(value.shape)
    unchanged = torch.equal(dequantize(codes, scale, index), value)
    if not unchanged or int(codes.abs().max()) > largest_code(fixed.bits):
        return None
    return QuantizedTensor(codes, scale, fixed.bits, layout, fixed.granularity, fixed.group_size)


def _to_text(tensor: Tensor) -> str:
    return base64.b64encode(tensor.detach().float().cpu().numpy().astype("<f4").tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())


@dataclass
class StoredState:
    """Quantization as checkpoints and rebuilt models carry it: everything except the weights.

    Attributes:
        meta: plain data: versions, status, configuration, notes.
        ranges: observed sizes, by site name.
        weights: how converted weights were rounded, by parameter name.
        ratios: range ratios of weights in training, by parameter name.
        steps: fixed scales of weights in training, by parameter name; weights whose scale follows them are missing.
    """

    meta: Document
    ranges: dict[str, Tensor]
    weights: dict[str, FixedWeight] = field(default_factory=dict)
    ratios: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: torch.nn.Module, meta: Document, quantizers: Mapping[str, WeightQuantizer]) -> "StoredState":
        """Collect the state of a quantized model, given its weight quantizers by parameter name."""
        return cls(
            meta=dict(meta),
            ranges={name: q.ranges() for name, q in feature_quantizers(model).items()},
            weights=dict(require_state(model).weights),
            ratios={name: q.range_ratio for name, q in quantizers.items()},
            steps={name: q.fixed_step for name, q in quantizers.items() if q.scale_is_fixed},
        )

    def to_json(self) -> Document:
        """Return plain data, with tensors as text."""
        weights = {n: [w.bits, w.granularity, w.group_size, _to_text(w.scale)] for n, w in self.weights.items()}
        tensors = {"ranges": self.ranges, "ratios": self.ratios, "steps": self.steps}
        texts = {key: {name: _to_text(t) for name, t in group.items()} for key, group in tensors.items()}
        return {"meta": self.meta, "weights": weights, **texts}

    @classmethod
    def from_json(cls, plain: ReadOnlyDocument) -> "StoredState":
        """Inverse of `to_json`."""
        weights = {n: FixedWeight(b, g, size, _from_text(text)) for n, (b, g, size, text) in plain["weights"].items()}
        groups = {
            key: {name: _from_text(text) for name, text in plain.get(key, {}).items()}
            for key in ("ranges", "ratios", "steps")
        }
        return cls(meta=dict(plain["meta"]), weights=weights, **groups)

    def load_ranges(self, model: torch.nn.Module, quantizers: Mapping[str, WeightQuantizer]) -> None:
        """Load the stored ranges and scales into a model with the same quantizers."""
        for name, quantizer in feature_quantizers(model).items():
            if name in self.ranges:
                quantizer.load_ranges(self.ranges[name])
        for name, weight_quantizer in quantizers.items():
            if name in self.ratios and self.ratios[name].numel() == weight_quantizer.groups:
                weight_quantizer.range_ratio.copy_(self.ratios[name].to(weight_quantizer.range_ratio.device))
            if name in self.steps and self.steps[name].numel() == weight_quantizer.groups:
                weight_quantizer.fix_scale(self.steps[name], scale=self.steps[name])


def keep_earlier_preset(model: torch.nn.Module, stored: ReadOnlyDocument) -> None:
    """Give a model that was built from the name of a preset what that name meant when its state was stored.

    A checkpoint may hold no more than that name. The schedule of vectors was one of epochs before it was relative to
    the run. In the versions before, no scalars had more than `gaq.config.schema.MOST_SCALAR_BITS`, so a quantizer with
    more has them from a preset of today.

    Args:
        model: quantized model.
        stored: what `QuantizationConfig.to_dict` gave when the state was written.
    """
    state = require_state(model)
    version = int(stored.get("version", 1))
    most = MOST_SCALAR_BITS.get(version)
    if most is None or version >= state.config.version:
        return
    wide = [q for q in feature_quantizers(model).values() if q.round_scalars and q.scalar_bits > most]
    for quantizer in wide:
        quantizer.set_scalar_bits(most)
    if wide:
        logger.info("The state was written when presets rounded scalars to %d bits, which this model keeps.", most)
    scalars, vectors = state.config.scalars, state.config.vectors
    if scalars.bits is not None and scalars.bits > most:
        scalars = dataclasses.replace(scalars, bits=most)
    if vectors.start_epoch is None:
        epochs = {key: stored["vectors"].get(key) for key in ("start_epoch", "anneal_epochs")}
        vectors = dataclasses.replace(vectors, **epochs)
    state.config = dataclasses.replace(state.config, version=version, scalars=scalars, vectors=vectors)


def same_grid(a: ReadOnlyDocument, b: ReadOnlyDocument) -> bool:
    """Whether two configurations round to the same grid; schedules, data and losses may differ.

    Both are what `QuantizationConfig.to_dict` gave, in any version.
    """

    def grid(config: ReadOnlyDocument) -> Document:
        plain = {key: value for key, value in without_removed(config).items() if key not in _NOT_GRID}
        plain["vectors"] = {k: v for k, v in plain["vectors"].items() if k not in _SCHEDULE_KEYS}
        return plain

    return grid(a) == grid(b)


def describe_other_grid(given: QuantizationConfig, stored: ReadOnlyDocument) -> str:
    """Say how the settings of a checkpoint differ from those of the run that is to go on from it, and what to do."""
    return (
        f"this checkpoint {differing_grid(given, stored)}. "
        "Restart with the settings it was written with, or start a new run from its float model."
    )


def differing_grid(given: QuantizationConfig, stored: ReadOnlyDocument) -> str:
    """Say how the settings of a checkpoint differ from those of a run: the end of a sentence about the checkpoint."""
    plain = given.to_dict()
    differing = []
    for section, value in without_removed(stored).items():
        if section in _NOT_GRID or value == plain.get(section):
            continue
        if not isinstance(value, Mapping) or section == "overrides":
            differing.append(section)
            continue
        given_section = plain.get(section) or {}
        keys = [key for key in value if value[key] != given_section.get(key) and key not in _SCHEDULE_KEYS]
        differing += [f"{section}.{key} {value[key]} there, {given_section.get(key)} here" for key in keys]
    return (
        f"was written with other quantization settings (preset {stored['preset']}) than the ones given "
        f"(preset {given.preset}): {'; '.join(differing)}"
    )


_SCHEDULE_KEYS = ("start", "anneal", "start_epoch", "anneal_epochs")
_NOT_GRID = ("version", "preset", "calibration", "distillation", "training", "equivariance_loss")
