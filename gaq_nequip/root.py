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

from gaq.model.state import (
    TRAINED,
    ModelState,
    StoredState,
    describe_other_grid,
    is_kind,
    keep_earlier_preset,
    require_state,
    same_grid,
    settle_codes,
    state_of,
)
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import WeightQuantizer
from gaq.untyped import AnyModule, Options
from gaq_nequip.freeze import freeze
from gaq_nequip.live import is_live, live_rounding
from gaq_nequip.names import SPECIES
from gaq_nequip.packed import PackedWeight, widen_codes
from gaq_nequip.weights import hold_scales, settle_species, weight_quantizers

__all__ = ["COMPILES", "QuantizedCompileGraphModel", "QuantizedGraphModel", "adopt", "eager", "stored_state"]

COMPILES = "gaq_compiles"
"""Name of an attribute: whether the model was built to be compiled, and not to be trained."""


def stored_state(model: torch.nn.Module) -> StoredState:
    """The quantization of a model as a checkpoint keeps it.

    For weights in training it includes the scales with which they were trained and evaluated. The averaged weights of a
    checkpoint are averages of rounded weights, so a scale computed from them would differ from that of their codes.
    """
    state = require_state(model)
    stored = StoredState.of(model, dict(state.notes.get("meta", {})), weight_quantizers(model))
    stored.meta.update({"status": state.status, "config": state.config.to_dict(), "notes": state.notes})
    return stored


class _QuantizedRoot:
    """What the root of a quantized model adds to NequIP's: quantization in states, metadata and packages."""

    def train(self, mode: bool = True) -> AnyModule:
        """Switch between training and evaluation; in evaluation scales are held."""
        super().train(mode)  # type: ignore[misc]  # of the NequIP class that the subclasses inherit as well
        model: AnyModule = self
        state = state_of(model)
        if state is None:
            return self
        if not mode and state.status == "training":
            hold_scales(model, fresh=not state.holds_scales)
            if model.__dict__.get(COMPILES):
                settle_species(model)
        for module in model.modules():
            if is_kind(module, FeatureQuantizer):
                # Only training differentiates forces again; evaluation can take the fused path.
                module.differentiable_twice = mode
        return self

    def get_extra_state(self) -> Tensor:
        """Configuration and ranges as JSON text in a tensor of bytes, so that checkpoints keep them."""
        model: AnyModule = self
        text = json.dumps(stored_state(model).to_json()) if state_of(model) is not None else ""
        return torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Load the ranges of the model that the state comes from.

        Raises:
            ValueError: if that model was quantized with other settings.
        """
        model: AnyModule = self
        text = bytes(state.cpu().numpy().tobytes()).decode().strip()
        model_state = state_of(model)
        if not text or model_state is None:
            return
        stored = StoredState.from_json(json.loads(text))
        keep_earlier_preset(model, stored.meta["config"])
        if not same_grid(model_state.config.to_dict(), stored.meta["config"]):
            raise ValueError(describe_other_grid(model_state.config, stored.meta["config"]))
        model_state.resumed = True
        model_state.status = stored.meta["status"]
        if model_state.status != "training":
            settle_codes(model)
        model_state.notes = dict(stored.meta.get("notes", {}))
        model_state.weights = dict(stored.weights)
        stored.load_ranges(model, weight_quantizers(model))
        model_state.holds_scales = bool(stored.steps)

    @property
    def metadata(self) -> dict[str, str]:
        """NequIP's metadata, and what a compiled file says about its quantization."""
        model: AnyModule = self
        facts: dict[str, str] = dict(super().metadata)  # type: ignore[misc]  # of the NequIP class, as in `train`
        state = state_of(model)
        if state is not None:
            facts["gaq_preset"] = state.config.preset
            facts["gaq_status"] = state.status
            facts["gaq_trained"] = str(int(bool(state.notes.get(TRAINED))))
            facts["gaq_config"] = json.dumps(state.config.to_dict())
            if model.__dict__.get(SPECIES):
                facts[SPECIES] = json.dumps(model.__dict__[SPECIES])
            facts.update(_size_metadata(model))
        return facts

    def freeze_weights(self) -> AnyModule:
        """Freeze the model in place by the `gaq_nequip.freeze.freeze` of its own package, if it comes from one."""
        model: AnyModule = self
        return freeze(model)

    @model_modifier(persistent=False)
    @classmethod
    def enable_GAQInt8(cls, model: torch.nn.Module) -> torch.nn.Module:
        """Replace the weights by their integer codes and scales, and fold the self-connection where that is smaller.

        For ``nequip-compile --modifiers enable_GAQInt8``. Afterwards the model can only be evaluated. Codes of 9 to 15
        bits are kept as int16, because every step reads them.
        """
        quantized: AnyModule = model
        frozen: torch.nn.Module = quantized.freeze_weights()
        widen_codes(frozen)
        return frozen


