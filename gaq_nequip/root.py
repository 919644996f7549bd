"""The classes of a quantized model's root, which keep its quantization in checkpoints and packages.

Embedded in packages, like `gaq_nequip.layers`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nequip.data import AtomicDataDict
from nequip.nn.compile import CompileGraphModel
from nequip.nn.graph_model import GraphModel
from nequip.nn.model_modifier_utils import model_modifier
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode

from gaq.model.state import StoredState, is_kind, require_state, same_grid, settle_codes, state_of
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import WeightQuantizer
from gaq_nequip.freeze import freeze
from gaq_nequip.packed import PackedWeight
from gaq_nequip.weights import hold_scales, settle_species, weight_quantizers

__all__ = ["COMPILES", "QuantizedCompileGraphModel", "QuantizedGraphModel", "adopt", "eager", "stored_state"]

COMPILES = "gaq_compiles"
"""Attribute of a model that is built to be compiled and not to be trained."""


def stored_state(model: torch.nn.Module) -> StoredState:
    """The quantization of a model as a checkpoint keeps it.

    Of weights in training it holds the scales with which they were trained and evaluated. The averaged weights in it
    are averages of rounded ones: a scale taken from them would not be that of the codes they are averages of.
    """
    state = require_state(model)
    stored = StoredState.of(model, dict(state.notes.get("meta", {})), weight_quantizers(model))
    stored.meta.update({"status": state.status, "config": state.config.to_dict(), "notes": state.notes})
    return stored


class _QuantizedRoot:
    """What the root of a quantized model has more than NequIP's."""

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation; in evaluation scales are held."""
        super().train(mode)  # type: ignore[misc]  # of the host's class, which comes after this one
        model: Any = self
        state = state_of(model)
        if state is None:
            return self
        if not mode and state.status == "training":
            hold_scales(model, fresh=not state.holds_scales)
            if model.__dict__.get(COMPILES):
                settle_species(model)
        for module in model.modules():
            if is_kind(module, FeatureQuantizer):
                # Only training differentiates forces again; the rest takes the fused path.
                module.differentiable_twice = mode
        return self

    def get_extra_state(self) -> Tensor:
        """Configuration and ranges, as bytes, so that checkpoints keep them."""
        model: Any = self
        text = json.dumps(stored_state(model).to_json()) if state_of(model) is not None else ""
        return torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the ranges of the model the state comes from.

        Raises:
            ValueError: if that model was quantized with other settings.
        """
        model: Any = self
        text = bytes(state.cpu().numpy().tobytes()).decode().strip()
        own = state_of(model)
        if not text or own is None:
            return
        stored = StoredState.from_json(json.loads(text))
        if not same_grid(own.config.to_dict(), stored.meta["config"]):
            raise ValueError(
                "this checkpoint was written with other quantization settings "
                f"(preset {stored.meta['config']['preset']}) than the ones given (preset {own.config.preset}). "
                "Restart with the settings it was written with, or start a new run from its float model."
            )
        own.resumed = True
        own.status = stored.meta["status"]
        if own.status != "training":
            settle_codes(model)
        own.notes = dict(stored.meta.get("notes", {}))
        own.weights = dict(stored.weights)
        stored.load_ranges(model, weight_quantizers(model))
        own.holds_scales = bool(stored.steps)

    @property
    def metadata(self) -> dict[str, str]:
        """NequIP's metadata, and what a compiled file is to say about its quantization."""
        model: Any = self
        found: dict[str, str] = dict(super().metadata)  # type: ignore[misc]  # of the host's class
        state = state_of(model)
        if state is not None:
            found["gaq_preset"] = state.config.preset
            found["gaq_status"] = state.status
            found["gaq_config"] = json.dumps(state.config.to_dict())
            found.update(_size_metadata(model))
        return found

    def freeze_weights(self) -> Any:
        """`gaq_nequip.freeze.freeze` of the model, as the package it may come from has it."""
        model: Any = self
        return freeze(model)

    @model_modifier(persistent=False)
    @classmethod
    def enable_GAQInt8(cls, model: torch.nn.Module) -> torch.nn.Module:
        """Replace the weights by their integer codes and scales, and fold the self-connection where that is smaller.

        For ``nequip-compile --modifiers enable_GAQInt8``; the model can only be evaluated afterwards. Codes of 9 to 15
        bits are kept as int16: they are read in every step.
        """
        own: Any = model
        frozen = own.freeze_weights()
        for module in frozen.modules():
            if is_kind(module, PackedWeight):
                module.widen()
        return frozen


def _size_metadata(model: torch.nn.Module) -> dict[str, str]:
    packed = [m for m in model.modules() if is_kind(m, PackedWeight)]
    if not packed:
        return {}
    return {
        "gaq_weight_bytes": str(sum(m.bytes for m in packed) + 4 * sum(p.numel() for p in model.parameters())),
        "gaq_float_weight_bytes": str(require_state(model).notes.get("float_weight_bytes", "")),
        "gaq_folded": str(int(any(hasattr(m, "gaq_folded") for m in model.modules()))),
    }


class QuantizedGraphModel(_QuantizedRoot, GraphModel):
    """NequIP's `GraphModel` that keeps its quantization in checkpoints and packages."""

    gaq_host_class = "GraphModel"


