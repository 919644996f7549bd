"""The rounded weights of a NequIP model, by parameter name. Embedded in packages, like `gaq_nequip.layers`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gaq.model.state import (
    is_kind,
    require_state,
)
from gaq.quantizers.species import SpeciesWeightQuantizer
from gaq.quantizers.weights import QuantizedTensor, WeightQuantizer
from gaq_nequip.insertion import site_quantizers
from gaq_nequip.packed import PackedWeight
from gaq_nequip.sites import find_sites

__all__ = [
    "hold_codes",
    "hold_scales",
    "packed_weights",
    "quantized_weights",
    "release_codes",
    "settle_species",
    "species_quantizers",
    "weight_quantizers",
]


def weight_quantizers(model: torch.nn.Module) -> dict[str, WeightQuantizer]:
    """The weight quantizers of a model that still has its weights, by parameter name."""
    found: dict[str, WeightQuantizer] = {}
    for site in find_sites(model):
        for path, quantizer in site_quantizers(site).items():
            if is_kind(quantizer, WeightQuantizer):
                found[f"{site.name}.{path}"] = quantizer
    return found


def packed_weights(model: torch.nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a frozen model, by the name its parameter had."""
    found: dict[str, PackedWeight] = {}
    for site in find_sites(model):
        for path, packed in site_quantizers(site).items():
            if is_kind(packed, PackedWeight):
                found[f"{site.name}.{path}"] = packed
    return found


@torch.no_grad()
def settle_species(model: torch.nn.Module) -> None:
    """Round the weights whose codes are chosen together for good, in place: a compiled file cannot choose any."""
    parameters = dict(model.named_parameters())
    for name, quantizer in species_quantizers(model).items():
        if not quantizer.settled:
            tensor = quantizer.quantized(parameters[name])
            quantizer.fix_scale(parameters[name], scale=tensor.scale)
            parameters[name].copy_(tensor.dequantize().to(parameters[name]))
            quantizer.settle()


def hold_scales(model: torch.nn.Module, fresh: bool = True) -> None:
    """Take the scales of weights from the weights as they are now, and hold them.

    Args:
        model: in training.
        fresh: whether scales that are held already are to be taken anew.
    """
    parameters = dict(model.named_parameters())
    for name, quantizer in weight_quantizers(model).items():
        if fresh or not quantizer.scale_is_fixed:
            quantizer.refresh_scale(parameters[name])


def species_quantizers(model: torch.nn.Module) -> dict[str, SpeciesWeightQuantizer]:
    """The quantizers of weights whose codes are chosen together, by the names of their parameters."""
    return {n: q for n, q in weight_quantizers(model).items() if is_kind(q, SpeciesWeightQuantizer)}


def hold_codes(model: torch.nn.Module) -> dict[str, Tensor]:
    """Round weights whose codes are chosen together as they are rounded now, without choosing anew in every step.

    Returns:
        What was held before, for `release_codes`.
    """
    parameters = dict(model.named_parameters())
    before = {}
    for name, quantizer in species_quantizers(model).items():
        before[name] = quantizer.offset
        quantizer.hold(parameters[name])
    return before


def release_codes(model: torch.nn.Module, before: Mapping[str, Tensor] | None = None) -> None:
    """Choose codes for the weights as they are from now on, or go back to what was held before."""
    for name, quantizer in species_quantizers(model).items():
        quantizer.release((before or {}).get(name))


def quantized_weights(model: torch.nn.Module) -> dict[str, QuantizedTensor]:
    """Codes and scales of every quantized weight, by parameter name."""
    require_state(model)
    parameters = dict(model.named_parameters())
    found = {
        name: quantizer.quantized(parameters[name])
        for name, quantizer in weight_quantizers(model).items()
        if quantizer.enabled
    }
    found.update({name: packed.tensor() for name, packed in packed_weights(model).items()})
    return found
