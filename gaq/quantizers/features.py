"""`FeatureQuantizer`: rounds a tensor of irreps features, scalars by ruler and vectors by compass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from gaq.codebooks import (
    cube_components,
    cube_quantize,
    direction_levels,
    direction_table,
    nearest_direction,
    octahedral_components,
    octahedral_quantize,
)
from gaq.config.schema import ScalarConfig, VectorConfig
from gaq.quantizers.directions import round_vector
from gaq.quantizers.frames import local_frame, local_frame_at_once, mixtures
from gaq.quantizers.magnitudes import round_linear
from gaq.quantizers.weights import largest_code

__all__ = ["FeatureLayout", "FeatureQuantizer"]

OBSERVER_DECAY = 0.99
FINE_BITS = 14
"""From here on rounding changes a feature by less than 1e-4 of the largest of its atom."""


@dataclass(frozen=True)
class FeatureLayout:
    """How irreps lie in the feature axis of a tensor.

    Attributes:
        pieces: (multiplicity, dimension) of each irrep, in order; adjacent equal dimensions may be
            merged. A piece that no weight reads may be marked by a negative multiplicity and is passed
            through.
        channels_first: False for ``(batch, irreps.dim)`` with the multiplicity outermost within a piece
            (e3nn's ``mul_ir``); True for ``(batch, channels, sum of dimensions)``.
    """

    pieces: tuple[tuple[int, int], ...]
    channels_first: bool = False


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    total = first[0] * second[0]
    for a, b in zip(first[1:], second[1:], strict=True):
        total = total + a * b
    return total


def own_limit(sizes: Tensor) -> Tensor:
    """The range of each atom: its largest size, and a little more, lest rounding put the largest outside.

    Args:
        sizes: shape (batch, channels, components), >= 0.

    Returns:
        Shape (batch, 1), positive.
    """
    return sizes.amax((1, 2)).unsqueeze(-1).clamp_min(1e-30) * 1.000001


class _Piece(NamedTuple):
    """One irrep within the feature axis, and how it is rounded; a largest code of 0 means not at all."""

    start: int
    size: int
    multiplicity: int
    dimension: int
    limit: Tensor
    step: Tensor
    top: float
    split: bool
    own: bool
    factor: float


class FeatureQuantizer(torch.nn.Module):
    """Rounds features with static ranges, and observes those ranges while told to.

    Ranges are one number a channel (or a tensor), never a batch: a range shared by a batch would couple
    atoms that do not interact. They are buffers, not persistent, so that a state dict keeps the host's
    keys; `ranges` and `load_ranges` carry them.

    Args:
        layout: of the features.
        scalars: how l = 0 is rounded.
        vectors: how l > 0 is rounded.
        headroom: the range is this many times the largest value observed.
    """

    observed: Tensor
    limit: Tensor
    direction_table: Tensor
    mixing: Tensor

    __jit_unused_properties__ = ["needs_ranges"]  # noqa: RUF012

    def __init__(self, layout: FeatureLayout, scalars: ScalarConfig, vectors: VectorConfig, headroom: float) -> None:
        super().__init__()
        self.channels_first = layout.channels_first
        merged: list[list[int]] = []
        for multiplicity, dimension in layout.pieces:
            # Scalars only: two vector irreps of one dimension may differ in parity, and so have no frame in common.
            same = merged and merged[-1][1] == dimension == 1 and (merged[-1][0] > 0) == (multiplicity > 0)
            if same and not layout.channels_first:
                merged[-1][0] += multiplicity
            else:
                merged.append([multiplicity, dimension])
        self.multiplicities = [m for m, _ in merged]
        self.dimensions = [d for _, d in merged]
        self.round_scalars = scalars.bits is not None
        self.round_vectors = vectors.magnitude_bits is not None
        self.scalar_top = float(largest_code(scalars.bits or 16))
        self.split = vectors.scheme == "mddq"
        self.local_frame = self.split and vectors.frame == "local"
        bits = vectors.magnitude_bits or 16
        # A magnitude has no sign, so its code has one bit more than a component's.
        self.magnitude_top = float(2**bits - 1) if self.split else float(largest_code(bits))
        self.levels = direction_levels(vectors.direction_bits)
        self.one_scalar_range = scalars.granularity == "per_tensor"
        self.one_vector_range = vectors.granularity == "per_tensor"
        self.own_scalar_range = scalars.granularity == "per_atom"
        self.own_vector_range = vectors.granularity == "per_atom"
        self.fine_scalars = (scalars.bits or 16) >= FINE_BITS
        self.fine_vectors = min(bits, vectors.direction_bits) >= FINE_BITS
        # Whether the gradient may pass unchanged: the Jacobian of the rounding differs from the identity by its
        # relative error, which from `FINE_BITS` on is far below that of the values themselves; and where ranges are the
        # atom's own, nothing lies outside. In training too, so that what is trained is what is deployed.
        passing_scalars = (self.own_scalar_range and self.fine_scalars) or not self.round_scalars
        fine_split = self.split and self.fine_vectors
        passing_vectors = (self.own_vector_range and fine_split) or not self.round_vectors
        self.passes_through = passing_scalars and passing_vectors
        self.headroom = headroom
        self.scalars_enabled = True
        self.vectors_enabled = True
        self.vector_range_factor = 1.0
        self.observing = False
        # Training on forces differentiates the gradient again, and there the plain path is exact where one node of the
        # graph (`_RoundFeatures`) is not.
        self.differentiable_twice = True
        self._pieces: tuple[Tensor, Any, list[_Piece]] | None = None
        self.decay = OBSERVER_DECAY
        self.note = ", ".join(
            text
            for text, wanted in (
                (f"l=0: {scalars.bits} bits", self.round_scalars and 1 in self.dimensions),
                (
                    f"l>0: {vectors.magnitude_bits} bits"
                    + (f" + 2x{vectors.direction_bits} {vectors.codebook}" if self.split else " a component"),
                    self.round_vectors and any(d > 1 for d in self.dimensions),
                ),
            )
            if wanted
        )
        channels = sum(abs(m) for m in self.multiplicities)
        self.register_buffer("observed", torch.zeros(channels), persistent=False)
        self.register_buffer("limit", torch.ones(channels), persistent=False)
        table = torch.zeros(0)
        if self.split and self.round_vectors and vectors.codebook != "octahedral":
            table = direction_table(vectors.direction_bits)
        self.register_buffer("direction_table", table, persistent=False)
        widest = max((d for d in self.dimensions), default=1)
        most = max((abs(m) for m in self.multiplicities), default=1)
        framed = self.local_frame and self.round_vectors and widest > 1
        mixing = mixtures(widest, most) if framed else torch.zeros(0, dtype=torch.float64)
        self.register_buffer("mixing", mixing, persistent=False)

    @property
    def needs_ranges(self) -> bool:
        """Whether any range has to be observed; those of one atom are its own."""
        scalars = self.round_scalars and not self.own_scalar_range and 1 in self.dimensions
        vectors = self.round_vectors and not self.own_vector_range and any(d > 1 for d in self.dimensions)
        return scalars or vectors

    @torch.jit.unused
    def describe(self) -> str:
        """How the features are rounded, in a few words."""
        return self.note

    @torch.jit.unused
    def start_observing(self) -> None:
        """Forget the ranges and take the largest sizes from now on."""
        self.observed = torch.zeros_like(self.observed)
        self.decay = 1.0
        self.observing = True

    @torch.jit.unused
    def ranges(self) -> Tensor:
        """The largest size observed of each channel, shape (channels,), on CPU."""
        return self.observed.detach().float().cpu().clone()

    @torch.jit.unused
    def load_ranges(self, observed: Tensor) -> None:
        """Set the observed sizes and derive the ranges from them.

        Raises:
            ValueError: if the number of channels differs and is no multiple of this layer's (a
                multiple is what remains when one head of several is cut out).
        """
        n = self.observed.numel()
        if observed.numel() != n:
            if observed.numel() == 0 or observed.numel() % n:
                raise ValueError(f"ranges for {observed.numel()} channels do not fit a layer of {n} channels.")
            observed = observed.reshape(-1, n).amax(0)
        self.observed = observed.detach().to(self.limit.device, self.limit.dtype).clone()
        self.update_limits()

    @torch.jit.unused
    def update_limits(self) -> None:
        """Ranges from what was observed.

        A channel that was silent in the calibration set may speak later: it gets 1/64 of the largest
        range of its piece rather than none.
        """
        limits = []
        scalars: list[Tensor] = []
        vectors: list[Tensor] = []
        start = 0
        for multiplicity, dimension in zip(self.multiplicities, self.dimensions, strict=True):
            piece = self.observed[start : start + abs(multiplicity)]
            start += abs(multiplicity)
            limits.append(torch.maximum(piece, piece.max() / 64.0))
            if multiplicity > 0:
                (scalars if dimension == 1 else vectors).append(piece.max())
        # One range a tensor: the largest of the pieces that are read, scalars and vectors together if both ask for it.
        if self.one_scalar_range and self.one_vector_range:
            scalars = vectors = scalars + vectors
        for i, (multiplicity, dimension) in enumerate(zip(self.multiplicities, self.dimensions, strict=True)):
            shared = scalars if dimension == 1 else vectors
            wanted = self.one_scalar_range if dimension == 1 else self.one_vector_range
            if wanted and multiplicity > 0:
                limits[i] = torch.stack(shared).max().expand(multiplicity)
        limit = torch.cat(limits) * self.headroom
        self.limit = torch.where(limit > 0, limit, torch.ones_like(limit))

    def _piece(self, x: Tensor, start: int, multiplicity: int, dimension: int) -> Tensor:
        if self.channels_first:
            return x[:, :, start : start + dimension]
        return x[:, start : start + multiplicity * dimension].reshape(-1, multiplicity, dimension)

    @torch.jit.unused
    def observe(self, x: Tensor) -> None:
        """Take note of the largest sizes in a batch: a maximum that forgets slowly."""
        if x.numel() == 0 or not self.needs_ranges:
            return
        x = x.detach()
        sizes = []
        start = 0
        for m, d in zip(self.multiplicities, self.dimensions, strict=True):
            m = abs(m)
            piece = self._piece(x, start, m, d)
            start += d if self.channels_first else m * d
            size = piece.norm(dim=-1) if self.split and d > 1 else piece.abs().amax(-1)
            sizes.append(size.amax(0))
        size = torch.cat(sizes).to(self.observed.dtype)
        self.observed = torch.maximum(size, self.observed * self.decay)
        self.update_limits()

    def forward(self, x: Tensor) -> Tensor:
        """Rounded features, shape and dtype of `x`."""
        if self.observing:
            self.observe(x)
        if not torch.jit.is_scripting():
            if self.passes_through:
                # Values here; the gradient as if nothing had been done. A trace of a step of training need not know yet
                # what will want a gradient.
                rounded = self._values(x.detach())
                wanted = x.requires_grad or self.differentiable_twice
                return x + (rounded - x.detach()) if wanted else rounded
            if not self.differentiable_twice and self._can_fuse(x):
                return self._fused(x)
        parts: list[Tensor] = []
        start = 0
        channel = 0
        for multiplicity, dimension in zip(self.multiplicities, self.dimensions):  # noqa: B905 (scripted)
            m = abs(multiplicity)
            piece = self._piece(x, start, m, dimension)
            limit = self.limit[channel : channel + m].to(x.dtype)
            start += dimension if self.channels_first else m * dimension
            channel += m
            if multiplicity > 0:
                if dimension == 1:
                    if self.round_scalars and self.scalars_enabled:
                        if self.own_scalar_range:
                            limit = own_limit(piece.detach().abs())
                        piece = round_linear(piece, limit.unsqueeze(-1), self.scalar_top, True)
                elif self.round_vectors and self.vectors_enabled:
                    if self.own_vector_range:
                        sizes = piece.detach()
                        sizes = torch.sqrt((sizes * sizes).sum(-1, keepdim=True)) if self.split else sizes.abs()
                        limit = own_limit(sizes)
                    limit = limit * self.vector_range_factor
                    if self.split:
                        axes: Tensor | None = None
                        if self.local_frame:
                            axes = local_frame(piece.detach(), self.mixing[:, :m].to(piece.dtype), dimension)
                        piece = round_vector(
                            piece,
                            limit,
                            self.magnitude_top,
                            self.levels,
                            self.direction_table.to(x.dtype),
                            dimension,
                            axes,
                        )
                    else:
                        piece = round_linear(piece, limit.unsqueeze(-1), self.magnitude_top, True)
            parts.append(piece if self.channels_first else piece.reshape(-1, m * dimension))
        out = torch.cat(parts, -1)
        if self.passes_through:
            out = x + (out - x).detach()
        return out

    @torch.jit.unused
    def _values(self, x: Tensor) -> Tensor:
        """Rounded features, without a gradient; for ranges of the atom's own."""
        parts = []
        start = 0
        for multiplicity, dimension in zip(self.multiplicities, self.dimensions, strict=True):
            m = abs(multiplicity)
            piece = self._piece(x, start, m, dimension)
            start += dimension if self.channels_first else m * dimension
            if multiplicity > 0 and dimension == 1 and self.round_scalars and self.scalars_enabled:
                step = own_limit(piece.abs()).unsqueeze(-1) / self.scalar_top
                piece = torch.round(piece / step) * step
            elif multiplicity > 0 and dimension > 1 and self.round_vectors and self.vectors_enabled:
                traced = not self._can_fuse(x)
                piece = self._vector_values(piece, dimension) if traced else self._few_operations(piece)
            parts.append(piece if self.channels_first else piece.reshape(-1, m * dimension))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @torch.jit.unused
    def _few_operations(self, piece: Tensor) -> Tensor:
        """`_vector_values` for eager evaluation of small molecules, whose time is the number of operations."""
        length = torch.linalg.vector_norm(piece, dim=-1, keepdim=True)
        step = own_limit(length).unsqueeze(-1) * (self.vector_range_factor / self.magnitude_top)
        return self.nearest_direction(piece, piece.shape[-1]) * torch.round(length / step).mul_(step)

    @torch.jit.unused
    def _vector_values(self, piece: Tensor, dimension: int) -> Tensor:
        # Components come first here: operations along a short last dimension cost several times more.
        v: Sequence[Tensor] = piece.unbind(-1)
        unit: Sequence[Tensor]
        length = torch.sqrt(_dot(v, v))
        step = own_limit(length.unsqueeze(-1)) * (self.vector_range_factor / self.magnitude_top)
        if self.local_frame:
            axes = local_frame(piece, self.mixing[:, : piece.shape[1]].to(piece.dtype), dimension)
            # One number an atom and axis, the same for all channels.
            rows = [[axes[:, k, j].unsqueeze(-1) for j in range(dimension)] for k in range(dimension)]
            v = [_dot(v, row) for row in rows]
        if dimension == 3 and self.direction_table.numel() == 0:
            unit = octahedral_components(v[0], v[1], v[2], self.levels)
        elif dimension == 3:
            unit = nearest_direction(self.direction_table.to(piece.dtype), torch.stack(list(v), -1)).unbind(-1)
        else:
            unit = cube_components(v, self.levels)
        if self.local_frame:
            unit = [_dot(unit, [row[j] for row in rows]) for j in range(dimension)]
        rounded = torch.round(length / step) * step
        return torch.stack([u * rounded for u in unit], -1)

    @torch.jit.unused
    def _can_fuse(self, x: Tensor) -> bool:
        # A tracer has to see plain operations, and must not leave its tensors in the cache of pieces.
        if torch.compiler.is_compiling():  # asked first: what is below cannot be compiled itself
            return False
        return not isinstance(x, torch.fx.Proxy) and get_proxy_mode() is None

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor:
        rounded: Tensor = _RoundFeatures.apply(x, self)[0]
        return rounded

    @torch.jit.unused
    def active_pieces(self, dtype: torch.dtype) -> list[_Piece]:
        """The pieces as they are rounded now; kept until a range or a switch changes."""
        key = (dtype, self.scalars_enabled, self.vectors_enabled, self.vector_range_factor)
        if self._pieces is not None and self._pieces[0] is self.limit and self._pieces[1] == key:
            return self._pieces[2]
        pieces = []
        start = 0
        channel = 0
        for multiplicity, dimension in zip(self.multiplicities, self.dimensions, strict=True):
            m = abs(multiplicity)
            size = dimension if self.channels_first else m * dimension
            limit = self.limit[channel : channel + m].to(dtype).unsqueeze(-1)
            top = 0.0
            factor = 1.0
            if multiplicity > 0 and dimension == 1 and self.round_scalars and self.scalars_enabled:
                top = self.scalar_top
            elif multiplicity > 0 and dimension > 1 and self.round_vectors and self.vectors_enabled:
                top = self.magnitude_top
                factor = self.vector_range_factor
                limit = limit * factor
            split = self.split and dimension > 1
            own = self.own_scalar_range if dimension == 1 else self.own_vector_range
            step = limit / max(top, 1.0)
            pieces.append(_Piece(start, size, m, dimension, limit, step, top, split, own, factor))
            start += size
            channel += m
        self._pieces = (self.limit, key, pieces)
        return pieces

    @torch.jit.unused
    def nearest_direction(self, vector: Tensor, dimension: int) -> Tensor:
        """The codebook's direction nearest to each vector, shape (batch, channels, dimension)."""
        axes = None
        if self.local_frame:
            axes = local_frame_at_once(vector, self.mixing[:, : vector.shape[1]].to(vector.dtype), dimension)
            vector = torch.matmul(vector, axes.transpose(1, 2))
        if dimension != 3:
            nearest = cube_quantize(vector, self.levels)
        elif self.direction_table.numel() > 0:
            nearest = nearest_direction(self.direction_table.to(vector.dtype), vector)
        else:
            nearest = octahedral_quantize(vector, self.levels)
        return nearest if axes is None else torch.matmul(nearest, axes)


