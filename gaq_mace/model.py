"""The quantized MACE model: quantizers in, weights rounded for good, and its state.

A quantized model differs from a stock one in the classes of some modules (`gaq_mace.layers`) and in the
class of its root, which packs itself when pickled and carries its configuration in the state dict.
"""

from __future__ import annotations

import copy
import io
import json
import logging
from typing import Any

import mace
import numpy as np
import torch
from e3nn.util.jit import compile_mode
from mace.modules import models as mace_models
from torch import Tensor

import gaq
from gaq.config.parse import ConfigError, parse_config, resolve_overrides
from gaq.config.schema import QuantizationConfig
from gaq.model import state as quantized
from gaq.model.bits import settle_bits
from gaq.model.state import (
    FORMAT,
    FixedWeight,
    ModelFileError,
    ModelState,
    StoredState,
    check_format,
    feature_quantizers,
    finish_features,
    require_state,
    same_grid,
    state_of,
    unquantized,
)
from gaq.quantizers.attention import RobustAttention
from gaq.quantizers.weights import QuantizedTensor, WeightLayout, WeightQuantizer
from gaq_mace import layers as modules
from gaq_mace.sites import find_sites

__all__ = [
    "FORMAT",
    "FixedWeight",
    "ModelFileError",
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


@compile_mode("script")
class ScaleShiftMACE(mace_models.ScaleShiftMACE):
    """A `mace.modules.ScaleShiftMACE` that keeps its quantization through copies, states and files."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not in forward, which is TorchScript: a scripted, traced or compiled model holds the reference path.
        from gaq_mace import engine

        own = engine.engine_for(self, kwargs)
        if own is not None:
            try:
                return own(*args, **{k: v for k, v in kwargs.items() if k != "training"})
            except engine.Unsupported as error:
                engine.give_up(self, error)
        return super().__call__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        from gaq_mace import packed_pickle

        if state_of(self) is not None:
            return packed_pickle.reduce_packed(self)
        return packed_pickle.reduce_stock(self, mace_models.ScaleShiftMACE)

    def __deepcopy__(self, memo: dict[int, Any]) -> ScaleShiftMACE:
        # Without this a copy would go through the packed form and lose the training state.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        # An engine belongs to the weights it was made from, and what is left to do to the model of a run.
        own = {key: value for key, value in self.__dict__.items() if key not in ("gaq_engine", "gaq_finish")}
        torch.nn.Module.__setstate__(new, copy.deepcopy(own, memo))
        return new

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; after a training whose weights are rounded at its end, that is done to what was loaded."""
        loaded = super().load_state_dict(*args, **kwargs)
        finish = self.__dict__.get("gaq_finish")
        if finish is not None:
            finish(self)
        return loaded

    def get_extra_state(self) -> Tensor:
        """Configuration and ranges, as bytes, so that checkpoints and rebuilt models keep them."""
        state = state_of(self)
        text = ""
        if state is not None:
            text = json.dumps(StoredState.of(self, meta_of(self), weight_quantizers(self)).to_json())
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


def _configure_attention(model: torch.nn.Module, config: QuantizationConfig) -> None:
    if config.attention is None:
        return
    if config.attention.messages:
        raise ConfigError(
            "quantization.attention.messages: is for NequIP. In MACE attention over messages is an interaction block: "
            "train from scratch with `interaction: GAQAttentionResidualInteractionBlock`."
        )
    for module in model.modules():
        if isinstance(module, RobustAttention):
            module.configure(config.attention)


FILE_OVERHEAD = 3500
"""Bytes of a file besides codes and scales: names and configuration."""

CODING_LOSS = 0.03
"""Share by which compressed codes and scales in a file are larger than their bits, at most as measured."""


def _file_bytes(model: torch.nn.Module) -> int:
    """Size of the file of a float model in single precision."""
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model).float(), buffer)
    return buffer.tell()


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
        gaq.config.parse.ConfigError: for a configuration that cannot be used, or overrides that match nothing.
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
    config, resolved = settle_bits(
        config, sites, resolved, lambda: (1 - CODING_LOSS) * _file_bytes(model), FILE_OVERHEAD
    )
    _configure_attention(model, config)
    parameters = dict(model.named_parameters())
    for site in sites:
        own = resolved[site.name]
        if own is None:
            continue
        quantizers = quantized.weight_quantizers(site, own)
        for path, quantizer in quantizers.items():
            quantizer.search(parameters[f"{site.name}.{path}"].detach().cpu(), own.weights.range)
        modules.insert(site, quantizers, quantized.feature_quantizer(site, own))
    _adopt(model, ModelState(config))
    return model


