"""Which modules of a NequIP or Allegro model carry weights and features to round, and how these lie.

Kinds, each with the class in `gaq_nequip.layers` that takes its place:

==================  ====================================================================================
``linear``          e3nn's equivariant linear layer (``linear_1``, ``linear_2``)
``tensor_product``  e3nn's fully connected tensor product: the self-connection ``sc``
``scalar_linear``   a layer of a scalar MLP (edge MLP, readout, all of Allegro's)
``deep_linear``     several scalar layers without non-linearity, multiplied out by NequIP
``embedding``       a table with a row a type (or a pair of types)
``convnet``         no weights; the node features it hands to later layers are rounded
``gate``            no weights; the scalars and gates it reads are rounded, the gated vectors are not
``contracter``      Allegro's tensor product: its path weights and the environment it reads
``tensor_track``    no weights; the tensor features that an Allegro tensor product reads
``env_weighter``    no weights; Allegro's environment weights, before the sum over neighbours
``attention``       a temperature a head; logits, rounded under the key ``attention``
==================  ====================================================================================

Modules are recognised by the name of their class: those of a packaged model are classes of the package, not of the
installed NequIP. This module is embedded in packages, so it imports nothing but torch and the core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from gaq.model.sites import POSITION_FREE, RADIAL, ROUNDED, AttentionSite, Bystander, Site, WeightSite, settle_first
from gaq.quantizers.features import FeatureLayout
from gaq.quantizers.weights import Block, WeightLayout

__all__ = ["TENSOR_TRACK", "bystanders", "class_name", "find_sites"]

TENSOR_TRACK = "tensor_track"
"""Name of the submodule of an Allegro tensor product that rounds its first input."""

TWO_BODY = "a function of one edge alone, kept smooth"
READOUT = "one dot product, whose every rounding is an error of the energy: kept exact"
LOGITS = "logits, bounded by the temperature: rounded under the key attention"
ENVIRONMENT = "the environment it reads, rounded where the preset says so"

# Parts of a model whose inputs are a function of one distance and two types.
_TWO_BODY_PARTS = (
    "edge_mlp",
    "edge_key",
    "radial_chemical_embed",
    "scalar_embed_mlp",
    "tensor_embed",
    "first_layer_env_embed",
)
_FIRST_RADIAL = ("edge_mlp.mlp.0", "edge_key", "basis_linear.mlp.0", "basis_linear.mlp.weights", "class_embed")
FEW = 4
"""Types are few where the embedding has at least this many numbers for each of them."""

_READOUTS = ("per_atom_energy_readout", "edge_readout")


def class_name(module: torch.nn.Module) -> str:
    """Name of the class of a module, or of the host's class that a quantized one stands for."""
    return getattr(type(module), "gaq_host_class", type(module).__name__)


def _pieces(irreps: Any, used: set[int] | None = None) -> tuple[tuple[int, int], ...]:
    """(multiplicity, dimension) of each irrep; those that are not used with a negative multiplicity."""
    return tuple(
        (mul if used is None or i in used else -mul, 2 * ir.l + 1) for i, (mul, ir) in enumerate(irreps) if mul > 0
    )


def _path_layout(module: Any, weighted: Any) -> WeightLayout:
    blocks = []
    offset = 0
    for instruction in weighted:
        blocks.append(Block(offset, tuple(instruction.path_shape), 0))
        offset += math.prod(instruction.path_shape)
    # A frozen layer has no parameter left: its size is that of its paths.
    return WeightLayout((offset,), tuple(blocks))


def _linear(name: str, module: Any) -> tuple[WeightSite, FeatureLayout, str]:
    weighted = [ins for ins in module.instructions if ins.i_in != -1 and 0 not in ins.path_shape]
    features = FeatureLayout(_pieces(module.irreps_in, {ins.i_in for ins in weighted}))
    site = WeightSite("", "weight", _path_layout(module, weighted))
    return site, features, f"{module.irreps_in} -> {module.irreps_out}"


def _tensor_product(name: str, module: Any) -> tuple[WeightSite, FeatureLayout, str]:
    weighted = [ins for ins in module.instructions if ins.has_weight]
    features = FeatureLayout(_pieces(module.irreps_in1, {ins.i_in1 for ins in weighted}))
    layout = _path_layout(module, weighted)
    if all(len(block.shape) == 3 for block in layout.blocks):
        # Both the features and the embedding are inputs: one scale an output channel, not one for each embedding too.
        blocks = (Block(b.offset, (b.shape[0] * b.shape[1], b.shape[2]), 0) for b in layout.blocks)
        layout = WeightLayout(layout.shape, tuple(blocks))
    site = WeightSite("", "weight", layout)
    return site, features, f"{module.irreps_in1} x {module.irreps_in2} -> {module.irreps_out}"


def _layer_of(name: str) -> str | None:
    """The part of a module's name that names its convolution layer."""
    for part in name.split("."):
        if part.startswith("layer") and part.endswith("_convnet"):
            return part
    return None


