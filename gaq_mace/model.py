"""The quantized MACE model: quantizers in, weights rounded for good, and its state.

A quantized model differs from a stock one in the classes of some modules (`gaq_mace.modules`) and in the
class of its root, which packs itself when pickled and carries its configuration in the state dict.
"""

from __future__ import annotations

import base64
import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mace
import numpy as np
import torch
from e3nn.util.jit import compile_mode
from mace.modules import models as mace_models
from torch import Tensor

import gaq
from gaq.config import ConfigError, QuantizationConfig, parse_config, resolve_overrides
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import QuantizedTensor, WeightLayout, WeightQuantizer, dequantize, largest_code
from gaq_mace import modules
from gaq_mace.sites import Site, find_sites

__all__ = [
    "FORMAT",
    "FixedWeight",
    "ModelState",
    "ScaleShiftMACE",
    "convert",
    "feature_quantizers",
    "is_quantized",
    "prepare",
    "quantized_weights",
    "restore",
    "search_ranges",
    "state_of",
    "unquantized",
]

FORMAT = 1
"""Version of the stored form; a file of a later one is refused."""


class ModelFileError(ValueError):
    """A model file that cannot be used; the message says which and why."""


@dataclass
class FixedWeight:
    """How the codes of one converted weight can be had back: ``codes = weight / scale``."""

    bits: int
    granularity: str
    group_size: int
    scale: Tensor


@dataclass
class ModelState:
    """What a quantized model knows about itself.

    Attributes:
        config: the resolved configuration.
        status: ``training`` (weights are rounded in every forward pass) or ``converted`` (they are
            rounded for good).
        weights: of a converted model, by parameter name.
        notes: anything worth keeping with the model: versions, gate results.
        resumed: whether the ranges came from a checkpoint of the same configuration; not stored.
    """

    config: QuantizationConfig
    status: str = "training"
    weights: dict[str, FixedWeight] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False


@compile_mode("script")
class ScaleShiftMACE(mace_models.ScaleShiftMACE):
    """A `mace.modules.ScaleShiftMACE` that keeps its quantization through copies, states and files."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        from gaq_mace import files

        if state_of(self) is not None:
            return files.reduce_packed(self)
        return files.reduce_stock(self, mace_models.ScaleShiftMACE)

    def __deepcopy__(self, memo: dict[int, Any]) -> ScaleShiftMACE:
        # Without this a copy would go through the packed form and lose the training state.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        torch.nn.Module.__setstate__(new, copy.deepcopy(self.__dict__, memo))
        return new

    def get_extra_state(self) -> Tensor:
        """Configuration and ranges, as bytes, so that checkpoints and rebuilt models keep them."""
        state = state_of(self)
        text = json.dumps(_to_json(self, state)) if state is not None else ""
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the quantization of the model the state comes from."""
        text = bytes(state.cpu().numpy().tobytes()).decode()
        if text:
            _from_json(self, json.loads(text))


