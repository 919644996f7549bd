"""Switching the fused kernels on for float models, and off for any model."""

from __future__ import annotations

import copy
import logging
from typing import SupportsIndex, TypeVar

import torch
from e3nn.util.jit import compile_mode
from mace.modules import models as mace_models

from gaq.model.state import state_of
from gaq.untyped import Document
from gaq_mace.engine.reading import Unsupported
from gaq_mace.engine.serving import CHOICE, OWN_ENTRIES, RECORD, Served, record_of, switched_off
from gaq_mace.packed_pickle import reduce_stock

__all__ = ["accelerate", "decelerate"]

Model = TypeVar("Model", bound=torch.nn.Module)


# It has the name of MACE's own class, because MACE compares names where it rebuilds a model.
@compile_mode("script")
class ScaleShiftMACE(Served, mace_models.ScaleShiftMACE):
    """A `mace.modules.ScaleShiftMACE` whose inference goes through the fused kernels.

    Weights, state dict and files are those of MACE's own class.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        return reduce_stock(mace_models.ScaleShiftMACE, _without_engine(self))

    def __deepcopy__(self, memo: dict[int, object]) -> ScaleShiftMACE:
        # Pickling would give a copy of MACE's own class. The engine is not copied: it serves the original's weights.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        torch.nn.Module.__setstate__(new, copy.deepcopy(_without_engine(self), memo))
        new.__dict__[CHOICE] = self.__dict__[CHOICE]
        return new


def _without_engine(model: torch.nn.Module) -> Document:
    """State of a model without the entries that the engine adds."""
    return {key: value for key, value in model.__dict__.items() if key not in OWN_ENTRIES}


def accelerate(model: Model) -> Model:
    """Let a MACE model compute energies, forces, virials and stresses through the fused kernels, in place.

    Converted models do so by default. A float model gives the same results as before, to the rounding of its dtype.
    Calls that need more than first derivatives (training, Hessians), or derivatives by the weights, still run MACE's
    own code. Files, pickles and state dicts of an accelerated float model are those of MACE's own class.

    Args:
        model: a `ScaleShiftMACE`, float or converted, such as ``calculator.models[0]`` of a `MACECalculator`.

    Returns:
        The same model.

    Raises:
        Unsupported: a `ValueError` that names the part of the model that the kernels do not serve.
        gaq.kernels.cpu.native.CompilerError: where the kernels cannot be built; the message says what helps.
    """
    state = state_of(model)
    if state is not None and state.status != "converted":
        raise Unsupported(
            "this model is in training: its weights are rounded anew in each call. Convert it first (gaq.convert)."
        )
    if type(model) is not mace_models.ScaleShiftMACE and not isinstance(model, Served):
        raise Unsupported(
            f"a {type(model).__module__}.{type(model).__name__} cannot be accelerated: the fused kernels serve "
            "mace.modules.ScaleShiftMACE, the class that mace_run_train makes. Give the plain model, not one that is "
            "compiled or scripted; a model of an older class has to be trained again."
        )
    for attribute, option in (("cueq_config", "enable_cueq"), ("oeq_config", "enable_oeq")):
        if getattr(getattr(model, attribute, None), "enabled", False):
            raise Unsupported(f"this model was built with {option} and has kernels of its own. Give the plain model.")
    weight = next(model.parameters())
    if weight.device.type not in ("cpu", "cuda") or weight.dtype not in (torch.float32, torch.float64):
        raise Unsupported(
            f"a model in {weight.dtype} on {weight.device} cannot be accelerated: the fused kernels compute in float32 "
            "or float64, on a CPU or an NVIDIA GPU."
        )
    if switched_off():
        logging.warning("gaq: the fused kernels are switched off (GAQ_ENGINE=0): the model runs as it did.")
    elif (reason := record_of(model, warn=False).reason) is not None:
        model.__dict__.pop(RECORD, None)
        raise Unsupported(f"this model cannot be accelerated: {reason}")
    model.__dict__[CHOICE] = True
    if type(model) is mace_models.ScaleShiftMACE:
        model.__class__ = ScaleShiftMACE  # type: ignore[assignment]  # changed in place
    return model


def decelerate(model: Model) -> Model:
    """Let a model run through the reference path, in place: MACE's code, with our quantizers in a quantized model.

    A float model has MACE's own class again. `accelerate` undoes this.
    """
    for name in OWN_ENTRIES:
        model.__dict__.pop(name, None)
    if type(model) is ScaleShiftMACE:
        model.__class__ = mace_models.ScaleShiftMACE  # type: ignore[assignment]  # changed in place
    elif isinstance(model, Served):
        model.__dict__[CHOICE] = False
    return model
