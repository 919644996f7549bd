"""Samples of structures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["choose"]


def choose(structures: Sequence[Any], count: int, seed: int) -> list[Any]:
    """At most `count` of the structures, drawn without replacement."""
    order = np.random.default_rng(seed).permutation(len(structures))[:count]
    return [structures[int(i)] for i in order]
