"""MACE's interaction blocks, each as a layer of the engine."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import nn
from torch import Tensor

from gaq.kernels import convolution, gpu, radial
from gaq.quantizers.attention import heads_of_weights, neighbour_weights
from gaq.quantizers.features import FeatureQuantizer
from gaq.untyped import AnyModule
from gaq_mace.engine import first_messages
from gaq_mace.engine.compositions import Composition
from gaq_mace.engine.edges import EdgeFeatures, Edges
from gaq_mace.engine.layer import Layer
from gaq_mace.engine.layouts import Rounder, rows_of
from gaq_mace.engine.linears import LinearLayer, Mixing
from gaq_mace.engine.radial_networks import RadialNetwork
from gaq_mace.engine.radial_tables import RadialTables
from gaq_mace.engine.reading import (
    Unsupported,
    class_name,
    input_quantizer_of,
    matrices_of,
    multiplicity,
    species_matrices_of,
)
from gaq_mace.names import ATTENTION

__all__ = ["INTERACTIONS", "AgnosticLayer", "NonLinearLayer", "layer_of"]


class AgnosticLayer(Layer):
    """`RealAgnosticInteractionBlock`, its residual form, and both with a density."""

    network: RadialNetwork | None
    density: RadialNetwork | None
    round_density: FeatureQuantizer | None

    def _message_divisor(self, block: AnyModule) -> float:
        return 1.0 if hasattr(block, "density_fn") else super()._message_divisor(block)

    def _read_block(self, model: AnyModule, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        self.network = self.density = None
        try:
            self.radial = RadialTables(model, block, len(self.problem.paths), self.channels, dtype)
        except ValueError:  # hidden layers that are rounded, say: a function with steps has no table
            self.radial = None
        if self.radial is not None and self.radial.transformed:
            rows = (0,) * len(self.problem.blocks)
            self.problem = dataclasses.replace(
                self.problem, r_max=self.radial.r_max, scale_rows=rows, plans={}, sources={}
            )
        self.round_density = copy.deepcopy(input_quantizer_of(block))
        self.reads_edges = self.radial is None or self.round_density is not None
        if self.radial is None or self.radial.by_species:  # not all pairs of species have tables
            self.network = RadialNetwork(block.conv_tp_weights, dtype)
        if hasattr(block, "density_fn") and (self.network is not None or self.round_density is not None):
            self.density = RadialNetwork(block.density_fn, dtype)
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
        read = x.split([rows.stop - rows.start for rows in self.skip_rows_in], dim=1)
        parts = []
        for out, rows in enumerate(self.skip_rows):
            if out in self.skip_inputs:
                parts.append(self._species_product(read[self.skip_inputs[out]], f"skip_{out}", composition))
            else:  # the block has no input of its degree
                parts.append(x.new_zeros(x.shape[0], rows.stop - rows.start, self.skip_channels))
        return torch.cat(parts, dim=1)

    def before_messages(self, features: Tensor, composition: Composition) -> list[Tensor]:
        made = [self.mix(self.up, features)]
        if self.residual:
            made.append(self._skip(features, composition))
        return [x.flatten(1) for x in made]

    def _densities(self, edges: Edges) -> Tensor | None:
        """Density of each edge, (edges,); None for a block without."""
        if edges.tables is None or self.round_density is not None:
            if self.density is None:
                return None
            assert edges.features is not None
            density = torch.tanh(self.density(edges.features.radial) ** 2)
            if self.round_density is not None:
                density = self.round_density(density)
            # Before the cutoff function, so that the steps vanish there.
            return (density if edges.features.cutoff is None else density * edges.features.cutoff)[:, 0]
        table = edges.tables[1]
        if table is None:
            return None
        lengths = edges.vectors.norm(dim=-1)
        if edges.graph.tables is None:
            density = radial.evaluate(table, lengths, self.problem.r_max)[:, 0, 0]
            return density if edges.cutoff is None else density * edges.cutoff[:, 0]
        return radial.evaluate_several(table, lengths, self.problem.r_max, edges.graph.tables, 1)[:, 0, 0]

    def _scales(self, features: Tensor, edges: Edges) -> Tensor | None:
        """Factors of each edge's radial weights, (edges, 1, channels); None without."""
        return None

    def _factors(self, features: Tensor, edges: Edges) -> Tensor | None:
        """What multiplies each edge's weights as the table or the network gives them, (edges, 1, channels)."""
        scales = self._scales(features, edges)
        if edges.cutoff is None:
            return scales
        cutoff = edges.cutoff[:, None]
        return cutoff.expand(-1, 1, self.channels) if scales is None else scales * cutoff

    def _interaction(self, features: Tensor, edges: Edges, composition: Composition) -> tuple[Tensor, Tensor | None]:
        atoms = features.shape[0]
        sc = self._skip(features, composition) if self.residual else None
        x, scales = self.sent(self.mix(self.up, features), edges), self._factors(features, edges)
        tabulated = edges.tables is not None
        if edges.tables is not None:
            weights = edges.tables[0]
        else:
            assert edges.features is not None
            assert self.network is not None
            weights = self.network(edges.features.radial, edges.features.cutoff)
            weights = weights.view(-1, len(self.problem.paths), self.channels)
        message = convolution.convolution(self.problem, edges.graph, x, edges.vectors, weights, tabulated, scales)
        x = torch.cat(self.mix_messages(message, atoms), dim=1)
        density = self._densities(edges)
        if density is not None:
            # A message is divided by the density of its atom plus one.
            x = x / (density.new_ones(atoms).index_add(0, edges.graph.receiver, density))[:, None, None]
        return (x, sc) if self.residual else (self._skip(x, composition), None)


