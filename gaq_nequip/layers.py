"""Quantized forms of the weight-carrying modules of NequIP, put in place by changing a module's class.

Parameters keep their names and their order, which NequIP's checkpoints and its exponential moving average rely on.
Each class holds no state but its quantizers: a `FeatureQuantizer` under ``input_quantizer`` and, for each weight, a
`WeightQuantizer` (in training, and after conversion) or a `PackedWeight` (once frozen).

This module is embedded in packages: it imports nothing but torch, e3nn, NequIP and the core.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from e3nn.nn._gate import Gate
from e3nn.o3._linear import Linear
from e3nn.o3._tensor_product._sub import FullyConnectedTensorProduct
from nequip.data import AtomicDataDict
from nequip.nn.compile import CompileGraphModel
from nequip.nn.convnetlayer import ConvNetLayer
from nequip.nn.graph_model import GraphModel
from nequip.nn.mlp import DeepLinearMLP, ScalarLinearLayer
from nequip.nn.model_modifier_utils import model_modifier
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode

from gaq.model.sites import Site
from gaq.model.state import StoredState, is_kind, require_state, same_grid, settle_codes, state_of
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.species import SpeciesWeightQuantizer
from gaq.quantizers.weights import WeightQuantizer
from gaq_nequip.packed import PackedWeight
from gaq_nequip.sites import TENSOR_TRACK, find_sites

__all__ = [
    "QuantizedCompileGraphModel",
    "QuantizedGraphModel",
    "adopt",
    "insert",
    "packed_weights",
    "site_quantizers",
    "stored_state",
    "weight_quantizers",
]


class QuantizedLinear(Linear):
    """`e3nn.o3.Linear` with rounded input and weight."""

    gaq_host_class = "Linear"

    def forward(self, features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        del weight, bias  # shared, internal weights only
        return self._compiled_main(self.input_quantizer(features), self.weight_quantizer(self.weight), self.bias)


class QuantizedTensorProduct(FullyConnectedTensorProduct):
    """`e3nn.o3.FullyConnectedTensorProduct` with rounded first input and weight."""

    gaq_host_class = "FullyConnectedTensorProduct"

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        del weight
        return self._compiled_main_left_right(self.input_quantizer(x), y, self.weight_quantizer(self.weight))


class QuantizedScalarLinear(ScalarLinearLayer):
    """NequIP's `ScalarLinearLayer` with rounded input and weight."""

    gaq_host_class = "ScalarLinearLayer"

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight) * self.alpha
        input = self.input_quantizer(input)
        return torch.mm(input, weight) if self.bias is None else torch.addmm(self.bias, input, weight)


class QuantizedDeepLinear(DeepLinearMLP):
    """NequIP's `DeepLinearMLP` with rounded input and weights."""

    gaq_host_class = "DeepLinearMLP"

    def forward(self, input: Tensor) -> Tensor:
        # Frozen, nothing but the dtype of a weight is left to hand over.
        own = list(self.weights) or [self.alpha] * len(self.weights_quantizers)
        weights = [q(w) for q, w in zip(self.weights_quantizers, own, strict=True)]
        return torch.mm(self.input_quantizer(input), torch.linalg.multi_dot(weights) * self.alpha)


class QuantizedEmbedding(torch.nn.Embedding):
    """`torch.nn.Embedding` with a rounded table."""

    gaq_host_class = "Embedding"

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.embedding(input, self.weight_quantizer(self.weight))


class QuantizedConvNet(ConvNetLayer):
    """NequIP's `ConvNetLayer` whose output, the node features of the next layer, is rounded."""

    gaq_host_class = "ConvNetLayer"

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        data = super().forward(data)
        features = data[AtomicDataDict.NODE_FEATURES_KEY]
        data[AtomicDataDict.NODE_FEATURES_KEY] = self.input_quantizer(features)
        return data


class QuantizedGate(Gate):
    """e3nn's `Gate` that reads rounded scalars and gates."""

    gaq_host_class = "Gate"

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.input_quantizer(features))


_CLASSES: dict[str, type] = {
    "linear": QuantizedLinear,
    "tensor_product": QuantizedTensorProduct,
    "scalar_linear": QuantizedScalarLinear,
    "deep_linear": QuantizedDeepLinear,
    "embedding": QuantizedEmbedding,
    "convnet": QuantizedConvNet,
    "gate": QuantizedGate,
}
COMPILES = "gaq_compiles"
"""Attribute of a model that is built to be compiled and not to be trained."""

_ALLEGRO_KINDS = ("contracter", "tensor_track", "env_weighter")


def _quantized_class(kind: str) -> type:
    if kind in _ALLEGRO_KINDS:
        # Allegro is an extension of its own and need not be there; a packager, which reads imports from the source,
        # would ask for it.
        classes: dict[str, type] = importlib.import_module("gaq_nequip.allegro_layers").CLASSES
        return classes[kind]
    return _CLASSES[kind]