class _LastingDetach(TorchFunctionMode):
    """Writes `Tensor.detach` so that a graph traced for training keeps it.

    NequIP traces with a table of decompositions that makes ``aten.detach`` an alias. It has to: the backward pass in
    the graph reads saved results through such nodes, and is differentiated again. But the straight-through estimator
    ``x + (round(x) - x).detach()`` with the detach gone has a gradient of exactly zero, and nothing would be trained.
    Reading the bits as integers and back says the same in operations that stay: integers have no gradient.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.detach and get_proxy_mode() is not None and args[0].dtype in _BITS:
            return args[0].view(_BITS[args[0].dtype]).view(args[0].dtype)
        return func(*args, **(kwargs or {}))


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@contextmanager
def _lasting_detach(model: torch.nn.Module) -> Iterator[None]:
    """Within this context every call of the model itself, but not of a graph made from it, is in `_LastingDetach`.

    Dynamo ties what it compiles to the modes that are active, so the mode must not be around the compilation.
    """
    mode = _LastingDetach()

    def enter(module: Any, arguments: Any) -> None:
        mode.__enter__()

    def leave(module: Any, arguments: Any, output: Any) -> None:
        mode.__exit__(None, None, None)

    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _step(quantizer: FeatureQuantizer) -> float:
    """The coarsest step of what a quantizer rounds, relative to its range; 0 if it rounds nothing."""
    steps = [0.0]
    if quantizer.round_scalars and quantizer.scalars_enabled:
        steps.append(1.0 / quantizer.scalar_top)
    if quantizer.round_vectors and quantizer.vectors_enabled:
        steps.append(quantizer.vector_range_factor / quantizer.magnitude_top)
        if quantizer.split:
            steps.append(1.0 / quantizer.levels)
    return max(steps)


class QuantizedCompileGraphModel(_QuantizedRoot, CompileGraphModel):
    """NequIP's `CompileGraphModel` that keeps its quantization in checkpoints and packages.

    Weights, scales and ranges are inputs of the compiled graph. What quantizers are told by plain attributes is fixed
    when it is traced, so there is a graph for each state of these: training and evaluation differ where features are
    rounded, and so does training before and after a branch is switched.
    """

    gaq_host_class = "CompileGraphModel"

    def _switches(self) -> tuple[Any, ...]:
        found: list[Any] = []
        for module in self.modules():
            if is_kind(module, FeatureQuantizer):
                found.append((module.scalars_enabled, module.vectors_enabled, module.vector_range_factor))
                found.append((module.differentiable_twice, getattr(module, "calibrated", True)))
            elif is_kind(module, WeightQuantizer):
                found.append((module.enabled, module.scale_is_fixed, getattr(module, "held", False)))
        return tuple(found)

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        graphs: dict[Any, dict[Any, Any]] = self.__dict__.setdefault("gaq_graphs", {})
        switches = self._switches()
        own = graphs.pop(switches, {})
        graphs[switches] = own
        # Training and validation take turns; a state of the schedule that is over does not come back.
        if len(graphs) > 2:
            del graphs[next(iter(graphs))]
        self._compiled_cache = (own,)
        return super().forward(data)

    def _compile_variant(self, data: AtomicDataDict.Type, input_signature: tuple[str, ...], cache: Any) -> None:
        try:
            with _lasting_detach(self.model):
                super()._compile_variant(data, input_signature, cache)
        except AssertionError:
            # NequIP asks the graph to agree with the modules more closely than one step of the rounding of features.
            # Their sums differ in the last bit, and a feature on the edge of two steps is then rounded to the other.
            if input_signature not in cache or not self._agrees(data, input_signature, cache):
                raise

    def _agrees(self, data: AtomicDataDict.Type, input_signature: tuple[str, ...], cache: Any) -> bool:
        """Whether a graph gives the labels in the data as the modules do, up to a few steps of the rounding."""
        tolerance = 4.0 * max([_step(m) for m in self.modules() if is_kind(m, FeatureQuantizer)], default=0.0)
        compiled, output_fields = cache[input_signature]
        inputs = {key: data[key] for key in input_signature}
        found = self._compiled_forward(inputs, compiled, input_signature, output_fields)
        wanted = self.model(inputs)
        for key in set(output_fields) & data.keys():
            expected = wanted[key].detach().double()
            error = (found[key].detach().double() - expected).abs()
            if not bool((error <= tolerance * expected.abs().max().clamp_min(1.0)).all()):
                return False
        return True


_ROOTS: dict[str, type] = {"GraphModel": QuantizedGraphModel, "CompileGraphModel": QuantizedCompileGraphModel}


def adopt(model: torch.nn.Module, state: Any) -> None:
    """Make a model a quantized one, with this state."""
    model.__class__ = _ROOTS[getattr(type(model), "gaq_host_class", type(model).__name__)]
    model.__dict__["gaq_state"] = state


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Within this context a train-time compiled model evaluates its modules and not its compiled graph."""
    before = model.__class__
    if getattr(model, "is_compile_graph_model", False):
        model.__class__ = QuantizedGraphModel
    try:
        yield
    finally:
        model.__class__ = before
