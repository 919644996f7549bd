r"""Joint choice of the codes of a weight that multiplies an embedding of the species.

A product of features x with an embedding a of the atom's species, ``sum_uv W[u, v, w] x[u] a[v]`` (NequIP's
self-connection), acts through one matrix per species,

.. math:: W_t[u, w] = \sum_v a_t[v] W[u, v, w]

With T species and V numbers in the embedding, V weights determine T numbers. Rounding the weights one by one would
bring V errors into these; choosing the codes together leaves almost no error (our derivation):

- The part of W orthogonal to all embeddings has no effect on any species and is removed. The largest weight becomes
  smaller, and with it the step.
- The v are rounded one after the other, and each corrects the error that the previous ones made in the W_t: its code is
  the one nearest to :math:`W[v] + \langle r, a[v] \rangle / |a[v]|^2`, which minimizes the new error r. The v with the
  largest :math:`|a[v]|` come first, so that the last corrections are the finest. This is the error feedback of
  sigma-delta converters, in T dimensions.
- Then pairs of v are moved by one step each where that makes r smaller: sums and differences of two embeddings are
  shorter than embeddings, and there are many. The shortest of these are combined again, up to moves of 16 codes; each
  doubling makes the shortest about five times shorter. 32 codes of 3 bits are 7^32 choices for the T numbers of each
  output, so some choices come very close.

The gradient lies in the part that acts on species and passes straight through. From 3 bits on the rounding changes the
W_t so little that the codes need not be chosen again in every training step: `hold` keeps the difference to the weights
until it is called again.

This module is embedded in packages: it imports nothing but torch and the core.
"""

import torch
from torch import Tensor

from gaq.caches import cached
from gaq.quantizers.weights import QuantizedTensor, WeightLayout, WeightQuantizer
from gaq.untyped import AnyModule, Operation

__all__ = ["SpeciesWeightQuantizer", "chosen_codes", "seen_part"]


def seen_part(weights: Tensor, table: Tensor) -> Tensor:
    """Project weights on the space that the embeddings span, the only part that acts on a species.

    Args:
        weights: shape (V, numbers), V the size of the embedding.
        table: embeddings, shape (T, V).

    Returns:
        Shape (V, numbers), float64.
    """
    rows = table.double()
    return torch.linalg.pinv(rows, rtol=1e-9) @ (rows @ weights.double())


MOVES = 64
"""Combinations tried of each length; more do not lower the error."""
PARTS = 256
"""Combinations kept to build longer ones from."""


