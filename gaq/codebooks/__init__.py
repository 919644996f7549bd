"""Codebooks of directions: finite sets of unit vectors in d = 2l + 1 dimensions.

l = 1 uses the octahedral code or a geodesic table, l >= 2 the cube code.
"""

from gaq.codebooks.cube import cube_components, cube_quantize
from gaq.codebooks.pyramid import direction_levels, octahedral_components, octahedral_quantize
from gaq.codebooks.tables import (
    MAX_TABLE_BITS,
    direction_table,
    geodesic_frequency,
    geodesic_table,
    nearest_direction,
)

__all__ = [
    "MAX_TABLE_BITS",
    "cube_components",
    "cube_quantize",
    "direction_levels",
    "direction_table",
    "geodesic_frequency",
    "geodesic_table",
    "nearest_direction",
    "octahedral_components",
    "octahedral_quantize",
]
