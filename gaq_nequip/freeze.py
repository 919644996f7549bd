"""Freezing: integer codes replace float weights, and the self-connection is folded by type where that is smaller.

**The fold** (our derivation). NequIP's self-connection is the bilinear map ``sum_uv W[u, v, w] x[u] a[v]`` of the node
features x and the embedding a of the atom's type. There are only as many embeddings as types, so it equals exactly one
matrix per type, ``W_t[u, w] = sum_v W[u, v, w] a_t[v]``, applied to the one-hot type in place of the embedding. For
three types and 64 features this is 64 / 3 times fewer numbers. Folded matrices are new numbers, off the grid of the
rounded weights, so they are stored with 16 bits. Models in float64 are not folded, because they are deployed to agree
to more digits than 16 bits give.

This module is embedded in packages: it imports only torch, NequIP and the core.
"""

from __future__ import annotations

import math

import torch
from nequip.data import AtomicDataDict
from nequip.nn.embedding.node import NodeTypeEmbed
from torch import Tensor

from gaq.model.sites import Site
from gaq.model.state import finish_features, is_kind, require_state, warn_if_unfinished
from gaq.quantizers.weights import Block, WeightLayout, WeightQuantizer
from gaq.untyped import AnyModule
from gaq_nequip.insertion import site_quantizers
from gaq_nequip.packed import PackedWeight
from gaq_nequip.sites import class_name, find_sites

__all__ = ["FOLD_BITS", "FoldedSelfConnection", "OneHotTypeEmbed", "freeze"]

FOLD_BITS = 16
"""Bits of the folded matrices; their rounding error is then far below that of the weights they come from."""


class OneHotTypeEmbed(NodeTypeEmbed):
    """NequIP's type embedding that gives the folded self-connections the one-hot type in place of the embedding."""

    gaq_host_class = "NodeTypeEmbed"

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        types = data[AtomicDataDict.ATOM_TYPE_KEY].view(-1)
        embedding = self.embed_module(types)
        all_types = torch.arange(self.num_types, device=types.device)
        data[AtomicDataDict.NODE_ATTRS_KEY] = (types.unsqueeze(-1) == all_types).to(embedding.dtype)
        if self.set_features:
            data[AtomicDataDict.NODE_FEATURES_KEY] = embedding
        return data


class FoldedSelfConnection(torch.nn.Module):
    """A self-connection as one matrix per type and path.

    Args:
        product: the self-connection, a fully connected tensor product.
        weight: its rounded weight, flat.
        embedding: rounded embeddings of the types, shape (types, embedding).
    """

    gaq_folded = True
    placeholder: Tensor

    def __init__(self, product: AnyModule, weight: Tensor, embedding: Tensor) -> None:
        super().__init__()
        types = embedding.shape[0]
        self.types = types
        self.out_dim = int(product.irreps_out.dim)
        self.input_quantizer = getattr(product, "input_quantizer", torch.nn.Identity())
        slices_in, slices_out = product.irreps_in1.slices(), product.irreps_out.slices()
        self.paths: list[tuple[int, int, int, int, int, int, int]] = []
        blocks, folded = [], []
        offset = begin = 0
        for instruction in product.instructions:
            u, v, w = instruction.path_shape
            dim = 2 * product.irreps_out[instruction.i_out].ir.l + 1
            block = weight[offset : offset + u * v * w].view(u, v, w)
            offset += u * v * w
            # The coupling of l with 0 to l is the identity over sqrt(2 l + 1).
            factor = float(instruction.path_weight) / math.sqrt(dim)
            folded.append(torch.einsum("uvw,tv->utw", block, embedding).reshape(-1) * factor)
            blocks.append(Block(begin, (u, types, w), 0))
            first = slices_in[instruction.i_in1].start
            self.paths.append((first, u, dim, begin, w, slices_out[instruction.i_out].start, u * types * w))
            begin += u * types * w
        flat = torch.cat(folded).detach()
        layout = WeightLayout((begin,), tuple(blocks))
        quantizer = WeightQuantizer(layout, FOLD_BITS, "per_channel", 0)
        self.weight_quantizer = PackedWeight(quantizer.quantized(flat))
        self.register_buffer("placeholder", torch.empty(0, dtype=weight.dtype), persistent=False)

    def forward(self, x: Tensor, types: Tensor) -> Tensor:
        """Output features, shape (atoms, irreps_out.dim), from features and one-hot types, shape (atoms, types)."""
        x = self.input_quantizer(x)
        weight = self.weight_quantizer(self.placeholder)
        pieces: dict[int, Tensor] = {}
        for first, u, dim, begin, w, start, size in self.paths:
            matrix = weight[begin : begin + size].view(u, self.types * w)
            rows = x[:, first : first + u * dim].reshape(-1, u, dim).transpose(1, 2)  # (atoms, dim, u)
            all_types = torch.matmul(rows, matrix).view(-1, dim, self.types, w)
            of_type = (all_types * types.view(-1, 1, self.types, 1)).sum(2)  # (atoms, dim, w)
            piece = of_type.transpose(1, 2).reshape(-1, w * dim)
            pieces[start] = pieces[start] + piece if start in pieces else piece
        parts: list[Tensor] = []
        filled = 0
        for start in sorted(pieces):
            if start > filled:
                parts.append(x.new_zeros(x.shape[0], start - filled))
            parts.append(pieces[start])
            filled = start + pieces[start].shape[1]
        if filled < self.out_dim:
            parts.append(x.new_zeros(x.shape[0], self.out_dim - filled))
        return torch.cat(parts, -1)


