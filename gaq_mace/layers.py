"""Quantized forms of MACE's weight-carrying modules, put in place by changing a module's class.

Parameter names, state-dict keys and attributes stay the host's own, so optimizers, checkpoints, exports
and weight decay by name keep working. A class here holds no state but its quantizers, and every forward
is TorchScript, so that LAMMPS export works in any state.
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
from mace.modules.symmetric_contraction import Contraction, SymmetricContraction
from mace.tools.scatter import scatter_sum
from torch import Tensor

from gaq.model.sites import Site
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import WeightQuantizer

__all__ = ["insert", "original_class", "original_type", "remove", "weight_quantizers"]


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
    """A layer of e3nn's `FullyConnectedNet` with rounded weight and, where asked for, input."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(x)
        weight = self.weight_quantizer(self.weight)
        if self.act is not None:
            x = x @ (weight / (self.h_in * self.var_in) ** 0.5)
            x = self.act(x)
            return x * self.var_out**0.5
        return x @ (weight / (self.h_in * self.var_in / self.var_out) ** 0.5)


class QuantizedDense(torch.nn.Linear):
    """`torch.nn.Linear` with rounded weight and, where asked for, input."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


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

    A density weight is ``tanh(x^2)``, so it lies in [0, 1). It is rounded before the cutoff multiplies it, so that its
    steps vanish at the cutoff.
    """

    def forward(
        self,
        node_attrs: Tensor,
        node_feats: Tensor,
        edge_attrs: Tensor,
        edge_feats: Tensor,
        edge_index: Tensor,
        cutoff: Tensor | None = None,
        lammps_class: Any | None = None,
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
    """MACE's `RealAgnosticDensityResidualInteractionBlock` whose density weights are rounded, as above."""

    def forward(
        self,
        node_attrs: Tensor,
        node_feats: Tensor,
        edge_attrs: Tensor,
        edge_feats: Tensor,
        edge_index: Tensor,
        cutoff: Tensor | None = None,
        lammps_class: Any | None = None,
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


_QUANTIZED = {
    "product": QuantizedProduct,
    "linear": QuantizedLinear,
    "tensor_product": QuantizedTensorProduct,
    "layer": QuantizedLayer,
    "dense": QuantizedDense,
}
_ORIGINAL: dict[type, type] = {
    QuantizedProduct: EquivariantProductBasisBlock,
    QuantizedLinear: o3.Linear,
    QuantizedTensorProduct: o3.FullyConnectedTensorProduct,
    QuantizedLayer: _Layer,
    QuantizedDense: torch.nn.Linear,
    QuantizedContraction: Contraction,
    QuantizedDensity: RealAgnosticDensityInteractionBlock,
    QuantizedDensityResidual: RealAgnosticDensityResidualInteractionBlock,
}
_BLOCKS = {_ORIGINAL[own]: own for own in (QuantizedDensity, QuantizedDensityResidual)}


def original_class(module: torch.nn.Module) -> type:
    """The host's class of a module, whether it is quantized now or not."""
    return original_type(type(module))


def original_type(kind: type) -> type:
    """The host's class that a class stands for."""
    return _ORIGINAL.get(kind, kind)


def insert(site: Site, weights: dict[str, WeightQuantizer], features: FeatureQuantizer | None) -> None:
    """Give a site its quantizers, in place.

    Args:
        site: the module and its layout.
        weights: a quantizer for each weight to round, by `WeightSite.path`; may be empty.
        features: of the input, or None.
    """
    module: Any = site.module
    device = next(module.parameters()).device
    identity = torch.nn.Identity()
    if site.kind == "contraction":
        for i, contraction in enumerate(module.contractions):
            own = {k.removeprefix(f"contractions.{i}."): q for k, q in weights.items() if f"contractions.{i}." in k}
            if own:
                contraction.weights_max_quantizer = own.get("weights_max", identity).to(device)
                quantizers = [own.get(f"weights.{k}", torch.nn.Identity()) for k in range(len(contraction.weights))]
                contraction.weights_quantizers = torch.nn.ModuleList(quantizers).to(device)
                contraction.__class__ = QuantizedContraction
    elif site.kind == "product":
        if not hasattr(module, "use_agnostic_product"):  # models from before MACE had it
            module.use_agnostic_product = False
    elif site.kind in ("density", "attention"):
        if features is not None:
            module.input_quantizer = features.to(device)
            module.__class__ = _BLOCKS.get(type(module), type(module))  # attention calls its quantizer as it is
        return
    elif weights or features is not None:
        module.weight_quantizer = weights.get("weight", identity).to(device)
    if features is not None or (weights and site.kind != "contraction"):
        module.input_quantizer = (features or identity).to(device)
        module.__class__ = _QUANTIZED[site.kind]


def remove(module: torch.nn.Module, keep_input: bool) -> None:
    """Take the weight quantizers out of a site, and the input's unless it is to be kept.

    The weights themselves are not touched: see `gaq_mace.model.convert` for writing them.
    """
    keep = keep_input and isinstance(getattr(module, "input_quantizer", None), FeatureQuantizer)
    if isinstance(module, SymmetricContraction):
        for contraction in module.contractions:
            if isinstance(contraction, QuantizedContraction):
                del contraction.weights_max_quantizer
                del contraction.weights_quantizers
                contraction.__class__ = Contraction
    elif hasattr(module, "weight_quantizer"):
        if keep:
            module.weight_quantizer = torch.nn.Identity()
        else:
            del module.weight_quantizer
    if not keep and type(module) in _ORIGINAL:
        if hasattr(module, "input_quantizer"):
            del module.input_quantizer
        module.__class__ = _ORIGINAL[type(module)]


def weight_quantizers(site: Site) -> dict[str, WeightQuantizer]:
    """The weight quantizers now in a site, by `WeightSite.path`."""
    found: dict[str, WeightQuantizer] = {}
    for weight in site.weights:
        owner = site.module.get_submodule(weight.owner) if weight.owner else site.module
        if site.kind == "contraction":
            if not isinstance(owner, QuantizedContraction):
                continue
            if weight.parameter == "weights_max":
                quantizer = owner.weights_max_quantizer
            else:
                rest: Any = owner.weights_quantizers
                quantizer = rest[int(weight.parameter.split(".")[1])]
        else:
            quantizer = getattr(owner, "weight_quantizer", None)
        if isinstance(quantizer, WeightQuantizer):
            found[weight.path] = quantizer
    return found
