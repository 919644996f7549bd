r"""Messages of a first layer: the species of an atom is all that its neighbours see of it.

There the features are scalars x that depend on the species z of the sender alone, and a radial weight is a linear
function, W, of some hidden values H of the edge. So the sum over edges can be taken before there are channels (our
derivation):

.. math:: m_i^{p m c} = \sum_j \Big(\sum_k W_{kpc} H_{ij}^k\Big) Y_{pm}(\hat r_{ij}) x_{z_j}^c
    = \sum_z \sum_k (W_{kpc} x_z^c) A_i^{z k p m}, \qquad A_i^{z k p m} = \sum_{j: z_j = z} H_{ij}^k Y_{pm}(\hat r_{ij})

No tensor has a row for each edge and channel. With a thousand channels and seven species that is half of the work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gaq.kernels import harmonics
from gaq.kernels.convolution import ConvolutionProblem, Graph

__all__ = ["messages", "pays", "serves"]

PADDING = 4
"""Most places for edges, as a multiple of the edges, in the table of the neighbours of each atom and species."""


def serves(problem: ConvolutionProblem) -> bool:
    """Whether the messages of a problem can be computed so: from scalars, with one path in each group."""
    one_path = all(len(problem.group_paths(group)) == 1 for group in range(len(problem.groups)))
    return problem.blocks == (0,) and one_path and not problem.scale_rows


def pays(problem: ConvolutionProblem, atoms: int, species: int, edges: int) -> bool:
    """Whether it is less work than the weights of all edges, which have to be written and read as well."""
    return atoms * species * problem.rows_out <= 2 * edges * len(problem.paths)


def _sums(hidden: Tensor, sh: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Sum the products of hidden values and harmonics over the edges of each slot, (slots, hidden, harmonics)."""
    edges = slot.shape[0]
    counts = torch.bincount(slot, minlength=slots)
    most = int(counts.max()) if edges else 0
    if slots * most > PADDING * edges:
        products = hidden[:, :, None] * sh[:, None, :]
        return products.new_zeros(slots, *products.shape[1:]).index_add(0, slot, products)
    order = torch.argsort(slot, stable=True)
    place = torch.arange(edges) - (counts.cumsum(0) - counts)[slot[order]]
    # Number of the edge at each place of a slot; empty places read a row of zeros.
    table = torch.full((slots, most), edges)
    table[slot[order], place] = order
    rows = [torch.nn.functional.pad(x, (0, 0, 0, 1)).index_select(0, table.flatten()) for x in (hidden, sh)]
    first, second = (x.view(slots, most, -1) for x in rows)
    return first.transpose(1, 2) @ second


def messages(
    problem: ConvolutionProblem,
    graph: Graph,
    features: Tensor,
    kind: Tensor,
    vectors: Tensor,
    hidden: Tensor,
    last: Tensor,
) -> Tensor:
    """Compute what `gaq.kernels.convolution.convolution` does, in plain torch, on the CPU.

    Args:
        problem: of scalars; see `serves`.
        graph: senders and receivers of edges shorter than the cutoff.
        features: of each kind of atoms, (kinds, 1, channels), independent of positions.
        kind: of each atom, (atoms,).
        vectors: of edges, (edges, 3) in Å.
        hidden: of edges, (edges, hidden).
        last: hidden values to radial weights, (hidden, paths * channels).

    Returns:
        (rows_out * atoms, channels).
    """
    atoms, kinds, channels = kind.shape[0], features.shape[0], problem.channels
    sh = harmonics.evaluate(list(problem.harmonics), vectors / vectors.norm(dim=-1, keepdim=True))
    sums = _sums(hidden, sh, graph.receiver * kinds + kind[graph.sender], atoms * kinds)
    # (kinds, hidden, paths, channels)
    matrices = last.view(1, -1, len(problem.paths), channels) * features[:, :, None]
    groups = []
    for group, l in enumerate(problem.groups):  # noqa: E741
        (number,) = problem.group_paths(group)
        path = problem.paths[number]
        of_path = sums[:, :, path.edge_degree**2 : (path.edge_degree + 1) ** 2] @ path.coefficients[0].to(sums)
        rows = of_path.view(atoms, kinds, -1, 2 * l + 1).permute(0, 3, 1, 2).reshape(atoms * (2 * l + 1), -1)
        groups.append(rows @ matrices[:, :, number].reshape(-1, channels))
    return torch.cat(groups)
