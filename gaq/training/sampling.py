"""Samples of structures, and their batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gaq.adapter import Adapter
from gaq.untyped import Structure

__all__ = ["by_atoms", "choose", "first_atoms"]


def choose(structures: Sequence[Structure], count: int, seed: int) -> list[Structure]:
    """At most `count` of the structures, drawn without replacement."""
    order = np.random.default_rng(seed).permutation(len(structures))[:count]
    return [structures[int(i)] for i in order]


def first_atoms(adapter: Adapter, structures: Sequence[Structure], atoms: int) -> list[Structure]:
    """The first of the structures, as many as have at most so many atoms together, but at least one."""
    spans = by_atoms(adapter.sizes(structures), atoms)
    return list(structures[spans[0]]) if spans else []


def by_atoms(sizes: Sequence[int], atoms: int) -> list[slice]:
    """Divide structures into batches of bounded size, in their order.

    The memory of a batch follows its atoms, whatever the number of its structures.

    Args:
        sizes: atoms of each structure.
        atoms: most atoms of a batch; a structure that is larger is a batch of its own.

    Returns:
        The span of each batch among the structures.
    """
    spans, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > atoms:
            spans.append(slice(start, i))
            start, total = i, 0
        total += size
    if start < len(sizes):
        spans.append(slice(start, len(sizes)))
    return spans
