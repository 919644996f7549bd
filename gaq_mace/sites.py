"""Which modules of a MACE model can be quantized, and how their weights and inputs are laid out.

Kinds: ``linear``, ``layer`` (e3nn's fully connected layer), ``tensor_product``, ``contraction``, ``dense``
(`torch.nn.Linear`), and ``product``, which has no weights of its own: its *output* is rounded, once for all that
read it. ``density`` and ``attention`` have none either: what is rounded, under the key ``attention``, are the density
weights of an interaction block and the logits of `gaq.quantizers.attention.RobustAttention`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import mace  # noqa: F401  (before e3nn: it sets the loading flag that e3nn 0.4.4 needs)
import torch
from e3nn import o3
from e3nn.nn._fc import _Layer
from mace.modules.blocks import (
    EquivariantProductBasisBlock,
    RealAgnosticAttResidualInteractionBlock,
    RealAgnosticDensityInteractionBlock,
    RealAgnosticDensityResidualInteractionBlock,
)
from mace.modules.symmetric_contraction import Contraction, SymmetricContraction

from gaq.model.sites import POSITION_FREE, RADIAL, ROUNDED, AttentionSite, Bystander, Site, WeightSite, settle_first
from gaq.quantizers.attention import RobustAttention
from gaq.quantizers.features import FeatureLayout
from gaq.quantizers.weights import Block, WeightLayout

__all__ = ["bystanders", "find_sites"]


DENSITY = "density weights, in [0, 1): rounded under the key attention"
LOGITS = "logits, bounded by the temperature: rounded under the key attention"
POLYNOMIAL = "a polynomial of features just computed, evaluated in float; its weights are rounded"


def _linear_layout(module: o3.Linear) -> WeightLayout:
    blocks = []
    offset = 0
    for instruction in module.instructions:
        if instruction.i_in == -1 or 0 in instruction.path_shape:
            continue
        blocks.append(Block(offset, tuple(instruction.path_shape), 0))
        offset += math.prod(instruction.path_shape)
    return WeightLayout(tuple(module.weight.shape), tuple(blocks))


def _tensor_product_layout(module: o3.TensorProduct) -> WeightLayout:
    blocks = []
    offset = 0
    for instruction in module.instructions:
        if not instruction.has_weight:
            continue
        blocks.append(Block(offset, tuple(instruction.path_shape), 0))
        offset += math.prod(instruction.path_shape)
    return WeightLayout(tuple(module.weight.shape), tuple(blocks))


def _pieces(irreps: o3.Irreps, used: set[int] | None = None) -> tuple[tuple[int, int], ...]:
    return tuple((mul if used is None or i in used else -mul, ir.dim) for i, (mul, ir) in enumerate(irreps) if mul > 0)


def _contraction_weights(module: Any) -> tuple[WeightSite, ...]:
    sites = []
    for i, contraction in enumerate(module.contractions):
        owner = f"contractions.{i}"
        named = [("weights_max", contraction.weights_max)]
        named += [(f"weights.{k}", weight) for k, weight in enumerate(contraction.weights)]
        for name, weight in named:
            if weight.requires_grad or bool((weight != 0).any()):
                # (elements, paths, channels): one scale for each element and path.
                sites.append(WeightSite(owner, name, WeightLayout.single(weight.shape, input_axis=2)))
    return tuple(sites)


# What an interaction block reads directly from the node features of the layer before.
_READERS = {
    "linear_up",
    "linear_down",
    "skip_linear",
    "linear_res",
    "source_embedding",
    "target_embedding",
    "linear_query",
    "linear_key",
}


def _source_of_node_feats(name: str, model: torch.nn.Module) -> int | None:
    """The layer whose node features a module reads unchanged: -1 the species embedding, None if it does not."""
    parts = name.split(".")
    if parts[0] == "interactions" and len(parts) == 3:
        block = type(model.get_submodule(".".join(parts[:2]))).__name__
        if parts[2] in _READERS or (parts[2] == "skip_tp" and "Residual" in block):
            return int(parts[1]) - 1
    if parts[0] == "readouts" and parts[2:] in (["linear"], ["linear_1"]):
        layers, readouts = (len(list(model.get_submodule(kind).children())) for kind in ("products", "readouts"))
        return layers - 1 if readouts == 1 else int(parts[1])
    return None


def _is_position_free(name: str, model: torch.nn.Module) -> bool:
    """Whether the input of a module is made of species (and global) embeddings only."""
    if name.startswith(("node_embedding", "joint_embedding", "embedding_readout")):
        return True
    return _source_of_node_feats(name, model) == -1


def _attention_weights(name: str, model: torch.nn.Module) -> AttentionSite | None:
    """What a layer reads of the scalars of both atoms, in the radial network of MACE's attention block.

    The first layer reads radial features as well, which stay as they are. In the first interaction those scalars are a
    function of the species.
    """
    parts = name.split(".")
    if parts[0] != "interactions" or parts[2:3] != ["conv_tp_weights"] or parts[1] == "0":
        return None
    block: Any = model.get_submodule(".".join(parts[:2]))
    if not isinstance(block, RealAgnosticAttResidualInteractionBlock):
        return None
    layer: Any = block.conv_tp_weights.get_submodule(parts[3])
    width = int(layer.h_in)
    radial = block.edge_feats_irreps.num_irreps
    pieces = ((-radial, 1), (width - radial, 1)) if parts[3] == "layer0" else ((width, 1),)
    return AttentionSite(FeatureLayout(pieces), what="attention weights")


def _edge_weights(name: str, module: torch.nn.Module) -> Site | None:
    """The site of density weights or attention logits, None if there are none."""
    if isinstance(module, RealAgnosticDensityInteractionBlock | RealAgnosticDensityResidualInteractionBlock):
        own = AttentionSite(FeatureLayout(((1, 1),)), limit=1.0, signed=False, what="density")
        return Site(name, module, "density", (), None, DENSITY, False, False, "1x0e", own)
    if isinstance(module, RobustAttention):
        own = AttentionSite(FeatureLayout(((module.heads, 1),)), limit=1.0, what="logits")
        return Site(name, module, "attention", (), None, LOGITS, False, False, f"{module.heads}x0e", own)
    return None


def _is_hidden(name: str, model: torch.nn.Module) -> bool:
    """Whether a layer of a network is not its last one."""
    network, leaf = name.rsplit(".", 1)
    children = model.get_submodule(network).named_children()
    return leaf != [own for own, module in children if isinstance(module, _Layer | torch.nn.Linear)][-1]


def find_sites(model: torch.nn.Module) -> list[Site]:
    """Every module of a MACE model that holds weights or node features to round, in order."""
    sites: list[Site] = []
    inside_contraction: set[str] = set()
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside_contraction):
            continue
        if (edge_weights := _edge_weights(name, module)) is not None:
            sites.append(edge_weights)
            continue
        radial = any(part in name for part in (".conv_tp_weights", ".density_fn", ".radial_key"))
        leaf = name.rsplit(".", 1)[-1]
        first_radial = radial and leaf in ("layer0", "0")
        # Each of these few weights acts on everything an atom of its species sends or becomes.
        per_species = isinstance(module, SymmetricContraction) or (
            isinstance(module, o3.Linear) and _source_of_node_feats(name, model) == -1
        )
        sensitive = name.startswith(("node_embedding", "readouts", "joint_embedding")) or first_radial or per_species
        weights: tuple[WeightSite, ...]
        features: FeatureLayout | None
        if isinstance(module, EquivariantProductBasisBlock):
            linear: Any = module.linear
            out = linear.irreps_out
            note = "its output, the node features all later layers read"
            own = FeatureLayout(_pieces(out))
            sites.append(Site(name, module, "product", (), own, note, False, False, f"-> {out}"))
            continue
        if isinstance(module, SymmetricContraction):
            inside_contraction.add(name + ".")
            weights = _contraction_weights(module)
            features = None
            kind, irreps = "contraction", f"{module.irreps_in} -> {module.irreps_out}"
        elif isinstance(module, o3.Linear) and isinstance(module.weight, torch.nn.Parameter):
            layout = _linear_layout(module)
            if not layout.blocks:
                continue
            if name.startswith("node_embedding"):
                # The input picks one row, so a row and not a column is what shares an error.
                layout = WeightLayout(layout.shape, tuple(Block(b.offset, b.shape, 1) for b in layout.blocks))
            weights = (WeightSite("", "weight", layout),)
            used = {ins.i_in for ins in module.instructions if ins.i_in != -1}
            features = FeatureLayout(_pieces(module.irreps_in, used))
            kind, irreps = "linear", f"{module.irreps_in} -> {module.irreps_out}"
        elif isinstance(module, o3.TensorProduct) and isinstance(module.weight, torch.nn.Parameter):
            layout = _tensor_product_layout(module)
            if not layout.blocks:
                continue
            weights = (WeightSite("", "weight", layout),)
            used = {ins.i_in1 for ins in module.instructions}
            features = FeatureLayout(_pieces(module.irreps_in1, used))
            kind, irreps = "tensor_product", f"{module.irreps_in1} x {module.irreps_in2} -> {module.irreps_out}"
        elif isinstance(module, _Layer):
            weights = (WeightSite("", "weight", WeightLayout.single(module.weight.shape, 0)),)
            features = FeatureLayout(((int(module.h_in), 1),))
            kind, irreps = "layer", f"{int(module.h_in)} -> {int(module.h_out)}"
        elif isinstance(module, torch.nn.Linear):
            weights = (WeightSite("", "weight", WeightLayout.single(module.weight.shape, 1)),)
            features = FeatureLayout(((module.in_features, 1),))
            kind, irreps = "dense", f"{module.in_features} -> {module.out_features}"
        else:
            continue
        note = ROUNDED
        if isinstance(module, SymmetricContraction):
            note = POLYNOMIAL
        if _is_position_free(name, model):
            features, note = None, POSITION_FREE
        elif radial:
            note = RADIAL
        elif (source := _source_of_node_feats(name, model)) is not None:
            features, note = None, f"rounded at the output of products.{source}"
        own_attention = _attention_weights(name, model)
        layer = name.split(".")[1] if name.startswith(("interactions.", "products.")) else None
        first = layer == "0"
        if first:
            mixing = kind == "tensor_product"
        else:
            mixing = layer is not None and (_is_hidden(name, model) if radial else kind == "linear")
        sites.append(
            Site(name, module, kind, weights, features, note, sensitive, radial, irreps, own_attention, first, mixing)
        )
    return settle_first(sites)


_REASONS = {
    "conv_tp": "no weights of its own: its weights come from the radial network",
    "spherical_harmonics": "no weights",
    "radial_embedding": "analytic functions of distance: rounding them would break the forces",
    "atomic_energies_fn": "one energy per element, kept exact: they set the zero of the energy",
    "scale_shift": "two numbers, kept exact",
    "pair_repulsion_fn": "analytic repulsion, kept exact",
    "reshape": "no weights",
    "envelope": "a cutoff function, kept smooth",
    "non_linearity": "no weights",
    "equivariant_nonlin": "no weights",
}


def bystanders(model: torch.nn.Module) -> Iterator[Bystander]:
    """The modules a user may look for and not find among the sites, each with the reason."""
    sites = find_sites(model)
    covered = {site.name for site in sites}
    # A density site is a whole block, in which every part has a place of its own.
    whole = {site.name for site in sites if site.kind != "density"}
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        parent_listed = any(name.startswith(prefix + ".") for prefix in whole)
        if name in covered or parent_listed:
            continue
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if leaf in _REASONS and not name.endswith("scale_shift.scale"):
            yield Bystander(name, type(module).__name__, _REASONS[leaf], own)
        elif own and not isinstance(module, Contraction | torch.nn.ParameterList):
            reason = "LayerNorm: a few numbers, kept exact" if "Norm" in type(module).__name__ else "not a known kind"
            yield Bystander(name, type(module).__name__, reason, own)
