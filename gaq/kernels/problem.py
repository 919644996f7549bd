"""What `gaq.kernels.convolution` convolves with what: the tensor product and the edges, for kernels of every device.

The names are those of `gaq.kernels.convolution`, where the layouts are explained.
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
    """One path of the tensor product.

    Attributes:
        block: number of the input block.
        edge_degree: l of the spherical harmonic.
        group: number of the output group.
        coefficients: (2 l1 + 1, 2 l2 + 1, 2 l3 + 1), float64, normalisation of the path included.
    """

    block: int
    edge_degree: int
    group: int
    coefficients: Tensor


@dataclass(frozen=True)
class ConvolutionProblem:
    """What is convolved with what, apart from how.

    Attributes:
        channels: multiplicity of every block.
        blocks: l of each input block.
        groups: l of each output group.
        paths: in the order of the radial weights.
        harmonics: coefficients of the spherical harmonics, as `gaq.kernels.harmonics.fit` gives them.
        r_max: cutoff in Å.
    """

    channels: int
    blocks: tuple[int, ...]
    groups: tuple[int, ...]
    paths: tuple[Path, ...]
    harmonics: tuple[Tensor, ...]
    r_max: float
    # Plain dictionaries, because compilers trace through them: one plan for each number of knots a table may have (8)
    # and one source for each kind of weights (2). Threads that meet there write the same value.
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
        """Components of all input blocks."""
        return sum(2 * l + 1 for l in self.blocks)  # noqa: E741

    def group_paths(self, group: int) -> list[int]:
        """Numbers of the paths that end in a group."""
        return [i for i, path in enumerate(self.paths) if path.group == group]

    def group_rows(self) -> list[int]:
        """Rows of `channels` numbers that each group has for one atom."""
        return [len(self.group_paths(g)) * (2 * l + 1) for g, l in enumerate(self.groups)]  # noqa: E741

    @property
    def rows_out(self) -> int:
        """Rows of `channels` numbers that an atom's message has."""
        return sum(self.group_rows())

    def split(self, message: Tensor, atoms: int) -> list[Tensor]:
        """The matrices of the groups, (atoms * (2l+1), paths * channels), views of a message."""
        found, offset = [], 0
        for group, rows in enumerate(self.group_rows()):
            paths = len(self.group_paths(group))
            part = message[offset * atoms : (offset + rows) * atoms]
            found.append(part.reshape(-1, paths * self.channels))
            offset += rows
        return found

    def plan(self, knots: int) -> tuple[Tensor, Tensor]:
        """The problem as the C++ code reads it; `knots` is 0 for weights given an edge at a time."""
        if knots not in self.plans:
            starts = [sum(2 * l + 1 for l in self.blocks[:i]) for i in range(len(self.blocks))]  # noqa: E741
            rows = self.group_rows()
            offsets = [sum(rows[:g]) for g in range(len(rows))]
            indices: list[int] = []
            values: list[float] = []
            ints: list[int] = []
            for number, path in enumerate(self.paths):
                begin = len(values)
                for m1, m2, m3 in path.coefficients.nonzero().tolist():
                    indices += [m1, m2, m3]
                    values.append(float(path.coefficients[m1, m2, m3]))
                own = self.group_paths(path.group)
                ints += [starts[path.block], 2 * self.blocks[path.block] + 1, path.edge_degree]
                ints += [offsets[path.group], rows[path.group], own.index(number), len(own)]
                ints += [2 * self.groups[path.group] + 1, begin, len(values)]
            head = [self.channels, len(self.harmonics) - 1, len(self.paths), self.rows_in, knots, int(knots > 0)]
            reals = torch.cat(
                [
                    torch.tensor([self.r_max, *values], dtype=torch.float64),
                    *[c.double().flatten() for c in self.harmonics],
                ]
            )
            self.plans[knots] = torch.tensor([*head, len(values), *ints, *indices], dtype=torch.int64), reals
        return self.plans[knots]


@dataclass(frozen=True)
class Graph:
    """Who sends to whom.

    Attributes:
        sender: (edges,), int64, in the order of the edge vectors.
        receiver: the same.
        tables: number of the radial table of each edge, where there are several (they depend on the species of both
            atoms); None where there is one.
    """

    sender: Tensor
    receiver: Tensor
    tables: Tensor | None = None
    lists: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def by_receiver(self, atoms: int) -> tuple[Tensor, Tensor]:
        """`neighbours` of the receivers, made once."""
        return self._list("receiver", self.receiver, self.sender, atoms)

    def by_sender(self, atoms: int) -> tuple[Tensor, Tensor]:
        """The same of the senders."""
        return self._list("sender", self.sender, self.receiver, atoms)

    def _list(self, name: str, own: Tensor, other: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
        # Not by a key of both: where graphs are traced the number of atoms is a symbol, which has no hash.
        if name not in self.lists or self.lists[name][0].shape[0] != atoms + 1:
            self.lists[name] = neighbours(own, other, atoms)
        return self.lists[name]


def neighbours(own: Tensor, other: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
    """Edges by the atom they belong to, as the kernels on a card read them.

    Args:
        own: atom of each edge, (edges,).
        other: atom at its other end.
        atoms: number of atoms.

    Returns:
        Where each atom's edges begin, (atoms + 1,), and the numbers of the edges with their other ends, (2, edges),
        both int32. The order is stable, and nothing waits for the device.
    """
    ordered, order = torch.sort(own, stable=True)
    first = torch.searchsorted(ordered, torch.arange(atoms + 1, device=own.device, dtype=own.dtype))
    return first.to(torch.int32), torch.stack([order, other[order]]).to(torch.int32)
