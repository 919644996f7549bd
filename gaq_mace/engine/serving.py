"""Which calls of a model go through the fused kernels: decided here, once a call, and nowhere else.

A model whose class is a `Served` asks `engine_for` at the beginning of each call. The engine is made at the first call
that it serves, for the weights the model has then, and kept with the model.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from gaq import settings
from gaq.kernels.cpu import native
from gaq.model.state import state_of
from gaq_mace.engine.integers import integer_linears
from gaq_mace.engine.reading import Unsupported, python_modules
from gaq_mace.engine.step import Engine

__all__ = [
    "OWN_ENTRIES",
    "Served",
    "disabled",
    "engine_for",
    "engine_of",
    "give_up",
    "is_accelerated",
    "serves",
    "switched_off",
]

CHOICE, RECORD = "gaq_kernels", "gaq_engine"
OWN_ENTRIES = (CHOICE, RECORD)
"""What is kept in the ``__dict__`` of a model: True or False where `accelerate` or `decelerate` was called, and the
engine in use."""

_disabled: ContextVar[bool] = ContextVar("gaq_mace.engine.disabled", default=False)


@contextmanager
def disabled() -> Iterator[None]:
    """Within this context models run through the reference path, in this thread."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def switched_off() -> bool:
    """Whether all engines are off, by `disabled` or by ``GAQ_ENGINE=0``."""
    return _disabled.get() or not settings.current().engine


class Served:
    """What the classes of served models do when they are called. Stands before MACE's own class among the bases."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not in forward, which is TorchScript: a scripted, traced or compiled model holds the reference path.
        own = engine_for(self, kwargs) if len(args) == 1 else None
        if own is not None:
            try:
                return own(*args, **{k: v for k, v in kwargs.items() if k != "training"})
            except Unsupported as error:
                give_up(self, error)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


# MACE asks for a differentiable backward pass in all of these.
_NOT_SERVED = ("training", "compute_hessian", "compute_edge_forces", "compute_atomic_stresses", "lammps_mliap")
_DERIVATIVES = ("compute_virials", "compute_stress")


def is_accelerated(model: Any) -> bool:
    """Whether the calls of a model that ask for energies and forces go through the fused kernels.

    True of converted models, and of float models after `gaq_mace.engine.accelerate`, unless the kernels are switched
    off (`gaq_mace.engine.decelerate`, `gaq_mace.engine.disabled`, ``GAQ_ENGINE=0``) or were found not to serve it.
    """
    choice = model.__dict__.get(CHOICE)
    if choice is False or switched_off():
        return False
    state = state_of(model)
    if not (choice is True if state is None else state.status == "converted"):
        return False
    record = model.__dict__.get(RECORD)
    return record is None or record.engine is not None


def engine_for(model: Any, options: dict[str, Any]) -> Engine | None:
    """The engine a call of a model goes through, or None for the reference path.

    Only at inference, on the CPU or an NVIDIA GPU: training needs second derivatives or those by the weights, as do
    Hessians, and a graph that is traced for something else has to consist of operations that are known there. Why a
    model is not served at all is said once, in a warning.

    Args:
        model: whose class is a `Served`.
        options: of the call, by the names that MACE gives them.
    """
    if not is_accelerated(model) or any(options.get(name, False) for name in _NOT_SERVED):
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    weight = next(model.parameters())
    if weight.device.type not in ("cpu", "cuda") or weight.dtype not in (torch.float32, torch.float64):
        return None
    # Taking the forces frees the graph; where none are taken, the caller may differentiate by the weights.
    freed = options.get("compute_force", True) or any(options.get(name, False) for name in _DERIVATIVES)
    if not freed and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
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


class Record(NamedTuple):
    """The engine of a model, and what it was made from.

    Attributes:
        key: state of the weights, and the settings that an engine depends on.
        engine: None where the kernels do not serve the model.
        parts: of the model.
        reason: why there is no engine.
    """

    key: tuple[Any, ...]
    engine: Engine | None
    parts: _Parts
    reason: str | None = None


# One for all models: making an engine takes turns in any case, at forward differentiation.
_making = threading.RLock()


def record_of(model: Any, warn: bool = True) -> Record:
    """The record of a model, made anew when its weights or parts have changed; why there is no engine is said once."""
    kept: Record | None = model.__dict__.get(RECORD)
    parts = kept.parts if kept is not None and kept.parts.complete() else _Parts(model)
    key = (integer_linears(), *parts.state())
    if kept is not None and kept.key == key:
        if kept.parts is not parts:
            kept = model.__dict__[RECORD] = kept._replace(parts=parts)
        return kept
    with _making:
        made: Record | None = model.__dict__.get(RECORD)
        if made is None or made.key != key:
            try:
                # Whoever asks first, in inference mode too: the engine serves all later calls.
                with torch.inference_mode(False):
                    made = Record(key, Engine(model), parts)
            except (Unsupported, native.CompilerError) as error:
                made = Record(key, None, parts, str(error))
                if warn:
                    _warn(str(error), stacklevel=6)
            model.__dict__[RECORD] = made
        return made


def engine_of(model: Any) -> Engine | None:
    """The engine of a model, made anew when its weights have changed; None where the kernels do not serve it."""
    return record_of(model).engine


def give_up(model: Any, error: Unsupported) -> None:
    """A structure has shown what the engine cannot compute: say so, and keep to the reference path."""
    record: Record = model.__dict__[RECORD]
    model.__dict__[RECORD] = record._replace(engine=None, reason=str(error))
    _warn(str(error), stacklevel=4)


def _warn(reason: str, stacklevel: int) -> None:
    warnings.warn(f"gaq: this model runs through the reference path: {reason}", stacklevel=stacklevel)
