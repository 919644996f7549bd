"""Models whose generated code is compiled when something asks for it.

e3nn writes code for each of its layers, optimizes it and compiles it to TorchScript, MACE does the same for its
contractions. That is most of the time its constructor takes, and for nothing where the fused kernels serve the model.
In a model that `constructing` made, a `Deferred` stands for each piece of generated code, with the same buffers under
the same names; the code of linear layers, which has no buffers, is not even written. The reference path, TorchScript
and pickles get the compiled code; see `settle`.
"""

from __future__ import annotations

import copy
import inspect
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import mace  # noqa: F401  (before e3nn)
import opt_einsum_fx
import torch
from e3nn.math import _normalize_activation as normalization
from e3nn.math import perm
from e3nn.o3 import _linear as e3nn_linear
from e3nn.o3._tensor_product import _codegen as e3nn_product
from e3nn.util.codegen import CodeGenMixin
from mace.tools import cg
from opt_einsum_fx import jitable
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from gaq.third_party_warnings import known_hidden

__all__ = ["DEFERRED", "Deferred", "construct", "constructing", "mark", "settle"]

DEFERRED = "gaq_deferred"
"""Entry in the ``__dict__`` of a model's root that has code yet to be compiled."""

_optimize: Callable[..., fx.GraphModule] = opt_einsum_fx.optimize_einsums_full
_active: ContextVar[bool] = ContextVar("gaq_mace.deferred.active", default=False)
_lock = threading.RLock()


@dataclass(frozen=True)
class _Recipe:
    """How to compile a piece of code.

    Attributes:
        graph: the code as it was written; where it has no buffers, a function that writes it.
        inputs: examples for the optimization of its einsums; None where it is not optimized.
        scripted: whether it becomes TorchScript.
    """

    graph: fx.GraphModule | Callable[[], fx.GraphModule]
    inputs: tuple[Tensor, ...] | None
    scripted: bool

    def compile(self) -> torch.nn.Module:
        written = self.graph if isinstance(self.graph, fx.GraphModule) else self.graph()
        graph = written if self.inputs is None else _optimize(written, self.inputs)
        if self.scripted:
            with known_hidden():  # as where a model is loaded
                return torch.jit.script(jitable(graph))
        return copy.deepcopy(graph) if graph is self.graph else graph


class Deferred(torch.nn.Module):
    """A piece of generated code, compiled when it is called, scripted or pickled.

    Args:
        recipe: how to compile it. Copies share it.
    """

    def __init__(self, recipe: _Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.made: list[torch.nn.Module] = []  # in a list, because it is no child of this module
        if isinstance(recipe.graph, fx.GraphModule):
            for name, buffer in recipe.graph.named_buffers():
                self.register_buffer(name, buffer)

    def compiled(self) -> torch.nn.Module:
        """Compile the code, with this module's buffers."""
        with _lock:
            if not self.made:
                made = self.recipe.compile()
                for name, buffer in self.named_buffers():
                    made.to(buffer.device, buffer.dtype)
                    getattr(made, name).copy_(buffer)
                self.made.append(made)
            return self.made[0]

    def forward(self, *arguments: Tensor) -> Any:
        return self.compiled()(*arguments)

    def _apply(self, *args: Any, **kwargs: Any) -> Deferred:
        self.made.clear()
        super()._apply(*args, **kwargs)
        return self

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return self.compiled()

    def __deepcopy__(self, memo: dict[int, Any]) -> Deferred:
        new = Deferred(self.recipe)
        memo[id(self)] = new
        for name, buffer in self.named_buffers():
            new.register_buffer(name, buffer.detach().clone())
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        compiled = self.compiled()
        if not isinstance(compiled, torch.jit.ScriptModule):
            return compiled.__reduce_ex__(protocol)
        content = io.BytesIO()
        torch.jit.save(compiled, content)
        return torch.jit.load, (io.BytesIO(content.getvalue()),)


def construct(kind: Callable[..., torch.nn.Module], **options: Any) -> torch.nn.Module:
    """Construct a model whose generated code is compiled later."""
    with constructing():
        model = kind(**options)
    mark(model)
    return model


def mark(model: torch.nn.Module) -> None:
    """Note in a model that it has code yet to be compiled, if it has."""
    if any(isinstance(module, Deferred) for module in model.modules()):
        model.__dict__[DEFERRED] = True


def settle(model: torch.nn.Module) -> None:
    """Compile all code of a model that waits for it, in place. The model then is as its constructor makes it."""
    if not model.__dict__.pop(DEFERRED, False):
        return
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, Deferred):
                module._modules[name] = child.compiled()
                if isinstance(module, CodeGenMixin) and child.recipe.scripted:
                    module.__codegen__.append(name)


def _optimize_later(model: fx.GraphModule, example_inputs: tuple[Tensor, ...]) -> Any:
    """Stand for `opt_einsum_fx.optimize_einsums_full`: the graph as it is, with a note of the optimization."""
    if not _active.get():
        return _optimize(model, example_inputs)
    model.__dict__["gaq_inputs"] = tuple(example_inputs)
    return model


