"""Codebooks of directions: finite sets of unit vectors in d = 2l + 1 dimensions.

`quantize_direction` is the one entry point the quantizers need; the modules hold the codes themselves.
"""

import torch
from torch import Tensor

from gaq.caches import Cache
from gaq.codebooks.cube import cube_components, cube_decode, cube_encode, cube_quantize
from gaq.codebooks.pyramid import (
    octahedral_components,
    octahedral_pack,
    octahedral_quantize,
    octahedral_unpack,
    pyramid_decode,
    pyramid_encode,
    pyramid_levels,
    pyramid_quantize,
)
from gaq.codebooks.tables import (
    fibonacci_table,
    geodesic_frequency,
    geodesic_table,
    nearest_direction,
)

__all__ = [
    "CODEBOOKS",
    "MAX_TABLE_BITS",
    "cube_components",
    "cube_decode",
    "cube_encode",
    "cube_quantize",
    "direction_table",
    "fibonacci_table",
    "geodesic_frequency",
    "geodesic_table",
    "nearest_direction",
    "octahedral_components",
    "octahedral_pack",
    "octahedral_quantize",
    "octahedral_unpack",
    "pyramid_decode",
    "pyramid_encode",
    "pyramid_levels",
    "pyramid_quantize",
    "quantize_direction",
]

CODEBOOKS = ("octahedral", "geodesic", "fibonacci")

MAX_TABLE_BITS = 6
"""Most bits per direction component for a table: 2 x 6 bits are 4096 directions, compared one by one."""

_tables: Cache[tuple[str, int, torch.dtype, torch.device], Tensor] = Cache(most=32)


def quantize_direction(vector: Tensor, codebook: str, bits: int) -> Tensor:
    """Nearest unit vector of a codebook.

    Tables exist for three components (l = 1) only; vectors of more components always take the pyramid code,
    the generalisation of the octahedral one. TorchScript and ``torch.fx`` take `pyramid_quantize` or
    `octahedral_quantize` instead.

    Args:
        vector: shape (..., 2l + 1) with l >= 1, any length. Half precisions are computed in float32.
        codebook: one of `CODEBOOKS`.
        bits: direction bits, 2 to 16. A three-dimensional direction takes 2 x ``bits`` bits in all, whichever
            the codebook; one of d > 3 components takes d x ``bits``.

    Returns:
        Unit vectors in the shape and dtype of ``vector``; zero vectors stay exactly zero.

    Raises:
        ValueError: unknown codebook, bits out of range, too many bits for a table, or a number of components
            that is not 3, 5, 7, ...
    """
    if codebook not in CODEBOOKS:
        raise ValueError(f"unknown codebook {codebook!r}; allowed: {', '.join(CODEBOOKS)}")
    dimension = vector.shape[-1] if vector.dim() else 0
    if dimension < 3 or dimension % 2 == 0:
        raise ValueError(
            f"a direction has 2l + 1 = 3, 5, 7, ... components in its last dimension, got shape "
            f"{tuple(vector.shape)}; scalars (l = 0) have no direction"
        )
    levels = pyramid_levels(bits)
    working = vector.float() if vector.dtype in (torch.float16, torch.bfloat16) else vector
    if dimension > 3:
        return cube_quantize(working, levels).to(vector.dtype)
    if codebook == "octahedral":
        return octahedral_quantize(working, levels).to(vector.dtype)
    table = direction_table(codebook, bits, working.dtype, working.device)
    return nearest_direction(table, working).to(vector.dtype)


def direction_table(codebook: str, bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Table of a codebook in three dimensions, built once for each set of arguments.

    Args:
        codebook: "geodesic" or "fibonacci".
        bits: direction bits, 2 to `MAX_TABLE_BITS`; the table has at most ``2**(2 * bits)`` entries.
        dtype: of the result.
        device: of the result.

    Returns:
        Unit vectors, shape (N, 3); shared between callers, not to be written to.

    Raises:
        ValueError: the codebook has no table, or ``bits`` is out of range.
    """
    if codebook not in ("geodesic", "fibonacci"):
        raise ValueError(f"codebook {codebook!r} has no table; allowed: geodesic, fibonacci")
    if bits < 2 or bits > MAX_TABLE_BITS:
        raise ValueError(
            f"codebook {codebook!r} takes 2 to {MAX_TABLE_BITS} direction bits, got {bits}: its table is "
            f"searched entry by entry; use codebook 'octahedral', which takes up to 16"
        )
    return _cached_table(codebook, bits, dtype, device)


# The table is a constant of the program: a compiler calls this once and keeps the result.
@torch.compiler.assume_constant_result
def _cached_table(codebook: str, bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    key = (codebook, bits, dtype, device)
    known = _tables.peek(key)
    if known is not None:
        return known
    if codebook == "geodesic":
        table = geodesic_table(geodesic_frequency(2 * bits))
    else:
        table = fibonacci_table(2 ** (2 * bits))
    table = table.to(dtype=dtype, device=device)
    # Tracers work on stand-ins without data, which must not outlive the trace.
    if type(table) is torch.Tensor:
        _tables.put(key, table)
    return table
