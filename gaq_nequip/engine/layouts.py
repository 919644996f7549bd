"""Where the messages of a convolution and the features of a gate lie in a program."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gaq.kernels import rounding
from gaq.kernels.chunks import ChunkedConvolution
from gaq.kernels.recording import Gated, View
from gaq.untyped import AnyModule
from gaq_nequip.engine.edges import Unsupported
from gaq_nequip.engine.reading import Block, blocks_of

__all__ = ["Message", "messages_of", "pieces_of"]

_FUNCTIONS: dict[object, str] = {torch.nn.functional.silu: "silu", torch.tanh: "tanh"}


@dataclass(frozen=True)
class Message:
    """Matrix of a group of messages.

    Attributes:
        view: of its rows.
        length: of a row.
        spans: begin and number of the channels of each path; the others only fill up.
    """

    view: View
    length: int
    spans: tuple[tuple[int, int], ...]

    @property
    def full(self) -> bool:
        """Whether no channels only fill up."""
        return sum(count for _, count in self.spans) == self.length

    def piece(self) -> rounding.Piece:
        """Its place, for a quantizer."""
        v = self.view
        return rounding.Piece(v.components, self.length, v.offset, v.atom_stride, v.row_stride, v.scaled_offset)

    def copies(self, to: Block, width: int) -> list[tuple[View, View, int]]:
        """Copies of its paths to a block of features of a width."""
        blocks, start = [], to.start
        for begin, count in self.spans:
            written = View(to.components, width, to.channels, start)
            blocks.append((replace(self.view, offset=self.view.offset + begin), written, count))
            start += count
        return blocks

    def padded(self, matrix: Tensor) -> Tensor:
        """A matrix (channels, out) with rows of zeros for channels that only fill up, (length, out)."""
        rows = matrix.new_zeros(self.length, matrix.shape[1])
        rows[torch.cat([torch.arange(begin, begin + count) for begin, count in self.spans])] = matrix
        return rows


def messages_of(chunked: ChunkedConvolution) -> list[Message]:
    """Matrices of the groups of a convolution."""
    problem, rows, messages = chunked.problem, chunked.problem.group_rows(), []
    for group, l in enumerate(problem.groups):  # noqa: E741
        spans, length = [], 0
        for block, of_group in zip(chunked.path_blocks, chunked.path_groups, strict=True):
            if of_group == group:
                spans.append((length, chunked.multiplicities[block]))
                length += -(-spans[-1][1] // problem.channels) * problem.channels
        components, before = 2 * l + 1, sum(rows[:group]) * problem.channels
        view = View(components, components * length, length, scaled_offset=before)
        messages.append(Message(view, length, tuple(spans)))
    return messages


def pieces_of(gate: AnyModule) -> tuple[list[Gated], int]:
    """Pieces of an `e3nn.nn.Gate`, and the width of its result.

    Raises:
        Unsupported: for functions of which there is no operation.
    """
    scalars, gates, gated = gate.sc.irreps_outs
    together = scalars + gates + gated
    ordered, positions, _ = together.sort()
    starts = [0, *itertools.accumulate(ir.dim * count for count, ir in ordered)]
    begin = [starts[position] for position in positions]
    # Place of each scalar.
    places = [b + k for b, (count, _) in zip(begin, scalars + gates, strict=False) for k in range(count)]
    pieces: list[Gated] = []
    number = out = 0
    for channels, _, act in gate.act_scalars.paths:
        pieces.append(Gated(channels, places[number], out, *_function(act)))
        number, out = number + channels, out + channels
    blocks = blocks_of(gate.irreps_in)
    paths = gate.act_gates.paths
    if [channels for channels, _, _ in paths] != [channels for channels, _ in gated]:
        raise Unsupported(f"gates {gates} do not belong to features {gated} one by one")
    for (channels, _, act), (_, ir), start in zip(paths, gated, begin[len(scalars) + len(gates) :], strict=True):
        if Block(start, channels, ir.dim) not in blocks:
            raise Unsupported(f"features {gated} lie otherwise in {gate.irreps_in}")
        pieces.append(Gated(channels, places[number], out, *_function(act), ir.dim, start))
        number, out = number + channels, out + channels * ir.dim
    return pieces, out


def _function(act: AnyModule) -> tuple[str, float]:
    """Kind and factor of an activation function of e3nn."""
    kind = _FUNCTIONS.get(getattr(act, "f", None))
    if kind is None:
        raise Unsupported(f"there is no operation for the activation function {getattr(act, 'f', act)}")
    return kind, 1.0 if act._is_id else float(act.cst)
