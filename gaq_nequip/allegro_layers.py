"""Quantized forms of Allegro's modules; see `gaq_nequip.layers`."""

from __future__ import annotations

from allegro.nn._strided._channels import MakeWeightedChannels
from allegro.nn._strided._contract import Contracter
from torch import Tensor

__all__ = ["CLASSES"]


class QuantizedContracter(Contracter):
    """Allegro's tensor product with rounded path weights, environment and tensor features.

    The sum over paths is NequIP's own: the weights are handed to it rounded.
    """

    gaq_host_class = "Contracter"

    def forward(self, x1: Tensor, x2: Tensor, idxs: Tensor) -> Tensor:
        x1 = x1.reshape(-1, self.mul, self.base_dim1)
        x2 = x2.reshape(-1, self.mul, self.base_dim2)
        if hasattr(self, "tensor_track"):
            x1 = self.tensor_track(x1)
        return self._contract_conv(x1, self.input_quantizer(x2), idxs)

    @property
    def weights(self) -> Tensor:
        """The rounded path weights."""
        return self.weight_quantizer(self.path_weights())  # type: ignore[no-any-return]

    def path_weights(self) -> Tensor:
        """The parameter under its own name, which the property above hides."""
        own = self._parameters.get("weights")
        return own if own is not None else self._buffers["weights"]  # type: ignore[return-value]


class QuantizedEnvWeighter(MakeWeightedChannels):
    """Allegro's weighting of the environment, with rounded weights."""

    gaq_host_class = "MakeWeightedChannels"

    def forward(self, edge_attr: Tensor, weights: Tensor) -> Tensor:
        return super().forward(edge_attr, self.input_quantizer(weights))


CLASSES: dict[str, type] = {
    "contracter": QuantizedContracter,
    "tensor_track": QuantizedContracter,
    "env_weighter": QuantizedEnvWeighter,
}
