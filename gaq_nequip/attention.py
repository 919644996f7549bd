"""Attention over messages in NequIP's interaction block, for models trained from scratch.

``quantization.attention.messages: true`` adds it to every interaction block of a model that was just built. This module
is embedded in packages: it imports only torch, e3nn, NequIP and the core.
"""

from __future__ import annotations

import torch
from e3nn.o3._irreps import Irreps
from e3nn.o3._linear import Linear
from nequip.data import AtomicDataDict
from nequip.nn.interaction_block import InteractionBlock
from nequip.nn.mlp import ScalarMLPFunction
from nequip.utils.compile import conditional_torchscript_mode

from gaq.quantizers.attention import RobustAttention, heads_of_weights
from gaq.untyped import AnyModule
from gaq_nequip.sites import class_name

__all__ = ["AttentionInteractionBlock", "add_attention"]

HEADS = 4
DIM = 16
"""Channels of a query and of a key, per head."""


class AttentionInteractionBlock(InteractionBlock):
    """NequIP's `InteractionBlock` whose sum over neighbours is weighted by attention.

    The message of edge ij is NequIP's, times ``N alpha_ij``. alpha_ij is that of `gaq.quantizers.attention`: queries
    are linear in the scalars of the receiver, keys in the scalars of the sender and in the edge embedding, and the
    envelope is NequIP's cutoff function. N is the average number of neighbours, so that equal weights give about
    NequIP's sum.
    The weights are invariants, so messages stay equivariant.
    """

    heads: int
    dim: int
    neighbours: float
    head_of_weight: torch.Tensor

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        if AtomicDataDict.LMP_MLIAP_DATA_KEY in data:
            raise ValueError("attention over messages does not serve ML-IAP: use pair_nequip.")
        x = data[AtomicDataDict.NODE_FEATURES_KEY]
        edges = data[AtomicDataDict.EDGE_INDEX_KEY]
        sc = None if self.sc is None else self.sc(x, data[AtomicDataDict.NODE_ATTRS_KEY])
        weights = self.edge_weights(data).index_select(1, self.head_of_weight)
        data[AtomicDataDict.NODE_FEATURES_KEY] = self.linear_1(x)
        data = self.avg_num_neighbors_norm(data)
        x = self.tp_scatter(
            x=data[AtomicDataDict.NODE_FEATURES_KEY],
            edge_attr=data[AtomicDataDict.EDGE_ATTRS_KEY],
            edge_weight=self.edge_mlp(data[AtomicDataDict.EDGE_EMBEDDING_KEY]) * weights,
            edge_dst=edges[0],
            edge_src=edges[1],
        )
        x = self.linear_2(x)
        data[AtomicDataDict.NODE_FEATURES_KEY] = x if sc is None else x + sc
        return data

    def edge_weights(self, data: AtomicDataDict.Type) -> torch.Tensor:
        """Compute ``N alpha_ij`` from the features before the block, (edges, heads)."""
        x = data[AtomicDataDict.NODE_FEATURES_KEY]
        embedding = data[AtomicDataDict.EDGE_EMBEDDING_KEY]
        edges = data[AtomicDataDict.EDGE_INDEX_KEY]
        query = self.linear_query(x)
        key = self.linear_key(x).index_select(0, edges[1]) + self.edge_key(embedding)
        envelope = data[AtomicDataDict.EDGE_CUTOFF_KEY].to(x.dtype).reshape(-1)
        weights: torch.Tensor = self.attention(
            query.reshape(-1, self.heads, self.dim), key.reshape(-1, self.heads, self.dim), envelope, edges[0]
        )
        return self.neighbours * weights


def _extend(block: AnyModule) -> None:
    """Give an interaction block the modules that attention needs, in the block's dtype, and its new class."""
    features = block.irreps_in[AtomicDataDict.NODE_FEATURES_KEY]
    weight = block.linear_1.weight
    # The seed follows from the weights that the builder drew: from the model's seed, and from no shared state.
    seed = int(float(weight.detach().double().abs().sum()) * 1e6) % 2**31
    before = torch.get_default_dtype()
    # Scripted layers would fix the number of atoms when the model is traced for compilation.
    with torch.random.fork_rng(devices=[]), conditional_torchscript_mode(False):
        # torch.manual_seed would seed every GPU as well.
        torch.default_generator.manual_seed(seed)
        try:
            torch.set_default_dtype(weight.dtype)
            scalars = Irreps(f"{HEADS * DIM}x0e")
            block.linear_query = Linear(features, scalars, internal_weights=True, shared_weights=True)
            block.linear_key = Linear(features, scalars, internal_weights=True, shared_weights=True)
            block.edge_key = ScalarMLPFunction(
                input_dim=block.irreps_in[AtomicDataDict.EDGE_EMBEDDING_KEY].num_irreps,
                output_dim=HEADS * DIM,
                hidden_layers_depth=0,
                bias=False,
                forward_weight_init=True,
            )
            block.attention = RobustAttention(HEADS)
        finally:
            torch.set_default_dtype(before)
    block.heads, block.dim = HEADS, DIM
    block.neighbours = float((1.0 / block.avg_num_neighbors_norm.norm_const.double() ** 2).mean())
    product = block.tp_scatter.tp
    head_of_weight = heads_of_weights([product.irreps_in1[ins.i_in1].mul for ins in product.instructions], HEADS)
    block.register_buffer("head_of_weight", head_of_weight, persistent=False)
    block.to(weight.device)
    block.__class__ = AttentionInteractionBlock


def add_attention(model: torch.nn.Module) -> None:
    """Weight the messages of every interaction block by attention, in place. The model becomes another function.

    Raises:
        ValueError: if the model has no interaction blocks (Allegro), or a block gets no cutoff function.
    """
    blocks: list[tuple[str, AnyModule]] = [
        (n, m) for n, m in model.named_modules() if class_name(m) == "InteractionBlock"
    ]
    if not blocks:
        raise ValueError(
            "quantization.attention.messages: this model has no interaction blocks whose messages could be weighted; "
            "it is for NequIPGNNModel. Allegro weighs its neighbours itself."
        )
    for name, block in blocks:
        if AtomicDataDict.EDGE_CUTOFF_KEY not in block.irreps_in:
            raise ValueError(f"quantization.attention.messages: {name} gets no cutoff function (edge_cutoff).")
        _extend(block)
