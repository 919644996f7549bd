"""Octahedral code for l = 1 directions.

A direction in three dimensions is coded by an integer point k with ``|k_1| + |k_2| + |k_3| = n``: the lattice points on
the surface of an octahedron. The decoded direction is k / ||k||. Nothing is stored but n; encoding takes a fixed number
of operations whatever n; the code is exactly symmetric under sign flips of the components, and under their permutations
up to ties. It is the pyramid code at d = 3; `gaq.codebooks.cube` says why more dimensions take another code.

Sources: T. R. Fischer, "A pyramid vector quantizer", IEEE Trans. Inf. Theory 32, 568 (1986), for the code;
J. H. Conway and N. J. A. Sloane, "Fast quantizing and decoding algorithms for lattice quantizers and
codes", IEEE Trans. Inf. Theory 28, 227 (1982), section on A_n, for the nearest point: round every
component, then repair the sum at the component that rounding moved most. The point is the one that filling
up the largest remainders of the floor finds, but the lattice points lie half a step away from every
rounding decision, so rounding noise cannot move them.

Largest angle between the decoded direction and the vector (our derivation): one face of the octahedron of unit 1-norm
lies at the distance 1 / sqrt(3) from the origin and carries the lattice A_2 / n, whose covering radius is
sqrt(2 / 3) / n (Conway and Sloane, "Sphere Packings, Lattices and Groups", chapter 4). A
segment of that length in the face is seen from the origin under at most ``2 atan(1 / (sqrt(2) n))`` radians, about
1.41 / n.

Dtypes: float32 and float64; half precisions cannot hold the integers of more than 8 bits, so convert first.
Range: the sum of the absolute components must not overflow. Vectors with components that are not finite
give NaN.

Every function is made of plain out-of-place tensor operations with no branch on tensor values, so that
TorchScript, ``torch.fx`` and ``torch.compile`` all take them.
"""

import torch
from torch import Tensor


def direction_levels(bits: int) -> int:
    """Return the number of lattice steps n from the origin to a vertex, for signed integers of ``bits`` bits.

    Args:
        bits: bits per component, 2 to 16.

    Returns:
        n = 2**(bits - 1) - 1, so that every component of a code lies in [-n, n].

    Raises:
        ValueError: ``bits`` is not between 2 and 16.
    """
    if bits < 2 or bits > 16:
        raise ValueError(f"direction bits must be between 2 and 16, got {bits}; 16 is the finest code")
    return (1 << (bits - 1)) - 1


def octahedral_quantize(vector: Tensor, levels: int) -> Tensor:
    """Return the octahedral code's unit vector nearest to each vector, measured on the octahedron.

    The vector is scaled to the 1-norm ``levels``, moved to the nearest integer point of that 1-norm, and
    scaled to unit 2-norm. The result is piecewise constant, so its gradient is zero.

    Args:
        vector: shape (..., 3), any length, float32 or float64.
        levels: n, from `direction_levels`.

    Returns:
        Unit vectors, shape (..., 3), in the dtype of ``vector``; zero vectors stay exactly zero.
    """
    # Components come first: operations along a short last dimension cost several times more on a CPU.
    components = vector.movedim(-1, 0).contiguous()
    point = _octahedral_point(components, levels)
    return (point / _length(point) * components.sign()).movedim(0, -1).contiguous()


def octahedral_components(x: Tensor, y: Tensor, z: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """`octahedral_quantize` on separate components, each of any shape, for fused code."""
    ax, ay, az = x.abs(), y.abs(), z.abs()
    scale = float(levels) / (ax + ay + az).clamp_min(1e-30)
    sx, sy, sz = ax * scale, ay * scale, az * scale
    kx, ky, kz = torch.round(sx), torch.round(sy), torch.round(sz)
    mx, my, mz = (sx - kx).abs(), (sy - ky).abs(), (sz - kz).abs()
    missing = float(levels) - (kx + ky + kz)
    first = (mx >= my) & (mx >= mz)
    third = (mz > mx) & (mz > my)
    kx = torch.where(first, kx + missing, kx)
    kz = torch.where(third, kz + missing, kz)
    ky = float(levels) - kx - kz
    inverse = 1.0 / torch.sqrt(kx * kx + ky * ky + kz * kz)
    # A zero vector lands on an axis; the factor sign(0) = 0 makes it zero again.
    return kx * inverse * x.sign(), ky * inverse * y.sign(), kz * inverse * z.sign()


def _octahedral_point(components: Tensor, levels: int) -> Tensor:
    """Nearest point to ``|components|`` with coordinates >= 0 and 1-norm ``levels``; shape (3, ...)."""
    magnitude = components.abs()
    x, y, z = magnitude.unbind(0)
    total = x + y + z
    scaled = magnitude / total.masked_fill(total == 0, 1.0) * levels
    rounded = scaled.round()
    kx, ky, kz = rounded.unbind(0)
    moved_x, moved_y, moved_z = (scaled - rounded).abs().unbind(0)
    # -1, 0 or 1. If it is not 0, the component that moved most moved the wrong way: otherwise the other two would
    # have to make up more than 1 with at most 1/2 each. Ties go to x, then y, then z, so exactly one is repaired.
    missing = levels - (kx + ky + kz)
    kx = kx + missing * ((moved_x >= moved_y) & (moved_x >= moved_z))
    kz = kz + missing * ((moved_z > moved_x) & (moved_z > moved_y))
    return torch.stack((kx, levels - kx - kz, kz))


def _length(point: Tensor) -> Tensor:
    # Summed in order of index, which a reduction does not guarantee.
    x, y, z = (point * point).unbind(0)
    return (x + y + z).sqrt()