def search_ranges(model: torch.nn.Module) -> None:
    """Set the range of every weight quantizer anew, for the weights the model has now."""
    sites = find_sites(model)
    resolved = resolve_overrides(require_state(model).config, [site.name for site in sites])
    parameters = dict(model.named_parameters())
    for site in sites:
        own = resolved[site.name]
        for path, quantizer in modules.weight_quantizers(site).items():
            assert own is not None
            quantizer.search(parameters[f"{site.name}.{path}"], own.weights.range)


def weight_quantizers(model: torch.nn.Module) -> dict[str, WeightQuantizer]:
    """The weight quantizers of a model in training, by parameter name."""
    found = {}
    for site in find_sites(model):
        for path, quantizer in modules.weight_quantizers(site).items():
            found[f"{site.name}.{path}"] = quantizer
    return found


def _layouts(model: torch.nn.Module) -> dict[str, WeightLayout]:
    return {f"{site.name}.{w.path}": w.layout for site in find_sites(model) for w in site.weights}


def quantized_weights(model: torch.nn.Module) -> dict[str, QuantizedTensor]:
    """Codes and scales of every quantized weight, by parameter name.

    Of a converted model the codes are read back from the weights, exactly; a weight that has been
    changed since is left out, and so is stored in float.
    """
    state = require_state(model)
    parameters = dict(model.named_parameters())
    if state.status == "training":
        return {name: q.quantized(parameters[name]) for name, q in weight_quantizers(model).items() if q.enabled}
    layouts = _layouts(model)
    found = {}
    for name, fixed in state.weights.items():
        if name in parameters and (codes := quantized.fixed_codes(parameters[name], fixed, layouts[name])) is not None:
            found[name] = codes
    return found


@torch.no_grad()
def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Round the weights for good, in place, and drop what only training needs.

    Afterwards every weight of the model *is* its dequantized code, in the host's own parameter, so
    whatever rebuilds the model from its weights (compilation, exports, head selection) stays quantized.

    Raises:
        ValueError: if the model is not prepared.
    """
    state = require_state(model)
    if state.status == "converted":
        return model
    parameters = dict(model.named_parameters())
    for name, tensor in quantized_weights(model).items():
        parameters[name].copy_(tensor.dequantize().to(parameters[name]))
        state.weights[name] = FixedWeight(tensor.bits, tensor.granularity, tensor.group_size, tensor.scale)
    for site in find_sites(model):
        modules.remove(site.module, keep_input=True)
    finish_features(model)
    state.status = "converted"
    return model


def meta_of(model: torch.nn.Module) -> dict[str, Any]:
    """Everything about a quantization but its tensors, as plain data."""
    state = require_state(model)
    return {
        "format": FORMAT,
        "gaq": gaq.__version__,
        "mace": getattr(mace, "__version__", "unknown"),
        "torch": torch.__version__,
        "status": state.status,
        "config": state.config.to_dict(),
        "notes": state.notes,
    }


def restore(model: torch.nn.Module, stored: StoredState) -> torch.nn.Module:
    """Make a plain model the quantized one that was stored, in place.

    Args:
        model: of the right architecture; of a converted model its weights are the dequantized ones.
        stored: what was stored.

    Raises:
        ModelFileError: if the stored form is newer than this version.
    """
    check_format(stored.meta)
    config = parse_config(stored.meta["config"])
    state = ModelState(config, stored.meta["status"], dict(stored.weights), dict(stored.meta.get("notes", {})))
    converted = state.status == "converted"
    _configure_attention(model, config)
    sites = find_sites(model)
    resolved = resolve_overrides(config, [site.name for site in sites])
    # The bits of the model itself are stored, those of its overrides follow from their sites.
    _, resolved = settle_bits(config, sites, resolved, lambda: 0.0)
    for site in sites:
        own = resolved[site.name]
        if own is None:
            continue
        features = quantized.feature_quantizer(site, own)
        if features is not None:
            features.differentiable_twice = not converted
        modules.insert(site, {} if converted else quantized.weight_quantizers(site, own), features)
    stored.load_ranges(model, weight_quantizers(model))
    _adopt(model, state)
    return model


def _from_json(model: torch.nn.Module, plain: dict[str, Any]) -> None:
    stored = StoredState.from_json(plain)
    state = state_of(model)
    if state is None:
        restore(model, stored)
    elif same_grid(state.config.to_dict(), stored.meta["config"]):
        # A checkpoint of the same run: only the ranges move, the modules are in place.
        state.resumed = True
        stored.load_ranges(model, weight_quantizers(model))
    else:
        logging.warning(
            "The checkpoint was written with other quantization settings: its weights are taken, its ranges are not."
        )
