"""Octahedral code for l = 1 directions, and its generalisation to any dimension.

A direction in d = 2l + 1 dimensions is coded by an integer point k with ``|k_1| + ... + |k_d| = n``: the
lattice points on the surface of a cross-polytope, an octahedron for d = 3. The decoded direction is k /
||k||. Nothing is stored but n; encoding and decoding take a fixed number of operations whatever n; the code
is exactly symmetric under sign flips of the components, and under their permutations up to ties.

Sources: T. R. Fischer, "A pyramid vector quantizer", IEEE Trans. Inf. Theory 32, 568 (1986), for the code;
J. H. Conway and N. J. A. Sloane, "Fast quantizing and decoding algorithms for lattice quantizers and
codes", IEEE Trans. Inf. Theory 28, 227 (1982), section on A_n, for the nearest point: round every
component, then repair the sum at the components that rounding moved most. The point is the one that filling
up the largest remainders of the floor finds, but the lattice points lie half a step away from every
rounding decision, so rounding noise cannot move them.

How far the decoded direction can lie from the vector (our derivation): one face of the cross-polytope of
unit 1-norm lies at the distance 1 / sqrt(d) from the origin and carries the lattice A_(d-1) / n, whose
covering radius is R / n with R = sqrt(a (d - a) / d), a = floor(d / 2) (Conway and Sloane, "Sphere
Packings, Lattices and Groups", chapter 4). A segment of length R / n in the face is seen from the origin
under at most ``2 atan(sqrt(d) R / (2 n))`` radians: for d = 3 that is ``2 atan(1 / (sqrt(2) n))``, about
1.41 / n.

Dtypes: float32 and float64; half precisions cannot hold the integers of more than 8 bits, so convert first.
Range: the sum of the absolute components must not overflow. Vectors with components that are not finite
give NaN.

Every function is made of plain out-of-place tensor operations with no branch on tensor values, so that
TorchScript, ``torch.fx`` and ``torch.compile`` all take them.
"""

import torch
from torch import Tensor


def pyramid_levels(bits: int) -> int:
    """Number of lattice steps n from the origin to a vertex, for signed integers of ``bits`` bits.

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
    """Nearest unit vector of the octahedral code for each three-dimensional vector.

    The same as `pyramid_quantize` on three components. Call it directly in code that ``torch.fx`` traces:
    there the number of components cannot be read off the tensor, and `pyramid_quantize` takes a slower way
    to the same points.

    Args:
        vector: shape (..., 3), any length, float32 or float64.
        levels: n, from `pyramid_levels`.

    Returns:
        Unit vectors, shape (..., 3), in the dtype of ``vector``; zero vectors stay exactly zero.
    """
    components = vector.movedim(-1, 0).contiguous()
    point = _octahedral_point(components, levels)
    return (point / _length(point) * components.sign()).movedim(0, -1).contiguous()


def octahedral_components(x: Tensor, y: Tensor, z: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """`octahedral_quantize` on separate components, each of any shape, as fused code wants them."""
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
    # A zero vector lands on an axis, and goes back to zero by its sign.
    return kx * inverse * x.sign(), ky * inverse * y.sign(), kz * inverse * z.sign()


def pyramid_quantize(vector: Tensor, levels: int) -> Tensor:
    """Nearest unit vector of the pyramid code, "nearest" being measured on the cross-polytope.

    The vector is scaled to the 1-norm ``levels``, moved to the nearest integer point of that 1-norm, and
    scaled to unit 2-norm. The result is piecewise constant, so its gradient is zero.

    Args:
        vector: shape (..., d), any length, float32 or float64.
        levels: n, from `pyramid_levels`.

    Returns:
        Unit vectors, shape (..., d), in the dtype of ``vector``; zero vectors stay exactly zero.
    """
    components = vector.movedim(-1, 0).contiguous()
    point = _nearest_point(components, levels)
    return (point / _length(point) * components.sign()).movedim(0, -1).contiguous()


def pyramid_encode(vector: Tensor, levels: int) -> Tensor:
    """Integer point of the pyramid code for each vector.

    Args:
        vector: shape (..., d), any length, float32 or float64.
        levels: n, from `pyramid_levels`.

    Returns:
        int32 codes, shape (..., d), with sum of absolute values ``levels``; all zero for a zero vector.
    """
    components = vector.movedim(-1, 0).contiguous()
    point = _nearest_point(components, levels) * components.sign()
    return point.to(torch.int32).movedim(0, -1).contiguous()


def pyramid_decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit vector of each integer point; bit for bit what `pyramid_quantize` returns for the encoded vector.

    Args:
        codes: integers, shape (..., d), from `pyramid_encode`.
        dtype: float32 or float64.

    Returns:
        Unit vectors, shape (..., d); an all-zero code gives the zero vector.
    """
    point = codes.movedim(-1, 0).to(dtype).contiguous()
    return (point / _length(point)).movedim(0, -1).contiguous()


