"""A MACE model as `gaq deploy` writes it: its engine's program for parts of space, and its radial functions."""

from __future__ import annotations

from collections.abc import Sequence

import mace  # noqa: F401  (before e3nn)
import torch

from gaq.deployed.form import Deployable, DeployedLayer, check_tables
from gaq.untyped import AnyModule
from gaq_mace.engine.radial_tables import Pair
from gaq_mace.engine.reading import Unsupported
from gaq_mace.engine.recorder import Recorder
from gaq_mace.engine.step import Engine

__all__ = ["deployable"]


def deployable(model: AnyModule, names: Sequence[str], elements: Sequence[str], heads: list[str]) -> Deployable:
    """Make what a deployed file holds.

    Args:
        model: a float or converted `ScaleShiftMACE` on the CPU, in float32 or float64.
        names: chemical symbols of its species.
        elements: those that the file is to know.
        heads: names of its heads.

    Raises:
        Unsupported: for parts of which there are no operations.
        ValueError: if the radial tables of so many elements would not fit into a file.
    """
    engine = Engine(model)
    if engine.embeds:
        raise Unsupported("it embeds charge, spin or other properties of structures")
    layers: AnyModule = engine.layers  # of `Layer`s; a ModuleList knows modules only
    species = torch.tensor([names.index(element) for element in elements], dtype=torch.int64)
    recorded = Recorder(model, layers, engine.embedding, True, species).recorded
    kept = species.tolist()
    pairs: list[Pair] = [(0, 0)]
    numbers = torch.zeros(len(kept), len(kept), dtype=torch.int64)
    if layers[0].radial.by_species:
        pairs = [(a, b) for i, a in enumerate(kept) for b in kept[i:]]
        first, second = torch.triu_indices(len(kept), len(kept))
        numbers[first, second] = numbers[second, first] = torch.arange(len(pairs))
    check_tables(sum(layer.radial.bytes_before_last() for layer in layers), len(pairs))
    made = []
    for layer in layers:
        tables, density = layer.radial.before_last(pairs)
        made.append(DeployedLayer(layer.problem, tables, layer.radial.last, density))
    isolated = model.atomic_energies_fn.atomic_energies.detach().double()
    return Deployable(
        recorded, made, numbers, list(elements), heads, engine.r_max, torch.atleast_2d(isolated)[:, species]
    )
