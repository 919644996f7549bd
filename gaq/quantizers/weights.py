"""Weight quantization: layouts, ranges, rounding and the fake-quantize module.

A framework keeps the weights of an equivariant layer in one flat tensor: one matrix per path, end to end. A
`WeightLayout` says where each matrix lies, so the same quantizer serves every framework. Weights do not depend on
positions: a potential with rounded weights stays exactly equivariant and exactly conservative.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gaq.files.packing import planes_max

__all__ = [
    "Block",
    "QuantizedTensor",
    "Segment",
    "WeightLayout",
    "WeightQuantizer",
    "dequantize",
    "gptq_round",
    "largest_code",
]


def largest_code(bits: int) -> int:
    """Largest integer of a symmetric code; at 8, 16 and 24 bits the largest that one, two or three int8 planes hold."""
    return planes_max(bits // 8) if bits % 8 == 0 else 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class Block:
    """One array within a flat weight.

    Attributes:
        offset: first element.
        shape: shape of the array, row-major.
        input_axis: axis that the layer sums over; the others index output channels.
    """

    offset: int
    shape: tuple[int, ...]
    input_axis: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Segment(NamedTuple):
    """A block, or part of one, whose scale broadcasts: ``codes.view(shape) * scale.view(scale_shape)``."""

    offset: int
    shape: tuple[int, ...]
    scale_offset: int
    scale_shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightLayout:
    """Where the arrays of one weight tensor lie; they must cover it in order.

    Attributes:
        shape: shape of the weight tensor.
        blocks: arrays within the flattened tensor.
    """

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def single(cls, shape: Sequence[int], input_axis: int = 0) -> "WeightLayout":
        """The layout of a tensor that is one array."""
        return cls(tuple(shape), (Block(0, tuple(shape), input_axis),))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def segments(self, granularity: str, group_size: int) -> list[Segment]:
        """Split the weight into pieces that each have one broadcastable scale array.

        Args:
            granularity: ``per_tensor``, ``per_channel`` or ``per_group``.
            group_size: inputs per group; a remainder becomes a smaller group. Groups split the first axis only, where
                all our layers have their inputs; a block with inputs on another axis falls back to one scale per
                channel.
        """
        if granularity == "per_tensor":
            return [Segment(0, (self.numel,), 0, (1,))]
        segments: list[Segment] = []
        scale_offset = 0

        def add(offset: int, shape: tuple[int, ...], axis: int) -> None:
            nonlocal scale_offset
            scale_shape = tuple(1 if i == axis else n for i, n in enumerate(shape))
            segments.append(Segment(offset, shape, scale_offset, scale_shape))
            scale_offset += math.prod(scale_shape)

        for block in self.blocks:
            inputs = block.shape[block.input_axis]
            if granularity == "per_channel" or block.input_axis != 0 or inputs <= group_size:
                add(block.offset, block.shape, block.input_axis)
                continue
            groups, rest = divmod(inputs, group_size)
            columns = block.shape[1:]
            add(block.offset, (groups, group_size, *columns), 1)
            if rest:
                add(block.offset + groups * group_size * math.prod(columns), (rest, *columns), 0)
        return segments

    def scales(self, granularity: str, group_size: int) -> int:
        """Number of scales."""
        last = self.segments(granularity, group_size)[-1]
        return last.scale_offset + math.prod(last.scale_shape)

    def scale_index(self, granularity: str, group_size: int) -> Tensor:
        """Index of the scale of each weight, shape (numel,), int64."""
        index = torch.empty(self.numel, dtype=torch.int64)
        for offset, shape, scale_offset, scale_shape in self.segments(granularity, group_size):
            indices = torch.arange(math.prod(scale_shape)).view(scale_shape) + scale_offset
            index[offset : offset + math.prod(shape)] = indices.expand(shape).reshape(-1)
        return index


@dataclass
class QuantizedTensor:
    """Integer codes and scales of one weight tensor.

    Attributes:
        codes: int32, the shape of the weight.
        scale: float32, one per group of `layout`.
        bits: code width.
        layout: where the arrays lie.
        granularity: ``per_tensor``, ``per_channel`` or ``per_group``.
        group_size: inputs per scale for ``per_group``.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    layout: WeightLayout
    granularity: str
    group_size: int

    def dequantize(self) -> Tensor:
        """The weight in float32, shape of `codes`."""
        index = self.layout.scale_index(self.granularity, self.group_size)
        return dequantize(self.codes, self.scale, index)


def dequantize(codes: Tensor, scale: Tensor, scale_index: Tensor) -> Tensor:
    """Compute ``codes * scale``, always in float32, so that every reader of a file gets the same weights."""
    flat = codes.reshape(-1).to(torch.float32) * scale.to(torch.float32)[scale_index]
    return flat.view(codes.shape)


