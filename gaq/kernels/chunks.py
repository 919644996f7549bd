"""Convolutions of blocks that differ in their number of channels, for the kernels, which know one number.

Channels do not mix in a channel-wise tensor product. So a block of 64 channels is four blocks of 16, each with the
block's paths, and a problem of 64x0e+32x1o+16x2e is one of 16 channels with four, two and one blocks. A multiplicity
that is no multiple of the width is filled up with channels that are zero and whose messages are dropped. The CPU kernel
takes the chunks of a path together (`gaq.kernels.problem`), so chunks cost no more than the channels they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gaq.kernels.problem import ConvolutionProblem, Path

__all__ = ["GPU_WIDTHS", "ChunkedConvolution", "chunk_width", "cpu_widths"]

REGISTER_BYTES = 64
"""Most bytes that the CPU kernel computes at once (``GAQ_BYTES`` in `cpu/lanes.h`)."""
GPU_WIDTHS = (32, 64, 128)
"""Channels of a program on a GPU: from a warp's threads to the most that one program takes."""


def cpu_widths(multiplicities: Sequence[int], dtype: torch.dtype) -> range:
    """Whole registers only: a shorter row at the end of a chunk costs three times a full one."""
    lanes = REGISTER_BYTES // dtype.itemsize
    return range(lanes, max(multiplicities) + lanes, lanes)


def chunk_width(costs: Sequence[tuple[int, float]], widths: Sequence[int]) -> int:
    """Choose the number of channels in a chunk.

    Args:
        costs: number of channels and cost of a channel, for each path.
        widths: to choose from.

    Returns:
        The width by which the paths cost least, filled up as they are; the largest one, where several do.
    """

    def cost(width: int) -> float:
        return sum(-(-channels // width) * width * weight for channels, weight in costs)

    return min(widths, key=lambda width: (cost(width), -width))


@dataclass(frozen=True)
class ChunkedConvolution:
    """A convolution in e3nn's layout (``mul_ir``), as a problem of one number of channels.

    Attributes:
        problem: of the chunks.
        multiplicities: channels of each input block.
        degrees: l of each input block.
        path_blocks: input block of each path, before it is cut.
        path_groups: output group of each path, before it is cut.
        columns: for each chunk of a path and channel, the column of its radial weight in the layout of `make`,
            (chunks * width,). Channels that only fill up have any.
    """

    problem: ConvolutionProblem
    multiplicities: tuple[int, ...]
    degrees: tuple[int, ...]
    path_blocks: tuple[int, ...]
    path_groups: tuple[int, ...]
    columns: Tensor

    @staticmethod
    def make(
        multiplicities: Sequence[int],
        degrees: Sequence[int],
        groups: Sequence[int],
        paths: Sequence[Path],
        starts: Sequence[int],
        harmonics: Sequence[Tensor],
        r_max: float,
        widths: Sequence[int],
        scaled: bool = False,
    ) -> ChunkedConvolution:
        """Cut a convolution into chunks.

        Args:
            multiplicities: channels of each input block.
            degrees: l of each input block.
            groups: l of each output group.
            paths: of the tensor product; `Path.block` counts the uncut blocks.
            starts: for each path, the column of its first radial weight among those of all paths.
            harmonics, r_max: as in `ConvolutionProblem`.
            widths: numbers of channels that a chunk may have; `cpu_widths` or `GPU_WIDTHS`.

            scaled: whether edges have factors; see `scale_channels`.

        Raises:
            ValueError: for a problem that the kernels do not serve.
        """
        sizes = [(multiplicities[p.block], float(p.coefficients[:, 0].numel())) for p in paths]
        width = chunk_width(sizes, widths)
        counts = [-(-m // width) for m in multiplicities]
        first = [sum(counts[:b]) for b in range(len(counts))]
        chunks, columns = [], []
        for path, start in zip(paths, starts, strict=True):
            for chunk in range(counts[path.block]):
                chunks.append(Path(first[path.block] + chunk, path.edge_degree, path.group, path.coefficients))
                channels = torch.arange(chunk * width, (chunk + 1) * width)
                columns.append(start + channels.clamp(max=multiplicities[path.block] - 1))
        blocks = tuple(l for l, count in zip(degrees, counts, strict=True) for _ in range(count))  # noqa: E741
        # Blocks of as many channels have the same factors: a row for each of their chunks.
        scale_rows: dict[int, range] = {}
        for m, count in zip(multiplicities, counts, strict=True):
            begin = sum(len(rows) for rows in scale_rows.values())
            scale_rows.setdefault(m, range(begin, begin + count))
        rows = tuple(row for m in multiplicities for row in scale_rows[m]) if scaled else ()
        problem = ConvolutionProblem(width, blocks, tuple(groups), tuple(chunks), tuple(harmonics), r_max, rows)
        of_paths = tuple(p.block for p in paths), tuple(p.group for p in paths)
        return ChunkedConvolution(problem, tuple(multiplicities), tuple(degrees), *of_paths, torch.cat(columns))

    def weights(self, weights: Tensor, columns: Tensor) -> Tensor:
        """Bring radial weights (..., weights) into the layout of the problem, (..., paths, channels).

        Args:
            weights: in the layout of `make`.
            columns: the attribute, on the device of the weights.
        """
        return weights.index_select(-1, columns).unflatten(-1, (len(self.problem.paths), self.problem.channels))

    def scale_channels(self) -> list[tuple[int, Tensor]]:
        """Channels that an edge's factors multiply, in the order of the factors.

        Returns:
            Pairs of a number of channels and, for each factor of the blocks that have as many, the channel within such
            a block, (chunks * width,). Factors that only fill up have the last channel.
        """
        width = self.problem.channels
        return [(m, torch.arange(-(-m // width) * width).clamp(max=m - 1)) for m in dict.fromkeys(self.multiplicities)]

    def rows(self, features: Tensor) -> Tensor:
        """Bring features (atoms, irreps.dim) into the layout of the problem, (atoms, rows, channels)."""
        width, parts, start = self.problem.channels, [], 0
        for m, l in zip(self.multiplicities, self.degrees, strict=True):  # noqa: E741
            d = 2 * l + 1
            piece = features[:, start : start + m * d].view(-1, m, d)
            start += m * d
            count = -(-m // width)
            if m % width:
                piece = torch.nn.functional.pad(piece, (0, 0, 0, count * width - m))
            parts.append(piece.view(-1, count, width, d).transpose(2, 3).reshape(-1, count * d, width))
        return torch.cat(parts, dim=1)

    def mul_ir(self, message: Tensor, atoms: int) -> Tensor:
        """Bring a message into e3nn's layout, (atoms, irreps.dim): group after group, path after path."""
        width, parts = self.problem.channels, []
        for number, matrix in enumerate(self.problem.split(message, atoms)):
            of_group = matrix.view(atoms, 2 * self.problem.groups[number] + 1, -1)
            blocks = [b for b, g in zip(self.path_blocks, self.path_groups, strict=True) if g == number]
            multiplicities = [self.multiplicities[block] for block in blocks]
            if any(m % width for m in multiplicities):
                padded = of_group.split([-(-m // width) * width for m in multiplicities], dim=2)
                of_group = torch.cat([p[:, :, :m] for p, m in zip(padded, multiplicities, strict=True)], dim=2)
            parts.append(of_group.transpose(1, 2).reshape(atoms, -1))
        return torch.cat(parts, dim=1)
