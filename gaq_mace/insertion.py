"""Putting quantizers into the modules of a MACE model, and taking them out."""

from __future__ import annotations

from collections.abc import Mapping

import mace  # noqa: F401  (before e3nn)
import torch
from mace.modules.symmetric_contraction import Contraction, SymmetricContraction

from gaq.config.parse import ConfigError
from gaq.config.schema import QuantizationConfig
from gaq.model.sites import Site
from gaq.quantizers.attention import RobustAttention
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import WeightQuantizer
from gaq.untyped import AnyModule
from gaq_mace.layers import (
    QuantizedContraction,
    QuantizedDense,
    QuantizedDensity,
    QuantizedDensityResidual,
    QuantizedEmbedding,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedProduct,
    QuantizedTensorProduct,
    original_type,
)

__all__ = ["configure_attention", "insert", "remove", "site_quantizers"]

_QUANTIZED = {
    "product": QuantizedProduct,
    "linear": QuantizedLinear,
    "tensor_product": QuantizedTensorProduct,
    "layer": QuantizedLayer,
    "dense": QuantizedDense,
    "embedding": QuantizedEmbedding,
}

_BLOCKS = {original_type(block): block for block in (QuantizedDensity, QuantizedDensityResidual)}


def _insert_contraction(
    module: SymmetricContraction, weights: Mapping[str, WeightQuantizer], device: torch.device
) -> None:
    """Give the contractions of a symmetric contraction their weight quantizers, by `WeightSite.path`."""
    for i, contraction in enumerate(module.contractions):
        prefix = f"contractions.{i}."
        quantizers = {path.removeprefix(prefix): q for path, q in weights.items() if prefix in path}
        if not quantizers:
            continue
        contraction.weights_max_quantizer = quantizers.get("weights_max", torch.nn.Identity()).to(device)
        others = [quantizers.get(f"weights.{k}", torch.nn.Identity()) for k in range(len(contraction.weights))]
        contraction.weights_quantizers = torch.nn.ModuleList(others).to(device)
        contraction.__class__ = QuantizedContraction


def insert(site: Site, weights: Mapping[str, WeightQuantizer], features: FeatureQuantizer | None) -> None:
    """Give a site its quantizers, in place.

    Args:
        site: the module and its layout.
        weights: a quantizer for each weight to round, by `WeightSite.path`; may be empty.
        features: the quantizer of the input, or None.
    """
    module: AnyModule = site.module  # its class is changed below
    device = next(module.parameters()).device
    if site.kind in ("density", "attention"):
        if features is not None:
            module.input_quantizer = features.to(device)
            # `RobustAttention` calls its quantizer without a class of ours.
            module.__class__ = _BLOCKS.get(type(module), type(module))
        return
    if site.kind == "contraction":
        _insert_contraction(module, weights, device)
    elif site.kind == "product":
        if not hasattr(module, "use_agnostic_product"):  # models from before MACE had it
            module.use_agnostic_product = False
    elif weights or features is not None:
        module.weight_quantizer = weights.get("weight", torch.nn.Identity()).to(device)
    if features is not None or (weights and site.kind != "contraction"):
        module.input_quantizer = (features or torch.nn.Identity()).to(device)
        module.__class__ = _QUANTIZED[site.kind]


def remove(module: torch.nn.Module, keep_input: bool) -> None:
    """Take the weight quantizers out of the module of a site, and the input quantizer unless it is to be kept.

    The weights stay as they are: `gaq_mace.model.convert` writes them.
    """
    keep = keep_input and isinstance(getattr(module, "input_quantizer", None), FeatureQuantizer)
    if isinstance(module, SymmetricContraction):
        for contraction in module.contractions:
            if isinstance(contraction, QuantizedContraction):
                del contraction.weights_max_quantizer
                del contraction.weights_quantizers
                contraction.__class__ = Contraction
    elif hasattr(module, "weight_quantizer"):
        if keep:
            module.weight_quantizer = torch.nn.Identity()
        else:
            del module.weight_quantizer
    host_class = original_type(type(module))
    if not keep and host_class is not type(module):
        if hasattr(module, "input_quantizer"):
            del module.input_quantizer
        module.__class__ = host_class


def site_quantizers(site: Site) -> dict[str, WeightQuantizer]:
    """The weight quantizers now in a site, by `WeightSite.path`."""
    quantizers_by_path: dict[str, WeightQuantizer] = {}
    for weight in site.weights:
        owner: AnyModule = site.module.get_submodule(weight.owner) if weight.owner else site.module
        quantizer: object
        if site.kind == "contraction":
            if not isinstance(owner, QuantizedContraction):
                continue
            if weight.parameter == "weights_max":
                quantizer = owner.weights_max_quantizer
            else:
                quantizers: AnyModule = owner.weights_quantizers
                quantizer = quantizers[int(weight.parameter.split(".")[1])]
        else:
            quantizer = getattr(owner, "weight_quantizer", None)
        if isinstance(quantizer, WeightQuantizer):
            quantizers_by_path[weight.path] = quantizer
    return quantizers_by_path


def configure_attention(model: torch.nn.Module, config: QuantizationConfig) -> None:
    """Apply the key ``attention`` to the attention blocks of a model."""
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
