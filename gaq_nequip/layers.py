"""Quantized forms of NequIP's modules, put in place by changing a module's class.

Parameters keep their names and their order, because NequIP's checkpoints and its exponential moving average rely on
them. The only state that a class adds are quantizers: a `FeatureQuantizer` under ``input_quantizer`` and, for each
weight, a `WeightQuantizer` (in training and after conversion) or a `PackedWeight` (once frozen).

This module is embedded in packages: it imports only torch, e3nn, NequIP and the core.
"""

from __future__ import annotations

import torch
from e3nn.nn._gate import Gate
from e3nn.o3._linear import Linear
from e3nn.o3._tensor_product._sub import FullyConnectedTensorProduct
from nequip.data import AtomicDataDict
from nequip.nn.convnetlayer import ConvNetLayer
from nequip.nn.mlp import DeepLinearMLP, ScalarLinearLayer
from torch import Tensor

from gaq.quantizers.features import FeatureQuantizer

__all__ = [
    "QuantizedConvNet",
    "QuantizedDeepLinear",
    "QuantizedEmbedding",
    "QuantizedGate",
    "QuantizedLinear",
    "QuantizedScalarLinear",
    "QuantizedTensorProduct",
    "SecondInput",
]


class QuantizedLinear(Linear):
    """`e3nn.o3.Linear` with rounded input and weight."""

    gaq_host_class = "Linear"

    def forward(self, features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        del weight, bias  # sites have shared, internal weights only
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
        # A frozen layer has no weights left; its packed weights need a tensor of the right dtype only.
        parameters = list(self.weights) or [self.alpha] * len(self.weights_quantizers)
        weights = [q(w) for q, w in zip(self.weights_quantizers, parameters, strict=True)]
        return torch.mm(self.input_quantizer(input), torch.linalg.multi_dot(weights) * self.alpha)


class QuantizedEmbedding(torch.nn.Embedding):
    """`torch.nn.Embedding` with a rounded table."""

    gaq_host_class = "Embedding"

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.embedding(input, self.weight_quantizer(self.weight))


class QuantizedConvNet(ConvNetLayer):
    """NequIP's `ConvNetLayer` with rounded output, which is the node features that later layers read."""

    gaq_host_class = "ConvNetLayer"

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        data = super().forward(data)
        features = data[AtomicDataDict.NODE_FEATURES_KEY]
        data[AtomicDataDict.NODE_FEATURES_KEY] = self.input_quantizer(features)
        return data


class QuantizedGate(Gate):
    """`e3nn.nn.Gate` with rounded scalars and gates."""

    gaq_host_class = "Gate"

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.input_quantizer(features))


class SecondInput(torch.nn.Module):
    """Rounds a further input of a module whose ``input_quantizer`` belongs to another input."""

    def __init__(self, quantizer: FeatureQuantizer) -> None:
        super().__init__()
        self.input_quantizer = quantizer

    def forward(self, features: Tensor) -> Tensor:
        rounded: Tensor = self.input_quantizer(features)
        return rounded