def _shortest(rows: Tensor, parts: Tensor, count: int) -> Tensor:
    """Sums and differences of two combinations of embeddings with the smallest lengths, shortest first.

    Args:
        rows: embeddings, shape (T, V).
        parts: integers, shape (V, n), one combination per column.
        count: number of combinations to return.

    Returns:
        Integers up to 2, shape (V, count) or fewer columns.
    """
    left, right = torch.triu_indices(parts.shape[1], parts.shape[1], 1, device=rows.device)
    vectors = rows @ parts
    first, second = vectors[:, left], vectors[:, right]
    squares = torch.cat(((first + second).square().sum(0), (first - second).square().sum(0)))
    # Moving one of two equal embeddings against the other changes nothing.
    squares = torch.where(squares > (1e-9 * rows.norm()) ** 2, squares, torch.full_like(squares, torch.inf))
    order = torch.topk(squares, min(8 * count, int(torch.isfinite(squares).sum())), largest=False).indices
    pair = order % left.numel()
    sign = torch.where(order < left.numel(), 1.0, -1.0).to(rows.dtype)
    combined = parts[:, left[pair]] + sign * parts[:, right[pair]]
    combined = combined[:, combined.abs().amax(0) <= 2]
    # A combination may arise in several ways, also with the opposite sign: a random projection identifies it.
    drawn = torch.rand(len(rows.T), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    projection = (1e9 * (drawn.to(rows) @ combined).abs()).round()
    _, identity = torch.unique(projection, return_inverse=True)
    columns = torch.arange(combined.shape[1], device=rows.device)
    first_column = torch.full_like(columns, combined.shape[1]).scatter_reduce(0, identity, columns, "amin")
    return combined[:, torch.sort(first_column[first_column < combined.shape[1]]).values[:count]]


def _short_sums(rows: Tensor) -> Tensor:
    """Moves of codes that change the W_t little: combinations of embeddings with short sums, longest first."""
    parts = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    levels = []
    for _ in range(4):
        parts = _shortest(rows, parts, PARTS)
        levels.append(parts[:, :MOVES].flip(1))
    return torch.cat(levels, 1)


def chosen_codes(target: Tensor, table: Tensor, top: float) -> Tensor:
    """Choose integers that give nearly the same sums over the embedding as the target numbers.

    Args:
        target: numbers in units of the step, shape (V, numbers).
        table: embeddings, shape (T, V).
        top: the largest code.

    Returns:
        Codes, shape (V, numbers), float64.
    """
    x, rows = target.double(), table.double()
    squares = (rows**2).sum(0)
    error = torch.zeros(rows.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    codes = torch.zeros_like(x)
    for v in torch.argsort(squares, descending=True).tolist():
        column = rows[:, v]
        correction = column @ error / squares[v] if squares[v] > 0 else torch.zeros_like(x[v])
        codes[v] = torch.round(x[v] + correction).clamp(-top, top)
        error += torch.outer(column, x[v] - codes[v])
    for move in _short_sums(rows).unbind(1):
        moved = move.nonzero().squeeze(1)
        step_sizes = move[moved].unsqueeze(1)
        change = rows @ move
        steps = torch.round(change @ error / (change @ change))
        # The number of steps is an integer that leaves every code within its range.
        present = step_sizes.sign() * codes[moved]
        least = ((-top - present) / step_sizes.abs()).ceil().amax(0)
        most = ((top - present) / step_sizes.abs()).floor().amin(0)
        steps = torch.minimum(torch.maximum(steps, least), most)
        codes[moved] += step_sizes * steps
        error -= torch.outer(change, steps)
    return codes


@cached(most=1)
def _operations() -> tuple[Operation, Operation]:
    """Return `seen_part` and `chosen_codes` as torch operations, which a trace does not look into.

    They are registered at the first call and only once, because a package holds a copy of this module.
    """
    if not hasattr(torch.ops.gaq, "chosen_codes"):

        def same_shape(weights: Tensor, table: Tensor, top: float = 0.0) -> Tensor:
            return torch.empty_like(weights, dtype=torch.float64)

        for function, schema in ((seen_part, "(Tensor a, Tensor b) -> Tensor"), (chosen_codes, None)):
            schema = schema or "(Tensor a, Tensor b, float top) -> Tensor"
            operation = torch.library.custom_op(f"gaq::{function.__name__}", function, mutates_args=(), schema=schema)
            operation.register_fake(same_shape)
    return torch.ops.gaq.seen_part.default, torch.ops.gaq.chosen_codes.default


class SpeciesWeightQuantizer(WeightQuantizer):
    """A `WeightQuantizer` that chooses codes together, for weights that multiply an embedding of the species.

    Once the weights lie on the grid (`settle`) it rounds to nearest, which leaves them unchanged.

    Args:
        layout: layout of the weight: blocks of shape (features * embedding, outputs), the embedding index fastest.
        bits: code width, 2 to 16.
        embedding: module with the table of embeddings as ``weight``, shape (species, size), and optionally its
            quantizer as ``weight_quantizer``. This quantizer refers to it and does not register it as a submodule.
    """

    order: Tensor
    offset: Tensor

    def __init__(self, layout: WeightLayout, bits: int, embedding: torch.nn.Module) -> None:
        super().__init__(layout, bits, "per_channel", 0)
        self.__dict__["embedding"] = embedding
        self.settled = False
        # A lower bound from trained models; see benchmarks/species_codes.py.
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
        """Return the embeddings that the model computes with, shape (species, size), detached."""
        embedding: AnyModule = self.__dict__["embedding"]
        weight = embedding.weight.detach()
        quantizer = getattr(embedding, "weight_quantizer", None)
        table: Tensor = weight if quantizer is None else quantizer(weight).detach()
        return table

    def settle(self) -> None:
        """Record that the weights lie on the grid for good: their codes are not chosen again."""
        self.settled = True

    def projected(self, weight: Tensor) -> Tensor:
        """Return the weight without the part that acts on no species, flat, shape (numel,)."""
        if self.settled:
            return weight.reshape(-1)
        flat = weight.detach().reshape(-1)
        part = _operations()[0](flat[self.order], self.table())
        return torch.zeros_like(flat).index_put((self.order,), part.to(flat.dtype))

    def largest(self, weight: Tensor) -> Tensor:
        """Return the largest absolute value of `projected` in each channel, shape (groups,)."""
        return super().largest(self.projected(weight))

    def search(self, weight: Tensor, method: str) -> None:
        """Set the range by ``absmax``, or by the least squared ``error`` of the matrices of the species."""
        self.range_ratio.fill_(1.0)
        if method != "error" or self.settled:
            return
        projected, table = self.projected(weight.detach()), self.table().double()
        channel = self.scale_index[self.order]
        best, least = self.range_ratio.clone(), torch.full_like(self.range_ratio, torch.inf, dtype=torch.float64)
        for ratio in torch.linspace(1.0, 0.4, 13).tolist():
            self.range_ratio.fill_(ratio)
            rounded = self.codes(weight) * self.spread(self.current_scale(weight))
            squares = ((table @ (rounded - projected)[self.order].double()) ** 2).sum(0)
            error = torch.zeros_like(least).index_add(0, channel[0], squares)
            best = torch.where(error < least, torch.full_like(best, ratio), best)
            least = torch.minimum(least, error)
        self.range_ratio.copy_(best)

    def codes(self, weight: Tensor) -> Tensor:
        """Return the codes as floating-point numbers, flat, shape (numel,)."""
        flat = self.projected(weight.detach())
        x = flat / self.spread(self.current_scale(weight)).to(flat.dtype)
        if self.settled:
            return torch.round(x).clamp(-self.top, self.top)
        chosen = _operations()[1](x[self.order], self.table(), self.top)
        return torch.zeros_like(x).index_put((self.order,), chosen.to(x.dtype))

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """Keep the rounding offset of `weight` until `release`, if the rounding is `negligible`."""
        self.release()
        if self.negligible and self.enabled:
            self.offset = (self.forward(weight) - weight).reshape(-1)
            self.held = True

    def release(self, offset: Tensor | None = None) -> None:
        """Choose the codes in every call again, or go back to an `offset` that was held before."""
        self.held = offset is not None and offset.numel() > 0
        self.offset = offset if offset is not None else self.offset.new_zeros(0)

    def forward(self, weight: Tensor) -> Tensor:
        """Round the weight; the result has its shape and dtype, and the gradient passes straight through."""
        if not self.enabled:
            return weight
        if self.held:
            return weight + self.offset.to(weight.dtype).view(weight.shape)
        rounded = self.codes(weight) * self.spread(self.current_scale(weight))
        # The difference is exactly zero and carries the gradient.
        return rounded.detach().view(weight.shape) + (weight - weight.detach())

    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return codes and scales of a weight, as they are stored."""
        codes = self.codes(weight.detach()).to(torch.int32).cpu().view(weight.shape)
        scale = self.current_scale(weight).detach().float().cpu()
        return QuantizedTensor(codes, scale, self.bits, self.layout, self.granularity, self.group_size)
