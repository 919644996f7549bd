"""Description of a convolution for the kernels of every device: the tensor product and the edges.

`gaq.kernels.convolution` explains the symbols and the layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["ConvolutionProblem", "Graph", "Path", "neighbours"]

MAX_L = 6
COMPONENTS = (1, 3, 5, 7, 9)


@dataclass(frozen=True)
class Path:
    """A path of the tensor product.

    Attributes:
        block: number of the input block.
        edge_degree: l of the spherical harmonic.
        group: number of the output group.
        coefficients: (2 l1 + 1, 2 l2 + 1, 2 l3 + 1), float64, with the normalisation of the path.
    """

    block: int
    edge_degree: int
    group: int
    coefficients: Tensor


@dataclass(frozen=True)
class ConvolutionProblem:
    """Tensor product, harmonics and cutoff of a convolution.

    Attributes:
        channels: multiplicity of every block.
        blocks: l of each input block.
        groups: l of each output group.
        paths: of the tensor product, in the order of the radial weights.
        harmonics: coefficients of the spherical harmonics, from `gaq.kernels.harmonics.fit`.
        r_max: cutoff in Å.
        scale_rows: where edges have factors by which radial weights are multiplied, as the weights of attention: for
            each input block, the row of an edge's factors that its paths read. Empty where there are none.
    """

    channels: int
    blocks: tuple[int, ...]
    groups: tuple[int, ...]
    paths: tuple[Path, ...]
    harmonics: tuple[Tensor, ...]
    r_max: float
    scale_rows: tuple[int, ...] = ()
    # Plain dictionaries, because compilers trace through them: a plan for each number of intervals that was needed,
    # and the name of the generated kernels for each kind of weights (2). Threads that write at the same time write the
    # same.
    plans: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)
    sources: dict[bool, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.harmonics) > MAX_L + 1:
            raise ValueError(f"spherical harmonics up to l = {MAX_L} are served, not {len(self.harmonics) - 1}")
        for path in self.paths:
            shape = (
                2 * self.blocks[path.block] + 1,
                2 * path.edge_degree + 1,
                2 * self.groups[path.group] + 1,
            )
            if tuple(path.coefficients.shape) != shape:
                raise ValueError(f"coefficients of shape {tuple(path.coefficients.shape)} for a path of shape {shape}")
            if shape[0] not in COMPONENTS or shape[2] not in COMPONENTS:
                raise ValueError(f"features up to l = {COMPONENTS[-1] // 2} are served, not a path of shape {shape}")

    @property
    def rows_in(self) -> int:
        """Number of components of all input blocks."""
        return sum(2 * l + 1 for l in self.blocks)  # noqa: E741

    @property
    def scales(self) -> int:
        """Number of rows (of `channels` numbers) of an edge's factors."""
        return max(self.scale_rows, default=-1) + 1

    def group_paths(self, group: int) -> list[int]:
        """Numbers of the paths whose output is a group."""
        return [i for i, path in enumerate(self.paths) if path.group == group]

    def group_rows(self) -> list[int]:
        """Number of rows (of `channels` numbers) of each group in an atom's message."""
        return [len(self.group_paths(g)) * (2 * l + 1) for g, l in enumerate(self.groups)]  # noqa: E741

    @property
    def rows_out(self) -> int:
        """Number of rows (of `channels` numbers) in an atom's message."""
        return sum(self.group_rows())

    def split(self, message: Tensor, atoms: int) -> list[Tensor]:
        """Views of a message as the matrices of its groups, (atoms * (2l+1), paths * channels)."""
        matrices, offset = [], 0
        for group, rows in enumerate(self.group_rows()):
            paths = len(self.group_paths(group))
            part = message[offset * atoms : (offset + rows) * atoms]
            matrices.append(part.reshape(-1, paths * self.channels))
            offset += rows
        return matrices

    def _spans(self) -> list[tuple[int, int]]:
        """First path and number of paths of each run of paths that differ in their channels only.

        Such are the chunks of a block (`gaq.kernels.chunks`): the same coefficients, inputs and outputs one after the
        other. The CPU kernel takes them together.
        """
        spans: list[tuple[int, int]] = []
        for number, path in enumerate(self.paths):
            first, span = spans[-1] if spans else (0, 0)
            start = self.paths[first]
            if (
                span
                and path.coefficients is start.coefficients
                and (path.block, path.edge_degree, path.group) == (start.block + span, start.edge_degree, start.group)
                and (not self.scale_rows or self.scale_rows[path.block] == self.scale_rows[start.block] + span)
            ):
                spans[-1] = first, span + 1
            else:
                spans.append((number, 1))
        return spans

    def plan(self, intervals: int) -> tuple[Tensor, Tensor]:
        """The problem as the C++ code reads it, integers and reals; `intervals` is 0 for weights of each edge."""
        if intervals not in self.plans:
            starts = [sum(2 * l + 1 for l in self.blocks[:i]) for i in range(len(self.blocks))]  # noqa: E741
            rows = self.group_rows()
            offsets = [sum(rows[:g]) for g in range(len(rows))]
            indices: list[int] = []
            values: list[float] = []
            ints: list[int] = []
            for number, span in self._spans():
                path, begin = self.paths[number], len(values)
                for m1, m2, m3 in path.coefficients.nonzero().tolist():
                    indices += [m1, m2, m3]
                    values.append(float(path.coefficients[m1, m2, m3]))
                group_paths = self.group_paths(path.group)
                ints += [starts[path.block], 2 * self.blocks[path.block] + 1, path.edge_degree]
                ints += [offsets[path.group], rows[path.group], group_paths.index(number), len(group_paths)]
                ints += [2 * self.groups[path.group] + 1, begin, len(values), span]
                ints.append(self.scale_rows[path.block] if self.scale_rows else 0)
            head = [self.channels, len(self.harmonics) - 1, len(self.paths), self.rows_in]
            head += [intervals, int(intervals > 0)]
            head.append(self.scales)
            reals = torch.cat(
                [
                    torch.tensor([self.r_max, *values], dtype=torch.float64),
                    *[c.double().flatten() for c in self.harmonics],
                ]
            )
            self.plans[intervals] = torch.tensor([*head, len(values), *ints, *indices], dtype=torch.int64), reals
        return self.plans[intervals]


