"""The two steps of a quantized MACE model: quantizers are inserted, and later the weights are rounded for good.

A quantized model has other classes than a stock one for some of its modules (`gaq_mace.layers`) and for its root
(`gaq_mace.root`).
"""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping

import mace  # noqa: F401  (before e3nn)
import torch
from mace.modules import models as mace_models

from gaq.config.schema import QuantizationConfig
from gaq.model import insertion as shared
from gaq.model.sites import Site
from gaq.model.state import ModelState, finish_features, require_state
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import WeightQuantizer
from gaq_mace import insertion, root
from gaq_mace.engine import decelerate
from gaq_mace.sites import find_sites
from gaq_mace.weights import quantized_weights

__all__ = ["convert", "prepare", "search_ranges"]

SUPPORTED = (mace_models.ScaleShiftMACE, root.ScaleShiftMACE)

FILE_OVERHEAD = 3500
"""Size of the names and the configuration in a file, in bytes."""

CODING_LOSS = 0.03
"""Largest share, as measured, by which compressed codes and scales are larger in a file than their bits."""


def check_supported(model: torch.nn.Module) -> None:
    """Refuse models that cannot be quantized, with the reason.

    Raises:
        ValueError: for model classes other than ScaleShiftMACE (what `mace_run_train` makes of both
            ``MACE`` and ``ScaleShiftMACE``), for cuEquivariance and OpenEquivariance modules, and for
            LoRA layers.
    """
    if type(model) not in SUPPORTED:
        raise ValueError(
            f"this model is of MACE's class {type(model).__name__}, from which no packed file can be made: MACE can "
            "rebuild only its class ScaleShiftMACE. Train it again: mace_run_train makes that class of both `model: "
            "MACE` and `model: ScaleShiftMACE`."
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


def _file_bytes(model: torch.nn.Module) -> int:
    """Size of the file of a float model in single precision, in bytes."""
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model).float(), buffer)
    return buffer.tell()


class MACEHost:
    """See `gaq.model.insertion.Host`."""

    def check_supported(self, model: torch.nn.Module) -> None:
        # An accelerated float model is of MACE's own class again from here on; conversion brings the kernels back.
        check_supported(decelerate(model))

    def configure_attention(self, model: torch.nn.Module, config: QuantizationConfig) -> None:
        insertion.configure_attention(model, config)

    def find_sites(self, model: torch.nn.Module) -> list[Site]:
        return find_sites(model)

    def insert(self, site: Site, weights: Mapping[str, WeightQuantizer], features: FeatureQuantizer | None) -> None:
        insertion.insert(site, weights, features)

    def site_quantizers(self, site: Site) -> Mapping[str, torch.nn.Module]:
        return insertion.site_quantizers(site)

    def float_size(self, model: torch.nn.Module) -> shared.FloatSize:
        return shared.FloatSize(lambda: (1 - CODING_LOSS) * _file_bytes(model), FILE_OVERHEAD)

    def adopt(self, model: torch.nn.Module, state: ModelState) -> None:
        root.adopt(model, state)


HOST = MACEHost()


def prepare(model: torch.nn.Module, config: QuantizationConfig) -> torch.nn.Module:
    """Insert quantizers into a stock `ScaleShiftMACE`, in place; see `gaq.model.insertion.prepare`."""
    return shared.prepare(HOST, model, config)


def search_ranges(model: torch.nn.Module) -> None:
    """Search the range of every weight quantizer again, for the weights that the model has now."""
    shared.search_ranges(HOST, model)


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Write rounded weights into the model, in place, and drop the quantizers that only training needs.

    Raises:
        ValueError: if the model is not prepared.
    """
    state = require_state(model)
    if state.status == "converted":
        return model
    shared.write_codes(model, quantized_weights(model))
    for site in find_sites(model):
        insertion.remove(site.module, keep_input=True)
    finish_features(model)
    state.status = "converted"
    return model
