"""The decision which calls of a model go through the fused kernels, made here and nowhere else.

A model whose class is a `Served` asks `engine_for` at the beginning of each call. Its engine is made at the first call
that the engine serves, for the weights that the model has then, and is kept with the model.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from gaq import settings
from gaq.kernels.cpu import native
from gaq.model.state import state_of
from gaq.progress import explained
from gaq.untyped import AnyModule, Options
from gaq_mace.deferred import DEFERRED, settle
from gaq_mace.engine.integers import integer_linears
from gaq_mace.engine.reading import Unsupported, python_modules
from gaq_mace.engine.soundness import checked, edge_lengths
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

logger = logging.getLogger(__name__)

CHOICE, RECORD = "gaq_kernels", "gaq_engine"
OWN_ENTRIES = (CHOICE, RECORD)
"""Entries in the ``__dict__`` of a model: True or False where `accelerate` or `decelerate` was called, and the `Record`
of its engine."""

_disabled: ContextVar[bool] = ContextVar("gaq_mace.engine.disabled", default=False)


@contextmanager
def disabled() -> Iterator[None]:
    """Context in which models run through the reference path, in the current thread."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def switched_off() -> bool:
    """Whether all engines are off, by `disabled` or by ``GAQ_ENGINE=0``."""
    return _disabled.get() or not settings.current().engine


class Served:
    """Base of the classes of served models: sends each call to the engine or to MACE. Comes before MACE's own class."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        # Not in forward, which is TorchScript: a scripted, traced or compiled model holds the reference path.
        engine = engine_for(self, kwargs) if len(args) == 1 else None
        if engine is not None:
            try:
                if kwargs.get(LAMMPS, False):
                    return engine.of_part(args[0])  # type: ignore[arg-type]  # a dict
                return engine(*args, **{k: v for k, v in kwargs.items() if k != "training"})
            except Unsupported as error:
                give_up(self, error)
        if DEFERRED in self.__dict__:
            settle(self)  # type: ignore[arg-type]  # a module, by its other base
        call = super().__call__  # type: ignore[misc]  # of the next base, MACE's class
        data = args[0] if len(args) == 1 and not any(kwargs.get(name, False) for name in _NOT_CHECKED) else None
        if not isinstance(data, dict) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return call(*args, **kwargs)
        # Before the call, in which MACE changes positions and shifts.
        batch: dict[str, torch.Tensor] = dict(data)
        lengths = edge_lengths(batch)
        return checked(call(*args, **kwargs), batch["positions"], lengths, batch["batch"], batch["edge_index"][0])


# In each of these MACE needs a differentiable backward pass.
_NOT_SERVED = ("training", "compute_hessian", "compute_atomic_stresses")
_DERIVATIVES = ("compute_virials", "compute_stress")
LAMMPS, EDGE_FORCES = "lammps_mliap", "compute_edge_forces"
# Data of LAMMPS have no positions, and a loss is NaN by MACE's own code.
_NOT_CHECKED = ("training", LAMMPS)


def is_accelerated(model: AnyModule) -> bool:
    """Whether calls of a model for energies and forces go through the fused kernels.

    True for converted models, and for float models after `gaq_mace.engine.accelerate`, unless the kernels are switched
    off (`gaq_mace.engine.decelerate`, `gaq_mace.engine.disabled`, ``GAQ_ENGINE=0``) or turned out not to serve the
    model.
    """
    choice = model.__dict__.get(CHOICE)
    if choice is False or switched_off():
        return False
    state = state_of(model)
    if not (choice is True if state is None else state.status == "converted"):
        return False
    record = model.__dict__.get(RECORD)
    return record is None or record.engine is not None


def engine_for(model: AnyModule, options: Options) -> Engine | None:
    """Engine for a call of a model; None for the reference path.

    The engine serves inference on the CPU or an NVIDIA GPU. Training and Hessians need second derivatives or
    derivatives by the weights, and a traced graph must consist of operations that its runtime knows. Where a model is
    not served at all, one warning says why.

    Args:
        model: of a class derived from `Served`.
        options: of the call, by the names that MACE gives them.
    """
    # Comes first: torch.compile cannot trace what follows.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if not is_accelerated(model) or any(options.get(name, False) for name in _NOT_SERVED):
        return None
    lammps = options.get(LAMMPS, False)
    if bool(lammps) != bool(options.get(EDGE_FORCES, False)):
        return None  # what the engine computes of one, MACE's class for LAMMPS asks of the other
    weight = next(model.parameters())
    if weight.device.type not in ("cpu", "cuda") or weight.dtype not in (torch.float32, torch.float64):
        return None
    # Computing forces frees the autograd graph. Without forces the caller may differentiate by the weights.
    freed = lammps or options.get("compute_force", True) or any(options.get(name, False) for name in _DERIVATIVES)
    if not freed and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return None
    engine = engine_of(model)
    return engine if engine is not None and engine.rounds_as_deployed() else None


def serves(model: AnyModule, options: Options) -> bool:
    """Whether a call of a model goes through the engine."""
    return engine_for(model, options) is not None


class _Parts:
    """Modules and parameters of a model, listed to check quickly whether one has been replaced or changed.

    In a replayed step, a walk through all modules would take most of the host's time.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        modules = python_modules(model)
        self.lengths = [(members, len(members)) for m in modules for members in (m._modules, m._parameters)]
        self.children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self.parameters = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items()]
        self.weights = list(model.parameters())

    def complete(self) -> bool:
        """Whether the model still has the same modules and parameters."""
        same = all(members.get(name) is child for members, name, child in self.children)
        same = same and all(members.get(name) is p for members, name, p in self.parameters)
        return same and all(len(members) == length for members, length in self.lengths)

    def state(self) -> tuple[object, ...]:
        """Device, address, version and dtype of each weight: it changes when a weight does."""
        return tuple((p.device, p.data_ptr(), p._version, p.dtype) for p in self.weights)


