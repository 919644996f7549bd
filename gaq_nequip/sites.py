"""Which modules of a NequIP or Allegro model can be quantized, and how their weights and inputs are laid out.

Kinds of sites; `gaq_nequip.insertion.insert` gives each the quantized class of its kind:

==================  ====================================================================================
``linear``          e3nn's equivariant linear layer (``linear_1``, ``linear_2``)
``tensor_product``  e3nn's fully connected tensor product: the self-connection ``sc``
``scalar_linear``   a layer of a scalar MLP (edge MLP, readout, all of Allegro's)
``deep_linear``     several scalar layers without non-linearity, which NequIP multiplies into one matrix
``embedding``       a table with one row per type (or pair of types)
``convnet``         no weights; the node features it hands to later layers are rounded
``gate``            no weights; the scalars and gates it reads are rounded, the gated vectors are not
``contracter``      Allegro's tensor product: its path weights and the environment it reads
``tensor_track``    no weights; the tensor features that an Allegro tensor product reads
``env_weighter``    no weights; Allegro's environment weights, before the sum over neighbours
``attention``       one temperature per head; logits, rounded under the key ``attention``
==================  ====================================================================================

Modules are recognised by the name of their class, because the classes of a packaged model come from the package and not
from the installed NequIP. This module is embedded in packages, so it imports only torch and the core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from gaq.model.sites import POSITION_FREE, RADIAL, ROUNDED, AttentionSite, Bystander, Site, WeightSite, settle_first
from gaq.quantizers.features import FeatureLayout
from gaq.quantizers.weights import Block, WeightLayout
from gaq.untyped import AnyModule, Instructions, Irreps

__all__ = ["TENSOR_TRACK", "bystanders", "class_name", "find_sites"]

TENSOR_TRACK = "tensor_track"
"""Name of the submodule of an Allegro tensor product that rounds its first input."""

TWO_BODY = "a function of one edge alone, kept smooth"
READOUT = "one dot product, whose every rounding is an error of the energy: kept exact"
LOGITS = "logits, bounded by the temperature: rounded under the key attention"
ENVIRONMENT = "the environment it reads, rounded where the preset says so"

# Parts of a model whose inputs depend on one distance and two types only.
_TWO_BODY_PARTS = (
    "edge_mlp",
    "edge_key",
    "radial_chemical_embed",
    "scalar_embed_mlp",
    "tensor_embed",
    "first_layer_env_embed",
)
_FIRST_RADIAL = ("edge_mlp.mlp.0", "edge_key", "basis_linear.mlp.0", "basis_linear.mlp.weights", "class_embed")
_READOUTS = ("per_atom_energy_readout", "edge_readout")

FEW = 4
"""Types count as few if the embedding has at least this many numbers for each of them."""


def class_name(module: torch.nn.Module) -> str:
    """Name of a module's class; for a quantized class, the name of the NequIP class that it replaces."""
    return getattr(type(module), "gaq_host_class", type(module).__name__)


def _pieces(irreps: Irreps, used: set[int] | None = None) -> tuple[tuple[int, int], ...]:
    """(multiplicity, dimension) of each irrep; an unused irrep gets a negative multiplicity."""
    return tuple(
        (mul if used is None or i in used else -mul, 2 * ir.l + 1) for i, (mul, ir) in enumerate(irreps) if mul > 0
    )


def _path_layout(instructions: Instructions) -> WeightLayout:
    """Layout of a flat weight: one block for each path with weights."""
    blocks = []
    offset = 0
    for instruction in instructions:
        blocks.append(Block(offset, tuple(instruction.path_shape), 0))
        offset += math.prod(instruction.path_shape)
    # The size is that of the paths: a frozen layer has no parameter left to ask.
    return WeightLayout((offset,), tuple(blocks))


def _layer_of(name: str) -> str | None:
    """The part of a module's name that names its convolution layer."""
    for part in name.split("."):
        if part.startswith("layer") and part.endswith("_convnet"):
            return part
    return None


