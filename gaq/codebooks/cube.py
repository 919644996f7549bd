"""Cube code for directions in any dimension: round on the surface of a cube, then normalise.

A vector is scaled until its largest component is ``n``, and every component is rounded to an integer. The point lies on
the surface of a cube and its largest component is exactly ``n``, so encoding a decoded direction gives the same point.
Sign flips and permutations of the components commute with the code exactly, without ties, because each component is
rounded by itself.

The code serves d = 2l + 1 >= 5 components. The pyramid code (Fischer 1986), the octahedral code in more dimensions, has
steps of ``1 / n`` of the 1-norm at the same d integers per direction: up to sqrt(d) times longer than the steps here,
for four times the operations. For d = 3 the octahedral code needs two integers where this one would need three. The
angle to the decoded direction is at most ``atan(sqrt(d - 1) / (2 n))`` (our derivation: the rounding moves d - 1
components by at most 1/2, at a distance of at least n from the origin).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def cube_quantize(vector: Tensor, levels: int) -> Tensor:
    """Return the code's unit vector nearest to each vector, measured on the cube.

    Args:
        vector: shape (..., d), any length, float32 or float64.
        levels: n, from `gaq.codebooks.direction_levels`.

    Returns:
        Unit vectors, shape (..., d); zero vectors stay exactly zero. Piecewise constant, so the gradient is zero.
    """
    return _unit(_point(vector, levels))


def _point(vector: Tensor, levels: int) -> Tensor:
    """Integer point of each vector, shape (..., d)."""
    largest = vector.abs().amax(-1, keepdim=True)
    # Divide before multiplying: n times a large component would overflow.
    return torch.round(vector / largest.masked_fill(largest == 0, 1.0) * float(levels))


def _unit(point: Tensor) -> Tensor:
    """Point scaled to length 1; zero stays zero."""
    # Only the zero vector's code is shorter than 1.
    return point / torch.sqrt((point * point).sum(-1, keepdim=True)).clamp_min(1.0)


def cube_components(components: Sequence[Tensor], levels: int) -> tuple[Tensor, ...]:
    """`cube_quantize` on separate components, each of any shape, for fused code."""
    largest = components[0].abs()
    for component in components[1:]:
        largest = torch.maximum(largest, component.abs())
    scale = float(levels) / largest.clamp_min(1e-30)
    points = [torch.round(component * scale) for component in components]
    square = points[0] * points[0]
    for point in points[1:]:
        square = square + point * point
    inverse = 1.0 / torch.sqrt(square.clamp_min(1.0))
    return tuple(point * inverse for point in points)