_ROOTS: dict[type, type] = {mace_models.ScaleShiftMACE: ScaleShiftMACE}


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a model carries a quantization of ours."""
    return state_of(model) is not None


def state_of(model: torch.nn.Module) -> ModelState | None:
    """The quantization state of a model, None if it has none."""
    return model.__dict__.get("gaq_state")


def _require_state(model: torch.nn.Module) -> ModelState:
    state = state_of(model)
    if state is None:
        raise ValueError("this model is not quantized: call gaq.prepare(model, 'gaq') first.")
    return state


def _adopt(model: torch.nn.Module, state: ModelState) -> None:
    if type(model) in _ROOTS:
        model.__class__ = _ROOTS[type(model)]
    model.__dict__["gaq_state"] = state


def check_supported(model: torch.nn.Module) -> None:
    """Refuse models that cannot be quantized, with the reason.

    Raises:
        ValueError: for model classes other than ScaleShiftMACE (what `mace_run_train` makes of both
            ``MACE`` and ``ScaleShiftMACE``), for cuEquivariance and OpenEquivariance modules, and for
            LoRA layers.
    """
    if type(model) not in (*_ROOTS, *_ROOTS.values()):
        raise ValueError(
            f"{type(model).__name__} models cannot be quantized: MACE can rebuild only ScaleShiftMACE from its "
            "configuration, which a packed file needs. Train with `model: MACE` or `model: ScaleShiftMACE`."
        )
    for attribute, name in (("cueq_config", "enable_cueq"), ("oeq_config", "enable_oeq")):
        config = getattr(model, attribute, None)
        if config is not None and getattr(config, "enabled", False):
            raise ValueError(
                f"this model was built with {name}, whose kernels replace the modules to be quantized. "
                f"Quantize the plain model, with {name}: False."
            )
    for name, module in model.named_modules():
        if type(module).__name__.startswith("LoRA"):
            raise ValueError(
                f"{name} is a LoRA layer: rounding its two parts is not rounding their sum. "
                "Merge the LoRA weights first, or fine-tune without `lora`."
            )


def _weight_quantizers(site: Site, config: QuantizationConfig) -> dict[str, WeightQuantizer]:
    weights = config.weights
    bits = weights.bits
    if bits is None:
        return {}
    granularity = weights.granularity
    if site.sensitive and weights.sensitive_bits is not None and weights.sensitive_bits > bits:
        bits = weights.sensitive_bits
        granularity = "per_channel" if granularity == "per_group" else granularity
    return {w.path: WeightQuantizer(w.layout, bits, granularity, weights.group_size) for w in site.weights}


def _feature_quantizer(site: Site, config: QuantizationConfig) -> FeatureQuantizer | None:
    if site.features is None or (site.radial and not config.radial_activations):
        return None
    scalars, vectors = config.scalars, config.vectors
    has_scalars = any(d == 1 and m > 0 for m, d in site.features.pieces)
    has_vectors = any(d > 1 and m > 0 for m, d in site.features.pieces)
    if not ((has_scalars and scalars.bits is not None) or (has_vectors and vectors.magnitude_bits is not None)):
        return None
    return FeatureQuantizer(site.features, scalars, vectors, config.calibration.headroom)


def prepare(model: torch.nn.Module, spec: Any) -> torch.nn.Module:
    """Insert quantizers into a MACE model, in place.

    The weights stay in float; each forward pass rounds them (straight-through, so the model can be
    trained). Activation ranges are empty until calibrated.

    Args:
        model: a stock `ScaleShiftMACE`.
        spec: preset name, mapping or `QuantizationConfig`.

    Returns:
        The same model.

    Raises:
        gaq.config.ConfigError: for a configuration that cannot be used, or overrides that match nothing.
        ValueError: for a model that cannot be quantized.
    """
    config = parse_config(spec)
    check_supported(model)
    if is_quantized(model):
        raise ValueError("this model is already quantized. Start from the float model; rounding twice only adds error.")
    sites = find_sites(model)
    resolved = resolve_overrides(config, [site.name for site in sites])
    if all(c is None for c in resolved.values()):
        raise ConfigError("quantization.overrides: every module is left alone, so nothing would be quantized.")
    parameters = dict(model.named_parameters())
    for site in sites:
        own = resolved[site.name]
        if own is None:
            continue
        quantizers = _weight_quantizers(site, own)
        for path, quantizer in quantizers.items():
            quantizer.search(parameters[f"{site.name}.{path}"].detach().cpu(), own.weights.range)
        modules.insert(site, quantizers, _feature_quantizer(site, own))
    _adopt(model, ModelState(config))
    return model


def search_ranges(model: torch.nn.Module) -> None:
    """Set the range of every weight quantizer anew, for the weights the model has now."""
    sites = find_sites(model)
    resolved = resolve_overrides(_require_state(model).config, [site.name for site in sites])
    parameters = dict(model.named_parameters())
    for site in sites:
        own = resolved[site.name]
        for path, quantizer in modules.weight_quantizers(site).items():
            assert own is not None
            quantizer.search(parameters[f"{site.name}.{path}"], own.weights.range)


def feature_quantizers(model: torch.nn.Module) -> dict[str, FeatureQuantizer]:
    """The input quantizers of a model, by site name."""
    return {
        name.removesuffix(".input_quantizer"): module
        for name, module in model.named_modules()
        if isinstance(module, FeatureQuantizer)
    }


def weight_quantizers(model: torch.nn.Module) -> dict[str, WeightQuantizer]:
    """The weight quantizers of a model in training, by parameter name."""
    found = {}
    for site in find_sites(model):
        for path, quantizer in modules.weight_quantizers(site).items():
            found[f"{site.name}.{path}"] = quantizer
    return found


@contextmanager
def unquantized(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the model computes in float, with its unrounded weights.

    In a converted model the weights are rounded already; only its activations become exact.
    """
    weights = [m for m in model.modules() if isinstance(m, WeightQuantizer)]
    features = [m for m in model.modules() if isinstance(m, FeatureQuantizer)]
    before_w = [m.enabled for m in weights]
    before_f = [(m.scalars_enabled, m.vectors_enabled, m.observing) for m in features]
    try:
        for w in weights:
            w.enabled = False
        for f in features:
            f.scalars_enabled = f.vectors_enabled = f.observing = False
        yield
    finally:
        for w, enabled in zip(weights, before_w, strict=True):
            w.enabled = enabled
        for f, flags in zip(features, before_f, strict=True):
            f.scalars_enabled, f.vectors_enabled, f.observing = flags


