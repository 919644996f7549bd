"""Quantized forms of MACE's weight-carrying modules, put in place by changing a module's class.

Parameter names, state-dict keys and attributes stay those of MACE, so optimizers, checkpoints, exports and weight decay
by name keep working. The only state that a class here adds are its quantizers. Every ``forward`` can be compiled by
TorchScript, so that the export to LAMMPS works in training and after conversion.
"""

from __future__ import annotations

from typing import Any

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from e3nn.nn._fc import _Layer
from e3nn.util.jit import compile_mode
from mace.modules.blocks import (
    EquivariantProductBasisBlock,
    RealAgnosticDensityInteractionBlock,
    RealAgnosticDensityResidualInteractionBlock,
)
from mace.modules.symmetric_contraction import Contraction
from mace.tools.scatter import scatter_sum
from torch import Tensor

__all__ = ["original_class", "original_type"]


@compile_mode("script")
class QuantizedLinear(o3.Linear):
    """`e3nn.o3.Linear` with rounded input and weight."""

    def forward(self, features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        del weight, bias  # shared, internal weights only
        return self._compiled_main(self.input_quantizer(features), self.weight_quantizer(self.weight), self.bias)


@compile_mode("script")
class QuantizedTensorProduct(o3.FullyConnectedTensorProduct):
    """`e3nn.o3.FullyConnectedTensorProduct` with rounded first input and weight."""

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        del weight
        return self._compiled_main_left_right(self.input_quantizer(x), y, self.weight_quantizer(self.weight))


@compile_mode("script")
class QuantizedLayer(_Layer):
    """A layer of e3nn's `FullyConnectedNet` with rounded weight and, where the preset says so, rounded input."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(x)
        weight = self.weight_quantizer(self.weight)
        if self.act is not None:
            x = x @ (weight / (self.h_in * self.var_in) ** 0.5)
            x = self.act(x)
            return x * self.var_out**0.5
        return x @ (weight / (self.h_in * self.var_in / self.var_out) ** 0.5)


class QuantizedDense(torch.nn.Linear):
    """`torch.nn.Linear` with rounded weight and, where the preset says so, rounded input."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


class QuantizedEmbedding(torch.nn.Embedding):
    """`torch.nn.Embedding` with rounded weight."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.embedding(input, self.weight_quantizer(self.weight))


@compile_mode("script")
class QuantizedContraction(Contraction):
    """MACE's `Contraction` with rounded weights."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.graph_opt_main(self.U_tensors(self.correlation), self.weights_max_quantizer(self.weights_max), x, y)
        for i, (weight, quantizer, contract_weights, contract_features) in enumerate(
            zip(self.weights, self.weights_quantizers, self.contractions_weighting, self.contractions_features)  # noqa: B905
        ):
            c_tensor = contract_weights(self.U_tensors(self.correlation - i - 1), quantizer(weight), y)
            c_tensor = c_tensor + out
            out = contract_features(c_tensor, x)
        return out.view(out.shape[0], -1)


@compile_mode("script")
class QuantizedProduct(EquivariantProductBasisBlock):
    """MACE's `EquivariantProductBasisBlock` whose output, the node features of the next layer, is rounded."""

    def forward(self, node_feats: Tensor, sc: Tensor | None, node_attrs: Tensor) -> Tensor:
        if self.use_agnostic_product:
            node_attrs = torch.ones((node_feats.shape[0], 1), dtype=node_feats.dtype, device=node_feats.device)
        out = self.linear(self.symmetric_contractions(node_feats, node_attrs))
        if self.use_sc and sc is not None:
            out = out + sc
        return self.input_quantizer(out)


@compile_mode("script")
class QuantizedDensity(RealAgnosticDensityInteractionBlock):
    """MACE's `RealAgnosticDensityInteractionBlock` whose density weights are rounded.

    A density weight is ``tanh(x^2)``, so it lies in [0, 1). It is rounded before it is multiplied by the cutoff
    function, so that its steps vanish at the cutoff.
    """

    def forward(
        self,
        node_attrs: Tensor,
        node_feats: Tensor,
        edge_attrs: Tensor,
        edge_feats: Tensor,
        edge_index: Tensor,
        cutoff: Tensor | None = None,
        lammps_class: Any | None = None,  # as in MACE, for TorchScript
        lammps_natoms: tuple[int, int] = (0, 0),
        first_layer: bool = False,
    ) -> tuple[Tensor, None]:
        n_real = lammps_natoms[0] if lammps_class is not None else None
        node_feats = self.linear_up(node_feats)
        node_feats = self.handle_lammps(
            node_feats, lammps_class=lammps_class, lammps_natoms=lammps_natoms, first_layer=first_layer
        )
        tp_weights = self.conv_tp_weights(edge_feats)
        edge_density = self.input_quantizer(torch.tanh(self.density_fn(edge_feats) ** 2))
        if cutoff is not None:
            tp_weights = tp_weights * cutoff
            edge_density = edge_density * cutoff
        density = scatter_sum(src=edge_density, index=edge_index[1], dim=0, dim_size=node_feats.shape[0])
        if hasattr(self, "conv_fusion"):
            message = self.conv_tp(node_feats, edge_attrs, tp_weights, edge_index)
        else:
            mji = self.conv_tp(node_feats[edge_index[0]], edge_attrs, tp_weights)
            message = scatter_sum(src=mji, index=edge_index[1], dim=0, dim_size=node_feats.shape[0])
        message = self.truncate_ghosts(message, n_real)
        node_attrs = self.truncate_ghosts(node_attrs, n_real)
        density = self.truncate_ghosts(density, n_real)
        message = self.linear(message) / (density + 1)
        return self.reshape(self.skip_tp(message, node_attrs)), None


@compile_mode("script")
class QuantizedDensityResidual(RealAgnosticDensityResidualInteractionBlock):
    """MACE's `RealAgnosticDensityResidualInteractionBlock` whose density weights are rounded.

    See `QuantizedDensity`.
    """

    def forward(
        self,
        node_attrs: Tensor,
        node_feats: Tensor,
        edge_attrs: Tensor,
        edge_feats: Tensor,
        edge_index: Tensor,
        cutoff: Tensor | None = None,
        lammps_class: Any | None = None,  # as in MACE, for TorchScript
        lammps_natoms: tuple[int, int] = (0, 0),
        first_layer: bool = False,
    ) -> tuple[Tensor, Tensor]:
        n_real = lammps_natoms[0] if lammps_class is not None else None
        sc = self.skip_tp(node_feats, node_attrs)
        node_feats = self.linear_up(node_feats)
        node_feats = self.handle_lammps(
            node_feats, lammps_class=lammps_class, lammps_natoms=lammps_natoms, first_layer=first_layer
        )
        tp_weights = self.conv_tp_weights(edge_feats)
        edge_density = self.input_quantizer(torch.tanh(self.density_fn(edge_feats) ** 2))
        if cutoff is not None:
            tp_weights = tp_weights * cutoff
            edge_density = edge_density * cutoff
        density = scatter_sum(src=edge_density, index=edge_index[1], dim=0, dim_size=node_feats.shape[0])
        if hasattr(self, "conv_fusion"):
            message = self.conv_tp(node_feats, edge_attrs, tp_weights, edge_index)
        else:
            mji = self.conv_tp(node_feats[edge_index[0]], edge_attrs, tp_weights)
            message = scatter_sum(src=mji, index=edge_index[1], dim=0, dim_size=node_feats.shape[0])
        message = self.truncate_ghosts(message, n_real)
        density = self.truncate_ghosts(density, n_real)
        sc = self.truncate_ghosts(sc, n_real)
        message = self.linear(message) / (density + 1)
        return self.reshape(message), sc


_ORIGINAL: dict[type, type] = {
    QuantizedProduct: EquivariantProductBasisBlock,
    QuantizedLinear: o3.Linear,
    QuantizedTensorProduct: o3.FullyConnectedTensorProduct,
    QuantizedLayer: _Layer,
    QuantizedDense: torch.nn.Linear,
    QuantizedEmbedding: torch.nn.Embedding,
    QuantizedContraction: Contraction,
    QuantizedDensity: RealAgnosticDensityInteractionBlock,
    QuantizedDensityResidual: RealAgnosticDensityResidualInteractionBlock,
}


def original_class(module: torch.nn.Module) -> type:
    """MACE's, e3nn's or torch's own class of a module, quantized or not."""
    return original_type(type(module))


def original_type(kind: type) -> type:
    """The class of MACE, e3nn or torch that a quantized class stands for; any other class as it is."""
    return _ORIGINAL.get(kind, kind)
