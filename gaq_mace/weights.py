"""The rounded weights of a MACE model, by parameter name."""

from __future__ import annotations

import mace  # noqa: F401  (before e3nn)
import torch

from gaq.model.state import fixed_codes, require_state
from gaq.quantizers.weights import QuantizedTensor, WeightLayout, WeightQuantizer
from gaq_mace.insertion import site_quantizers
from gaq_mace.sites import find_sites

__all__ = ["layouts", "quantized_weights", "weight_quantizers"]


def weight_quantizers(model: torch.nn.Module) -> dict[str, WeightQuantizer]:
    """The weight quantizers of a model in training, by parameter name."""
    return {
        f"{site.name}.{path}": quantizer
        for site in find_sites(model)
        for path, quantizer in site_quantizers(site).items()
    }


def layouts(model: torch.nn.Module) -> dict[str, WeightLayout]:
    """The layout of every weight that can be quantized, by parameter name."""
    return {f"{site.name}.{weight.path}": weight.layout for site in find_sites(model) for weight in site.weights}


def quantized_weights(model: torch.nn.Module) -> dict[str, QuantizedTensor]:
    """Codes and scales of every quantized weight, by parameter name.

    For a converted model the codes are read back from the weights, exactly. A weight that has been changed since is
    left out, so a file stores it in float.
    """
    state = require_state(model)
    parameters = dict(model.named_parameters())
    if state.status == "training":
        return {name: q.quantized(parameters[name]) for name, q in weight_quantizers(model).items() if q.enabled}
    layout_of = layouts(model)
    quantized = {
        name: fixed_codes(parameters[name], fixed, layout_of[name])
        for name, fixed in state.weights.items()
        if name in parameters
    }
    return {name: codes for name, codes in quantized.items() if codes is not None}
