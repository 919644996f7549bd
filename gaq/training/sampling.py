"""Samples of structures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gaq.untyped import Structure

__all__ = ["choose"]


def choose(structures: Sequence[Structure], count: int, seed: int) -> list[Structure]:
    """At most `count` of the structures, drawn without replacement."""
    order = np.random.default_rng(seed).permutation(len(structures))[:count]
    return [structures[int(i)] for i in order]
