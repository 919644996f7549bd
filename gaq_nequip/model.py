"""The quantized NequIP model: inserting quantizers, and rounding the weights for good."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import nequip
import torch
from nequip.scripts._workflow_utils import get_workflow_state

import gaq
from gaq.config.schema import QuantizationConfig
from gaq.model import insertion as shared
from gaq.model.sites import Site
from gaq.model.state import (
    FORMAT,
    ModelState,
    finish_features,
    require_state,
    settle_codes,
    state_of,
    warn_if_unfinished,
)
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import WeightQuantizer
from gaq_nequip import insertion, root
from gaq_nequip.sites import class_name, find_sites
from gaq_nequip.weights import weight_quantizers

__all__ = [
    "config_of",
    "convert",
    "graph_models",
    "in_float64",
    "prepare",
    "quantized_models",
    "ranges_follow",
    "search_ranges",
]

SUPPORTED = ("GraphModel", "CompileGraphModel")


def graph_models(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The complete models in what NequIP built, by key: those of a `ModuleDict`, or the model itself under ''."""
    if getattr(model, "is_graph_model", False):
        return {"": model}
    return dict(model.items()) if isinstance(model, torch.nn.ModuleDict) else {}


def quantized_models(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The quantized ones among the `graph_models`."""
    return [m for m in graph_models(model).values() if state_of(m) is not None]


def check_supported(model: torch.nn.Module) -> None:
    """Refuse models that cannot be quantized, with the reason.

    Raises:
        ValueError: if the root is not one of NequIP's complete models, or an acceleration has replaced modules.
    """
    if class_name(model) not in SUPPORTED:
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


class NequIPHost:
    """NequIP as a `gaq.model.insertion.Host`."""

    def check_supported(self, model: torch.nn.Module) -> None:
        check_supported(model)

    def configure_attention(self, model: torch.nn.Module, config: QuantizationConfig) -> None:
        insertion.configure_attention(model, config)

    def find_sites(self, model: torch.nn.Module) -> list[Site]:
        return find_sites(model)

    def insert(self, site: Site, weights: Mapping[str, WeightQuantizer], features: FeatureQuantizer | None) -> None:
        insertion.insert(site, weights, features)

    def site_quantizers(self, site: Site) -> Mapping[str, torch.nn.Module]:
        return insertion.site_quantizers(site)

    def float_size(self, model: torch.nn.Module) -> shared.FloatSize:
        # The weights alone are compared: the rest of a file is mostly code.
        return shared.FloatSize(lambda: 4 * sum(p.numel() for p in model.parameters()), of_a_file=False)

    def adopt(self, model: torch.nn.Module, state: ModelState) -> None:
        versions = {"format": FORMAT, "gaq": gaq.__version__, "nequip": nequip.__version__, "torch": torch.__version__}
        state.notes["meta"] = versions
        root.adopt(model, state)
        model.__dict__[root.COMPILES] = get_workflow_state() == "compile"


HOST = NequIPHost()


_ranges_follow: ContextVar[bool] = ContextVar("gaq_nequip.model.ranges_follow", default=False)


@contextmanager
def ranges_follow() -> Iterator[None]:
    """Context in which models are built for a file that brings their weights and ranges: none are searched."""
    token = _ranges_follow.set(True)
    try:
        yield
    finally:
        _ranges_follow.reset(token)


def prepare(model: torch.nn.Module, config: QuantizationConfig, written: bool = True) -> torch.nn.Module:
    """Insert quantizers into a complete NequIP or Allegro model, in place; see `gaq.model.insertion.prepare`."""
    return shared.prepare(HOST, model, config, search=not _ranges_follow.get(), written=written)


def search_ranges(model: torch.nn.Module) -> None:
    """Set the range of every weight quantizer anew, for the weights the model has now."""
    shared.search_ranges(HOST, model)


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Round the weights for good, in place.

    Afterwards every parameter holds its dequantized codes. The quantizers stay, with fixed scales: rounding a rounded
    weight changes nothing, and `gaq_nequip.freeze.freeze` needs them to read the codes.

    Raises:
        ValueError: if the model is not prepared.
    """
    state = require_state(model)
    if state.status != "training":
        return model
    warn_if_unfinished(state)
    parameters = dict(model.named_parameters())
    codes = {}
    for name, quantizer in weight_quantizers(model).items():
        codes[name] = quantizer.quantized(parameters[name])
        quantizer.fix_scale(parameters[name], scale=codes[name].scale)
    shared.write_codes(model, codes)
    settle_codes(model)
    finish_features(model)
    state.status = "converted"
    return model


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model that computes in float64.

    NequIP casts intermediate results to the dtype that a module was built with, so these attributes change as well.
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
