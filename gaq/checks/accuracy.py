"""How much accuracy rounding may cost, and the force difference to the float model that costs so much."""

from __future__ import annotations

import math

__all__ = ["ERROR_GROWTH", "LOWEST_FLOAT_ERROR", "difference_of_growth"]

ERROR_GROWTH = 1.02
"""Largest ratio of the force error of a rounded model to that of its float model."""

LOWEST_FLOAT_ERROR = 0.013
"""RMS force error over RMS force of the most accurate float model in ``benchmarks/results/force_difference_*.json``."""


def difference_of_growth(growth: float) -> float:
    """Force difference to the float model, as a fraction of its force error, that makes the error grow by a factor.

    The difference is independent of the float model's own error, so the squares of both add.

    Args:
        growth: ratio of the force errors, at least 1.
    """
    return math.sqrt(growth**2 - 1.0)
