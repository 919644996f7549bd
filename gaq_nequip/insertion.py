"""Putting quantizers into the modules of a NequIP or Allegro model.

Embedded in packages, like `gaq_nequip.layers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch

from gaq.config.schema import QuantizationConfig
from gaq.model.sites import Site
from gaq.model.state import is_kind
from gaq.quantizers.attention import RobustAttention
from gaq.quantizers.features import FeatureQuantizer
from gaq.untyped import AnyModule
from gaq_nequip.attention import add_attention
from gaq_nequip.layers import (
    QuantizedConvNet,
    QuantizedDeepLinear,
    QuantizedEmbedding,
    QuantizedGate,
    QuantizedLinear,
    QuantizedScalarLinear,
    QuantizedTensorProduct,
    SecondInput,
)
from gaq_nequip.sites import TENSOR_TRACK

__all__ = ["configure_attention", "insert", "site_quantizers"]

_CLASSES: dict[str, type] = {
    "linear": QuantizedLinear,
    "tensor_product": QuantizedTensorProduct,
    "scalar_linear": QuantizedScalarLinear,
    "deep_linear": QuantizedDeepLinear,
    "embedding": QuantizedEmbedding,
    "convnet": QuantizedConvNet,
    "gate": QuantizedGate,
}
"""The quantized class of each kind of site."""

_ALLEGRO_KINDS = ("contracter", "tensor_track", "env_weighter")


def _quantized_class(kind: str) -> type:
    if kind in _ALLEGRO_KINDS:
        # Allegro is an extension that need not be installed. It is imported by name, because the packager reads import
        # statements from the source and would ask for Allegro.
        classes: dict[str, type] = importlib.import_module("gaq_nequip.allegro_layers").CLASSES
        return classes[kind]
    return _CLASSES[kind]


def insert(site: Site, weights: Mapping[str, torch.nn.Module], features: FeatureQuantizer | None) -> None:
    """Give a site its quantizers, in place.

    Args:
        site: the module and its layout.
        weights: quantizers of the weights to round, by `gaq.model.sites.WeightSite.path`; may be empty.
        features: quantizer of the input, or None.
    """
    if not weights and features is None:
        return
    module: AnyModule = site.module
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if site.kind == "tensor_track":
        assert features is not None
        module.add_module(TENSOR_TRACK, SecondInput(features).to(device))
    elif features is not None or not hasattr(module, "input_quantizer"):
        module.input_quantizer = (features if features is not None else torch.nn.Identity()).to(device)
    if site.kind == "deep_linear":
        quantizers = [weights.get(w.path, torch.nn.Identity()) for w in site.weights]
        module.weights_quantizers = torch.nn.ModuleList(quantizers).to(device)
        module.gaq_shapes = [w.layout.shape for w in site.weights]
    elif site.weights:
        module.weight_quantizer = weights.get(site.weights[0].path, torch.nn.Identity()).to(device)
    elif site.kind == "tensor_track" and not hasattr(module, "weight_quantizer"):
        module.weight_quantizer = torch.nn.Identity()
        module.input_quantizer = torch.nn.Identity()
    if site.kind != "attention":  # it calls its quantizer without a change of class
        module.__class__ = _quantized_class(site.kind)


def site_quantizers(site: Site) -> dict[str, torch.nn.Module]:
    """The weight quantizers or packed weights in a site, by `gaq.model.sites.WeightSite.path`."""
    module: AnyModule = site.module
    if site.kind == "deep_linear":
        quantizers = list(getattr(module, "weights_quantizers", []))
    else:
        quantizers = [getattr(module, "weight_quantizer", None)] if site.weights else []
    return {w.path: q for w, q in zip(site.weights, quantizers, strict=False) if q is not None}


def configure_attention(model: torch.nn.Module, config: QuantizationConfig) -> None:
    """Apply the key ``attention``: add attention over messages if asked for, and configure the attention there is."""
    if config.attention is None:
        return
    if config.attention.messages:
        add_attention(model)
    for module in model.modules():
        if is_kind(module, RobustAttention):
            module.configure(config.attention)
