"""Features and quantizers of features that several tests use."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gaq.config.parse import ScalarConfig, VectorConfig
from gaq.quantizers.features import FeatureLayout, FeatureQuantizer
from gaq.untyped import Document

MUL_IR = FeatureLayout(((4, 1), (3, 3), (2, 5), (2, 7), (2, 1)))
CHANNELS_FIRST = FeatureLayout(((4, 1), (4, 3), (4, 5), (4, 7)), channels_first=True)
LAYOUTS = pytest.mark.parametrize("layout", [MUL_IR, CHANNELS_FIRST], ids=["mul_ir", "channels_first"])
# The plain operations of training, and the fused ones that are differentiated once.
# Ranges and axes of their own have tests of their own, below.
STATIC: Document = {"granularity": "per_channel"}
FIXED: Document = {"granularity": "per_channel", "frame": "fixed"}
PATHS = pytest.mark.parametrize("plain", [True, False], ids=["plain", "fused"])
VECTORS = [
    *(
        {"magnitude_bits": bits, "direction_bits": directions}
        for bits, directions in ((4, 4), (8, 8), (8, 12), (12, 6), (16, 16))
    ),
    *({"magnitude_bits": 8, "direction_bits": bits, "codebook": "geodesic"} for bits in (4, 6)),
    *({"scheme": "components", "magnitude_bits": bits} for bits in (4, 8, 12, 16)),
]
SCHEMES = pytest.mark.parametrize("vectors", VECTORS, ids=lambda v: "-".join(str(value) for value in v.values()))
# The largest angles of the geodesic tables on 200,000 directions, and a little for the places between those.
TABLE_ANGLES = {4: 0.150, 6: 0.0375}


def width(layout: FeatureLayout) -> tuple[int, ...]:
    """Shape of one row of features."""
    if layout.channels_first:
        return abs(layout.pieces[0][0]), sum(d for _, d in layout.pieces)
    return (sum(abs(m) * d for m, d in layout.pieces),)


def random_features(
    layout: FeatureLayout, rows: int = 200, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *width(layout), generator=generator, dtype=torch.float64).to(dtype)


def split(layout: FeatureLayout, x: Tensor) -> Iterator[Tensor]:
    """Each piece of a tensor of features, shape (rows, multiplicity, dimension); views where possible."""
    start = 0
    for multiplicity, dimension in layout.pieces:
        if layout.channels_first:
            yield x[:, :, start : start + dimension]
            start += dimension
        else:
            size = abs(multiplicity) * dimension
            yield x[:, start : start + size].unflatten(1, (abs(multiplicity), dimension))
            start += size


def join(layout: FeatureLayout, pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces if layout.channels_first else [piece.flatten(1) for piece in pieces], -1)


def make(
    layout: FeatureLayout,
    vectors: Document | None = None,
    scalars: Document | None = None,
    limit: float | Tensor = 3.0,
    plain: bool = True,
) -> FeatureQuantizer:
    """A quantizer with the same limit for all channels, or the limits given."""
    quantizer = FeatureQuantizer(
        layout,
        ScalarConfig(**{**STATIC, **(scalars or {})}),
        VectorConfig(**{**FIXED, **(vectors or {})}),
        headroom=1.0,
    )
    quantizer.load_ranges(torch.as_tensor(limit).expand(quantizer.observed.shape))
    quantizer.differentiable_twice = plain
    return quantizer


def limits(layout: FeatureLayout, quantizer: FeatureQuantizer) -> Iterator[Tensor]:
    """The limit of each channel of each piece, shape (multiplicity, 1), float64."""
    start = 0
    for multiplicity, _ in layout.pieces:
        yield quantizer.limit[start : start + abs(multiplicity)].double().unsqueeze(-1)
        start += abs(multiplicity)


def angle(first: Tensor, second: Tensor) -> Tensor:
    """Radians between vectors, accurate for small angles too; shape (..., 1)."""
    first, second = first.double(), second.double()
    first = first / first.norm(dim=-1, keepdim=True)
    second = second / second.norm(dim=-1, keepdim=True)
    return 2 * torch.asin(((first - second).norm(dim=-1, keepdim=True) / 2).clamp(max=1.0))


def angle_bound(config: VectorConfig, dimension: int) -> float:
    """Worst angle of the codebook, as derived in `gaq.codebooks`."""
    levels = 2 ** (config.direction_bits - 1) - 1
    if dimension > 3:
        return math.atan(math.sqrt(dimension - 1) / (2 * levels))
    if config.codebook == "octahedral":
        return 2 * math.atan(1 / (math.sqrt(2) * levels))
    return TABLE_ANGLES[config.direction_bits]


def length_bound(config: VectorConfig, limit: Tensor) -> Tensor:
    """Largest error of a magnitude inside the range, but for float32."""
    assert config.magnitude_bits is not None
    return 0.5 * limit / (2**config.magnitude_bits - 1)
