"""Radial networks that are evaluated for each edge, where tables do not serve.

The networks of `RealAgnosticResidualNonLinearInteractionBlock` read the species of sender and receiver, so a table
would be needed for each ordered pair. Their cost lies in the last layer, a matrix product: about as long as the
look-up of as many polynomials. Nothing has to be made before the first step, and the number of species does not matter.
"""

from __future__ import annotations

import copy

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn.nn._fc import _Layer
from torch import Tensor

from gaq.untyped import AnyModule
from gaq_mace.engine.edges import EdgeFeatures
from gaq_mace.engine.reading import Unsupported, class_name, input_quantizer_of, matrices_of

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


def _affine(layer: torch.nn.Module) -> tuple[Tensor, Tensor | None]:
    """Matrix (inputs, outputs) and bias (outputs,) of a layer without an activation, float64.

    Raises:
        Unsupported: for a layer of an unknown kind.
    """
    if isinstance(layer, torch.nn.Linear):
        return layer.weight.detach().double().T, None if layer.bias is None else layer.bias.detach().double()
    if isinstance(layer, _Layer) and layer.act is None:
        return layer.weight.detach().double() / (layer.h_in * layer.var_in / layer.var_out) ** 0.5, None
    raise Unsupported(f"a radial network begins or ends with a {class_name(layer)}")


class RadialNetwork(torch.nn.Module):
    """A radial network of an interaction block, with the species embeddings that it reads.

    What the species add to the first layer is multiplied out once for each species. A factor of the outputs multiplies
    the inputs of the last layer and its bias, which are many times fewer.

    Args:
        network: MACE's ``RadialMLP`` or e3nn's ``FullyConnectedNet``.
        dtype: of the model.
        source: linear layer that embeds the species of the sender; None where the network does not read species.
        target: the same for the receiver.

    Raises:
        Unsupported: for a network of an unknown kind.
    """

    sender: Tensor
    receiver: Tensor
    first: Tensor
    last: Tensor

    def __init__(
        self, network: AnyModule, dtype: torch.dtype, source: AnyModule = None, target: AnyModule = None
    ) -> None:
        super().__init__()
        layers = _layers_of(network)
        matrix, bias = _affine(layers[-1])
        self.biased = bias is not None
        self.register_buffer("last", (matrix if bias is None else torch.cat([matrix, bias[None]])).to(dtype))
        self.round_last = input_quantizer_of(layers[-1])
        self.species = self.folded = source is not None
        if self.species:
            embedded = [matrices_of(linear)[0] for linear in (source, target)]
            # A first layer whose inputs are rounded needs them all at once.
            self.folded = input_quantizer_of(layers[0]) is None
            if self.folded:
                matrix, bias = _affine(layers.pop(0))
                size = embedded[0].shape[1]
                parts = matrix.split([matrix.shape[0] - 2 * size, size, size])
                self.register_buffer("first", parts[0].to(dtype))
                embedded = [table @ part for table, part in zip(embedded, parts[1:], strict=True)]
                if bias is not None:
                    embedded[0] = embedded[0] + bias
            self.register_buffer("sender", embedded[0].to(dtype))
            self.register_buffer("receiver", embedded[1].to(dtype))
        self.hidden = copy.deepcopy(torch.nn.Sequential(*layers[:-1])).requires_grad_(False)

    def forward(self, edges: EdgeFeatures, factor: Tensor | None = None) -> Tensor:
        """Compute the outputs of the network, (edges, outputs), times a factor (edges, 1) if there is one."""
        return self.before_last(edges, factor) @ self.last

    def before_last(self, edges: EdgeFeatures, factor: Tensor | None = None) -> Tensor:
        """Compute what the matrix `last` multiplies, times a factor (edges, 1) if there is one."""
        x = edges.radial
        if self.species:
            sender, receiver = self.sender[edges.sender], self.receiver[edges.receiver]
            x = x @ self.first + sender + receiver if self.folded else torch.cat([x, sender, receiver], dim=1)
        x = self.hidden(x)
        if self.round_last is not None:
            x = self.round_last(x)
        if self.biased:
            x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        return x if factor is None else x * factor
