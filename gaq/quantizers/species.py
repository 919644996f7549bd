r"""Codes of a weight that meets an embedding of the species, chosen together.

A product of features x with an embedding a of the atom's species, ``sum_uv W[u, v, w] x[u] a[v]`` (NequIP's
self-connection), acts through one matrix a species alone,

.. math:: W_t[u, w] = \sum_v a_t[v] W[u, v, w]

With T species and V numbers in the embedding, V weights serve T numbers. Rounded one by one they would bring V errors
into these; chosen together they bring in next to none (our derivation):

- What no species sees of W, its part orthogonal to all embeddings, is left out. The largest weight, and with it the
  step, becomes smaller.
- One v after the other is rounded, and the error made so far in the W_t is corrected by the next: the code is that
  nearest to :math:`W[v] + \langle r, a[v] \rangle / |a[v]|^2`, which makes the new error r least. Those with the
  largest :math:`|a[v]|` come first, so that the last corrections are the finest. It is the error feedback of
  sigma-delta converters, in T dimensions.
- Then two v at a time are moved by a step each where that makes r smaller: differences and sums of two embeddings are
  shorter than embeddings, and there are many. The shortest of these are combined in turn, to moves of up to 16 codes:
  each doubling makes the shortest some five times shorter. 32 codes of 3 bits are 7^32 choices for the T numbers of
  each output, so that there are some that come very near.

The gradient of what is trained lies in the part the species see by itself: it passes straight through. From 3 bits on
what species see of the rounding is so little that it need not be found anew in every step of a training: `hold` keeps
the difference to the weights until it is called again.

This module is embedded in packages: it imports nothing but torch and the core.
"""

from typing import Any

import torch
from torch import Tensor

from gaq.caches import cached
from gaq.quantizers.weights import QuantizedTensor, WeightLayout, WeightQuantizer

__all__ = ["SpeciesWeightQuantizer", "chosen_codes", "seen_part"]


def seen_part(weights: Tensor, table: Tensor) -> Tensor:
    """The part of weights that embeddings can see: their projection on the space these span.

    Args:
        weights: shape (V, numbers), V the size of the embedding.
        table: embeddings, shape (T, V).

    Returns:
        Shape (V, numbers), float64.
    """
    rows = table.double()
    return torch.linalg.pinv(rows, rtol=1e-9) @ (rows @ weights.double())


MOVES = 64
"""Combinations of each kind that are tried; more gain nothing."""
PARTS = 256
"""Combinations of which longer ones are made."""


