"""The rounded weights of a NequIP model, by parameter name.

Embedded in packages, like `gaq_nequip.layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from gaq.model.state import is_kind, require_state
from gaq.quantizers.species import SpeciesWeightQuantizer
from gaq.quantizers.weights import QuantizedTensor, WeightQuantizer
from gaq_nequip.insertion import site_quantizers
from gaq_nequip.packed import PackedWeight
from gaq_nequip.sites import find_sites

Kind = TypeVar("Kind", bound=torch.nn.Module)

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
    """The weight quantizers of a model, by parameter name; a frozen model has none."""
    return _in_sites(model, WeightQuantizer)


def packed_weights(model: torch.nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a frozen model, by the names that their parameters had."""
    return _in_sites(model, PackedWeight)


def _in_sites(model: torch.nn.Module, kind: type[Kind]) -> dict[str, Kind]:
    return {
        f"{site.name}.{path}": module
        for site in find_sites(model)
        for path, module in site_quantizers(site).items()
        if is_kind(module, kind)
    }


@torch.no_grad()
def settle_species(model: torch.nn.Module) -> None:
    """Round for good, in place, the weights whose codes are chosen together: a compiled file cannot choose codes."""
    parameters = dict(model.named_parameters())
    for name, quantizer in species_quantizers(model).items():
        if not quantizer.settled:
            tensor = quantizer.quantized(parameters[name])
            quantizer.fix_scale(parameters[name], scale=tensor.scale)
            parameters[name].copy_(tensor.dequantize().to(parameters[name]))
            quantizer.settle()


def hold_scales(model: torch.nn.Module, fresh: bool = True) -> None:
    """Compute the scales of all weights from the present weights, and hold them.

    Args:
        model: quantized model in training.
        fresh: whether to compute again the scales that are held already.
    """
    parameters = dict(model.named_parameters())
    for name, quantizer in weight_quantizers(model).items():
        if fresh or not quantizer.scale_is_fixed:
            quantizer.refresh_scale(parameters[name])


def species_quantizers(model: torch.nn.Module) -> dict[str, SpeciesWeightQuantizer]:
    """The quantizers of the weights whose codes are chosen together, by parameter name."""
    return _in_sites(model, SpeciesWeightQuantizer)


def hold_codes(model: torch.nn.Module) -> dict[str, Tensor]:
    """Hold the codes that are chosen together: choose them for the present weights, and not again in every step.

    Returns:
        The offsets held before, by parameter name, for `release_codes`.
    """
    parameters = dict(model.named_parameters())
    offsets_before = {}
    for name, quantizer in species_quantizers(model).items():
        offsets_before[name] = quantizer.offset
        quantizer.hold(parameters[name])
    return offsets_before


def release_codes(model: torch.nn.Module, offsets: Mapping[str, Tensor] | None = None) -> None:
    """Go back to the offsets that `hold_codes` returned; without them, choose codes in every step from now on."""
    for name, quantizer in species_quantizers(model).items():
        quantizer.release((offsets or {}).get(name))


def quantized_weights(model: torch.nn.Module) -> dict[str, QuantizedTensor]:
    """Codes and scales of every quantized weight, by parameter name."""
    require_state(model)
    parameters = dict(model.named_parameters())
    tensors = {
        name: quantizer.quantized(parameters[name])
        for name, quantizer in weight_quantizers(model).items()
        if quantizer.enabled
    }
    tensors.update({name: packed.tensor() for name, packed in packed_weights(model).items()})
    return tensors
