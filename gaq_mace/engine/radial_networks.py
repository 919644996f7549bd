"""Radial networks that are evaluated for each edge, where tables do not serve.

The networks of `RealAgnosticResidualNonLinearInteractionBlock` read the species of sender and receiver, so a table
would be needed for each ordered pair; those of `RealAgnosticAttResidualInteractionBlock` read features of both atoms,
and no table would do. The cost of a network lies in the last layer, a matrix product. Nothing has to be made before the
first step, and the number of species does not matter.
"""

from __future__ import annotations

import copy

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn.nn._fc import _Layer
from torch import Tensor

from gaq.untyped import AnyModule
from gaq_mace.engine.reading import Unsupported, class_name, input_quantizer_of

__all__ = ["RadialNetwork"]


def _layers_of(network: AnyModule) -> list[torch.nn.Module]:
    """Layers of a radial network in their order.

    Raises:
        Unsupported: for a network of an unknown kind.
    """
    if class_name(network) == "RadialMLP":
        return list(network.net)
    if class_name(network) == "FullyConnectedNet":
        return list(network)
    raise Unsupported(f"the radial network is a {class_name(network)}")


class _Activation(torch.nn.Module):
    """What a layer of e3nn's networks applies to its matrix product."""

    def __init__(self, layer: _Layer) -> None:
        super().__init__()
        self.act, self.factor = layer.act, float(layer.var_out**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized activation of any shape."""
        activated: Tensor = self.act(x) * self.factor
        return activated


def _affine(layer: torch.nn.Module) -> tuple[Tensor, Tensor | None, list[torch.nn.Module]]:
    """Take a layer apart: matrix (inputs, outputs) and bias (outputs,), float64, and what is applied after them.

    Raises:
        Unsupported: for a layer of an unknown kind.
    """
    if isinstance(layer, torch.nn.Linear):
        return layer.weight.detach().double().T, None if layer.bias is None else layer.bias.detach().double(), []
    if not isinstance(layer, _Layer):
        raise Unsupported(f"a radial network begins or ends with a {class_name(layer)}")
    weight = layer.weight.detach().double()
    if layer.act is None:
        return weight / (layer.h_in * layer.var_in / layer.var_out) ** 0.5, None, []
    return weight / (layer.h_in * layer.var_in) ** 0.5, None, [_Activation(layer)]


class RadialNetwork(torch.nn.Module):
    """A radial network of an interaction block.

    It may read properties of the sender and of the receiver beside the radial basis. These are multiplied by their part
    of the first layer once for each species or atom, and not for each edge. A factor of the outputs multiplies the
    inputs of the last layer and its bias, which are many times fewer.

    Args:
        network: MACE's ``RadialMLP`` or e3nn's ``FullyConnectedNet``.
        dtype: of the model.
        properties: number of properties that it reads of either end.

    Raises:
        Unsupported: for a network of an unknown kind.
    """

    last: Tensor
    of_basis: Tensor
    of_sender: Tensor
    of_receiver: Tensor
    bias: Tensor | None

    def __init__(self, network: AnyModule, dtype: torch.dtype, properties: int = 0) -> None:
        super().__init__()
        layers = _layers_of(network)
        matrix, bias, activation = _affine(layers[-1])
        if activation:
            raise Unsupported(f"a {class_name(network)} ends with an activation")
        self.biased = bias is not None
        self.register_buffer("last", (matrix if bias is None else torch.cat([matrix, bias[None]])).to(dtype))
        self.round_last = copy.deepcopy(input_quantizer_of(layers[-1]))
        # A first layer whose inputs are rounded needs them all at once.
        self.folded = properties > 0 and len(layers) > 1 and input_quantizer_of(layers[0]) is None
        if self.folded:
            matrix, bias, activation = _affine(layers[0])
            layers[:1] = activation
            parts = matrix.split([matrix.shape[0] - 2 * properties, properties, properties])
            for name, part in zip(("of_basis", "of_sender", "of_receiver"), parts, strict=True):
                self.register_buffer(name, part.to(dtype))
            self.register_buffer("bias", None if bias is None else bias.to(dtype))
        self.hidden = copy.deepcopy(torch.nn.Sequential(*layers[:-1])).requires_grad_(False)

    def properties_of(self, sender: Tensor, receiver: Tensor) -> tuple[Tensor, Tensor]:
        """Prepare the properties of atoms or species for `forward`.

        Args:
            sender, receiver: of an atom or species at either end of an edge, (n, properties).
        """
        if not self.folded:
            return sender, receiver
        receiver = receiver @ self.of_receiver
        return sender @ self.of_sender, receiver if self.bias is None else receiver + self.bias

    def forward(
        self, radial: Tensor, factor: Tensor | None = None, ends: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Compute the outputs of the network, (edges, outputs).

        Args:
            radial: radial basis, (edges, basis).
            factor: of the outputs, (edges, 1); None for 1.
            ends: what `properties_of` gives, for the sender and the receiver of each edge; None where the network reads
                the radial basis alone.
        """
        return self.before_last(radial, factor, ends) @ self.last

    def before_last(
        self, radial: Tensor, factor: Tensor | None = None, ends: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Compute what the matrix `last` multiplies, (edges, inputs of the last layer), from what `forward` takes."""
        x = radial
        if ends is not None:
            x = x @ self.of_basis + ends[0] + ends[1] if self.folded else torch.cat([x, *ends], dim=1)
        x = self.hidden(x)
        if self.round_last is not None:
            x = self.round_last(x)
        if self.biased:
            x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        return x if factor is None else x * factor
