"""The steps of preparing and converting a model that are the same in every framework.

A framework implements `Host`, which finds the sites of a model and puts quantizers into them. This module decides the
order of the steps, the checks and the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from gaq.config.parse import ConfigError, resolve_overrides
from gaq.config.schema import QuantizationConfig
from gaq.model.bits import bits_of, granularity_of, group_of, settle_bits
from gaq.model.effect import check_effect
from gaq.model.sites import Site
from gaq.model.state import FixedWeight, ModelState, is_kind, require_state, state_of
from gaq.quantizers.attention import BoundedGate, GridQuantizer
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.species import SpeciesWeightQuantizer
from gaq.quantizers.weights import QuantizedTensor, WeightQuantizer

__all__ = [
    "FloatSize",
    "Host",
    "new_feature_quantizer",
    "new_weight_quantizers",
    "prepare",
    "search_ranges",
    "weight_quantizers",
    "write_codes",
]


@dataclass(frozen=True)
class FloatSize:
    """Size of the float model, with which the size of the quantized model is compared.

    Attributes:
        measure: returns the bytes of the float model in single precision; called only if the configuration gives a
            size.
        overhead: bytes of the quantized model besides codes and scales.
        of_a_file: whether sizes are those of files, to which ``weights.least_compression`` applies.
    """

    measure: Callable[[], float]
    overhead: int = 0
    of_a_file: bool = True


class Host(Protocol):
    """What `prepare` and its relatives ask of a framework."""

    def check_supported(self, model: torch.nn.Module) -> None:
        """Raise ValueError, with the reason, for a model that cannot be quantized."""
        ...

    def configure_attention(self, model: torch.nn.Module, config: QuantizationConfig) -> None:
        """Apply the key ``attention``; raise `gaq.config.parse.ConfigError` where the model lacks what it asks for."""
        ...

    def find_sites(self, model: torch.nn.Module) -> list[Site]: ...

    def insert(self, site: Site, weights: Mapping[str, WeightQuantizer], features: FeatureQuantizer | None) -> None: ...

    def site_quantizers(self, site: Site) -> Mapping[str, torch.nn.Module]:
        """Return the modules that stand for a site's weights now, by `gaq.model.sites.WeightSite.path`."""
        ...

    def float_size(self, model: torch.nn.Module) -> FloatSize: ...

    def adopt(self, model: torch.nn.Module, state: ModelState) -> None:
        """Give a model its state, and its root module the class that keeps the state."""
        ...


def new_weight_quantizers(site: Site, config: QuantizationConfig) -> dict[str, WeightQuantizer]:
    """Make quantizers for the weights of a site, by `gaq.model.sites.WeightSite.path`."""
    weights = config.weights
    if weights.bits is None:
        return {}
    group = group_of(site, weights)
    bits = bits_of(group, weights)
    if group == "species":
        assert site.embedding is not None
        return {w.path: SpeciesWeightQuantizer(w.layout, bits, site.embedding) for w in site.weights}
    granularity = granularity_of(bits, weights)
    return {w.path: WeightQuantizer(w.layout, bits, granularity, weights.group_size) for w in site.weights}


def new_feature_quantizer(site: Site, config: QuantizationConfig) -> FeatureQuantizer | None:
    """Make a quantizer for the features of a site; None where the configuration leaves them in float."""
    bounded, attention = site.attention, config.attention
    if bounded is not None and attention is not None:
        if bounded.limit is None:
            return BoundedGate(bounded.layout, attention.bits, config.calibration.headroom, attention.gate_limit)
        channels = sum(multiplicity for multiplicity, _ in bounded.layout.pieces)
        if attention.bits is None:
            return None
        return GridQuantizer(channels, attention.bits, bounded.limit, bounded.signed, bounded.what)
    if site.features is None or (site.radial and not config.radial_activations):
        return None
    scalars, vectors = config.scalars, config.vectors
    has_scalars = any(dim == 1 and multiplicity > 0 for multiplicity, dim in site.features.pieces)
    has_vectors = any(dim > 1 and multiplicity > 0 for multiplicity, dim in site.features.pieces)
    if not ((has_scalars and scalars.bits is not None) or (has_vectors and vectors.magnitude_bits is not None)):
        return None
    return FeatureQuantizer(site.features, scalars, vectors, config.calibration.headroom)