def _size_metadata(model: torch.nn.Module) -> dict[str, str]:
    """Bytes of the weights, and whether the self-connection is folded; empty unless the model is frozen."""
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
    """Replaces `Tensor.detach` while a graph is traced for training, so that the graph keeps its effect.

    NequIP traces with a table of decompositions that turns ``aten.detach`` into an alias. It has to: the backward pass
    in the graph reads saved results through such nodes, and is differentiated again. But without the detach the
    straight-through estimator ``x + (round(x) - x).detach()`` has a gradient of exactly zero, and nothing would be
    trained. Viewing the bits as integers and back has the same effect in operations that the graph keeps, because
    integers have no gradient.
    """

    def __torch_function__(  # typed as in torch
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Options | None = None
    ) -> Any:
        if func is torch.Tensor.detach and get_proxy_mode() is not None and args[0].dtype in _BITS:
            return args[0].view(_BITS[args[0].dtype]).view(args[0].dtype)
        return func(*args, **(kwargs or {}))


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@contextmanager
def _lasting_detach(model: torch.nn.Module) -> Iterator[None]:
    """Within this context calls of the model run under `_LastingDetach`; calls of a graph made from it do not.

    Dynamo ties what it compiles to the active modes, so the mode must not be active during compilation.
    """
    mode = _LastingDetach()

    def enter(module: torch.nn.Module, arguments: object) -> None:
        mode.__enter__()

    def leave(module: torch.nn.Module, arguments: object, output: object) -> None:
        mode.__exit__(None, None, None)

    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _step(quantizer: FeatureQuantizer) -> float:
    """The coarsest step of a quantizer relative to its range; 0 if it rounds nothing."""
    steps = [0.0]
    if quantizer.round_scalars and quantizer.scalars_enabled:
        steps.append(1.0 / quantizer.scalar_top)
    if quantizer.round_vectors and quantizer.vectors_enabled:
        steps.append(quantizer.vector_range_factor / quantizer.magnitude_top)
        if quantizer.split:
            steps.append(1.0 / quantizer.levels)
    return max(steps)


_Variants = dict[tuple[str, ...], Any]  # what NequIP makes of a compiled graph, by the names of its inputs


class QuantizedCompileGraphModel(_QuantizedRoot, CompileGraphModel):
    """NequIP's `CompileGraphModel` that keeps its quantization in checkpoints and packages.

    Weights, scales and ranges are inputs of the compiled graph. Fine rounding of features is a call of the quantizer
    (`gaq_nequip.live`). Plain attributes of other quantizers are fixed when the graph is traced, so there is one graph
    for each combination of them: training and evaluation differ where features are rounded, and so does training
    before and after a branch is switched.
    """

    gaq_host_class = "CompileGraphModel"

    def _switches(self) -> tuple[object, ...]:
        """The attributes of all quantizers that a graph fixes when it is traced, and the model that has them."""
        switches: list[object] = [id(self)]  # a copy of a model has the dictionary of its graphs
        for module in self.modules():
            if is_live(module):
                continue
            if is_kind(module, FeatureQuantizer):
                switches.append((module.scalars_enabled, module.vectors_enabled, module.vector_range_factor))
                switches.append((module.differentiable_twice, getattr(module, "calibrated", True)))
            elif is_kind(module, WeightQuantizer):
                on = module.enabled  # without it the others have no effect
                switches.append((on, on and module.scale_is_fixed, on and getattr(module, "held", False)))
        return tuple(switches)

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        graphs: dict[tuple[object, ...], _Variants] = self.__dict__.setdefault("gaq_graphs", {})
        switches = self._switches()
        graph = graphs.pop(switches, {})
        graphs[switches] = graph
        # Two are enough: training and validation alternate, and past stages of the schedule do not return.
        if len(graphs) > 2:
            del graphs[next(iter(graphs))]
        self._compiled_cache = (graph,)
        return super().forward(data)

    def _compile_variant(self, data: AtomicDataDict.Type, input_signature: tuple[str, ...], cache: _Variants) -> None:
        try:
            with _lasting_detach(self.model), live_rounding(self.model):
                super()._compile_variant(data, input_signature, cache)
        except AssertionError:
            # NequIP requires the graph to agree with the modules more closely than one rounding step of the features.
            # But sums differ in the last bit, and a feature on the edge of two steps may then be rounded to the other.
            if input_signature not in cache or not self._agrees(data, input_signature, cache):
                raise

    def _agrees(self, data: AtomicDataDict.Type, input_signature: tuple[str, ...], cache: _Variants) -> bool:
        """Whether graph and modules predict the labels in the data alike, up to a few rounding steps."""
        tolerance = 4.0 * max([_step(m) for m in self.modules() if is_kind(m, FeatureQuantizer)], default=0.0)
        compiled, output_fields = cache[input_signature]
        inputs = {key: data[key] for key in input_signature}
        of_graph = self._compiled_forward(inputs, compiled, input_signature, output_fields)
        of_modules = self.model(inputs)
        for key in set(output_fields) & data.keys():
            expected = of_modules[key].detach().double()
            error = (of_graph[key].detach().double() - expected).abs()
            if not bool((error <= tolerance * expected.abs().max().clamp_min(1.0)).all()):
                return False
        return True


_ROOTS: dict[str, type] = {"GraphModel": QuantizedGraphModel, "CompileGraphModel": QuantizedCompileGraphModel}


def adopt(model: torch.nn.Module, state: ModelState) -> None:
    """Give a model its state, and its root the class that keeps it."""
    model.__class__ = _ROOTS[getattr(type(model), "gaq_host_class", type(model).__name__)]
    model.__dict__["gaq_state"] = state


@contextmanager
def eager(model: torch.nn.Module) -> Iterator[None]:
    """Within this context a train-time compiled model evaluates its modules and not its compiled graph."""
    before = model.__class__
    if getattr(model, "is_compile_graph_model", False):
        model.__class__ = QuantizedGraphModel
    try:
        yield
    finally:
        model.__class__ = before