@dataclass(frozen=True)
class Graph:
    """Senders and receivers of the edges.

    Attributes:
        sender: of each edge, (edges,), int64, in the order of the edge vectors.
        receiver: of each edge, (edges,), int64.
        tables: number of each edge's radial table, where tables depend on the species of both atoms; None where there
            is only one table.
        receivers: number of atoms that receive, the first of those that send; None where all do. In a simulation on
            parts of space the atoms of other parts send only.
        lists: edges by receiver and by sender, made when first needed.
    """

    sender: Tensor
    receiver: Tensor
    tables: Tensor | None = None
    receivers: int | None = None
    lists: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def received(self, senders: int) -> int:
        """Number of atoms that receive, where so many send."""
        return senders if self.receivers is None else self.receivers

    def by_receiver(self, atoms: int) -> tuple[Tensor, Tensor]:
        """Edges by receiver, made once; see `neighbours`."""
        return self._list("receiver", self.receiver, self.sender, atoms)

    def by_sender(self, atoms: int) -> tuple[Tensor, Tensor]:
        """Edges by sender, made once; see `neighbours`."""
        return self._list("sender", self.sender, self.receiver, atoms)

    def _list(self, name: str, atom: Tensor, other: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
        # The number of atoms is not part of the key: in a traced graph it is a symbol, which has no hash.
        if name not in self.lists or self.lists[name][0].shape[0] != atoms + 1:
            self.lists[name] = neighbours(atom, other, atoms)
        return self.lists[name]


def neighbours(atom: Tensor, other: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
    """Sort edges by atom, in the form that the GPU kernels read.

    Args:
        atom: atom of each edge by which to sort, (edges,).
        other: atom at the other end of each edge, (edges,).
        atoms: number of atoms.

    Returns:
        Where each atom's edges begin, (atoms + 1,), and the numbers of the edges with their other ends, (2, edges),
        both int32. The order is stable, and the host does not wait for the device.
    """
    ordered, order = torch.sort(atom, stable=True)
    first = torch.searchsorted(ordered, torch.arange(atoms + 1, device=atom.device, dtype=atom.dtype))
    return first.to(torch.int32), torch.stack([order, other[order]]).to(torch.int32)