def _amax(values: Tensor, scale_index: Tensor, groups: int) -> Tensor:
    """Largest absolute value of each group, shape (groups,)."""
    zeros = torch.zeros(groups, dtype=values.dtype, device=values.device)
    return zeros.scatter_reduce(0, scale_index, values.abs(), "amax", include_self=True)


def stored_scale(step: Tensor) -> Tensor:
    """Round a scale up to bfloat16, the form a file keeps; never zero.

    The codes are chosen for the rounded scale, so its rounding costs nothing; rounding up keeps the largest weight from
    being clipped. bfloat16 halves the bytes spent on scales and makes ``codes * scale`` exact in float32 (15 and 8
    significant bits), so that every dtype dequantizes to the same weights.
    """
    step = step.clamp_min(1e-30)
    nearest = step.to(torch.bfloat16).to(torch.float32)
    above = (step * 1.00390625).to(torch.bfloat16).to(torch.float32)
    return step + (torch.where(nearest < step, above, nearest) - step).detach()


def search_range(weight: Tensor, scale_index: Tensor, groups: int, bits: int) -> Tensor:
    """Find the ratio of range to largest weight that minimizes each group's squared rounding error.

    A grid search over 0.3 to 1 in steps of 0.02, all groups at once. Clipping a few outliers helps at 4 bits and rarely
    at 8; above 8 bits the result is 1.

    Args:
        weight: flat, shape (numel,).
        scale_index: group of each weight, shape (numel,).
        groups: number of groups.
        bits: code width.

    Returns:
        Ratios in (0, 1], shape (groups,).
    """
    amax = _amax(weight, scale_index, groups)
    best = torch.ones_like(amax)
    if bits > 8:
        return best
    top = largest_code(bits)
    least = torch.full_like(amax, math.inf)
    for ratio in torch.linspace(1.0, 0.3, 36).tolist():
        # The scale as stored gives the error: its rounding can change which of two ratios is better.
        scale = stored_scale(ratio * amax / top)[scale_index]
        rounded = torch.round(weight / scale).clamp(-top, top) * scale
        error = torch.zeros_like(amax).index_add(0, scale_index, (rounded - weight) ** 2)
        better = error < least
        best = torch.where(better, torch.full_like(best, ratio), best)
        least = torch.where(better, error, least)
    return best


