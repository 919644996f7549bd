"""`FeatureQuantizer` rounds a tensor of irreps features: scalars by value, vectors by magnitude and direction."""

from collections.abc import Sequence
from dataclasses import dataclass

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
from gaq.quantizers.feature_gradient import Piece, RoundFeatures
from gaq.quantizers.frames import local_frame, local_frame_at_once, mixtures
from gaq.quantizers.magnitudes import atom_range, round_linear
from gaq.quantizers.weights import largest_code

__all__ = ["FeatureLayout", "FeatureQuantizer"]

OBSERVER_DECAY = 0.99
FINE_BITS = 14
"""From this many bits on, rounding changes a feature by less than 1e-4 of the largest feature of its atom."""


@dataclass(frozen=True)
class FeatureLayout:
    """How irreps lie in the feature axis of a tensor.

    Attributes:
        pieces: (multiplicity, dimension) of each irrep, in order; adjacent equal dimensions may be
            merged. A negative multiplicity marks a piece that no weight reads: it passes through unrounded.
        channels_first: False for ``(batch, irreps.dim)`` with the multiplicity outermost within a piece
            (e3nn's ``mul_ir``); True for ``(batch, channels, sum of dimensions)``.
    """

    pieces: tuple[tuple[int, int], ...]
    channels_first: bool = False


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Dot product of two vectors given as lists of components."""
    total = first[0] * second[0]
    for a, b in zip(first[1:], second[1:], strict=True):
        total = total + a * b
    return total


def _merge_scalars(layout: FeatureLayout) -> tuple[list[int], list[int]]:
    """Multiplicities and dimensions of the pieces, with adjacent scalar pieces merged into one.

    Only scalars are merged: two vector irreps of one dimension may differ in parity and then share no frame.
    """
    multiplicities: list[int] = []
    dimensions: list[int] = []
    for multiplicity, dimension in layout.pieces:
        joins_previous = (
            len(dimensions) > 0
            and dimensions[-1] == dimension == 1
            and (multiplicities[-1] > 0) == (multiplicity > 0)
            and not layout.channels_first
        )
        if joins_previous:
            multiplicities[-1] += multiplicity
        else:
            multiplicities.append(multiplicity)
            dimensions.append(dimension)
    return multiplicities, dimensions


def _summary(dimensions: Sequence[int], scalars: ScalarConfig, vectors: VectorConfig) -> str:
    """How features of these dimensions are rounded, in a few words; empty if they are not."""
    parts = []
    if scalars.bits is not None and 1 in dimensions:
        parts.append(_scalar_note(scalars.bits))
    if vectors.magnitude_bits is not None and any(dimension > 1 for dimension in dimensions):
        split = vectors.scheme == "mddq"
        direction = f" + 2x{vectors.direction_bits} {vectors.codebook}" if split else " a component"
        parts.append(f"l>0: {vectors.magnitude_bits} bits{direction}")
    return ", ".join(parts)


def _scalar_note(bits: int) -> str:
    return f"l=0: {bits} bits"


class FeatureQuantizer(torch.nn.Module):
    """Rounds features, on the range of each atom or on static ranges that it observes while told to.

    A static range belongs to a channel or to the tensor, never to a batch: a range shared by a batch would couple
    atoms that do not interact. Ranges are buffers but not persistent, so a state dict keeps the framework's keys;
    `ranges` and `load_ranges` carry them.

    Args:
        layout: layout of the features.
        scalars: how l = 0 is rounded.
        vectors: how l > 0 is rounded.
        headroom: ratio of a static range to the largest value observed.

    Attributes:
        passes_through: whether the gradient passes unchanged. The Jacobian of the rounding differs from the identity
            by its relative error, which from `FINE_BITS` on is far below that of the values; and with per-atom ranges
            nothing lies outside the range. True in training too, so that the model trained is the model deployed.
        differentiable_twice: whether gradients are differentiated again, as training on forces does. Then the plain
            operations run; `RoundFeatures` is exact to first order only.
    """

    observed: Tensor
    limit: Tensor
    direction_table: Tensor
    mixing: Tensor

    __jit_unused_properties__ = ["needs_ranges"]  # noqa: RUF012

    def __init__(self, layout: FeatureLayout, scalars: ScalarConfig, vectors: VectorConfig, headroom: float) -> None:
        super().__init__()
        self.channels_first = layout.channels_first
        self.multiplicities, self.dimensions = _merge_scalars(layout)
        self.round_scalars = scalars.bits is not None
        self.round_vectors = vectors.magnitude_bits is not None
        self.scalar_bits = scalars.bits or 16
        self.scalar_top = float(largest_code(self.scalar_bits))
        self.split = vectors.scheme == "mddq"
        self.local_frame = self.split and vectors.frame == "local"
        magnitude_bits = vectors.magnitude_bits or 16
        # A magnitude has no sign, so its code has one bit more than a component's.
        self.magnitude_top = float(2**magnitude_bits - 1) if self.split else float(largest_code(magnitude_bits))
        self.levels = direction_levels(vectors.direction_bits)
        self.scalar_range_per_tensor = scalars.granularity == "per_tensor"
        self.vector_range_per_tensor = vectors.granularity == "per_tensor"
        self.scalar_range_per_atom = scalars.granularity == "per_atom"
        self.vector_range_per_atom = vectors.granularity == "per_atom"
        fine_scalars = self.scalar_bits >= FINE_BITS
        fine_vectors = self.split and min(magnitude_bits, vectors.direction_bits) >= FINE_BITS
        scalars_pass = (self.scalar_range_per_atom and fine_scalars) or not self.round_scalars
        vectors_pass = (self.vector_range_per_atom and fine_vectors) or not self.round_vectors
        self.passes_through = scalars_pass and vectors_pass
        self.differentiable_twice = True
        self.headroom = headroom
        self.scalars_enabled = True
        self.vectors_enabled = True
        self.vector_range_factor = 1.0
        self.observing = False
        self.decay = OBSERVER_DECAY
        self.note = _summary(self.dimensions, scalars, vectors)
        # The limits and the switches that the pieces were made for, and the pieces; see `active_pieces`.
        self._pieces: tuple[Tensor, tuple[torch.dtype, bool, bool, float], list[Piece]] | None = None
        self._register_buffers(vectors)

    def _register_buffers(self, vectors: VectorConfig) -> None:
        """Register the ranges, the direction table and the channel mixtures of local frames; none is persistent."""
        channels = sum(abs(m) for m in self.multiplicities)
        self.register_buffer("observed", torch.zeros(channels), persistent=False)
        self.register_buffer("limit", torch.ones(channels), persistent=False)
        table = torch.zeros(0)
        if self.split and self.round_vectors and vectors.codebook != "octahedral":
            table = direction_table(vectors.direction_bits)
        self.register_buffer("direction_table", table, persistent=False)
        largest_dimension = max(self.dimensions, default=1)
        most_channels = max((abs(m) for m in self.multiplicities), default=1)
        framed = self.local_frame and self.round_vectors and largest_dimension > 1
        mixing = mixtures(largest_dimension, most_channels) if framed else torch.zeros(0, dtype=torch.float64)
        self.register_buffer("mixing", mixing, persistent=False)

    @property
    def needs_ranges(self) -> bool:
        """Whether any range has to be observed; per-atom ranges need no observation."""
        scalars = self.round_scalars and not self.scalar_range_per_atom and 1 in self.dimensions
        vectors = self.round_vectors and not self.vector_range_per_atom and any(d > 1 for d in self.dimensions)
        return scalars or vectors

    @torch.jit.unused
    def describe(self) -> str:
        """Say how the features are rounded, in a few words."""
        return self.note

    @torch.jit.unused
    def set_scalar_bits(self, bits: int) -> None:
        """Change the width of scalars, both of them from `FINE_BITS` on, so that gradients pass as before."""
        self.note = self.note.replace(_scalar_note(self.scalar_bits), _scalar_note(bits))
        self.scalar_bits = bits
        self.scalar_top = float(largest_code(bits))
        self._pieces = None

    @torch.jit.unused
    def start_observing(self) -> None:
        """Forget the observed ranges and record the largest sizes from now on."""
        self.observed = torch.zeros_like(self.observed)
        self.decay = 1.0
        self.observing = True

    @torch.jit.unused
    def ranges(self) -> Tensor:
        """Return the largest size observed in each channel, shape (channels,), float32 on the CPU."""
        return self.observed.detach().float().cpu().clone()

    @torch.jit.unused
    def load_ranges(self, observed: Tensor) -> None:
        """Set the observed sizes and derive the ranges from them.

        Raises:
            ValueError: if the number of channels differs and is no multiple of this layer's (a
                multiple is what remains when one head of several is cut out).
        """
        channels = self.observed.numel()
        if observed.numel() != channels:
            if observed.numel() == 0 or observed.numel() % channels:
                raise ValueError(f"ranges for {observed.numel()} channels do not fit a layer of {channels} channels.")
            observed = observed.reshape(-1, channels).amax(0)
        self.observed = observed.detach().to(self.limit.device, self.limit.dtype).clone()
        self.update_limits()

    @torch.jit.unused
    def update_limits(self) -> None:
        """Set the ranges from the observed sizes.

        A channel that was zero in the calibration set may become nonzero later: it gets at least 1/64 of the largest
        range of its piece.
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
        # A range per tensor is the largest of the pieces that are read; scalars and vectors share it if both have one.
        if self.scalar_range_per_tensor and self.vector_range_per_tensor:
            scalars = vectors = scalars + vectors
        for i, (multiplicity, dimension) in enumerate(zip(self.multiplicities, self.dimensions, strict=True)):
            shared = scalars if dimension == 1 else vectors
            per_tensor = self.scalar_range_per_tensor if dimension == 1 else self.vector_range_per_tensor
            if per_tensor and multiplicity > 0:
                limits[i] = torch.stack(shared).max().expand(multiplicity)
        limit = torch.cat(limits) * self.headroom
        self.limit = torch.where(limit > 0, limit, torch.ones_like(limit))

    def _piece(self, x: Tensor, start: int, multiplicity: int, dimension: int) -> Tensor:
        """One irrep of the features, shape (batch, channels, dimension)."""
        if self.channels_first:
            return x[:, :, start : start + dimension]
        return x[:, start : start + multiplicity * dimension].reshape(-1, multiplicity, dimension)

    @torch.jit.unused
    def observe(self, x: Tensor) -> None:
        """Record the largest sizes in a batch: a running maximum that decays by `decay` per batch."""
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
        """Round features; the result has the shape and dtype of `x`."""
        if self.observing:
            self.observe(x)
        if not torch.jit.is_scripting():
            if self.passes_through:
                # The straight-through estimator: rounded values, and the gradient of the identity. The trace of a
                # training step may not know yet which tensors need a gradient: `requires_grad` alone does not decide.
                rounded = self.values(x.detach())
                needs_gradient = x.requires_grad or self.differentiable_twice
                return x + (rounded - x.detach()) if needs_gradient else rounded
            if not self.differentiable_twice and self._is_eager(x):
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
                        if self.scalar_range_per_atom:
                            limit = atom_range(piece.detach().abs())
                        piece = round_linear(piece, limit.unsqueeze(-1), self.scalar_top, True)
                elif self.round_vectors and self.vectors_enabled:
                    if self.vector_range_per_atom:
                        sizes = piece.detach()
                        sizes = torch.sqrt((sizes * sizes).sum(-1, keepdim=True)) if self.split else sizes.abs()
                        limit = atom_range(sizes)
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
    def values(self, x: Tensor) -> Tensor:
        """Round features on per-atom ranges, without a gradient."""
        parts = []
        start = 0
        for multiplicity, dimension in zip(self.multiplicities, self.dimensions, strict=True):
            m = abs(multiplicity)
            piece = self._piece(x, start, m, dimension)
            start += dimension if self.channels_first else m * dimension
            if multiplicity > 0 and dimension == 1 and self.round_scalars and self.scalars_enabled:
                step = atom_range(piece.abs()).unsqueeze(-1) / self.scalar_top
                piece = torch.round(piece / step) * step
            elif multiplicity > 0 and dimension > 1 and self.round_vectors and self.vectors_enabled:
                eager = self._is_eager(x)
                piece = self._vector_values_eager(piece) if eager else self._vector_values_traced(piece, dimension)
            parts.append(piece if self.channels_first else piece.reshape(-1, m * dimension))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @torch.jit.unused
    def _vector_values_eager(self, piece: Tensor) -> Tensor:
        """Round vectors in as few operations as possible: their number sets the time of a small molecule's step."""
        length = torch.linalg.vector_norm(piece, dim=-1, keepdim=True)
        step = atom_range(length).unsqueeze(-1) * (self.vector_range_factor / self.magnitude_top)
        return self.nearest_direction(piece, piece.shape[-1]) * torch.round(length / step).mul_(step)

    @torch.jit.unused
    def _vector_values_traced(self, piece: Tensor, dimension: int) -> Tensor:
        """Round vectors component by component, for compilers: reductions along a short last axis cost several times
        more."""
        v: Sequence[Tensor] = piece.unbind(-1)
        unit: Sequence[Tensor]
        length = torch.sqrt(_dot(v, v))
        step = atom_range(length.unsqueeze(-1)) * (self.vector_range_factor / self.magnitude_top)
        if self.local_frame:
            axes = local_frame(piece, self.mixing[:, : piece.shape[1]].to(piece.dtype), dimension)
            # An entry of an axis has shape (batch, 1): all channels of an atom share the axes.
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
    def _is_eager(self, x: Tensor) -> bool:
        """Whether `x` is evaluated eagerly, neither traced nor compiled."""
        # A tracer has to see plain operations, and must not leave its tensors in the cache of pieces.
        if torch.compiler.is_compiling():  # comes first: torch.compile cannot trace the tests below
            return False
        return not isinstance(x, torch.fx.Proxy) and get_proxy_mode() is None

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor:
        rounded: Tensor = RoundFeatures.apply(x, self)[0]
        return rounded

    @torch.jit.unused
    def active_pieces(self, dtype: torch.dtype) -> list[Piece]:
        """Return the pieces as they are rounded now; cached until a range or a switch changes."""
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
            per_atom = self.scalar_range_per_atom if dimension == 1 else self.vector_range_per_atom
            step = limit / max(top, 1.0)
            pieces.append(Piece(start, size, m, dimension, limit, step, top, split, per_atom, factor))
            start += size
            channel += m
        self._pieces = (self.limit, key, pieces)
        return pieces

    @torch.jit.unused
    def nearest_direction(self, vector: Tensor, dimension: int) -> Tensor:
        """Return the codebook's direction nearest to each vector, shape (batch, channels, dimension)."""
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