def _shortest(rows: Tensor, parts: Tensor, count: int) -> Tensor:
    """Sums and differences of two combinations of embeddings whose lengths are the least, shortest first.

    Args:
        rows: embeddings, shape (T, V).
        parts: integers, shape (V, n), a combination a column.
        count: how many.

    Returns:
        Integers up to 2, shape (V, count) or fewer columns.
    """
    one, other = torch.triu_indices(parts.shape[1], parts.shape[1], 1, device=rows.device)
    vectors = rows @ parts
    first, second = vectors[:, one], vectors[:, other]
    squares = torch.cat(((first + second).square().sum(0), (first - second).square().sum(0)))
    # Of embeddings that are equal, moving one against the other changes nothing.
    squares = torch.where(squares > (1e-9 * rows.norm()) ** 2, squares, torch.full_like(squares, torch.inf))
    order = torch.topk(squares, min(8 * count, int(torch.isfinite(squares).sum())), largest=False).indices
    pair = order % one.numel()
    sign = torch.where(order < one.numel(), 1.0, -1.0).to(rows.dtype)
    found = parts[:, one[pair]] + sign * parts[:, other[pair]]
    found = found[:, found.abs().amax(0) <= 2]
    # Some come about in several ways, perhaps with the other sign: numbers drawn at random tell them apart.
    drawn = torch.rand(len(rows.T), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names = (1e9 * (drawn.to(rows) @ found).abs()).round()
    _, which = torch.unique(names, return_inverse=True)
    at = torch.arange(found.shape[1], device=rows.device)
    earliest = torch.full_like(at, found.shape[1]).scatter_reduce(0, which, at, "amin")
    return found[:, torch.sort(earliest[earliest < found.shape[1]]).values[:count]]


def _short_sums(rows: Tensor) -> Tensor:
    """Moves of codes that change little: combinations of embeddings with short sums, the longest first."""
    parts = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    levels = []
    for _ in range(4):
        parts = _shortest(rows, parts, PARTS)
        levels.append(parts[:, :MOVES].flip(1))
    return torch.cat(levels, 1)


def chosen_codes(wanted: Tensor, table: Tensor, top: float) -> Tensor:
    """Integers that give nearly the same sums over the embedding as the numbers they stand for.

    Args:
        wanted: numbers in units of the step, shape (V, numbers).
        table: embeddings, shape (T, V).
        top: the largest code.

    Returns:
        Codes, shape (V, numbers), float64.
    """
    x, rows = wanted.double(), table.double()
    squares = (rows**2).sum(0)
    error = torch.zeros(rows.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    codes = torch.zeros_like(x)
    for v in torch.argsort(squares, descending=True).tolist():
        seen = rows[:, v]
        correction = seen @ error / squares[v] if squares[v] > 0 else torch.zeros_like(x[v])
        codes[v] = torch.round(x[v] + correction).clamp(-top, top)
        error += torch.outer(seen, x[v] - codes[v])
    for move in _short_sums(rows).unbind(1):
        moved = move.nonzero().squeeze(1)
        by = move[moved].unsqueeze(1)
        together = rows @ move
        steps = torch.round(together @ error / (together @ together))
        # Whole steps that leave every code within its range.
        present = by.sign() * codes[moved]
        least = ((-top - present) / by.abs()).ceil().amax(0)
        most = ((top - present) / by.abs()).floor().amin(0)
        steps = torch.minimum(torch.maximum(steps, least), most)
        codes[moved] += by * steps
        error -= torch.outer(together, steps)
    return codes


@cached(most=1)
def _operations() -> tuple[Any, Any]:
    """The two functions as operations, which a trace does not look into.

    They are registered when they are first asked for, and once: a package holds a copy of this module.
    """
    if not hasattr(torch.ops.gaq, "chosen_codes"):

        def same_shape(weights: Tensor, table: Tensor, top: float = 0.0) -> Tensor:
            return torch.empty_like(weights, dtype=torch.float64)

        for function, schema in ((seen_part, "(Tensor a, Tensor b) -> Tensor"), (chosen_codes, None)):
            schema = schema or "(Tensor a, Tensor b, float top) -> Tensor"
            made = torch.library.custom_op(f"gaq::{function.__name__}", function, mutates_args=(), schema=schema)
            made.register_fake(same_shape)
    return torch.ops.gaq.seen_part.default, torch.ops.gaq.chosen_codes.default


class SpeciesWeightQuantizer(WeightQuantizer):
    """A `WeightQuantizer` whose codes are chosen together, for weights that meet an embedding of the species.

    Once the weights are codes (`settle`) it rounds to nearest, which leaves them what they are.

    Args:
        layout: of the weight: blocks of shape (features * embedding, outputs), the embedding counting fastest.
        bits: 2 to 16.
        embedding: module with the table of embeddings as ``weight``, shape (species, size), and perhaps a quantizer of
            it as ``weight_quantizer``. It is referred to, not owned.
    """

    order: Tensor
    offset: Tensor

    def __init__(self, layout: WeightLayout, bits: int, embedding: torch.nn.Module) -> None:
        super().__init__(layout, bits, "per_channel", 0)
        self.__dict__["embedding"] = embedding
        self.settled = False
        # At least that, as measured on trained models; benchmarks/species_codes.py.
        self.effective_bits = bits + 5
        self.negligible = bits > 2
        self.held = False
        size = self.table().shape[1]
        numbers = torch.arange(layout.numel)
        blocks = [
            numbers[b.offset : b.offset + b.numel].view(-1, size, b.shape[1]).transpose(0, 1).reshape(size, -1)
            for b in layout.blocks
        ]
        self.register_buffer("order", torch.cat(blocks, 1), persistent=False)
        self.register_buffer("offset", torch.zeros(0), persistent=False)

    def table(self) -> Tensor:
        """The embeddings as the model computes with them, shape (species, size), detached."""
        embedding: Any = self.__dict__["embedding"]
        weight = embedding.weight.detach()
        quantizer = getattr(embedding, "weight_quantizer", None)
        table: Tensor = weight if quantizer is None else quantizer(weight).detach()
        return table

    def settle(self) -> None:
        """Say that the weights are codes now, and stay."""
        self.settled = True

    def seen(self, weight: Tensor) -> Tensor:
        """The weight without what no species sees, flat, shape (numel,)."""
        if self.settled:
            return weight.reshape(-1)
        flat = weight.detach().reshape(-1)
        part = _operations()[0](flat[self.order], self.table())
        return torch.zeros_like(flat).index_put((self.order,), part.to(flat.dtype))

    def largest(self, weight: Tensor) -> Tensor:
        """The largest absolute weight of each channel that species see, shape (groups,)."""
        return super().largest(self.seen(weight))

    def search(self, weight: Tensor, method: str) -> None:
        """Set the range by ``absmax``, or such that what species see is off by the least squared ``error``."""
        self.range_ratio.fill_(1.0)
        if method != "error" or self.settled:
            return
        seen, table = self.seen(weight.detach()), self.table().double()
        channel = self.scale_index[self.order]
        best, least = self.range_ratio.clone(), torch.full_like(self.range_ratio, torch.inf, dtype=torch.float64)
        for ratio in torch.linspace(1.0, 0.4, 13).tolist():
            self.range_ratio.fill_(ratio)
            rounded = self.codes(weight) * self.spread(self.current_scale(weight))
            off = ((table @ (rounded - seen)[self.order].double()) ** 2).sum(0)
            error = torch.zeros_like(least).index_add(0, channel[0], off)
            best = torch.where(error < least, torch.full_like(best, ratio), best)
            least = torch.minimum(least, error)
        self.range_ratio.copy_(best)

    def codes(self, weight: Tensor) -> Tensor:
        """The codes as floating-point numbers, flat, shape (numel,)."""
        flat = self.seen(weight.detach())
        x = flat / self.spread(self.current_scale(weight)).to(flat.dtype)
        if self.settled:
            return torch.round(x).clamp(-self.top, self.top)
        chosen = _operations()[1](x[self.order], self.table(), self.top)
        return torch.zeros_like(x).index_put((self.order,), chosen.to(x.dtype))

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """Round as for this weight until `release`, where that is as good as choosing codes anew."""
        self.release()
        if self.negligible and self.enabled:
            self.offset = (self.forward(weight) - weight).reshape(-1)
            self.held = True

    def release(self, offset: Tensor | None = None) -> None:
        """Choose the codes for each weight again, or go back to an `offset` that was held before."""
        self.held = offset is not None and offset.numel() > 0
        self.offset = offset if offset is not None else self.offset.new_zeros(0)

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight, same shape and dtype; its gradient passes straight through."""
        if not self.enabled:
            return weight
        if self.held:
            return weight + self.offset.to(weight.dtype).view(weight.shape)
        rounded = self.codes(weight) * self.spread(self.current_scale(weight))
        # The difference is exactly zero and carries the gradient.
        return rounded.detach().view(weight.shape) + (weight - weight.detach())

    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Codes and scales of a weight, as they are stored."""
        codes = self.codes(weight.detach()).to(torch.int32).cpu().view(weight.shape)
        scale = self.current_scale(weight).detach().float().cpu()
        return QuantizedTensor(codes, scale, self.bits, self.layout, self.granularity, self.group_size)