class _Rounding(torch.nn.Module):
    """A second input of a module, with its quantizer."""

    def __init__(self, quantizer: FeatureQuantizer) -> None:
        super().__init__()
        self.input_quantizer = quantizer

    def forward(self, features: Tensor) -> Tensor:
        rounded: Tensor = self.input_quantizer(features)
        return rounded


def insert(site: Site, weights: Mapping[str, torch.nn.Module], features: FeatureQuantizer | None) -> None:
    """Give a site its quantizers, in place.

    Args:
        site: the module and its layout.
        weights: a quantizer for each weight to round, by `gaq.model.sites.WeightSite.path`; may be empty.
        features: of the input, or None.
    """
    if not weights and features is None:
        return
    module: Any = site.module
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if site.kind == "tensor_track":
        assert features is not None
        module.add_module(TENSOR_TRACK, _Rounding(features).to(device))
    elif features is not None or not hasattr(module, "input_quantizer"):
        module.input_quantizer = (features if features is not None else torch.nn.Identity()).to(device)
    if site.kind == "deep_linear":
        quantizers = [weights.get(w.path, torch.nn.Identity()) for w in site.weights]
        module.weights_quantizers = torch.nn.ModuleList(quantizers).to(device)
        module.gaq_shapes = [w.layout.shape for w in site.weights]
    elif site.weights:
        module.weight_quantizer = weights.get(site.weights[0].path, torch.nn.Identity()).to(device)
    elif site.kind == "tensor_track" and not hasattr(module, "weight_quantizer"):
        module.weight_quantizer = torch.nn.Identity()
        module.input_quantizer = torch.nn.Identity()
    if site.kind != "attention":  # which calls its quantizer as it is
        module.__class__ = _quantized_class(site.kind)


def site_quantizers(site: Site) -> dict[str, torch.nn.Module]:
    """The weight quantizers or packed weights now in a site, by `gaq.model.sites.WeightSite.path`."""
    module: Any = site.module
    if site.kind == "deep_linear":
        present = list(getattr(module, "weights_quantizers", []))
    else:
        present = [getattr(module, "weight_quantizer", None)] if site.weights else []
    return {w.path: q for w, q in zip(site.weights, present, strict=False) if q is not None}


def weight_quantizers(model: torch.nn.Module) -> dict[str, WeightQuantizer]:
    """The weight quantizers of a model that still has its weights, by parameter name."""
    found: dict[str, WeightQuantizer] = {}
    for site in find_sites(model):
        for path, quantizer in site_quantizers(site).items():
            if is_kind(quantizer, WeightQuantizer):
                found[f"{site.name}.{path}"] = quantizer
    return found


def packed_weights(model: torch.nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a frozen model, by the name its parameter had."""
    found: dict[str, PackedWeight] = {}
    for site in find_sites(model):
        for path, packed in site_quantizers(site).items():
            if is_kind(packed, PackedWeight):
                found[f"{site.name}.{path}"] = packed
    return found


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
        from gaq_nequip.freeze import freeze

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


@torch.no_grad()
def settle_species(model: torch.nn.Module) -> None:
    """Round the weights whose codes are chosen together for good, in place: a compiled file cannot choose any."""
    parameters = dict(model.named_parameters())
    for name, quantizer in species_quantizers(model).items():
        if not quantizer.settled:
            tensor = quantizer.quantized(parameters[name])
            quantizer.fix_scale(parameters[name], scale=tensor.scale)
            parameters[name].copy_(tensor.dequantize().to(parameters[name]))
            quantizer.settle()


def hold_scales(model: torch.nn.Module, fresh: bool = True) -> None:
    """Take the scales of weights from the weights as they are now, and hold them.

    Args:
        model: in training.
        fresh: whether scales that are held already are to be taken anew.
    """
    parameters = dict(model.named_parameters())
    for name, quantizer in weight_quantizers(model).items():
        if fresh or not quantizer.scale_is_fixed:
            quantizer.refresh_scale(parameters[name])


def species_quantizers(model: torch.nn.Module) -> dict[str, SpeciesWeightQuantizer]:
    """The quantizers of weights whose codes are chosen together, by the names of their parameters."""
    return {n: q for n, q in weight_quantizers(model).items() if is_kind(q, SpeciesWeightQuantizer)}


def hold_codes(model: torch.nn.Module) -> dict[str, Tensor]:
    """Round weights whose codes are chosen together as they are rounded now, without choosing anew in every step.

    Returns:
        What was held before, for `release_codes`.
    """
    parameters = dict(model.named_parameters())
    before = {}
    for name, quantizer in species_quantizers(model).items():
        before[name] = quantizer.offset
        quantizer.hold(parameters[name])
    return before


def release_codes(model: torch.nn.Module, before: Mapping[str, Tensor] | None = None) -> None:
    """Choose codes for the weights as they are from now on, or go back to what was held before."""
    for name, quantizer in species_quantizers(model).items():
        quantizer.release((before or {}).get(name))
