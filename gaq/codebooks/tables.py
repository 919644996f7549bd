"""Table of directions in three dimensions, coded by the index of the nearest entry.

Its points are spread more evenly than those of the octahedral code, but every lookup compares the vector with all
entries, so tables serve few bits only.
"""

import math

import numpy as np
import torch
from torch import Tensor

from gaq.caches import cached

MAX_TABLE_BITS = 6
"""Most bits per direction component for a table: 2 x 6 bits are 4002 directions, compared one by one."""


def direction_table(bits: int) -> Tensor:
    """Return the finest geodesic table with an index of 2 x ``bits`` bits.

    Args:
        bits: direction bits, 2 to `MAX_TABLE_BITS`.

    Returns:
        Unit vectors, float64, shape (at most ``2**(2 * bits)``, 3).

    Raises:
        ValueError: ``bits`` is out of range.
    """
    if bits < 2 or bits > MAX_TABLE_BITS:
        raise ValueError(
            f"codebook 'geodesic' takes 2 to {MAX_TABLE_BITS} direction bits, got {bits}: its table is "
            f"searched entry by entry; use codebook 'octahedral', which takes up to 16"
        )
    return geodesic_table(geodesic_frequency(2 * bits))


def geodesic_frequency(bits: int) -> int:
    """Return the frequency of the finest geodesic table whose indices fit.

    Args:
        bits: bits of the index (twice the direction bits per component), at least 4.

    Returns:
        The largest frequency f with ``10 f**2 + 2 <= 2**bits``.

    Raises:
        ValueError: not even the 12 vertices of the icosahedron fit.
    """
    if bits < 4:
        raise ValueError(f"a geodesic table needs an index of at least 4 bits (12 directions), got {bits}")
    return math.isqrt((2**bits - 2) // 10)


def geodesic_table(frequency: int) -> Tensor:
    """Return the vertices of the geodesic icosahedron, symmetric under its 120 rotations and inversions.

    Class I: every edge of the icosahedron is cut into ``frequency`` equal parts, every face into a triangular
    grid, and the grid is projected to the sphere. Source: M. J. Wenninger, "Spherical Models" (1979).

    Args:
        frequency: number of parts f, at least 1.

    Returns:
        Unit vectors, float64, shape (10 f**2 + 2, 3).

    Raises:
        ValueError: ``frequency`` is less than 1.
    """
    if frequency < 1:
        raise ValueError(f"the frequency of a geodesic table must be at least 1, got {frequency}")
    return torch.from_numpy(_geodesic_points(frequency).copy())


@cached(most=MAX_TABLE_BITS)
def _geodesic_points(frequency: int) -> np.ndarray:
    """Vertices of `geodesic_table` as an array that must not be changed: it is cached."""
    corners, faces = _icosahedron()
    # Integer weights on the corners identify a grid point, so points that faces share coincide exactly.
    weights: dict[tuple[tuple[int, int], ...], None] = {}
    for first, second, third in faces:
        for i in range(frequency + 1):
            for j in range(frequency + 1 - i):
                triple = ((first, i), (second, j), (third, frequency - i - j))
                weights[tuple(sorted((corner, weight) for corner, weight in triple if weight))] = None
    points = np.array([sum(weight * corners[corner] for corner, weight in key) for key in weights])
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def nearest_direction(table: Tensor, vector: Tensor, scores_at_once: int = 1 << 22) -> Tensor:
    """Return the table entry at the smallest angle to each vector; of equally near ones, the first.

    Vectors are compared in chunks, which bounds memory. The result is piecewise constant and carries no
    gradient.

    Args:
        table: unit vectors, shape (N, 3), in the dtype and on the device of ``vector``.
        vector: shape (..., 3), any length.
        scores_at_once: dot products held in memory at a time (16 MiB in float32).

    Returns:
        Rows of the table, shape (..., 3); zero vectors stay exactly zero, and components that are not finite
        give NaN.

    Raises:
        ValueError: the shapes, dtypes or devices do not fit together.
    """
    # TorchScript compiles this function, hence no globals here.
    if table.dim() != 2 or table.size(-1) != 3 or vector.dim() == 0 or vector.size(-1) != 3:
        raise ValueError(
            f"expected a table of shape (N, 3) and vectors of shape (..., 3), got {table.shape} and {vector.shape}"
        )
    if table.dtype != vector.dtype or table.device != vector.device:
        raise ValueError(
            f"the table is {table.dtype} on {table.device} but the vectors are {vector.dtype} on "
            f"{vector.device}; pass table.to(vector)"
        )
    rows = vector.detach().reshape(-1, 3)
    largest = rows.abs().amax(dim=1, keepdim=True)
    # Only the direction matters: scaled to the largest component, no product can overflow or underflow.
    scaled = rows / largest.masked_fill(largest == 0, 1.0)
    chunks = scaled.split(max(1, scores_at_once // table.size(0)))
    nearest = torch.cat([table[(chunk @ table.t()).argmax(dim=1)] for chunk in chunks])
    usable = (largest > 0) & (largest < math.inf)
    return torch.where(usable, nearest, scaled).reshape(vector.shape)


def _icosahedron() -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Corners, shape (12, 3), and the 20 faces as triples of corners."""
    golden = (1.0 + math.sqrt(5.0)) / 2.0
    plane = [(0.0, short, long) for short in (1.0, -1.0) for long in (golden, -golden)]
    corners = np.array([np.roll(corner, shift) for shift in range(3) for corner in plane])
    distance = np.linalg.norm(corners[:, None] - corners[None], axis=2)
    # Edges have length 2; the next distance between corners is 3.2.
    joined = (distance > 1.0) & (distance < 2.5)
    faces = [
        (i, j, k)
        for i in range(12)
        for j in range(i + 1, 12)
        for k in range(j + 1, 12)
        if joined[i, j] and joined[j, k] and joined[i, k]
    ]
    return corners, faces