class _RoundFeatures(torch.autograd.Function):
    """All pieces of a tensor in one node of the graph, with the gradient written out.

    A small molecule's step is bound by the number of operations, and this takes about half as many as the plain
    path. The values are the plain path's. The gradient is that of `round_linear` and `round_vector`; its own
    derivative treats their Jacobians as constant, which is right to the order of the rounding error.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]  # torch declares any arguments
        x: Tensor, quantizer: FeatureQuantizer
    ) -> tuple[Tensor, ...]:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        saved: list[Tensor] = []
        for piece in quantizer.active_pieces(x.dtype):
            target = out[..., piece.start : piece.start + piece.size]
            values = x[..., piece.start : piece.start + piece.size]
            if not quantizer.channels_first:
                values = values.reshape(-1, piece.multiplicity, piece.dimension)
                target = target.view(-1, piece.multiplicity, piece.dimension)
            if piece.top == 0.0:
                target.copy_(values)
            elif not piece.split:
                limit, step = piece.limit, piece.step
                if piece.own:
                    limit = own_limit(values.abs()).unsqueeze(-1) * piece.factor
                    step = limit / piece.top
                target.copy_((values / step).round_().clamp_(-piece.top, piece.top).mul_(step))
                saved.append((values.abs() <= limit).to(x.dtype))
            else:
                length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
                limit, step = piece.limit, piece.step
                if piece.own:
                    limit = own_limit(length).unsqueeze(-1) * piece.factor
                    step = limit / piece.top
                rounded_length = (length / step).round_().clamp_(max=piece.top).mul_(step)
                unit = values / length.clamp_min(torch.finfo(x.dtype).tiny)
                rounded_unit = quantizer.nearest_direction(values, piece.dimension)
                target.copy_(rounded_length * rounded_unit)
                # A length that rounds to zero has no direction left to project on: the gradient passes unchanged.
                gone = rounded_length == 0
                stretch = (rounded_length / length).masked_fill_(gone, 1.0)
                radial = torch.where(gone, unit, rounded_unit) * (length <= limit) - stretch * unit
                saved += [radial, unit, stretch]
        return (out, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.channels_first = inputs[1].channels_first
        ctx.pieces = inputs[1].active_pieces(inputs[0].dtype)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        saved = list(ctx.saved_tensors)
        parts = []
        for piece in ctx.pieces:
            values = gradients[0][..., piece.start : piece.start + piece.size]
            shape = values.shape
            if not ctx.channels_first:
                values = values.reshape(-1, piece.multiplicity, piece.dimension)
            if piece.top > 0.0 and not piece.split:
                values = values * saved.pop(0)
            elif piece.top > 0.0:
                # J = u_q u^T + s (1 - u u^T), so J^T g = u ((u_q - s u) . g) + s g.
                radial, unit, stretch = saved.pop(0), saved.pop(0), saved.pop(0)
                values = unit * (radial * values).sum(-1, keepdim=True) + stretch * values
            parts.append(values.reshape(shape))
        return torch.cat(parts, -1), None
