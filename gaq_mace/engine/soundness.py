"""Structures for which no number is right: two atoms at one place, or positions that are not finite.

Between atoms at one place there is no direction, and MACE gives NaN. The kernels leave such edges out, and MACE's
neighbour list leaves out atoms whose positions are NaN: what is left has a plausible energy. So the results of such
structures are made NaN here, on the fused path and on the reference path of a quantized model alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gaq.kernels.gpu.graphs import Outputs

__all__ = ["checked", "edge_lengths"]

_ATOMS = ("node_energy", "forces", "node_feats")
_ON_GPU = ("energy", "interaction_energy", "forces", "virials")
_ON_CPU = (*_ON_GPU, "stress", "node_energy", "node_feats")


def edge_lengths(data: dict[str, Tensor]) -> Tensor:
    """Lengths of the edges of a batch, (edges, 1) in Å, without an autograd graph."""
    sender, receiver = data["edge_index"]
    positions = data["positions"].detach()
    lengths: Tensor = (positions[receiver] - positions[sender] + data["shifts"].detach()).norm(dim=-1, keepdim=True)
    return lengths


def _reads_values(device: torch.device) -> bool:
    """Whether the values of tensors may decide what is computed next: a GPU would have to be waited for."""
    return device.type == "cpu"


def checked(outputs: Outputs, positions: Tensor, lengths: Tensor, batch: Tensor, sender: Tensor) -> Outputs:
    """Make the results of structures NaN that hold atoms at one place, or positions that are not finite.

    On the CPU two reductions tell whether there are any. A GPU does not wait for their result: there zero or NaN is
    added to what a simulation reads.

    Args:
        outputs: of MACE's forward pass; changed in place.
        positions: (atoms, 3) in Å.
        lengths: of the edges, (edges, 1) in Å.
        batch: number of each atom's structure, (atoms,).
        sender: atom at which each edge begins, (edges,).
    """
    positions, lengths, energy = positions.detach(), lengths.detach(), outputs["energy"]
    assert energy is not None
    on_cpu = _reads_values(positions.device)
    if on_cpu and math.isfinite(float(positions.sum())) and (not lengths.numel() or float(lengths.min()) > 0.0):
        return outputs
    # Zero for a sound structure, NaN for any other.
    by_edge, by_atom = 0.0 / lengths[:, 0], positions.sum(1) * 0.0
    if energy.numel() == 1:
        spoiled = (by_edge.sum() + by_atom.sum()).view(1)
    else:
        spoiled = positions.new_zeros(energy.numel()).index_add(0, batch, by_atom).index_add(0, batch[sender], by_edge)
    for name in _ON_CPU if on_cpu else _ON_GPU:
        values = outputs.get(name)
        if values is not None:
            added = (spoiled[batch] if name in _ATOMS else spoiled).to(values.dtype)
            outputs[name] = values + added.view(-1, *(1,) * (values.dim() - 1))
    return outputs