def octahedral_pack(codes: Tensor, levels: int) -> Tensor:
    """Fold the octahedron into a square, so that two integers are stored instead of three.

    The upper half is seen from above; the four faces of the lower half are folded outwards over the edges of
    the equator, which fills the square |u|, |v| <= n. Source: Z. H. Cigolle et al., "A survey of efficient
    representations for independent unit vectors", J. Comput. Graph. Tech. 3(2), 1 (2014), here on the integer
    points, where it is exact. The square has (2n + 1)^2 points for 4n^2 + 2 codes: some on its rim are spare,
    and (-n, -n) stands for the zero vector.

    Args:
        codes: signed integers, shape (..., 3), from `pyramid_encode`.
        levels: the n that the codes were made with.

    Returns:
        Integers in [-levels, levels], shape (..., 2), in the dtype of ``codes``.
    """
    x, y, z = codes.unbind(-1)
    lower = z < 0
    across, along = levels - y.abs(), levels - x.abs()
    u = torch.where(lower, torch.where(x < 0, -across, across), x)
    v = torch.where(lower, torch.where(y < 0, -along, along), y)
    zero = (x == 0) & (y == 0) & (z == 0)
    return torch.stack((u.masked_fill(zero, -levels), v.masked_fill(zero, -levels)), dim=-1)


def octahedral_unpack(packed: Tensor, levels: int) -> Tensor:
    """Exact inverse of `octahedral_pack`.

    Args:
        packed: signed integers, shape (..., 2), from `octahedral_pack`.
        levels: the n that the codes were made with.

    Returns:
        Integer points, shape (..., 3), in the dtype of ``packed``.
    """
    u, v = packed.unbind(-1)
    across, along = levels - v.abs(), levels - u.abs()
    z = across - u.abs()
    lower = z < 0
    x = torch.where(lower, torch.where(u < 0, -across, across), u)
    y = torch.where(lower, torch.where(v < 0, -along, along), v)
    zero = (u == -levels) & (v == -levels)
    return torch.stack((x, y, z), dim=-1).masked_fill(zero.unsqueeze(-1), 0)


# Below, components come first: operations along a short last dimension cost several times more on a CPU.


def _nearest_point(components: Tensor, levels: int) -> Tensor:
    """Nearest point to ``|components|`` with coordinates >= 0 and 1-norm ``levels``; shape (d, ...)."""
    if not _is_symbolic(components) and components.size(0) == 3:
        return _octahedral_point(components, levels)
    return _pyramid_point(components, levels)


def _octahedral_point(components: Tensor, levels: int) -> Tensor:
    """`_pyramid_point` in three dimensions, where one repair at most is needed; shape (3, ...)."""
    magnitude = components.abs()
    x, y, z = magnitude.unbind(0)
    total = x + y + z
    scaled = magnitude / total.masked_fill(total == 0, 1.0) * levels
    rounded = scaled.round()
    kx, ky, kz = rounded.unbind(0)
    moved_x, moved_y, moved_z = (scaled - rounded).abs().unbind(0)
    # -1, 0 or 1. When not 0, the component that moved most moved the wrong way: otherwise the other two would
    # have to make up more than 1 with 1/2 at most each. Ties go to x, then y, then z, so one is repaired.
    missing = levels - (kx + ky + kz)
    kx = kx + missing * ((moved_x >= moved_y) & (moved_x >= moved_z))
    kz = kz + missing * ((moved_z > moved_x) & (moved_z > moved_y))
    return torch.stack((kx, levels - kx - kz, kz))


def _pyramid_point(components: Tensor, levels: int) -> Tensor:
    magnitude = components.abs()
    total = _sum(magnitude)
    scaled = magnitude / total.masked_fill(total == 0, 1.0) * levels
    rounded = scaled.round()
    missing = levels - _sum(rounded)
    step = missing.sign()
    return rounded + step * (_rank((scaled - rounded) * step) < missing.abs())


def _rank(urgency: Tensor) -> Tensor:
    """Place of every component in descending order, equal ones in order of index; shape (d, ...)."""
    if _is_symbolic(urgency):
        return urgency.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    # Comparing all pairs is several times faster than sorting for the few components there are.
    parts = urgency.unbind(0)
    places = [torch.zeros_like(part, dtype=torch.uint8) for part in parts]
    for i in range(len(parts)):
        for j in range(i + 1, len(parts)):
            first = parts[i] >= parts[j]
            places[j] = places[j] + first
            places[i] = places[i] + ~first
    return torch.stack(places)


def _length(point: Tensor) -> Tensor:
    # Only the zero vector's code is shorter than 1: the clamp turns its 0 / 0 into 0 and changes no other.
    return _sum(point * point).clamp_min(1.0).sqrt()


def _sum(components: Tensor) -> Tensor:
    """Sum over the components in order of index, which a reduction would not promise; shape (...)."""
    if _is_symbolic(components):
        return components.sum(0)
    parts = components.unbind(0)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _is_symbolic(tensor: Tensor) -> bool:
    """Whether ``torch.fx`` is tracing, when the number of components is unknown."""
    if torch.jit.is_scripting():
        return False
    return isinstance(tensor, torch.fx.Proxy)