class Record(NamedTuple):
    """Engine of a model, with what it was made from.

    Attributes:
        key: settings that an engine depends on, and state of the weights.
        engine: None where the kernels do not serve the model.
        parts: modules and parameters of the model.
        reason: why there is no engine; None where there is one.
    """

    key: tuple[object, ...]
    engine: Engine | None
    parts: _Parts
    reason: str | None = None


_FIRST = "first step of this model: its kernels are compiled (once on a machine), and its tables made"

# One lock for all models: forward differentiation lets only one engine be made at a time anyway.
_making = threading.RLock()


def record_of(model: AnyModule, warn: bool = True) -> Record:
    """Record of a model, remade when its weights or parts have changed.

    Args:
        model: of a class derived from `Served`.
        warn: whether a warning says why a new record has no engine.
    """
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
                # The first call may run in inference mode; the engine serves later calls outside of it too.
                with torch.inference_mode(False), explained(_FIRST, say=logger.info):
                    made = Record(key, Engine(model), parts)
            except (Unsupported, native.CompilerError) as error:
                made = Record(key, None, parts, str(error))
                if warn:
                    _warn(str(error), stacklevel=6)
            model.__dict__[RECORD] = made
        return made


def engine_of(model: AnyModule) -> Engine | None:
    """Engine of a model, remade when its weights have changed; None where the kernels do not serve the model."""
    return record_of(model).engine


def give_up(model: AnyModule, error: Unsupported) -> None:
    """Send all later calls of a model to the reference path, with a warning: the engine cannot compute a structure."""
    record: Record = model.__dict__[RECORD]
    model.__dict__[RECORD] = record._replace(engine=None, reason=str(error))
    _warn(str(error), stacklevel=4)


def _warn(reason: str, stacklevel: int) -> None:
    warnings.warn(f"gaq: this model runs through the reference path: {reason}", stacklevel=stacklevel)
