"""An interaction block for MACE whose messages are weighted by robust attention.

A model that is trained from scratch gets it by its name, like MACE's own blocks:

.. code-block:: yaml

    interaction: GAQAttentionResidualInteractionBlock

Importing this module makes it known to MACE. A model that has it can be loaded only where this package is installed,
whatever the form of its file: stock MACE has no such block.
"""

from __future__ import annotations

from typing import Any

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import nn, o3
from e3nn.util.jit import compile_mode
from mace.modules import interaction_classes
from mace.modules.blocks import InteractionBlock
from mace.modules.irreps_tools import reshape_irreps, tp_out_irreps_with_instructions
from mace.modules.wrapper_ops import FullyConnectedTensorProduct, Linear, TensorProduct
from mace.tools.scatter import scatter_sum
from torch import Tensor

from gaq.quantizers.attention import LearnedEnvelope, RobustAttention, heads_of_weights
from gaq_mace.names import ATTENTION

__all__ = ["GAQAttentionResidualInteractionBlock", "register"]

HEADS = 4
DIM = 16
"""Size of queries and keys in each head: together 64 scalars, as many as in MACE's own attention block."""


@compile_mode("script")
class GAQAttentionResidualInteractionBlock(InteractionBlock):
    """MACE's residual interaction block whose sum over neighbours is weighted by attention.

    The message of edge ij is that of `RealAgnosticResidualInteractionBlock` times ``alpha_ij`` of
    `gaq.quantizers.attention`. Queries are linear in the scalars of the receiver, keys in the scalars of the sender and
    in the radial features. The weights are invariants, so messages stay equivariant. Their sum is less than one, which
    replaces the division by the average number of neighbours. With ``apply_cutoff: False`` MACE hands its cutoff over,
    and that is the envelope. Otherwise the envelope is learned from the radial features, which contain the cutoff.
    """

    def _setup(self) -> None:
        self.linear_up = Linear(
            self.node_feats_irreps,
            self.edge_irreps,
            internal_weights=True,
            shared_weights=True,
            cueq_config=self.cueq_config,
        )
        irreps_mid, instructions = tp_out_irreps_with_instructions(
            self.edge_irreps, self.edge_attrs_irreps, self.target_irreps
        )
        self.conv_tp = TensorProduct(
            self.edge_irreps,
            self.edge_attrs_irreps,
            irreps_mid,
            instructions=instructions,
            shared_weights=False,
            internal_weights=False,
            cueq_config=self.cueq_config,
            oeq_config=self.oeq_config,
        )
        basis = self.edge_feats_irreps.num_irreps
        self.conv_tp_weights = nn.FullyConnectedNet(
            [basis, *self.radial_MLP, self.conv_tp.weight_numel],  # type: ignore[attr-defined]  # of e3nn's class
            torch.nn.functional.silu,
        )
        self.irreps_out = self.target_irreps
        self.linear = Linear(
            irreps_mid, self.irreps_out, internal_weights=True, shared_weights=True, cueq_config=self.cueq_config
        )
        self.skip_tp = FullyConnectedTensorProduct(
            self.node_feats_irreps, self.node_attrs_irreps, self.hidden_irreps, cueq_config=self.cueq_config
        )
        self.reshape = reshape_irreps(self.irreps_out, cueq_config=self.cueq_config)

        self.heads, self.dim = HEADS, DIM
        scalars = o3.Irreps(f"{HEADS * DIM}x0e")
        self.linear_query = Linear(self.node_feats_irreps, scalars, cueq_config=self.cueq_config)
        self.linear_key = Linear(self.node_feats_irreps, scalars, cueq_config=self.cueq_config)
        self.radial_key = nn.FullyConnectedNet([basis, HEADS * DIM])
        self.envelope = LearnedEnvelope(basis)
        self.attention = RobustAttention(HEADS)
        head_of_weight = heads_of_weights([self.edge_irreps[ins[0]].mul for ins in instructions], HEADS)
        self.register_buffer("head_of_weight", head_of_weight, persistent=False)

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
        """Messages, shape (atoms, channels, (l_max + 1)^2), and the skip connection, as MACE's blocks return them."""
        sender, receiver = edge_index[0], edge_index[1]
        n_real = lammps_natoms[0] if lammps_class is not None else None
        sc = self.skip_tp(node_feats, node_attrs)
        query, key = self.linear_query(node_feats), self.linear_key(node_feats)
        node_feats = self.linear_up(node_feats)
        # LAMMPS exchanges ghost atoms once for all that neighbours read.
        combined = self.handle_lammps(
            torch.cat((node_feats, query, key), dim=-1),
            lammps_class=lammps_class,
            lammps_natoms=lammps_natoms,
            first_layer=first_layer,
        )
        width, size = node_feats.shape[-1], query.shape[-1]
        node_feats = combined[:, :width]
        query, key = combined[:, width : width + size], combined[:, width + size :]
        key = key.index_select(0, sender) + self.radial_key(edge_feats)
        envelope = self.envelope(edge_feats) if cutoff is None else cutoff.squeeze(-1)
        weights = self.attention(
            query.reshape(-1, self.heads, self.dim), key.reshape(-1, self.heads, self.dim), envelope, receiver
        )
        tp_weights = self.conv_tp_weights(edge_feats) * weights.index_select(1, self.head_of_weight)
        if hasattr(self, "conv_fusion"):
            message = self.conv_tp(node_feats, edge_attrs, tp_weights, edge_index)
        else:
            mji = self.conv_tp(node_feats.index_select(0, sender), edge_attrs, tp_weights)
            message = scatter_sum(src=mji, index=receiver, dim=0, dim_size=node_feats.shape[0])
        message = self.linear(self.truncate_ghosts(message, n_real))
        return self.reshape(message), self.truncate_ghosts(sc, n_real)


def register() -> None:
    """Add the block to those that MACE knows by name."""
    interaction_classes[ATTENTION] = GAQAttentionResidualInteractionBlock


register()
