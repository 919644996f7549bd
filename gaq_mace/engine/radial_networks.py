"""Radial networks that are evaluated for each edge, where tables do not serve.

The networks of `RealAgnosticResidualNonLinearInteractionBlock` read the species of sender and receiver, so a table
would be needed for each ordered pair. Their cost lies in the last layer, a matrix product: about as long as the
look-up of as many polynomials. Nothing has to be made before the first step, and the number of species does not matter.
"""

from __future__ import annotations

import copy

import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

from gaq.untyped import AnyModule
from gaq_mace.engine.edges import EdgeFeatures
from gaq_mace.engine.reading import class_name, input_quantizer_of, matrices_of

__all__ = ["RadialNetwork"]


class RadialNetwork(torch.nn.Module):
    """A radial network of an interaction block, with the species embeddings that it reads.

    What the species add to the first layer is multiplied out once for each species.

    Args:
        network: MACE's ``RadialMLP`` or e3nn's ``FullyConnectedNet``.
        dtype: of the model.
        source: linear layer that embeds the species of the sender; None where the network does not read species.
        target: the same for the receiver.
    """

    def __init__(
        self, network: AnyModule, dtype: torch.dtype, source: AnyModule = None, target: AnyModule = None
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.folded = self.species = source is not None
        if not self.species:
            return
        for name, linear in (("sender", source), ("receiver", target)):
            self.register_buffer(name, matrices_of(linear)[0].to(dtype))
        first = self.network.net[0] if class_name(network) == "RadialMLP" else None
        # A first layer whose inputs are rounded needs them all at once.
        self.folded = isinstance(first, torch.nn.Linear) and input_quantizer_of(first) is None
        if self.folded:
            assert first is not None
            weight = first.weight.detach().double()
            size = self.sender.shape[1]
            basis = weight.shape[1] - 2 * size
            parts = weight.split([basis, size, size], dim=1)
            self.register_buffer("basis", parts[0].T.to(dtype).contiguous())
            self.sender = (self.sender.double() @ parts[1].T).to(dtype)
            self.receiver = (self.receiver.double() @ parts[2].T + first.bias.detach().double()).to(dtype)
            self.network = self.network.net[1:]

    sender: Tensor
    receiver: Tensor
    basis: Tensor

    def forward(self, edges: EdgeFeatures) -> Tensor:
        """Compute the outputs of the network, (edges, outputs), without the cutoff."""
        x = edges.radial
        if self.species:
            sender, receiver = self.sender[edges.sender], self.receiver[edges.receiver]
            x = x @ self.basis + sender + receiver if self.folded else torch.cat([x, sender, receiver], dim=1)
        outputs: Tensor = self.network(x)
        return outputs
