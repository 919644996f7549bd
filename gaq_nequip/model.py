"""The quantized NequIP model: quantizers in, weights rounded for good, and its codes."""

from __future__ import annotations

import copy
from typing import Any

import nequip
import torch
from nequip.scripts._workflow_utils import get_workflow_state

import gaq
from gaq.config.parse import ConfigError, QuantizationConfig, resolve_overrides
from gaq.model import state as quantized
from gaq.model import summary as inspection
from gaq.model.bits import settle_bits
from gaq.model.state import (
    FORMAT,
    FixedWeight,
    ModelState,
    feature_quantizers,
    finish_features,
    is_kind,
    require_state,
    settle_codes,
    state_of,
    warn_if_unfinished,
)
from gaq.model.summary_table import SummaryRow
from gaq.quantizers.attention import RobustAttention
from gaq.quantizers.weights import QuantizedTensor
from gaq_nequip import layers as modules
from gaq_nequip.attention import add_attention
from gaq_nequip.sites import bystanders, class_name, find_sites

__all__ = ["convert", "graph_models", "in_float64", "prepare", "quantized_weights", "rows"]

_ROOTS = ("GraphModel", "CompileGraphModel")


def graph_models(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The complete models in what NequIP built: itself, or those of a `ModuleDict`, by key."""
    if getattr(model, "is_graph_model", False):
        return {"": model}
    return {name: m for name, m in model.items()} if isinstance(model, torch.nn.ModuleDict) else {}  # noqa: C416


def check_supported(model: torch.nn.Module) -> None:
    """Refuse models that cannot be quantized, with the reason.

    Raises:
        ValueError: for anything but a complete model of NequIP's own root class, and for modules that an
            acceleration has replaced.
    """
    if class_name(model) not in _ROOTS:
        raise ValueError(
            f"{type(model).__name__} cannot be quantized: give a complete NequIP model, whose root is a GraphModel "
            "(what the builders of nequip.model and allegro.model return)."
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.startswith(("OpenEquivariance", "CuEquivariance", "Triton")):
            raise ValueError(
                f"{name} is a {kind}: quantize first, and give the acceleration to nequip-compile --modifiers."
            )


def _configure_attention(model: torch.nn.Module, config: QuantizationConfig) -> None:
    if config.attention is None:
        return
    if config.attention.messages:
        add_attention(model)
    for module in model.modules():
        if is_kind(module, RobustAttention):
            module.configure(config.attention)


def prepare(model: torch.nn.Module, config: QuantizationConfig) -> torch.nn.Module:
    """Insert quantizers into a NequIP or Allegro model, in place.

    The weights stay in float; each forward pass rounds them (straight-through, so the model can be trained).
    Activation ranges are empty until calibrated.

    Args:
        model: a complete model.
        config: from `gaq.config.parse.parse_config`.

    Returns:
        The same model.

    Raises:
        gaq.config.parse.ConfigError: for a configuration that this model cannot use, or overrides that match nothing.
        ValueError: for a model that cannot be quantized.
    """
    check_supported(model)
    if state_of(model) is not None:
        raise ValueError("this model is already quantized. Start from the float model; rounding twice only adds error.")
    _configure_attention(model, config)
    sites = find_sites(model)
    resolved = resolve_overrides(config, [site.name for site in sites])
    if all(c is None for c in resolved.values()):
        raise ConfigError("quantization.overrides: every module is left alone, so nothing would be quantized.")
    parameters = dict(model.named_parameters())
    config, resolved = settle_bits(
        config, sites, resolved, lambda: sum(4 * p.numel() for p in parameters.values()), of_a_file=False
    )
    for site in sites:
        own = resolved[site.name]
        if own is None:
            continue
        quantizers = quantized.weight_quantizers(site, own)
        for path, quantizer in quantizers.items():
            quantizer.search(parameters[f"{site.name}.{path}"].detach().cpu(), own.weights.range)
        modules.insert(site, quantizers, quantized.feature_quantizer(site, own))
    meta = {"format": FORMAT, "gaq": gaq.__version__, "nequip": nequip.__version__, "torch": torch.__version__}
    modules.adopt(model, ModelState(config, notes={"meta": meta}))
    model.__dict__[modules.COMPILES] = get_workflow_state() == "compile"
    return model


def search_ranges(model: torch.nn.Module) -> None:
    """Set the range of every weight quantizer anew, for the weights the model has now."""
    resolved = resolve_overrides(require_state(model).config, [site.name for site in find_sites(model)])
    parameters = dict(model.named_parameters())
    for name, quantizer in modules.weight_quantizers(model).items():
        own = next(c for site, c in resolved.items() if name.startswith(site + ".") and c is not None)
        quantizer.search(parameters[name], own.weights.range)


@torch.no_grad()
def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Round the weights for good, in place.

    Afterwards every weight *is* its dequantized code, in the host's own parameter. The quantizers stay, with fixed
    scales: rounding what is rounded changes nothing, and `gaq_nequip.freeze.freeze` reads the codes from them.

    Raises:
        ValueError: if the model is not prepared.
    """
    state = require_state(model)
    if state.status != "training":
        return model
    warn_if_unfinished(state)
    parameters = dict(model.named_parameters())
    for name, quantizer in modules.weight_quantizers(model).items():
        tensor = quantizer.quantized(parameters[name])
        quantizer.fix_scale(parameters[name], scale=tensor.scale)
        parameters[name].copy_(tensor.dequantize().to(parameters[name]))
        state.weights[name] = FixedWeight(tensor.bits, tensor.granularity, tensor.group_size, tensor.scale)
    settle_codes(model)
    finish_features(model)
    state.status = "converted"
    return model


def quantized_weights(model: torch.nn.Module) -> dict[str, QuantizedTensor]:
    """Codes and scales of every quantized weight, by parameter name."""
    require_state(model)
    parameters = dict(model.named_parameters())
    found = {
        name: quantizer.quantized(parameters[name])
        for name, quantizer in modules.weight_quantizers(model).items()
        if quantizer.enabled
    }
    found.update({name: packed.tensor() for name, packed in modules.packed_weights(model).items()})
    return found


def rows(model: torch.nn.Module) -> list[SummaryRow]:
    """A row a module, and one for each that is never quantized, with the reason."""
    state = state_of(model)
    found = inspection.rows(
        find_sites(model),
        state,
        dict(model.named_parameters()),
        quantized_weights(model) if state is not None else {},
        feature_quantizers(model),
        bystanders(model),
    )
    for name, module in model.named_modules():
        if getattr(module, "gaq_folded", False):
            packed: Any = module.weight_quantizer
            scale = packed.scale.float()
            found.append(
                SummaryRow(
                    name,
                    f"{packed.numel} weights",
                    f"int{packed.bits} {packed.granularity}",
                    "float: rounded at the output of the layer before",
                    f"{float(scale.min()):.1e} .. {float(scale.max()):.1e}",
                    packed.bytes,
                    "rounded, folded by type",
                )
            )
    return found


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model that computes in float64.

    NequIP casts intermediate results to the dtype a module was built in, so that has to follow.
    """
    double = copy.deepcopy(model).double()
    for module in double.modules():
        for attribute in ("model_dtype", "_output_dtype"):
            if hasattr(module, attribute):
                setattr(module, attribute, torch.float64)
    return double


def config_of(model: torch.nn.Module) -> QuantizationConfig | None:
    """The configuration of a quantized model, None for a float one."""
    state = state_of(model)
    return None if state is None else state.config
