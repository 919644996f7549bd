"""MACE's interaction blocks, each as a layer of the engine."""

from __future__ import annotations

from collections.abc import Callable

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import nn
from torch import Tensor

from gaq.kernels import convolution, radial
from gaq.untyped import AnyModule
from gaq_mace.engine.compositions import Composition
from gaq_mace.engine.edges import Edges
from gaq_mace.engine.layer import Layer, LinearLayer
from gaq_mace.engine.layouts import Rounder, rows_of
from gaq_mace.engine.radial_networks import RadialNetwork
from gaq_mace.engine.radial_tables import RadialTables
from gaq_mace.engine.reading import (
    Unsupported,
    class_name,
    input_quantizer_of,
    multiplicity,
    species_matrices_of,
)

__all__ = ["INTERACTIONS", "layer_of"]


class AgnosticLayer(Layer):
    """`RealAgnosticInteractionBlock`, its residual form, and both with a density."""

    def _message_divisor(self, block: AnyModule) -> float:
        return 1.0 if hasattr(block, "density_fn") else super()._message_divisor(block)

    def _read_block(self, model: AnyModule, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        if input_quantizer_of(block) is not None:
            raise Unsupported(f"the density weights of interactions.{number} are rounded")
        try:
            self.radial = RadialTables(model, block, len(self.problem.paths), self.channels, dtype)
        except ValueError as error:
            raise Unsupported(str(error)) from error
        if self.radial.by_species:
            self.network = RadialNetwork(block.conv_tp_weights, dtype)
            self.density = RadialNetwork(block.density_fn, dtype) if hasattr(block, "density_fn") else None
        self.residual = "Residual" in class_name(block)
        self._read_skip(block, number, dtype)

    def _read_skip(self, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        """Read the product with the species, ``skip_tp``."""
        product, path = block.skip_tp, f"interactions.{number}.skip_tp"
        skip = species_matrices_of(product)
        self.skip_inputs = {out: i_in for out, (i_in, _) in skip.items()}
        for out, (_, matrix) in skip.items():
            self.register_buffer(f"skip_{out}", matrix.to(dtype))
        self.linears.append(LinearLayer("skip", path, product, reads_features=self.residual))
        channels = multiplicity(product.irreps_in1, f"inputs of {path}")
        self.skip_channels = multiplicity(product.irreps_out, f"outputs of {path}")
        self.round_skip = Rounder(input_quantizer_of(product), product.irreps_in1, channels)
        self.skip_rows_in, self.skip_rows = rows_of(product.irreps_in1), rows_of(product.irreps_out)

    def _skip(self, x: Tensor, composition: Composition) -> Tensor:
        """Product of features with the species, (atoms, rows, channels)."""
        x = self.round_skip(x)
        parts = []
        for out, rows in enumerate(self.skip_rows):
            if out in self.skip_inputs:
                rows_read = self.skip_rows_in[self.skip_inputs[out]]
                parts.append(self._species_product(x[:, rows_read], f"skip_{out}", composition))
            else:  # the block has no input of its degree
                parts.append(x.new_zeros(x.shape[0], rows.stop - rows.start, self.skip_channels))
        return torch.cat(parts, dim=1)

    def _density_of(self, edges: Edges, atoms: int) -> Tensor | None:
        """Edge density of each atom, (atoms,); None without one. A message is divided by the density plus one."""
        if edges.tables is None:
            return None if self.density is None else self._evaluated_density(self.density, edges, atoms)
        table = edges.tables[1]
        if table is None:
            return None
        lengths = edges.vectors.norm(dim=-1)
        if edges.graph.tables is None:
            edge = radial.evaluate(table, lengths, self.problem.r_max)
        else:
            edge = radial.evaluate_several(table, lengths, self.problem.r_max, edges.graph.tables, 1)
        return edge.new_zeros(atoms).index_add(0, edges.graph.receiver, edge[:, 0, 0])

    def _interaction(self, features: Tensor, edges: Edges, composition: Composition) -> tuple[Tensor, Tensor | None]:
        atoms = features.shape[0]
        sc = self._skip(features, composition) if self.residual else None
        tabulated = edges.tables is not None
        weights = self._evaluated_weights(self.network, edges) if edges.tables is None else edges.tables[0]
        x = self.mix(self.up, features)
        message = convolution.convolution(self.problem, edges.graph, x, edges.vectors, weights, tabulated)
        x = torch.cat(self.mix_messages(message, atoms), dim=1)
        density = self._density_of(edges, atoms)
        if density is not None:
            x = x / (density + 1)[:, None, None]
        return (x, sc) if self.residual else (self._skip(x, composition), None)


Activation = Callable[[Tensor], Tensor]


def _activations_of(gate: AnyModule, path: str) -> tuple[Activation, Activation]:
    """Functions that a gate applies to scalars and to the gates of other features.

    Raises:
        Unsupported: for a gate that is neither MACE's nor e3nn's.
    """
    if isinstance(gate, nn.Gate):  # of models from before MACE had a gate of its own
        return gate.act_scalars.acts[0], gate.act_gates.acts[0]
    if class_name(gate) != "GatedEquivariantBlock":
        raise Unsupported(f"{path} is a {class_name(gate)}")
    scalar, scalar_factor, of_gate, gate_factor = gate._act_scalar, gate._scalar_cst, gate._act_gate, gate._gate_cst
    return (lambda x: scalar(x) * scalar_factor), (lambda x: of_gate(x) * gate_factor)


class NonLinearLayer(Layer):
    """`RealAgnosticResidualNonLinearInteractionBlock`."""

    MESSAGE_LINEAR = "linear_1"
    alpha: Tensor
    beta: Tensor

    def _message_divisor(self, block: AnyModule) -> float:
        return 1.0

    def _read_block(self, model: AnyModule, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        path = f"interactions.{number}"
        embeddings = block.source_embedding, block.target_embedding
        self.network = RadialNetwork(block.conv_tp_weights, dtype, *embeddings)
        self.density = RadialNetwork(block.density_fn, dtype, *embeddings)
        for name in ("alpha", "beta"):
            self.register_buffer(name, getattr(block, name).detach().to(dtype))
        skip = LinearLayer("skip", f"{path}.skip_tp", block.skip_tp, reads_features=True)
        self.skip = self._read_mixing(skip, dtype)
        self.residual = self._read_mixing(LinearLayer("res", f"{path}.linear_res", block.linear_res), dtype)
        self.second = self._read_mixing(LinearLayer("second", f"{path}.linear_2", block.linear_2), dtype)
        gate = block.equivariant_nonlin
        self.scalar_activation, self.gate_activation = _activations_of(gate, f"{path}.equivariant_nonlin")
        multiplicity(gate.irreps_scalars + gate.irreps_gated, f"messages of {path}.equivariant_nonlin")
        if len(gate.irreps_scalars) != 1 or block.linear_1.irreps_out[0].ir.l != 0:
            raise Unsupported(f"{path}.equivariant_nonlin has scalars of several kinds")

    def _gated(self, blocks: list[Tensor]) -> Tensor:
        """Apply the gate to blocks (atoms, components, channels); the first holds scalars, then gates."""
        channels = blocks[1].shape[2] if len(blocks) > 1 else blocks[0].shape[2]
        scalars, *gates = blocks[0].split(channels, dim=2)
        parts = [self.scalar_activation(scalars)]
        parts += [block * self.gate_activation(gate) for block, gate in zip(blocks[1:], gates, strict=True)]
        return torch.cat(parts, dim=1)

    def _interaction(self, features: Tensor, edges: Edges, composition: Composition) -> tuple[Tensor, Tensor | None]:
        atoms = features.shape[0]
        sc = self.mix(self.skip, features)
        x = self.mix(self.up, features)
        weights = self._evaluated_weights(self.network, edges)
        message = convolution.convolution(self.problem, edges.graph, x, edges.vectors, weights, tabulated=False)
        scale = (1.0 / (self._evaluated_density(self.density, edges, atoms) * self.beta + self.alpha))[:, None, None]
        pairs = zip(self.mix_messages(message, atoms), self.mix_blocks(self.residual, x), strict=True)
        return self.mix(self.second, self._gated([mixed * scale + kept for mixed, kept in pairs])), sc


_LAYERS: dict[str, type[Layer]] = {
    "RealAgnosticInteractionBlock": AgnosticLayer,
    "RealAgnosticResidualInteractionBlock": AgnosticLayer,
    "RealAgnosticDensityInteractionBlock": AgnosticLayer,
    "RealAgnosticDensityResidualInteractionBlock": AgnosticLayer,
    "RealAgnosticResidualNonLinearInteractionBlock": NonLinearLayer,
}
INTERACTIONS = tuple(_LAYERS)
"""Names of the interaction blocks that the engine serves."""


def layer_of(model: AnyModule, number: int, sh: list[Tensor], dtype: torch.dtype) -> Layer:
    """Make the layer of an interaction block; the arguments are those of `Layer`.

    Raises:
        Unsupported: for a block that the kernels do not serve.
    """
    name = class_name(model.interactions[number])
    if name not in _LAYERS:
        raise Unsupported(f"interactions.{number} is a {name}; served are {', '.join(INTERACTIONS)}")
    return _LAYERS[name](model, number, sh, dtype)
