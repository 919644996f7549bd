"""The engine that serves a call of a model: made once for its weights, kept with it, and how it is switched off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gaq import settings
from gaq.kernels.cpu import native
from gaq.model.state import state_of
from gaq_mace.engine.integers import integer_linears
from gaq_mace.engine.reading import Unsupported, python_modules
from gaq_mace.engine.step import Engine

__all__ = ["disabled", "engine_for", "engine_of", "give_up", "serves"]

_disabled = False


@contextmanager
def disabled() -> Iterator[None]:
    """Within this context models run through the reference path."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


def switched_off() -> bool:
    """Whether the engine is turned off, here or by ``GAQ_ENGINE=0``."""
    return _disabled or not settings.current().engine


# MACE asks for a differentiable backward pass in all of these.
_NOT_SERVED = ("compute_hessian", "compute_edge_forces", "compute_atomic_stresses", "lammps_mliap")


def engine_for(model: Any, options: dict[str, Any]) -> Engine | None:
    """The engine a call of a model goes through, or None.

    Only at inference, on the CPU or an NVIDIA card: training needs second derivatives, as do Hessians, and a graph that
    is traced for something else has to consist of operations that are known there. Why a model is not served at all is
    said once, in a warning.
    """
    if options.get("training", False) or any(options.get(name, False) for name in _NOT_SERVED) or switched_off():
        return None
    state = state_of(model)
    if state is None or state.status != "converted" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    weight = next(model.parameters())
    if weight.device.type not in ("cpu", "cuda") or weight.dtype not in (torch.float32, torch.float64):
        return None
    own = engine_of(model)
    return own if own is not None and own.rounds_as_deployed() else None


def serves(model: Any, options: dict[str, Any]) -> bool:
    """Whether a call of a model goes through the engine."""
    return engine_for(model, options) is not None


class _Parts:
    """The modules and parameters of a model, to see in a moment whether one of them has been replaced or changed.

    A walk through all modules in every step would be most of what a replayed step leaves to the host.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        modules = python_modules(model)
        self.lengths = [(own, len(own)) for m in modules for own in (m._modules, m._parameters)]
        self.children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self.parameters = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items()]
        self.weights = list(model.parameters())

    def complete(self) -> bool:
        """Whether the model consists of what it did."""
        same = all(own.get(name) is child for own, name, child in self.children)
        same = same and all(own.get(name) is p for own, name, p in self.parameters)
        return same and all(len(own) == length for own, length in self.lengths)

    def state(self) -> tuple[Any, ...]:
        """Where the weights lie, and what tells one state of them from another."""
        return tuple((p.device, p.data_ptr(), p._version, p.dtype) for p in self.weights)


def engine_of(model: Any) -> Engine | None:
    """The engine of a model, built anew when its weights have changed; None where the kernels do not serve it."""
    kept = model.__dict__.get("gaq_engine")
    parts = kept[2] if kept is not None and kept[2].complete() else _Parts(model)
    key = (integer_linears(), *parts.state())
    if kept is None or kept[0] != key:
        engine: Engine | None = None
        try:
            engine = Engine(model)
        except (Unsupported, native.CompilerError) as error:
            _warn(error)
        kept = (key, engine, parts)
    elif kept[2] is not parts:
        kept = (*kept[:2], parts)
    model.__dict__["gaq_engine"] = kept
    return kept[1]  # type: ignore[no-any-return]


def give_up(model: Any, error: Unsupported) -> None:
    """A structure has shown what the engine cannot compute: say so, and keep to the reference path."""
    _warn(error)
    key, _, parts = model.__dict__["gaq_engine"]
    model.__dict__["gaq_engine"] = (key, None, parts)


def _warn(error: Exception) -> None:
    warnings.warn(f"gaq: this model runs through the reference path: {error}", stacklevel=4)
