"""Which modules of a MACE model can be quantized, and how their weights and inputs are laid out.

==================  =====================================================================================
``linear``          e3nn's equivariant linear layer
``tensor_product``  e3nn's fully connected tensor product: the skip connection
``contraction``     MACE's symmetric contraction: its weights
``layer``           a layer of e3nn's `FullyConnectedNet`: the radial networks
``dense``           `torch.nn.Linear`
``embedding``       `torch.nn.Embedding`: charge, spin and other classes of a structure or an atom
``product``         no weights of its own; its *output*, the node features that later layers read, is rounded
``density``         no weights; the density weights of an interaction block, rounded under the key ``attention``
``attention``       no weights; the logits of `gaq.quantizers.attention.RobustAttention`, rounded under that key
==================  =====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import mace  # noqa: F401  (before e3nn: it sets the loading flag that e3nn 0.4.4 needs)
import torch
from e3nn import o3
from e3nn.nn._fc import _Layer
from mace.modules.blocks import (
    EquivariantProductBasisBlock,
    RealAgnosticAttResidualInteractionBlock,
    RealAgnosticDensityInteractionBlock,
    RealAgnosticDensityResidualInteractionBlock,
    RealAgnosticResidualNonLinearInteractionBlock,
)
from mace.modules.radial import AgnesiTransform, BesselBasis, GaussianBasis, SoftTransform, ZBLBasis
from mace.modules.symmetric_contraction import Contraction, SymmetricContraction

from gaq.model.sites import POSITION_FREE, RADIAL, ROUNDED, AttentionSite, Bystander, Site, WeightSite, settle_first
from gaq.quantizers.attention import LearnedEnvelope, RobustAttention
from gaq.quantizers.features import FeatureLayout
from gaq.quantizers.weights import Block, WeightLayout
from gaq.untyped import AnyModule, Instructions

__all__ = ["bystanders", "find_sites"]

DENSITY = "density weights, in [0, 1): rounded under the key attention"
LOGITS = "logits, bounded by the temperature: rounded under the key attention"
POLYNOMIAL = "a polynomial of features just computed, evaluated in float; its weights are rounded"


def _path_layout(module: AnyModule, weighted: Instructions) -> WeightLayout:
    """The layout of a weight that holds a matrix for each of these instructions, one after the other."""
    blocks = []
    offset = 0
    for instruction in weighted:
        blocks.append(Block(offset, tuple(instruction.path_shape), 0))
        offset += math.prod(instruction.path_shape)
    return WeightLayout(tuple(module.weight.shape), tuple(blocks))


def _pieces(irreps: o3.Irreps, used: set[int] | None = None) -> tuple[tuple[int, int], ...]:
    """(multiplicity, dimension) of each irrep; those that are not used with a negative multiplicity."""
    return tuple((mul if used is None or i in used else -mul, ir.dim) for i, (mul, ir) in enumerate(irreps) if mul > 0)


def _contraction_weights(module: AnyModule) -> tuple[WeightSite, ...]:
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


# Parts of an interaction block that read the node features of the layer before as they are.
_READERS = {
    "linear_up",
    "linear_down",
    "skip_linear",
    "linear_query",
    "linear_key",
}


def _source_of_node_feats(name: str, model: torch.nn.Module) -> int | None:
    """The layer whose node features a module reads unchanged; -1 is the species embedding, None no layer."""
    parts = name.split(".")
    if parts[0] == "interactions" and len(parts) == 3:
        block = type(model.get_submodule(".".join(parts[:2]))).__name__
        if parts[2] in _READERS or (parts[2] == "skip_tp" and "Residual" in block):
            return int(parts[1]) - 1
    if parts[0] == "readouts" and parts[2:] in (["linear"], ["linear_1"]):
        layers, readouts = (len(list(model.get_submodule(kind).children())) for kind in ("products", "readouts"))
        return layers - 1 if readouts == 1 else int(parts[1])
    return None


def _reads_species(name: str) -> bool:
    """Whether the input of a linear layer is the one-hot species, which picks a row of its matrix."""
    return name.startswith("node_embedding") or name.endswith((".source_embedding", ".target_embedding"))


def _is_position_free(name: str, model: torch.nn.Module) -> bool:
    """Whether the input of a module is made of species (and global) embeddings only."""
    if name.startswith(("joint_embedding", "embedding_readout")) or _reads_species(name):
        return True
    return _source_of_node_feats(name, model) == -1


def _attention_weights(name: str, model: torch.nn.Module) -> AttentionSite | None:
    """The scalars of both atoms that a layer reads, in the radial network of MACE's attention block; None elsewhere.

    The first layer also reads radial features, which stay as they are. The scalars of the first interaction depend on
    the species only, so they stay too.
    """
    parts = name.split(".")
    if parts[0] != "interactions" or parts[2:3] != ["conv_tp_weights"] or parts[1] == "0":
        return None
    block: AnyModule = model.get_submodule(".".join(parts[:2]))
    if not isinstance(block, RealAgnosticAttResidualInteractionBlock):
        return None
    layer: AnyModule = block.conv_tp_weights.get_submodule(parts[3])
    width = int(layer.h_in)
    radial = block.edge_feats_irreps.num_irreps
    pieces = ((-radial, 1), (width - radial, 1)) if parts[3] == "layer0" else ((width, 1),)
    return AttentionSite(FeatureLayout(pieces), what="attention weights")


def _edge_weights(name: str, module: torch.nn.Module) -> Site | None:
    """The site of density weights or attention logits; None for a module without them."""
    if isinstance(module, RealAgnosticDensityInteractionBlock | RealAgnosticDensityResidualInteractionBlock):
        density = AttentionSite(FeatureLayout(((1, 1),)), limit=1.0, signed=False, what="density")
        return Site(name, module, "density", (), None, DENSITY, False, False, "1x0e", density)
    if isinstance(module, RobustAttention):
        logits = AttentionSite(FeatureLayout(((module.heads, 1),)), limit=1.0, what="logits")
        return Site(name, module, "attention", (), None, LOGITS, False, False, f"{module.heads}x0e", logits)
    return None


def _product(name: str, module: EquivariantProductBasisBlock) -> Site:
    """The site of the node features that an interaction hands to all later layers."""
    linear: AnyModule = module.linear  # an e3nn Linear, which torch types as Tensor or Module
    irreps = linear.irreps_out
    note = "its output, the node features all later layers read"
    return Site(name, module, "product", (), FeatureLayout(_pieces(irreps)), note, False, False, f"-> {irreps}")


def _is_hidden(name: str, model: torch.nn.Module) -> bool:
    """Whether a layer of a network is not its last one."""
    network, leaf = name.rsplit(".", 1)
    children = model.get_submodule(network).named_children()
    layers = [child for child, module in children if isinstance(module, _Layer | torch.nn.Linear)]
    return leaf != layers[-1]


class _Tensors(NamedTuple):
    """What a module holds to round, whatever its place in the model."""

    kind: str
    weights: tuple[WeightSite, ...]
    features: FeatureLayout | None
    irreps: str


def _linear(name: str, module: o3.Linear) -> _Tensors | None:
    weighted = [ins for ins in module.instructions if ins.i_in != -1 and 0 not in ins.path_shape]
    layout = _path_layout(module, weighted)
    if not layout.blocks:
        return None
    if _reads_species(name):
        # The input picks one row, so a row and not a column is what shares an error.
        layout = WeightLayout(layout.shape, tuple(Block(b.offset, b.shape, 1) for b in layout.blocks))
    features = FeatureLayout(_pieces(module.irreps_in, {ins.i_in for ins in module.instructions if ins.i_in != -1}))
    irreps = f"{module.irreps_in} -> {module.irreps_out}"
    return _Tensors("linear", (WeightSite("", "weight", layout),), features, irreps)


def _tensor_product(module: o3.TensorProduct) -> _Tensors | None:
    layout = _path_layout(module, (ins for ins in module.instructions if ins.has_weight))
    if not layout.blocks:
        return None
    features = FeatureLayout(_pieces(module.irreps_in1, {ins.i_in1 for ins in module.instructions}))
    irreps = f"{module.irreps_in1} x {module.irreps_in2} -> {module.irreps_out}"
    return _Tensors("tensor_product", (WeightSite("", "weight", layout),), features, irreps)


def _tensors(name: str, module: torch.nn.Module) -> _Tensors | None:
    """The weights of a module and the layout of its input; None if it has no weights that can be rounded."""
    if isinstance(module, SymmetricContraction):
        irreps = f"{module.irreps_in} -> {module.irreps_out}"
        return _Tensors("contraction", _contraction_weights(module), None, irreps)
    if isinstance(module, o3.Linear) and isinstance(module.weight, torch.nn.Parameter):
        return _linear(name, module)
    if isinstance(module, o3.TensorProduct) and isinstance(module.weight, torch.nn.Parameter):
        return _tensor_product(module)
    if isinstance(module, _Layer):
        weight = WeightSite("", "weight", WeightLayout.single(module.weight.shape, 0))
        inputs, outputs = int(module.h_in), int(module.h_out)
        return _Tensors("layer", (weight,), FeatureLayout(((inputs, 1),)), f"{inputs} -> {outputs}")
    if isinstance(module, torch.nn.Linear):
        weight = WeightSite("", "weight", WeightLayout.single(module.weight.shape, 1))
        inputs, outputs = module.in_features, module.out_features
        return _Tensors("dense", (weight,), FeatureLayout(((inputs, 1),)), f"{inputs} -> {outputs}")
    if isinstance(module, torch.nn.Embedding):
        # As for species: an input picks a row.
        weight = WeightSite("", "weight", WeightLayout.single(module.weight.shape, 1))
        return _Tensors("embedding", (weight,), None, f"{module.num_embeddings} -> {module.embedding_dim}")
    return None


def _is_radial(name: str) -> bool:
    """Whether a module belongs to a network that reads the distance of an edge."""
    return any(part in name for part in (".conv_tp_weights", ".density_fn", ".radial_key"))


def _is_sensitive(name: str, module: torch.nn.Module, model: torch.nn.Module) -> bool:
    """Whether `sensitive_bits` protects the weights of a module."""
    if name.startswith(("node_embedding", "readouts", "joint_embedding")):
        return True
    if _is_radial(name) and name.rsplit(".", 1)[-1] in ("layer0", "0"):
        return True
    # Each of these few weights acts on everything that an atom of its species sends or becomes.
    if isinstance(module, SymmetricContraction):
        return True
    return isinstance(module, o3.Linear) and _source_of_node_feats(name, model) == -1


def _settle_input(name: str, tensors: _Tensors, model: torch.nn.Module) -> tuple[FeatureLayout | None, str]:
    """The layout of the input that is rounded in a module, and the note about it; None where it is not rounded."""
    if _is_position_free(name, model):
        return None, POSITION_FREE
    if _is_radial(name):
        return tensors.features, RADIAL
    if (source := _source_of_node_feats(name, model)) is not None:
        return None, f"rounded at the output of products.{source}"
    return tensors.features, POLYNOMIAL if tensors.kind == "contraction" else ROUNDED


def _site(name: str, module: torch.nn.Module, tensors: _Tensors, model: torch.nn.Module) -> Site:
    """The site of a module with weights, in its place in the model."""
    radial = _is_radial(name)
    features, note = _settle_input(name, tensors, model)
    layer = name.split(".")[1] if name.startswith(("interactions.", "products.")) else None
    first = layer == "0"
    if first:
        mixing = tensors.kind == "tensor_product"
    else:
        mixing = layer is not None and (_is_hidden(name, model) if radial else tensors.kind == "linear")
    return Site(
        name,
        module,
        tensors.kind,
        tensors.weights,
        features,
        note,
        sensitive=_is_sensitive(name, module, model),
        radial=radial,
        irreps=tensors.irreps,
        attention=_attention_weights(name, model),
        first=first,
        mixing=mixing,
    )


def find_sites(model: torch.nn.Module) -> list[Site]:
    """Every module of a MACE model that holds weights or node features to round, in the order of its modules."""
    sites: list[Site] = []
    contractions: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(contraction) for contraction in contractions):
            continue
        if isinstance(module, SymmetricContraction):
            contractions.append(name + ".")
        if (edge_weights := _edge_weights(name, module)) is not None:
            sites.append(edge_weights)
        elif isinstance(module, EquivariantProductBasisBlock):
            sites.append(_product(name, module))
        elif (tensors := _tensors(name, module)) is not None:
            sites.append(_site(name, module, tensors, model))
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

_KINDS: tuple[tuple[type[torch.nn.Module], str], ...] = (
    (torch.nn.LayerNorm, "LayerNorm: a few numbers, kept exact"),
    (RealAgnosticResidualNonLinearInteractionBlock, "two numbers that scale the density, kept exact"),
    (BesselBasis, "frequencies of the radial basis, kept exact"),
    (GaussianBasis, "widths of the radial basis, kept exact"),
    (AgnesiTransform, "constants of the distance transform, kept exact"),
    (SoftTransform, "constants of the distance transform, kept exact"),
    (ZBLBasis, "analytic repulsion, kept exact"),
    (LearnedEnvelope, "a few numbers that weigh the radial basis in the envelope, kept exact"),
)


def bystanders(model: torch.nn.Module) -> Iterator[Bystander]:
    """The modules that a user may look for and not find among the sites, each with the reason."""
    sites = find_sites(model)
    names = {site.name for site in sites}
    # A density site is a complete block, whose parts are listed by themselves.
    covering = {site.name for site in sites if site.kind != "density"}
    for name, module in model.named_modules():
        if name in names or any(name.startswith(site + ".") for site in covering):
            continue
        leaf = name.rsplit(".", 1)[-1]
        parameters = sum(p.numel() for p in module.parameters(recurse=False))
        if leaf in _REASONS and not name.endswith("scale_shift.scale"):
            yield Bystander(name, type(module).__name__, _REASONS[leaf], parameters)
        elif parameters and not isinstance(module, Contraction | torch.nn.ParameterList):
            reason = next((text for kind, text in _KINDS if isinstance(module, kind)), "not a known kind")
            yield Bystander(name, type(module).__name__, reason, parameters)