class AttentionLayer(AgnosticLayer):
    """`gaq_mace.attention.GAQAttentionResidualInteractionBlock`."""

    SCALED = True
    exchanges = False
    mix_query: Mixing
    mix_key: Mixing
    head_of_channel: Tensor
    radial_key: AnyModule
    envelope: AnyModule
    attention: AnyModule

    def _message_divisor(self, block: AnyModule) -> float:
        return 1.0

    def _read_block(self, model: AnyModule, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        super()._read_block(model, block, number, dtype)
        self.reads_edges = True
        self.heads = int(block.heads)
        for name in ("query", "key"):
            path = f"interactions.{number}.linear_{name}"
            linear = LinearLayer(name, path, getattr(block, f"linear_{name}"), reads_features=True)
            setattr(self, f"mix_{name}", self._read_mixing(linear, dtype))
        for name in ("radial_key", "envelope", "attention"):
            setattr(self, name, copy.deepcopy(getattr(block, name)).requires_grad_(False))
        self.register_buffer("head_of_channel", heads_of_weights([self.channels], self.heads))

    def _scales(self, features: Tensor, edges: Edges) -> Tensor:
        assert edges.features is not None
        graph, radial_features, cutoff = edges.graph, edges.features.radial, edges.features.cutoff
        atoms = features.shape[0]
        query = self.mix(self.mix_query, features)[:, 0]
        key = self.mix(self.mix_key, features)[:, 0].index_select(0, graph.sender) + self.radial_key(radial_features)
        heads = (-1, self.heads, query.shape[1] // self.heads)
        logits = self.attention.logits(query.view(heads), key.view(heads), graph.receiver)
        envelope = self.envelope(radial_features) if cutoff is None else cutoff[:, 0]
        # The radial tables contain the cutoff function where MACE hands it over.
        weights = neighbour_weights(logits, envelope, graph.receiver, atoms, enveloped=cutoff is None)
        if self.channels % self.heads:
            return weights.index_select(1, self.head_of_channel)[:, None]
        return weights[:, :, None].expand(-1, -1, self.channels // self.heads).reshape(-1, 1, self.channels)


class Activation(NamedTuple):
    """An activation function of a gate, times a factor."""

    function: Callable[[Tensor], Tensor]
    factor: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x) * self.factor


def _activations_of(gate: AnyModule, path: str) -> tuple[Activation, Activation]:
    """Functions that a gate applies to scalars and to the gates of other features.

    Raises:
        Unsupported: for a gate that is neither MACE's nor e3nn's.
    """
    if isinstance(gate, nn.Gate):  # of models from before MACE had a gate of its own
        acts = gate.act_scalars.acts[0], gate.act_gates.acts[0]
        scalars, gates = (Activation(getattr(act, "f", act), float(getattr(act, "cst", 1.0))) for act in acts)
        return scalars, gates
    if class_name(gate) != "GatedEquivariantBlock":
        raise Unsupported(f"{path} is a {class_name(gate)}")
    return (
        Activation(gate._act_scalar, float(gate._scalar_cst)),
        Activation(gate._act_gate, float(gate._gate_cst)),
    )


class NonLinearLayer(Layer):
    """`RealAgnosticResidualNonLinearInteractionBlock`."""

    MESSAGE_LINEAR = "linear_1"
    READS_TABLES = False
    network: RadialNetwork
    density: RadialNetwork
    alpha: Tensor
    beta: Tensor

    def _message_divisor(self, block: AnyModule) -> float:
        return 1.0

    def _read_block(self, model: AnyModule, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        path = f"interactions.{number}"
        species = [matrices_of(linear)[0].to(dtype) for linear in (block.source_embedding, block.target_embedding)]
        for name, network in (("network", block.conv_tp_weights), ("density", block.density_fn)):
            networks = RadialNetwork(network, dtype, species[0].shape[1])
            setattr(self, name, networks)
            for end, rows in zip(("sender", "receiver"), networks.properties_of(*species), strict=True):
                self.register_buffer(f"{name}_{end}", rows)
        for name in ("alpha", "beta"):
            self.register_buffer(name, getattr(block, name).detach().to(dtype))
        if not gpu.chosen(next(model.parameters()).device):
            with contextlib.suppress(ValueError):  # a function with steps has no table
                self.radial = RadialTables(model, block, len(self.problem.paths), self.channels, dtype)
        skip = LinearLayer("skip", f"{path}.skip_tp", block.skip_tp, reads_features=True)
        self.skip = self._read_mixing(skip, dtype)
        self.residual = self._read_mixing(LinearLayer("res", f"{path}.linear_res", block.linear_res), dtype)
        self.second = self._read_mixing(LinearLayer("second", f"{path}.linear_2", block.linear_2), dtype)
        self.first = number == 0 and first_messages.serves(self.problem)
        gate = block.equivariant_nonlin
        self.scalar_activation, self.gate_activation = _activations_of(gate, f"{path}.equivariant_nonlin")
        multiplicity(gate.irreps_scalars + gate.irreps_gated, f"messages of {path}.equivariant_nonlin")
        if len(gate.irreps_scalars) != 1 or block.linear_1.irreps_out[0].ir.l != 0:
            raise Unsupported(f"{path}.equivariant_nonlin has scalars of several kinds")

    def before_messages(self, features: Tensor, composition: Composition) -> list[Tensor]:
        sent = self.mix(self.up, features)
        kept = torch.cat([block.flatten(1) for block in self.mix_blocks(self.residual, sent)], dim=1)
        return [sent.flatten(1), self.mix(self.skip, features).flatten(1), kept]

    def _ends(self, name: str, edges: EdgeFeatures) -> tuple[Tensor, Tensor]:
        """What one of the two networks reads of the species of each edge."""
        return getattr(self, f"{name}_sender")[edges.sender], getattr(self, f"{name}_receiver")[edges.receiver]

    def _density(self, edges: Edges, atoms: int) -> Tensor:
        """Edge density of each atom, (atoms,)."""
        assert edges.features is not None
        density = torch.tanh(self.density(edges.features.radial, None, self._ends("density", edges.features)) ** 2)
        # Without the cutoff function nothing else would leave out the edges beyond.
        factor = edges.features.inside if edges.features.cutoff is None else edges.features.cutoff
        density = density * factor
        return density.new_zeros(atoms).index_add(0, edges.graph.receiver, density[:, 0])

    def _gated(self, blocks: list[Tensor]) -> Tensor:
        """Apply the gate to blocks (atoms, components, channels); the first holds scalars, then gates."""
        channels = blocks[1].shape[2] if len(blocks) > 1 else blocks[0].shape[2]
        scalars, *gates = blocks[0].split(channels, dim=2)
        parts = [self.scalar_activation(scalars)]
        parts += [block * self.gate_activation(gate) for block, gate in zip(blocks[1:], gates, strict=True)]
        return torch.cat(parts, dim=1)

    def _interaction(self, features: Tensor, edges: Edges, composition: Composition) -> tuple[Tensor, Tensor | None]:
        atoms = features.shape[0]
        assert edges.features is not None
        kinds = self._kinds(edges, composition)
        if kinds is not None:  # one row for all atoms of a species
            features = features.index_select(0, kinds[0])
        sc = self.mix(self.skip, features)
        x = self.mix(self.up, features)
        kept = self.mix_blocks(self.residual, x)
        hidden = self.network.before_last(
            edges.features.radial, edges.features.cutoff, self._ends("network", edges.features)
        )
        if kinds is None:
            weights = (hidden @ self.network.last).view(-1, len(self.problem.paths), self.channels)
            sent = self.sent(x, edges)
            message = convolution.convolution(self.problem, edges.graph, sent, edges.vectors, weights, tabulated=False)
        else:
            kind, last = kinds[1], self.network.last
            message = first_messages.messages(self.problem, edges.graph, x, kind, edges.vectors, hidden, last)
            sc, kept = sc.index_select(0, kind), [block.index_select(0, kind) for block in kept]
        scale = (1.0 / (self._density(edges, atoms) * self.beta + self.alpha))[:, None, None]
        mixed = [block * scale for block in self.mix_messages(message, atoms)]
        gated = self._gated([block + rest for block, rest in zip(mixed, kept, strict=True)])
        return self.mix(self.second, gated), sc

    def _kinds(self, edges: Edges, composition: Composition) -> tuple[Tensor, Tensor] | None:
        """An atom of each species, (kinds,), and the kind of each atom, (atoms,), where `first_messages` serve.

        None where they do not: after the first layer, and on a GPU, where the host would have to wait.
        """
        if edges.features is None or not (self.first and edges.features.alike) or gpu.chosen(edges.vectors.device):
            return None
        atoms, count = composition.ordered.shape[0], edges.vectors.shape[0]
        if not first_messages.pays(self.problem, atoms, len(composition.bounds), count):
            return None
        firsts = torch.tensor([begin for _, begin, _ in composition.bounds])
        sizes = torch.tensor([end - begin for _, begin, end in composition.bounds])
        return firsts, torch.repeat_interleave(torch.arange(len(sizes)), sizes)


class NodeAttentionLayer(Layer):
    """`RealAgnosticAttResidualInteractionBlock`: MACE's radial network that reads scalars of both atoms."""

    exchanges = False

    def _read_block(self, model: AnyModule, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        path = f"interactions.{number}"
        down = LinearLayer("down", f"{path}.linear_down", block.linear_down, reads_features=True)
        self.down = self._read_mixing(down, dtype)
        skip = LinearLayer("skip", f"{path}.skip_linear", block.skip_linear, reads_features=True)
        self.skip = self._read_mixing(skip, dtype)
        self.network = RadialNetwork(block.conv_tp_weights, dtype, self.down.channels[0])

    def _interaction(self, features: Tensor, edges: Edges, composition: Composition) -> tuple[Tensor, Tensor | None]:
        assert edges.features is not None
        graph = edges.graph
        scalars = self.mix(self.down, features)[:, 0]
        sender, receiver = self.network.properties_of(scalars, scalars)
        ends = sender.index_select(0, graph.sender), receiver.index_select(0, graph.receiver)
        weights: Tensor = self.network(edges.features.radial, edges.features.cutoff, ends)
        weights = weights.view(-1, len(self.problem.paths), self.channels)
        x = self.mix(self.up, features)
        message = convolution.convolution(self.problem, graph, x, edges.vectors, weights, tabulated=False)
        return torch.cat(self.mix_messages(message, features.shape[0]), dim=1), self.mix(self.skip, features)


_LAYERS: dict[str, type[Layer]] = {
    "RealAgnosticInteractionBlock": AgnosticLayer,
    "RealAgnosticResidualInteractionBlock": AgnosticLayer,
    "RealAgnosticDensityInteractionBlock": AgnosticLayer,
    "RealAgnosticDensityResidualInteractionBlock": AgnosticLayer,
    "RealAgnosticResidualNonLinearInteractionBlock": NonLinearLayer,
    "RealAgnosticAttResidualInteractionBlock": NodeAttentionLayer,
    ATTENTION: AttentionLayer,
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