class _Finder:
    """Walks a model once, in the order of its modules."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.layers = [name for name, module in self.modules.items() if class_name(module) == "ConvNetLayer"]
        self.readout_layers = [
            name
            for name, module in self.modules.items()
            if class_name(module) == "ScalarLinearLayer" and any(part in name for part in _READOUTS)
        ]

    def source(self, name: str) -> str | None:
        """Why the input of a module need not be rounded there; None if it has to be."""
        leaf = name.rsplit(".", 1)[-1]
        layer = _layer_of(name)
        if layer is not None and leaf in ("linear_1", "sc", "linear_query", "linear_key"):
            own = next(i for i, full in enumerate(self.layers) if full.rsplit(".", 1)[-1] == layer)
            return POSITION_FREE if own == 0 else f"rounded at the output of {self.layers[own - 1]}"
        if self.readout_layers and name == self.readout_layers[-1]:
            return READOUT
        if "embed_module" in name or "center_embed" in name or "neighbor_embed" in name or "class_embed" in name:
            return POSITION_FREE
        if "edge_mlp" in name or "edge_key" in name:
            return RADIAL
        if any(part in name for part in _TWO_BODY_PARTS):
            return TWO_BODY
        return None

    def is_hidden(self, name: str) -> bool:
        """Whether a layer of a network is not its last one."""
        network = name.rsplit(".", 1)[0]
        layers = [own for own, module in self.modules.items() if class_name(module) == "ScalarLinearLayer"]
        return name != [own for own in layers if own.rsplit(".", 1)[0] == network][-1]

    def embedding(self, product: Any) -> torch.nn.Module | None:
        """The table of type embeddings that a self-connection multiplies with, if types are few beside its columns."""
        embeds = [m for m in self.modules.values() if class_name(m) == "NodeTypeEmbed"]
        if len(embeds) != 1 or embeds[0].do_categorical_graph_field_embed:
            return None
        modes = {instruction.connection_mode for instruction in product.instructions}
        table: Any = embeds[0].embed_module
        size = int(table.embedding_dim)
        scalars = all(ir.l == 0 for _, ir in product.irreps_in2) and int(product.irreps_in2.dim) == size
        few = FEW * int(table.num_embeddings) <= size
        return table if few and scalars and modes == {"uvw"} else None

    def sites(self) -> Iterator[Site]:
        for name, module in self.modules.items():
            yield from self._of(name, module, class_name(module))

    def _of(self, name: str, module: Any, kind: str) -> Iterator[Site]:
        radial = any(part in name for part in _TWO_BODY_PARTS)
        sensitive = (
            "embed_module" in name
            or any(part in name for part in _FIRST_RADIAL)
            or any(part in name for part in ("center_embed", "neighbor_embed"))
            # It acts on type embeddings only: each of its few weights is in everything an atom of a type sends.
            or (name.endswith(("linear_1", "linear_query", "linear_key")) and self.source(name) == POSITION_FREE)
            or (bool(self.readout_layers) and name == self.readout_layers[-1])
        )

        def site(
            kind: str, weights: tuple[WeightSite, ...], features: FeatureLayout | None, note: str, irreps: str
        ) -> Site:
            reason = self.source(name)
            # Two-body layers keep their layout: `radial_activations` rounds them all the same.
            if reason is not None and not (radial and reason in (RADIAL, TWO_BODY)):
                features = None
            first = bool(self.layers) and name.startswith(self.layers[0] + ".")
            if first:
                mixing = kind == "tensor_product"
            else:
                mixing = _layer_of(name) is not None and (self.is_hidden(name) if radial else kind == "linear")
            note = reason or note
            return Site(
                name, module, kind, weights, features, note, sensitive, radial, irreps, first=first, mixing=mixing
            )

        if kind == "Linear" and hasattr(module, "irreps_in"):
            weight, features, irreps = _linear(name, module)
            if weight.layout.blocks and module.internal_weights:
                yield site("linear", (weight,), features, ROUNDED, irreps)
        elif kind == "FullyConnectedTensorProduct" and module.internal_weights and module.weight_numel > 0:
            weight, features, irreps = _tensor_product(name, module)
            product = site("tensor_product", (weight,), features, ROUNDED, irreps)
            yield replace(product, embedding=self.embedding(module) if name.endswith(".conv.sc") else None)
        elif kind == "ScalarLinearLayer":
            shape = (int(module.in_features), int(module.out_features))
            weight = WeightSite("", "weight", WeightLayout.single(shape, 0))
            yield site(
                "scalar_linear", (weight,), FeatureLayout(((shape[0], 1),)), ROUNDED, f"{shape[0]} -> {shape[1]}"
            )
        elif kind == "DeepLinearMLP":
            shapes = getattr(module, "gaq_shapes", None) or [tuple(weight.shape) for weight in module.weights]
            weights = tuple(WeightSite("", f"weights.{i}", WeightLayout.single(s, 0)) for i, s in enumerate(shapes))
            dims = " -> ".join(str(n) for n in (*(s[0] for s in shapes), shapes[-1][1]))
            yield site("deep_linear", weights, FeatureLayout(((shapes[0][0], 1),)), ROUNDED, dims)
        elif kind == "Embedding":
            shape = (int(module.num_embeddings), int(module.embedding_dim))
            layout = WeightLayout.single(shape, 1)
            parent: Any = self.modules[name.rsplit(".", 1)[0]]
            if class_name(parent) == "PerClassSpline":
                # Rows hold a function a channel, as coefficients of splines: one scale a class and channel.
                cube = (shape[0], int(parent.num_channels), int(parent.num_splines))
                layout = WeightLayout(shape, (Block(0, cube, 2),))
            yield site(
                "embedding", (WeightSite("", "weight", layout),), None, POSITION_FREE, f"{shape[0]} -> {shape[1]}"
            )
        elif kind == "ConvNetLayer":
            irreps = module.irreps_out["node_features"]
            if name == self.layers[-1] and len(self.readout_layers) == 1:
                return
            note = "its output, the node features all later layers read"
            yield Site(name, module, "convnet", (), FeatureLayout(_pieces(irreps)), note, False, False, f"-> {irreps}")
        elif kind == "Gate":
            irreps = module.irreps_in
            scalars = FeatureLayout(tuple((mul if ir.l == 0 else -mul, 2 * ir.l + 1) for mul, ir in irreps if mul > 0))
            note = "scalars and gates it reads; vectors are rounded after the gate"
            gates = AttentionSite(scalars, what="gates")
            yield Site(name, module, "gate", (), scalars, note, False, False, f"{irreps} ->", gates)
        elif kind == "Contracter":
            sizes = [int(module.mul)] if module.path_channel_coupling else []
            sizes += [int(module.num_paths)] if module.num_paths > 1 else []
            # (channels, paths): one scale a channel.
            layout = WeightLayout.single(sizes or (1,), max(len(sizes) - 1, 0))
            own = tuple((int(module.mul), 2 * ir.l + 1) for _, ir in module.irreps_in2)
            text = f"{module.irreps_in1} x {module.irreps_in2} -> {module.irreps_out}"
            weight = WeightSite("", "weights", WeightLayout(tuple(sizes), layout.blocks))
            yield site("contracter", (weight,), FeatureLayout(own, channels_first=True), ENVIRONMENT, text)
            if not name.endswith(".tps.0"):
                # The first tensor product reads functions of one edge alone, which stay smooth.
                own = tuple((int(module.mul), 2 * ir.l + 1) for _, ir in module.irreps_in1)
                track = FeatureLayout(own, channels_first=True)
                full = f"{name}.{TENSOR_TRACK}"
                note = "tensor features that the product reads"
                yield Site(full, module, "tensor_track", (), track, note, False, False, f"{module.irreps_in1} ->")
        elif kind == "MakeWeightedChannels" and name.endswith("._env_weighter"):
            n = int(module.weight_numel)
            note = "environment weights, before the sum over neighbours"
            numbers = FeatureLayout(((n, 1),))
            environment = AttentionSite(numbers, what="environment weights")
            yield Site(name, module, "env_weighter", (), numbers, note, False, False, f"{n}x0e ->", environment)
        elif kind == "RobustAttention":
            heads = int(module.heads)
            logits = AttentionSite(FeatureLayout(((heads, 1),)), limit=1.0, what="logits")
            yield Site(name, module, "attention", (), None, LOGITS, False, False, f"{heads}x0e", logits)


def find_sites(model: torch.nn.Module) -> list[Site]:
    """Every module of a NequIP or Allegro model that holds weights or features to round, in order."""
    return settle_first(list(_Finder(model).sites()))


_REASONS = {
    "SphericalHarmonics": "no weights",
    "SphericalHarmonicEdgeAttrs": "no weights",
    "BesselEdgeLengthEncoding": "analytic functions of distance: rounding them would break the forces",
    "TensorProductScatter": "no weights of its own: its weights come from the edge MLP",
    "PerTypeScaleShift": "one scale and shift a type, kept exact: they set the zero of the energy",
    "AvgNumNeighborsNorm": "a constant",
    "ZBL": "analytic repulsion, kept exact",
}


def bystanders(model: torch.nn.Module) -> Iterator[Bystander]:
    """The modules a user may look for and not find among the sites, each with the reason."""
    sites = find_sites(model)
    covered = {site.name for site in sites}
    inside = tuple(f"{site.name}." for site in sites if site.weights)
    for name, module in model.named_modules():
        if name in covered or name.startswith(inside):
            continue
        own = sum(p.numel() for p in module.parameters(recurse=False))
        kind = class_name(module)
        if kind in _REASONS:
            yield Bystander(name, kind, _REASONS[kind], own)
        elif own:
            reason = "its weights are parametrized by torch" if "parametriz" in name or "Parametrized" in kind else None
            yield Bystander(name, kind, reason or "not a known kind", own)