class WeightQuantizer(torch.nn.Module):
    """Rounds a weight tensor in the forward pass, with the straight-through estimator in the backward pass.

    At first the scale follows the weights (``ratio * amax / largest_code``). `fix_scale` holds it, until
    `refresh_scale` takes it from the weights again (training does so every epoch). Self-distillation learns the scale;
    differentiating the expression in `forward` gives the gradient of Esser et al. 2020 (LSQ, arXiv 1902.08153).

    Args:
        layout: layout of the weight.
        bits: code width, 2 to 16.
        granularity: ``per_tensor``, ``per_channel`` or ``per_group``.
        group_size: inputs per scale for ``per_group``.

    Attributes:
        effective_bits: bits at which plain rounding would give the layer the same error.
        negligible: whether this rounding costs so much less than all others that these need not adapt to it.
    """

    range_ratio: Tensor
    fixed_step: Tensor

    __jit_unused_properties__ = ["layout", "scale_index"]  # noqa: RUF012

    def __init__(self, layout: WeightLayout, bits: int, granularity: str, group_size: int) -> None:
        super().__init__()
        self.layout_blocks = [(b.offset, b.shape, b.input_axis) for b in layout.blocks]
        self.weight_shape = list(layout.shape)
        self.bits = bits
        self.granularity = granularity
        self.group_size = group_size
        self.top = float(largest_code(bits))
        self.effective_bits = bits
        self.negligible = False
        self.enabled = True
        self.scale_is_fixed = False
        segments = layout.segments(granularity, group_size)
        self.segments = [(s.offset, list(s.shape), s.scale_offset, list(s.scale_shape)) for s in segments]
        self.groups = layout.scales(granularity, group_size)
        # The buffers are not persistent: the state dict of a model keeps the framework's keys.
        self.register_buffer("range_ratio", torch.ones(self.groups), persistent=False)
        self.register_buffer("fixed_step", torch.ones(self.groups), persistent=False)

    @property
    def layout(self) -> WeightLayout:
        return WeightLayout(tuple(self.weight_shape), tuple(Block(*b) for b in self.layout_blocks))

    @property
    def scale_index(self) -> Tensor:
        """Index of the scale of each weight, shape (numel,), int64."""
        return self.layout.scale_index(self.granularity, self.group_size).to(self.range_ratio.device)

    @torch.jit.unused
    def search(self, weight: Tensor, method: str) -> None:
        """Set the range for a weight: by its largest value (``absmax``) or by the least squared ``error``."""
        if method == "error":
            flat = weight.detach().reshape(-1).float()
            ratio = search_range(flat, self.scale_index, self.groups, self.bits)
            self.range_ratio.copy_(ratio)
        else:
            self.range_ratio.fill_(1.0)

    @torch.jit.unused
    def fix_scale(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """Hold the scale at its value for `weight`, or at `scale`, shape (groups,)."""
        value = self.current_scale(weight.detach()) if scale is None else scale
        self.fixed_step = value.detach().to(self.range_ratio.device, torch.float32).clone()
        self.scale_is_fixed = True

    @torch.jit.unused
    def refresh_scale(self, weight: Tensor) -> None:
        """Compute the scale from `weight` and hold it.

        A scale that followed the weights in every step would shift all codes of its group whenever the largest weight
        moves, and training could not converge.
        """
        self.scale_is_fixed = False
        self.fix_scale(weight)

    @torch.jit.unused
    def adopt_scale(self, weight: Tensor) -> None:
        """Set the range so that `refresh_scale` gives the held scale for `weight`."""
        largest = self.largest(weight.detach()).float()
        ratio = self.fixed_step.detach().float() * self.top / largest
        self.range_ratio.copy_(torch.where(largest > 0, ratio, torch.ones_like(ratio)))

    def current_scale(self, weight: Tensor) -> Tensor:
        """Return the scales in use, shape (groups,), in the dtype of the weight."""
        if self.scale_is_fixed:
            return stored_scale(self.fixed_step).to(weight.dtype)
        ratio = self.range_ratio.to(torch.float32)
        step = ratio * self.largest(weight.detach()).to(torch.float32) / self.top
        return stored_scale(step).to(weight.dtype)

    def largest(self, weight: Tensor) -> Tensor:
        """Return the largest absolute weight of each group, shape (groups,)."""
        flat = weight.reshape(-1).abs()
        parts: list[Tensor] = []
        for offset, shape, _, scale_shape in self.segments:
            size = 1
            shared: list[int] = []
            for axis in range(len(shape)):
                size *= shape[axis]
                if scale_shape[axis] != shape[axis]:
                    shared.append(axis)
            piece = flat[offset : offset + size].view(shape)
            parts.append((piece.amax(shared) if len(shared) > 0 else piece).reshape(-1))
        return torch.cat(parts)

    def spread(self, scale: Tensor) -> Tensor:
        """Expand scales of shape (groups,) to the scale of each weight, shape (numel,)."""
        parts: list[Tensor] = []
        for _, shape, scale_offset, scale_shape in self.segments:
            size = 1
            for n in scale_shape:
                size *= n
            parts.append(scale[scale_offset : scale_offset + size].view(scale_shape).expand(shape).reshape(-1))
        return torch.cat(parts)

    def forward(self, weight: Tensor) -> Tensor:
        """Round the weight; the result has its shape and dtype."""
        if not self.enabled:
            return weight
        scale = self.spread(self.current_scale(weight))
        x = (weight.reshape(-1) / scale).clamp(-self.top, self.top)
        x = x + (torch.round(x) - x).detach()
        return (x * scale).view(weight.shape)

    @torch.jit.unused
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return codes and scales of a weight, as they are stored."""
        scale = self.current_scale(weight).detach().float().cpu()
        flat = weight.detach().reshape(-1).cpu()
        spread = self.spread(scale).to(flat.dtype)
        codes = torch.round(flat / spread).clamp(-self.top, self.top).to(torch.int32)
        return QuantizedTensor(
            codes.view(weight.shape), scale, self.bits, self.layout, self.granularity, self.group_size
        )


@torch.no_grad()
def gptq_round(matrix: Tensor, hessian: Tensor, scale: Tensor, bits: int, damping: float = 0.01) -> Tensor:
    """Round a matrix so that its *product* with the observed inputs changes least.

    Rows are rounded one after the other, those of the largest inputs first, and the rows not yet rounded compensate
    the error of each (Frantar et al. 2023, GPTQ, arXiv 2210.17323, equations 2 to 4, by a Cholesky factor of the
    inverse).

    Args:
        matrix: weights, shape (inputs, outputs).
        hessian: sum of outer products of the inputs, shape (inputs, inputs).
        scale: step of each weight, shape (inputs, outputs) or broadcastable to it.
        bits: code width.
        damping: fraction of the mean diagonal that is added to the Hessian's diagonal.

    Returns:
        Integer codes, int32, shape (inputs, outputs).
    """
    top = largest_code(bits)
    # On the CPU: the rows are thousands of small steps, each of them a launch on a GPU.
    matrix, hessian = matrix.detach().cpu().double(), hessian.cpu().double()
    order = torch.argsort(hessian.diagonal(), descending=True)
    work = matrix[order]
    step = scale.cpu().double().expand_as(matrix)[order]
    h = hessian[order][:, order]
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = 1.0
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.zeros(work.shape, dtype=torch.int32)
    for i in range(work.shape[0]):
        code = torch.round(work[i] / step[i]).clamp(-top, top)
        codes[i] = code.to(torch.int32)
        error = (work[i] - code * step[i]) / factor[i, i]
        work[i + 1 :] -= factor[i, i + 1 :, None] * error[None, :]
    return codes[torch.argsort(order)]