def _layouts(model: torch.nn.Module) -> dict[str, WeightLayout]:
    return {f"{site.name}.{w.path}": w.layout for site in find_sites(model) for w in site.weights}


def quantized_weights(model: torch.nn.Module) -> dict[str, QuantizedTensor]:
    """Codes and scales of every quantized weight, by parameter name.

    Of a converted model the codes are read back from the weights, exactly; a weight that has been
    changed since is left out, and so is stored in float.
    """
    state = _require_state(model)
    parameters = dict(model.named_parameters())
    if state.status == "training":
        return {name: q.quantized(parameters[name]) for name, q in weight_quantizers(model).items() if q.enabled}
    found = {}
    layouts = _layouts(model)
    for name, fixed in state.weights.items():
        if name not in parameters or parameters[name].numel() != layouts[name].numel:
            continue
        layout = layouts[name]
        index = layout.scale_index(fixed.granularity, fixed.group_size)
        if int(index.max()) + 1 != fixed.scale.numel():
            continue
        weight = parameters[name].detach().cpu().float()
        scale = fixed.scale.float().cpu()
        codes = torch.round(weight.reshape(-1).double() / scale.double()[index]).to(torch.int32).view(weight.shape)
        unchanged = torch.equal(dequantize(codes, scale, index), weight)
        if unchanged and int(codes.abs().max()) <= largest_code(fixed.bits):
            found[name] = QuantizedTensor(codes, scale, fixed.bits, layout, fixed.granularity, fixed.group_size)
    return found


