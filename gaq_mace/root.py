"""The class of a quantized model's root, which keeps the quantization in pickles, copies and state dicts."""

from __future__ import annotations

import copy
import json
from typing import SupportsIndex

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from e3nn.util.jit import compile_mode
from mace.modules import models as mace_models
from torch import Tensor

from gaq.config.parse import ConfigError, parse_stored, resolve_overrides
from gaq.model.bits import settle_bits
from gaq.model.insertion import new_feature_quantizer, new_weight_quantizers
from gaq.model.state import (
    SCHEDULE,
    ModelFileError,
    ModelState,
    StoredState,
    check_format,
    describe_other_grid,
    keep_earlier_preset,
    same_grid,
    state_of,
)
from gaq.untyped import Document
from gaq_mace import packed, packed_pickle
from gaq_mace.deferred import settle
from gaq_mace.engine.serving import OWN_ENTRIES, RECORD, Served
from gaq_mace.insertion import configure_attention, insert
from gaq_mace.sites import find_sites
from gaq_mace.weights import weight_quantizers

__all__ = ["OtherSettingsError", "ScaleShiftMACE", "adopt", "is_quantized", "restore"]


class OtherSettingsError(ValueError):
    """A checkpoint of a model that is quantized otherwise than the one it is loaded into."""


@compile_mode("script")
class ScaleShiftMACE(Served, mace_models.ScaleShiftMACE):
    """A `mace.modules.ScaleShiftMACE` that keeps its quantization in pickles, copies and state dicts."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        if state_of(self) is not None:
            return packed_pickle.reduce_packed(self)
        settle(self)
        entries = {key: value for key, value in self.__dict__.items() if key not in OWN_ENTRIES}
        return packed_pickle.reduce_stock(mace_models.ScaleShiftMACE, entries)

    def __deepcopy__(self, memo: dict[int, object]) -> ScaleShiftMACE:
        # Without this a copy would go through the packed form and lose the training state.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        # The engine belongs to the weights of the original.
        entries = {key: value for key, value in self.__dict__.items() if key != RECORD}
        torch.nn.Module.__setstate__(new, copy.deepcopy(entries, memo))
        return new

    def get_extra_state(self) -> Tensor:
        """Configuration and ranges, as bytes, so that checkpoints and rebuilt models keep them."""
        state = state_of(self)
        text = ""
        if state is not None:
            text = json.dumps(StoredState.of(self, packed.meta_of(self), weight_quantizers(self)).to_json())
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the quantization of the model that the state comes from."""
        text = bytes(state.cpu().numpy().tobytes()).decode()
        if text:
            _take_over(self, json.loads(text))


_ROOTS: dict[type, type] = {mace_models.ScaleShiftMACE: ScaleShiftMACE}


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a model carries a quantization of ours."""
    return state_of(model) is not None


def adopt(model: torch.nn.Module, state: ModelState) -> None:
    """Give a model the state of its quantization, and its root the class that keeps the state."""
    if type(model) in _ROOTS:
        model.__class__ = _ROOTS[type(model)]
    model.__dict__["gaq_state"] = state


def restore(model: torch.nn.Module, stored: StoredState) -> torch.nn.Module:
    """Make a plain model the quantized one that was stored, in place.

    Args:
        model: of the right architecture; with the dequantized weights if the stored model was converted.
        stored: configuration, ranges and grids of the weights.

    Raises:
        ModelFileError: if the stored form is newer than this version, or has a key that this version no longer follows.
    """
    check_format(stored.meta)
    try:
        config = parse_stored(stored.meta["config"], finished=stored.meta["status"] != "training")
    except ConfigError as error:
        raise ModelFileError(str(error)) from error
    state = ModelState(config, stored.meta["status"], dict(stored.weights), dict(stored.meta.get("notes", {})))
    converted = state.status == "converted"
    configure_attention(model, config)
    sites = find_sites(model)
    resolved = resolve_overrides(config, [site.name for site in sites])
    # The bits of the model are stored; those of its overrides follow from their sites.
    _, resolved = settle_bits(config, sites, resolved, lambda: 0.0)
    for site in sites:
        site_config = resolved[site.name]
        if site_config is None:
            continue
        features = new_feature_quantizer(site, site_config)
        if features is not None:
            features.differentiable_twice = not converted
        insert(site, {} if converted else new_weight_quantizers(site, site_config), features)
    stored.load_ranges(model, weight_quantizers(model))
    adopt(model, state)
    return model


def _take_over(model: torch.nn.Module, plain: Document) -> None:
    """Make a model the quantized one that a state dict describes, or take its ranges if it is quantized already.

    Raises:
        OtherSettingsError: if it is quantized with other settings.
    """
    stored = StoredState.from_json(plain)
    state = state_of(model)
    if state is None:
        restore(model, stored)
        return
    keep_earlier_preset(model, stored.meta["config"])
    if not same_grid(state.config.to_dict(), stored.meta["config"]):
        # MACE's command swallows what is raised here and trains from the start; `gaq_mace.training.run` asks again.
        state.conflict = describe_other_grid(state.config, stored.meta["config"])
        raise OtherSettingsError(state.conflict)
    state.conflict = ""
    # A checkpoint of the same run: the quantizers are in place, and only their ranges differ.
    state.resumed = True
    if SCHEDULE in (notes := stored.meta.get("notes", {})):
        state.notes[SCHEDULE] = notes[SCHEDULE]
    stored.load_ranges(model, weight_quantizers(model))
