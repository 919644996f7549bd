"""Quantized forms of Allegro's modules, put in place as those of `gaq_nequip.layers` are.

Embedded in packages of Allegro models.
"""

from __future__ import annotations

from allegro.nn._strided._channels import MakeWeightedChannels
from allegro.nn._strided._contract import Contracter
from torch import Tensor

__all__ = ["CLASSES"]


class QuantizedContracter(Contracter):
    """Allegro's tensor product with rounded path weights, environment and tensor features.

    The sum over paths is Allegro's; it reads the property `weights`, which rounds.
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
        weights: Tensor = self.weight_quantizer(self.path_weights())
        return weights

    def path_weights(self) -> Tensor:
        """The float path weights: the parameter ``weights``, which the property of that name hides.

        In a frozen model an empty buffer has taken the place of the parameter.
        """
        parameter = self._parameters.get("weights")
        return parameter if parameter is not None else self._buffers["weights"]  # type: ignore[return-value]  # not None


class QuantizedEnvWeighter(MakeWeightedChannels):
    """Allegro's weighting of the environment, with rounded environment weights."""

    gaq_host_class = "MakeWeightedChannels"

    def forward(self, edge_attr: Tensor, weights: Tensor) -> Tensor:
        return super().forward(edge_attr, self.input_quantizer(weights))


CLASSES: dict[str, type] = {
    "contracter": QuantizedContracter,
    "tensor_track": QuantizedContracter,
    "env_weighter": QuantizedEnvWeighter,
}