def _defer_contraction(model: fx.GraphModule, example_inputs: tuple[Tensor, ...]) -> Any:
    """Stand for `opt_einsum_fx.optimize_einsums_full` where MACE's contractions call it."""
    if not _active.get():
        return _optimize(model, example_inputs)
    return Deferred(_Recipe(model, tuple(example_inputs), scripted=False))


def _traced_apart(original: Callable[..., fx.GraphModule]) -> Callable[..., fx.GraphModule]:
    """Stand for `torch.fx.symbolic_trace` where MACE's contractions call it, on functions of tensors.

    That puts its tracer into `torch.nn.Module` for all threads: modules that other threads call meanwhile would land in
    the graph.
    """

    def trace(function: Any) -> fx.GraphModule:
        if not _active.get() or isinstance(function, torch.nn.Module):
            return original(function)
        graph = fx.Graph()
        tracer = fx.proxy.GraphAppendingTracer(graph)
        inputs = [fx.Proxy(graph.placeholder(name), tracer) for name in inspect.signature(function).parameters]
        graph.output(function(*inputs).node)
        return fx.GraphModule(torch.nn.Module(), graph, function.__name__)

    return trace


def _write_later(original: Callable[..., tuple[fx.GraphModule, int, int]]) -> Callable[..., tuple[Any, int, int]]:
    """Stand for e3nn's ``_codegen_linear``: its code, which has no buffers, is written when it is compiled."""

    def write(irreps_in: Any, irreps_out: Any, instructions: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        if not _active.get():
            return original(irreps_in, irreps_out, instructions, *args, **kwargs)
        weights = sum(prod(instruction.path_shape) for instruction in instructions if instruction.i_in != -1)
        biases = sum(irreps_out[instruction.i_out].dim for instruction in instructions if instruction.i_in == -1)

        def graph() -> fx.GraphModule:
            return original(irreps_in, irreps_out, instructions, *args, **kwargs)[0]

        return graph, weights, biases

    return write


def _inverse_permutation(p: Sequence[int]) -> tuple[int, ...]:
    """Stand for e3nn's ``perm.inverse``, which takes time with the square of the length."""
    inverse = [0] * len(p)
    for place, image in enumerate(p):
        inverse[image] = place
    return tuple(inverse)


class _NotDrawn(TorchFunctionMode):
    """Constructors get zeros in place of random numbers: what they draw for weights, those of a file replace.

    Draws from a generator of their own, such as e3nn's samples for normalization, stay.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and "generator" not in kwargs:
            func = torch.zeros
        return func(*args, **kwargs)


def _register_later(original: Callable[..., None]) -> Callable[..., None]:
    """Stand for e3nn's ``CodeGenMixin._codegen_register``."""

    def register(self: Any, funcs: Mapping[str, Any]) -> None:
        import e3nn

        if not _active.get():
            return original(self, funcs)
        if not hasattr(self, "__codegen__"):
            self.__codegen__ = []
        scripted = bool(e3nn.get_optimization_defaults()["jit_script_fx"])
        for name, graph in funcs.items():
            inputs = graph.__dict__.pop("gaq_inputs", None)
            setattr(self, name, Deferred(_Recipe(graph, inputs, scripted)))
        return None

    return register


def _remembering(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stand for MACE's ``_wigner_nj``, which computes the same products anew for each output and correlation."""
    results: dict[Any, Any] = {}

    def products(irrepss: Any, normalization: str = "component", filter_ir_mid: Any = None, dtype: Any = None) -> Any:
        if not _active.get():
            return original(irrepss, normalization, filter_ir_mid, dtype)
        key = (tuple(map(str, irrepss)), normalization, str(filter_ir_mid), dtype)
        if key not in results:
            results[key] = original(irrepss, normalization, filter_ir_mid, dtype)
        return list(results[key])

    return products


def _remembering_moments(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stand for e3nn's ``moment``, which averages a function over a million numbers, the same ones in each layer."""
    results: dict[Any, Any] = {}

    def moment(f: Any, n: int, dtype: Any = None, device: Any = None) -> Any:
        if not _active.get():
            return original(f, n, dtype, device)
        key = (f, n, dtype, str(device))
        if key not in results:
            results[key] = original(f, n, dtype, device)
        return results[key].clone()

    return moment


@contextmanager
def constructing() -> Iterator[None]:
    """Context in which constructors of MACE and e3nn leave the compilation of generated code for later.

    They draw no weights either: whoever constructs a model here loads its weights. Other threads, which may construct
    models meanwhile, are not affected.
    """
    with _lock, ExitStack() as stack:
        for target, name, stand_in in (
            (e3nn_linear, "_codegen_linear", _write_later(e3nn_linear._codegen_linear)),
            (e3nn_product, "optimize_einsums_full", _optimize_later),
            (opt_einsum_fx, "optimize_einsums_full", _defer_contraction),
            (fx, "symbolic_trace", _traced_apart(fx.symbolic_trace)),
            (perm, "inverse", _inverse_permutation),
            (CodeGenMixin, "_codegen_register", _register_later(CodeGenMixin._codegen_register)),
            (cg, "_wigner_nj", _remembering(cg._wigner_nj)),
            (normalization, "moment", _remembering_moments(normalization.moment)),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        token = _active.set(True)
        stack.callback(_active.reset, token)
        stack.enter_context(_NotDrawn())
        yield