def _pack(module: AnyModule, parameter: str, quantizer: WeightQuantizer) -> PackedWeight:
    """Take a parameter out of its module, and return its codes."""
    weight = module.weights[int(parameter.split(".")[1])] if "." in parameter else module._parameters[parameter]
    packed = PackedWeight(quantizer.quantized(weight.detach())).to(weight.device)
    if "." not in parameter:
        del module._parameters[parameter]
        # The empty buffer tells the dtype to compute in, and moves with the module.
        module._buffers[parameter] = torch.empty(0, dtype=weight.dtype, device=weight.device)
        module._non_persistent_buffers_set.add(parameter)
    return packed


def _foldable(model: torch.nn.Module, sites: list[Site]) -> AnyModule | None:
    """The module of the type embedding, if every self-connection can be folded and becomes smaller; else None.

    Models in float64 are never folded: the rounding of the fold would be the largest error of a compiled model.
    """
    embeds: list[AnyModule] = [m for m in model.modules() if class_name(m) == "NodeTypeEmbed"]
    products = [site for site in sites if site.kind == "tensor_product"]
    if len(embeds) != 1 or not products:
        return None
    embed = embeds[0]
    if embed.do_categorical_graph_field_embed or embed.embed_module.weight.dtype == torch.float64:
        return None
    for site in products:
        product: AnyModule = site.module
        quantizers = list(site_quantizers(site).values())
        modes = {ins.connection_mode for ins in product.instructions}
        scalars = all(ir.l == 0 for _, ir in product.irreps_in2)
        if not quantizers or not is_kind(quantizers[0], WeightQuantizer) or modes != {"uvw"} or not scalars:
            return None
        # Other products read the embedding itself.
        if not site.name.endswith(".conv.sc"):
            return None
        features = int(product.irreps_in2.dim)
        if embed.num_types * FOLD_BITS >= features * quantizers[0].bits:
            return None
    return embed


@torch.no_grad()
def _fold(model: torch.nn.Module, sites: list[Site], embed: AnyModule) -> None:
    """Replace the self-connections by folded ones, and make the type embedding give the one-hot type."""
    table = embed.embed_module.weight
    if hasattr(embed.embed_module, "weight_quantizer"):
        table = embed.embed_module.weight_quantizer(table)
    for site in sites:
        if site.kind != "tensor_product":
            continue
        product: AnyModule = site.module
        folded = FoldedSelfConnection(product, product.weight_quantizer(product.weight), table).to(table.device)
        parent, leaf = site.name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, folded)
    embed.__class__ = OneHotTypeEmbed
    for module in model.modules():
        for irreps in (getattr(module, "irreps_in", None), getattr(module, "irreps_out", None)):
            if isinstance(irreps, dict) and AtomicDataDict.NODE_ATTRS_KEY in irreps:
                old = irreps[AtomicDataDict.NODE_ATTRS_KEY]
                irreps[AtomicDataDict.NODE_ATTRS_KEY] = type(old)(f"{embed.num_types}x0e")


def freeze(model: torch.nn.Module, fold: bool = True) -> torch.nn.Module:
    """Replace every rounded weight by its codes and scales, in place. Afterwards the model can only be evaluated.

    Args:
        model: quantized model, in training or converted, with the weights to deploy.
        fold: whether to fold the self-connection by type where that is smaller and the model is not in float64.

    Returns:
        The same model.

    Raises:
        ValueError: if the model is not quantized.
    """
    state = require_state(model)
    if state.status == "frozen":
        return model
    warn_if_unfinished(state)
    model.eval()
    finish_features(model)
    state.notes["float_weight_bytes"] = 4 * sum(p.numel() for p in model.parameters())
    sites = find_sites(model)
    if fold and (embedding := _foldable(model, sites)) is not None:
        _fold(model, sites, embedding)
        sites = [site for site in sites if site.kind != "tensor_product"]
    for site in sites:
        for weight in site.weights:
            quantizer = site_quantizers(site).get(weight.path)
            if not is_kind(quantizer, WeightQuantizer):
                continue
            packed = _pack(site.module, weight.parameter, quantizer)
            module: AnyModule = site.module
            if site.kind == "deep_linear":
                module.weights_quantizers[int(weight.parameter.split(".")[1])] = packed
            else:
                module.weight_quantizer = packed
        if site.kind == "deep_linear" and all(is_kind(q, PackedWeight) for q in site_quantizers(site).values()):
            site.module.weights = torch.nn.ParameterList()
    state.status = "frozen"
    state.weights = {}
    model.requires_grad_(False)
    return model