def prepare(
    host: Host, model: torch.nn.Module, config: QuantizationConfig, search: bool = True, written: bool = True
) -> torch.nn.Module:
    """Insert quantizers into a float model, in place.

    The weights stay in float; each forward pass rounds them (straight-through, so that the model can be trained).
    Activation ranges are empty until calibrated.

    Args:
        host: the model's framework.
        model: a float model.
        config: from `gaq.config.parse.parse_config`.
        search: whether to search the ranges of weights; False where a file brings both, weights and ranges.
        written: whether a user wrote the configuration for this model; that of a file is taken as it is.

    Returns:
        The same model.

    Raises:
        gaq.config.parse.ConfigError: for a configuration that this model cannot use, keys that cannot act on it
            (`gaq.model.effect`), or overrides that match nothing.
        ValueError: for a model that cannot be quantized, or is quantized already.
    """
    host.check_supported(model)
    if state_of(model) is not None:
        raise ValueError("this model is already quantized. Start from the float model; rounding twice only adds error.")
    host.configure_attention(model, config)
    sites = host.find_sites(model)
    resolved = resolve_overrides(config, [site.name for site in sites])
    if all(site_config is None for site_config in resolved.values()):
        raise ConfigError("quantization.overrides: every module is left alone, so nothing would be quantized.")
    size = host.float_size(model)
    given, given_resolved = config, resolved
    config, resolved = settle_bits(config, sites, resolved, size.measure, size.overhead, size.of_a_file)
    if written:
        check_effect(given, sites, given_resolved, resolved, size.of_a_file)
    parameters = dict(model.named_parameters())
    for site in sites:
        site_config = resolved[site.name]
        if site_config is None:
            continue
        quantizers = new_weight_quantizers(site, site_config)
        for path, quantizer in quantizers.items() if search else ():
            quantizer.search(parameters[f"{site.name}.{path}"].detach().cpu(), site_config.weights.range)
        host.insert(site, quantizers, new_feature_quantizer(site, site_config))
    host.adopt(model, ModelState(config))
    return model


def weight_quantizers(host: Host, model: torch.nn.Module) -> dict[str, WeightQuantizer]:
    """Return the weight quantizers of a model that still has its weights, by parameter name."""
    return {
        f"{site.name}.{path}": quantizer
        for site in host.find_sites(model)
        for path, quantizer in host.site_quantizers(site).items()
        if is_kind(quantizer, WeightQuantizer)
    }


def search_ranges(host: Host, model: torch.nn.Module) -> None:
    """Search the range of every weight quantizer again, for the present weights of the model."""
    sites = host.find_sites(model)
    resolved = resolve_overrides(require_state(model).config, [site.name for site in sites])
    parameters = dict(model.named_parameters())
    for site in sites:
        site_config = resolved[site.name]
        for path, quantizer in host.site_quantizers(site).items():
            if site_config is not None and is_kind(quantizer, WeightQuantizer):
                quantizer.search(parameters[f"{site.name}.{path}"], site_config.weights.range)


@torch.no_grad()
def write_codes(model: torch.nn.Module, codes: Mapping[str, QuantizedTensor]) -> None:
    """Write dequantized codes into the parameters of the model, and record in its state how to recover the codes.

    Whatever rebuilds the model from its weights (compilation, exports, head selection) then stays quantized.
    """
    state = require_state(model)
    parameters = dict(model.named_parameters())
    for name, tensor in codes.items():
        parameters[name].copy_(tensor.dequantize().to(parameters[name]))
        state.weights[name] = FixedWeight(tensor.bits, tensor.granularity, tensor.group_size, tensor.scale)
