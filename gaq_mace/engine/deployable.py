"""A MACE model as `gaq deploy` writes it: its engine's program for parts of space, and its radial functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

from gaq.deployed.form import Deployable, DeployedLayer, check_tables
from gaq.untyped import AnyModule
from gaq_mace.engine.radial_tables import Pair, RadialTables
from gaq_mace.engine.reading import Unsupported
from gaq_mace.engine.recorder import Recorder
from gaq_mace.engine.starts import embedded
from gaq_mace.engine.step import Engine

__all__ = ["deployable", "settled"]

DEFAULTS = {"charge": 0, "spin": 1}
"""Properties of structures that a deployed file can have fixed, and their values where nobody gives any."""


def settled(model: AnyModule, given: Mapping[str, int | None]) -> dict[str, int]:
    """Charge and spin that a deployed file is to have fixed, as far as the model reads them.

    Args:
        model: a `ScaleShiftMACE`.
        given: by the user, by the names of `DEFAULTS`; None where nothing is given.

    Raises:
        Unsupported: for other properties that a model embeds.
        ValueError: for a property that the model does not read, and for a value that it does not know.
    """
    specs = getattr(model, "embedding_specs", None) or {}
    for name, spec in specs.items():
        if name.removeprefix("total_") not in DEFAULTS or spec["per"] != "graph":
            raise Unsupported(f"it embeds {name}, and a deployed file can have charge and spin fixed only")
    values = {}
    for name, value in given.items():
        spec = specs.get(f"total_{name}")
        if spec is None:
            if value is not None:
                raise ValueError(f"--{name} {value}: the model does not read a {name}; leave it out.")
            continue
        values[name] = DEFAULTS[name] if value is None else value
        lowest = -int(spec.get("offset", 0))
        if spec["type"] == "categorical" and not 0 <= values[name] - lowest < spec["num_classes"]:
            highest = lowest + spec["num_classes"] - 1
            raise ValueError(f"--{name} {values[name]}: the model knows {lowest} to {highest}.")
    return values


def _fixed(model: AnyModule, embedding: Tensor, values: Mapping[str, int]) -> tuple[Tensor, Tensor | None]:
    """Features of the species before the first layer for a charge and spin, and the energies read of them alone.

    Returns:
        (species, channels), and (heads, species) in eV, float64, or None where a model reads no energies of them.
    """
    if not values:
        return embedding, None
    features = {f"total_{name}": torch.tensor([float(value)], dtype=embedding.dtype) for name, value in values.items()}
    with torch.no_grad():
        features_of = embedding + embedded(model, features, torch.zeros(1, dtype=torch.int64), 1)
        if not hasattr(model, "embedding_readout"):
            return features_of, None
        energies = model.embedding_readout(features_of, torch.zeros(len(features_of), dtype=torch.int64))
        return features_of, energies.double().T


def deployable(
    model: AnyModule,
    names: Sequence[str],
    elements: Sequence[str],
    heads: list[str],
    values: Mapping[str, int] | None = None,
) -> Deployable:
    """Make what a deployed file holds.

    Args:
        model: a float or converted `ScaleShiftMACE` on the CPU, in float32 or float64.
        names: chemical symbols of its species.
        elements: those that the file is to know.
        heads: names of its heads.
        values: charge and spin that the file has fixed; see `settled`. None for the defaults.

    Raises:
        Unsupported: for parts of which there are no operations.
        ValueError: if the radial tables of so many elements would not fit into a file.
    """
    engine = Engine(model)
    values = settled(model, {**dict.fromkeys(DEFAULTS), **(values or {})})
    embedding, energies = _fixed(model, engine.embedding, values)
    layers: AnyModule = engine.layers  # of `Layer`s; a ModuleList knows modules only
    species = torch.tensor([names.index(element) for element in elements], dtype=torch.int64)
    recorded = Recorder(model, layers, embedding, True, species).recorded
    kept = species.tolist()
    pairs, numbers = _pairs(layers[0].radial, kept)
    check_tables(sum(layer.radial.bytes_before_last() for layer in layers), len(pairs))
    made = []
    for layer in layers:
        tables, density = layer.radial.before_last(pairs)
        made.append(DeployedLayer(layer.problem, tables, layer.radial.last, density))
    isolated = torch.atleast_2d(model.atomic_energies_fn.atomic_energies.detach().double())
    if energies is not None:
        isolated = isolated + energies
    return Deployable(recorded, made, numbers, list(elements), heads, engine.r_max, isolated[:, species])


def _pairs(radial: RadialTables, kept: list[int]) -> tuple[list[Pair], Tensor]:
    """Pairs of species that have tables, and the number of the table of sender and receiver, (species, species)."""
    numbers = torch.zeros(len(kept), len(kept), dtype=torch.int64)
    if not radial.by_species:
        return [(0, 0)], numbers
    if radial.ordered:
        return [(a, b) for a in kept for b in kept], torch.arange(len(kept) ** 2).view(len(kept), len(kept))
    pairs = [(a, b) for i, a in enumerate(kept) for b in kept[i:]]
    first, second = torch.triu_indices(len(kept), len(kept))
    numbers[first, second] = numbers[second, first] = torch.arange(len(pairs))
    return pairs, numbers