class _Finder:
    """Finds the sites of one model, in the order of its modules."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.layers = [name for name, module in self.modules.items() if class_name(module) == "ConvNetLayer"]
        self.readout_layers = [
            name
            for name, module in self.modules.items()
            if class_name(module) == "ScalarLinearLayer" and any(part in name for part in _READOUTS)
        ]

    def sites(self) -> Iterator[Site]:
        for name, module in self.modules.items():
            describe = _DESCRIBE.get(class_name(module))
            if describe is not None:
                yield from describe(self, name, module)

    def reason_not_rounded(self, name: str) -> str | None:
        """Why the input of a module need not be rounded at the module itself; None if it has to be."""
        leaf = name.rsplit(".", 1)[-1]
        layer = _layer_of(name)
        if layer is not None and leaf in ("linear_1", "sc", "linear_query", "linear_key"):
            index = next(i for i, full in enumerate(self.layers) if full.rsplit(".", 1)[-1] == layer)
            return POSITION_FREE if index == 0 else f"rounded at the output of {self.layers[index - 1]}"
        if self.is_last_readout(name):
            return READOUT
        if "embed_module" in name or "center_embed" in name or "neighbor_embed" in name or "class_embed" in name:
            return POSITION_FREE
        if "edge_mlp" in name or "edge_key" in name:
            return RADIAL
        return TWO_BODY if self.is_radial(name) else None

    def is_radial(self, name: str) -> bool:
        """Whether the input of a module depends on one edge alone."""
        return any(part in name for part in _TWO_BODY_PARTS)

    def is_last_readout(self, name: str) -> bool:
        """Whether a layer is the last one of the readout."""
        return bool(self.readout_layers) and name == self.readout_layers[-1]

    def is_sensitive(self, name: str) -> bool:
        """Whether the weights of a module are among the few that `sensitive_bits` protects."""
        return (
            "embed_module" in name
            or any(part in name for part in _FIRST_RADIAL)
            or any(part in name for part in ("center_embed", "neighbor_embed"))
            # They act on type embeddings only: each of their few weights is in all that an atom of a type sends.
            or (
                name.endswith(("linear_1", "linear_query", "linear_key"))
                and self.reason_not_rounded(name) == POSITION_FREE
            )
            or self.is_last_readout(name)
        )

    def is_hidden(self, name: str) -> bool:
        """Whether a layer of a network is not its last one."""
        network = name.rsplit(".", 1)[0]
        scalar_layers = [layer for layer, module in self.modules.items() if class_name(module) == "ScalarLinearLayer"]
        return name != [layer for layer in scalar_layers if layer.rsplit(".", 1)[0] == network][-1]

    def embedding(self, product: AnyModule) -> torch.nn.Module | None:
        """The table of type embeddings that a self-connection reads, if types are few; None otherwise."""
        embeds = [m for m in self.modules.values() if class_name(m) == "NodeTypeEmbed"]
        if len(embeds) != 1 or embeds[0].do_categorical_graph_field_embed:
            return None
        modes = {instruction.connection_mode for instruction in product.instructions}
        table: AnyModule = embeds[0].embed_module
        size = int(table.embedding_dim)
        scalars = all(ir.l == 0 for _, ir in product.irreps_in2) and int(product.irreps_in2.dim) == size
        few = FEW * int(table.num_embeddings) <= size
        return table if few and scalars and modes == {"uvw"} else None

    def weighted_site(
        self,
        name: str,
        module: torch.nn.Module,
        kind: str,
        weights: tuple[WeightSite, ...],
        features: FeatureLayout | None,
        irreps: str,
        note: str = ROUNDED,
    ) -> Site:
        """The site of a module with weights; whether its input is rounded follows from its place in the model."""
        radial = self.is_radial(name)
        reason = self.reason_not_rounded(name)
        # Two-body layers keep the layout of their input, because `radial_activations` rounds it.
        if reason is not None and not (radial and reason in (RADIAL, TWO_BODY)):
            features = None
        first = bool(self.layers) and name.startswith(self.layers[0] + ".")
        if first:
            mixing = kind == "tensor_product"
        else:
            mixing = _layer_of(name) is not None and (self.is_hidden(name) if radial else kind == "linear")
        return Site(
            name,
            module,
            kind,
            weights,
            features,
            reason or note,
            self.is_sensitive(name),
            radial,
            irreps,
            first=first,
            mixing=mixing,
        )


def _unweighted_site(
    name: str,
    module: torch.nn.Module,
    kind: str,
    features: FeatureLayout | None,
    irreps: str,
    note: str,
    attention: AttentionSite | None = None,
) -> Site:
    """The site of a module that only has features to round."""
    return Site(name, module, kind, (), features, note, False, False, irreps, attention)


# -- one function for each class of module: the sites at a module --


def _linear(finder: _Finder, name: str, module: AnyModule) -> Iterator[Site]:
    if not hasattr(module, "irreps_in") or not module.internal_weights:
        return
    weighted = [ins for ins in module.instructions if ins.i_in != -1 and 0 not in ins.path_shape]
    if not weighted:
        return
    features = FeatureLayout(_pieces(module.irreps_in, {ins.i_in for ins in weighted}))
    weight = WeightSite("", "weight", _path_layout(weighted))
    irreps = f"{module.irreps_in} -> {module.irreps_out}"
    yield finder.weighted_site(name, module, "linear", (weight,), features, irreps)


def _tensor_product(finder: _Finder, name: str, module: AnyModule) -> Iterator[Site]:
    if not module.internal_weights or module.weight_numel == 0:
        return
    weighted = [ins for ins in module.instructions if ins.has_weight]
    features = FeatureLayout(_pieces(module.irreps_in1, {ins.i_in1 for ins in weighted}))
    layout = _path_layout(weighted)
    if all(len(block.shape) == 3 for block in layout.blocks):
        # Features and embedding are both inputs: one scale per output channel, not one per embedding as well.
        blocks = (Block(b.offset, (b.shape[0] * b.shape[1], b.shape[2]), 0) for b in layout.blocks)
        layout = WeightLayout(layout.shape, tuple(blocks))
    weight = WeightSite("", "weight", layout)
    irreps = f"{module.irreps_in1} x {module.irreps_in2} -> {module.irreps_out}"
    site = finder.weighted_site(name, module, "tensor_product", (weight,), features, irreps)
    yield replace(site, embedding=finder.embedding(module) if name.endswith(".conv.sc") else None)


def _scalar_linear(finder: _Finder, name: str, module: AnyModule) -> Iterator[Site]:
    inputs, outputs = int(module.in_features), int(module.out_features)
    weight = WeightSite("", "weight", WeightLayout.single((inputs, outputs), 0))
    features = FeatureLayout(((inputs, 1),))
    yield finder.weighted_site(name, module, "scalar_linear", (weight,), features, f"{inputs} -> {outputs}")


def _deep_linear(finder: _Finder, name: str, module: AnyModule) -> Iterator[Site]:
    shapes = getattr(module, "gaq_shapes", None) or [tuple(weight.shape) for weight in module.weights]
    weights = tuple(WeightSite("", f"weights.{i}", WeightLayout.single(s, 0)) for i, s in enumerate(shapes))
    features = FeatureLayout(((shapes[0][0], 1),))
    widths = " -> ".join(str(n) for n in (*(s[0] for s in shapes), shapes[-1][1]))
    yield finder.weighted_site(name, module, "deep_linear", weights, features, widths)


def _embedding(finder: _Finder, name: str, module: AnyModule) -> Iterator[Site]:
    shape = (int(module.num_embeddings), int(module.embedding_dim))
    layout = WeightLayout.single(shape, 1)
    parent: AnyModule = finder.modules[name.rsplit(".", 1)[0]]
    if class_name(parent) == "PerClassSpline":
        # A row holds spline coefficients, one function per channel: one scale per class and channel.
        cube = (shape[0], int(parent.num_channels), int(parent.num_splines))
        layout = WeightLayout(shape, (Block(0, cube, 2),))
    weight = WeightSite("", "weight", layout)
    yield finder.weighted_site(
        name, module, "embedding", (weight,), None, f"{shape[0]} -> {shape[1]}", note=POSITION_FREE
    )


def _convnet(finder: _Finder, name: str, module: AnyModule) -> Iterator[Site]:
    if name == finder.layers[-1] and len(finder.readout_layers) == 1:
        return
    irreps = module.irreps_out["node_features"]
    note = "its output, the node features all later layers read"
    yield _unweighted_site(name, module, "convnet", FeatureLayout(_pieces(irreps)), f"-> {irreps}", note)


def _gate(finder: _Finder, name: str, module: AnyModule) -> Iterator[Site]:
    irreps = module.irreps_in
    scalars = FeatureLayout(tuple((mul if ir.l == 0 else -mul, 2 * ir.l + 1) for mul, ir in irreps if mul > 0))
    note = "scalars and gates it reads; vectors are rounded after the gate"
    yield _unweighted_site(name, module, "gate", scalars, f"{irreps} ->", note, AttentionSite(scalars, what="gates"))


def _contracter(finder: _Finder, name: str, module: AnyModule) -> Iterator[Site]:
    channels = int(module.mul)
    sizes = [channels] if module.path_channel_coupling else []
    sizes += [int(module.num_paths)] if module.num_paths > 1 else []
    # (channels, paths): one scale per channel.
    layout = WeightLayout.single(sizes or (1,), max(len(sizes) - 1, 0))
    weight = WeightSite("", "weights", WeightLayout(tuple(sizes), layout.blocks))
    irreps = f"{module.irreps_in1} x {module.irreps_in2} -> {module.irreps_out}"
    pieces = tuple((channels, 2 * ir.l + 1) for _, ir in module.irreps_in2)
    environment = FeatureLayout(pieces, channels_first=True)
    yield finder.weighted_site(name, module, "contracter", (weight,), environment, irreps, note=ENVIRONMENT)
    if name.endswith(".tps.0"):
        return  # the first tensor product reads functions of one edge alone, which stay smooth
    pieces = tuple((channels, 2 * ir.l + 1) for _, ir in module.irreps_in1)
    track = FeatureLayout(pieces, channels_first=True)
    note = "tensor features that the product reads"
    full = f"{name}.{TENSOR_TRACK}"
    yield _unweighted_site(full, module, "tensor_track", track, f"{module.irreps_in1} ->", note)


def _env_weighter(finder: _Finder, name: str, module: AnyModule) -> Iterator[Site]:
    if not name.endswith("._env_weighter"):
        return
    count = int(module.weight_numel)
    layout = FeatureLayout(((count, 1),))
    note = "environment weights, before the sum over neighbours"
    attention = AttentionSite(layout, what="environment weights")
    yield _unweighted_site(name, module, "env_weighter", layout, f"{count}x0e ->", note, attention)


def _attention(finder: _Finder, name: str, module: AnyModule) -> Iterator[Site]:
    heads = int(module.heads)
    logits = AttentionSite(FeatureLayout(((heads, 1),)), limit=1.0, what="logits")
    yield _unweighted_site(name, module, "attention", None, f"{heads}x0e", LOGITS, logits)


_DESCRIBE: dict[str, Callable[[_Finder, str, AnyModule], Iterator[Site]]] = {
    "Linear": _linear,
    "FullyConnectedTensorProduct": _tensor_product,
    "ScalarLinearLayer": _scalar_linear,
    "DeepLinearMLP": _deep_linear,
    "Embedding": _embedding,
    "ConvNetLayer": _convnet,
    "Gate": _gate,
    "Contracter": _contracter,
    "MakeWeightedChannels": _env_weighter,
    "RobustAttention": _attention,
}
"""For each class of module, by its name, the function that yields the sites there."""


def find_sites(model: torch.nn.Module) -> list[Site]:
    """The sites of a NequIP or Allegro model, in the order of its modules."""
    return settle_first(list(_Finder(model).sites()))


_REASONS = {
    "SphericalHarmonics": "no weights",
    "SphericalHarmonicEdgeAttrs": "no weights",
    "BesselEdgeLengthEncoding": "analytic functions of distance: rounding them would break the forces",
    "TensorProductScatter": "no weights of its own: its weights come from the edge MLP",
    "PerTypeScaleShift": "one scale and shift per type, kept exact: they set the zero of the energy",
    "AvgNumNeighborsNorm": "a constant",
    "ZBL": "analytic repulsion, kept exact",
}


def bystanders(model: torch.nn.Module) -> Iterator[Bystander]:
    """The modules that are never quantized but that a user may look for, each with the reason."""
    sites = find_sites(model)
    covered = {site.name for site in sites}
    inside = tuple(f"{site.name}." for site in sites if site.weights)
    for name, module in model.named_modules():
        if name in covered or name.startswith(inside):
            continue
        parameters = sum(p.numel() for p in module.parameters(recurse=False))
        kind = class_name(module)
        if kind in _REASONS:
            yield Bystander(name, kind, _REASONS[kind], parameters)
        elif parameters:
            reason = "its weights are parametrized by torch" if "parametriz" in name or "Parametrized" in kind else None
            yield Bystander(name, kind, reason or "not a known kind", parameters)