@torch.no_grad()
def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Round the weights for good, in place, and drop what only training needs.

    Afterwards every weight of the model *is* its dequantized code, in the host's own parameter, so
    whatever rebuilds the model from its weights (compilation, exports, head selection) stays quantized.

    Raises:
        ValueError: if the model is not prepared.
    """
    state = _require_state(model)
    if state.status == "converted":
        return model
    parameters = dict(model.named_parameters())
    for name, tensor in quantized_weights(model).items():
        parameters[name].copy_(tensor.dequantize().to(parameters[name]))
        state.weights[name] = FixedWeight(tensor.bits, tensor.granularity, tensor.group_size, tensor.scale)
    for site in find_sites(model):
        modules.remove(site.module, keep_input=True)
    for quantizer in feature_quantizers(model).values():
        quantizer.observing = False
        quantizer.scalars_enabled = quantizer.vectors_enabled = True
        quantizer.vector_range_factor = 1.0
        quantizer.differentiable_twice = False
    state.status = "converted"
    return model


def meta_of(model: torch.nn.Module) -> dict[str, Any]:
    """Everything about a quantization but its tensors, as plain data."""
    state = _require_state(model)
    return {
        "format": FORMAT,
        "gaq": gaq.__version__,
        "mace": getattr(mace, "__version__", "unknown"),
        "torch": torch.__version__,
        "status": state.status,
        "config": state.config.to_dict(),
        "notes": state.notes,
    }


def check_format(meta: dict[str, Any], where: str = "this model") -> None:
    """Refuse a stored form that is newer than this version reads.

    Raises:
        ModelFileError: naming both versions.
    """
    if int(meta.get("format", 0)) > FORMAT:
        raise ModelFileError(
            f"{where} was written by gaq {meta.get('gaq', '?')} (format {meta['format']}); this is gaq "
            f"{gaq.__version__}, which reads formats up to {FORMAT}. Upgrade with: pip install -U gaq"
        )


def restore(
    model: torch.nn.Module,
    meta: dict[str, Any],
    ranges: dict[str, Tensor],
    weights: dict[str, FixedWeight],
    ratios: dict[str, Tensor] | None = None,
    steps: dict[str, Tensor] | None = None,
) -> torch.nn.Module:
    """Make a plain model the quantized one that was stored, in place.

    Args:
        model: of the right architecture; of a converted model its weights are the dequantized ones.
        meta: from `meta_of`.
        ranges: observed sizes by site name.
        weights: of a converted model.
        ratios: range ratios of the weights of a model in training.
        steps: scales of those weights of a model in training that hold theirs.

    Raises:
        ModelFileError: if the stored form is newer than this version.
    """
    check_format(meta)
    config = parse_config(meta["config"])
    state = ModelState(config, meta["status"], dict(weights), dict(meta.get("notes", {})))
    converted = state.status == "converted"
    sites = find_sites(model)
    resolved = resolve_overrides(config, [site.name for site in sites])
    for site in sites:
        own = resolved[site.name]
        if own is None:
            continue
        quantizers = {} if converted else _weight_quantizers(site, own)
        features = _feature_quantizer(site, own)
        if features is not None and site.name in ranges:
            features.load_ranges(ranges[site.name])
        if features is not None:
            features.differentiable_twice = not converted
        for path, quantizer in quantizers.items():
            ratio = (ratios or {}).get(f"{site.name}.{path}")
            if ratio is not None and ratio.numel() == quantizer.groups:
                quantizer.range_ratio.copy_(ratio)
            step = (steps or {}).get(f"{site.name}.{path}")
            if step is not None and step.numel() == quantizer.groups:
                quantizer.fix_scale(step, scale=step)
        modules.insert(site, quantizers, features)
    _adopt(model, state)
    return model


def _encode(tensor: Tensor) -> str:
    return base64.b64encode(tensor.detach().float().cpu().numpy().astype("<f4").tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())


def _to_json(model: torch.nn.Module, state: ModelState) -> dict[str, Any]:
    return {
        "meta": meta_of(model),
        "ranges": {name: _encode(q.ranges()) for name, q in feature_quantizers(model).items()},
        "ratios": {name: _encode(q.range_ratio) for name, q in weight_quantizers(model).items()},
        "steps": {name: _encode(q.fixed_step) for name, q in weight_quantizers(model).items() if q.scale_is_fixed},
        "weights": {name: [w.bits, w.granularity, w.group_size, _encode(w.scale)] for name, w in state.weights.items()},
    }


def _same_grid(a: QuantizationConfig, b: QuantizationConfig) -> bool:
    """Whether two configurations round alike: schedules, data and losses may differ."""

    def grid(config: QuantizationConfig) -> dict[str, Any]:
        plain = config.to_dict()
        for key in ("preset", "calibration", "distillation", "equivariance_loss"):
            del plain[key]
        for key in ("start_epoch", "anneal_epochs"):
            del plain["vectors"][key]
        return plain

    return grid(a) == grid(b)


def _from_json(model: torch.nn.Module, stored: dict[str, Any]) -> None:
    ranges = {name: _decode(text) for name, text in stored["ranges"].items()}
    ratios = {name: _decode(text) for name, text in stored["ratios"].items()}
    steps = {name: _decode(text) for name, text in stored.get("steps", {}).items()}
    weights = {name: FixedWeight(b, g, n, _decode(text)) for name, (b, g, n, text) in stored["weights"].items()}
    state = state_of(model)
    if state is not None:
        if not _same_grid(state.config, parse_config(stored["meta"]["config"])):
            logging.warning(
                "The checkpoint was written with other quantization settings: its weights are taken, "
                "its ranges are not."
            )
            return
        # A checkpoint of the same run: only the ranges move, the modules are in place.
        state.resumed = True
        for name, quantizer in feature_quantizers(model).items():
            if name in ranges:
                quantizer.load_ranges(ranges[name])
        for name, q in weight_quantizers(model).items():
            if name in ratios:
                q.range_ratio.copy_(ratios[name].to(q.range_ratio.device))
            if name in steps:
                q.fix_scale(steps[name], scale=steps[name])
        return
    restore(model, stored["meta"], ranges, weights, ratios, steps)
