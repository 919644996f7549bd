"""Which of a model's types each chemical element is.

NequIP's models know types by name. Where the names are not chemical symbols, the transform
`nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper` of the training data says which is which. Checkpoints and
packages hold the configuration of that data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import yaml
from ase.data import atomic_numbers
from nequip.nn import graph_model

from gaq.model.elements import SpeciesMap, parsed_species
from gaq.untyped import Document
from gaq_nequip.forms import CHECKPOINT, PACKAGE, form_of
from gaq_nequip.names import SPECIES

__all__ = ["check_given", "species_in_file", "species_of", "type_names"]

MAPPER = "ChemicalSpeciesToAtomTypeMapper"


def type_names(model: torch.nn.Module) -> list[str]:
    """The type names of a model or a compiled file, in the model's order."""
    metadata: dict[str, str] = model.metadata  # type: ignore[assignment]  # NequIP's property
    return metadata[graph_model.TYPE_NAMES_KEY].split(" ")


def species_of(model: torch.nn.Module, strict: bool = True) -> dict[str, str]:
    """The type name of each chemical symbol that a model knows.

    What the model's file says counts first. A type that it does not mention is known by its name if that is a symbol.

    Args:
        model: a model or a compiled file.
        strict: whether to raise for types of which nothing says which elements they are; else they are left out.

    Raises:
        ValueError: if the file says nothing, and the name of a type is not a chemical symbol.
    """
    names = type_names(model)
    stored: dict[str, str] = model.__dict__.get(SPECIES) or {}
    unnamed = [name for name in names if name not in atomic_numbers]
    if strict and unnamed and not stored:
        raise ValueError(
            f"the model's types {', '.join(unnamed)} are not chemical symbols, and its file does not say which "
            "elements they are: give --species (`species` in Python) with a symbol for each type, such as "
            f"H:{unnamed[0]}."
        )
    by_name = {n: n for n in names if n in atomic_numbers and n not in stored.values() and n not in stored}
    return {**stored, **by_name}


def check_given(species: SpeciesMap, names: list[str]) -> dict[str, str]:
    """The map from symbols to type names that a user gave.

    Args:
        species: type names by chemical symbol; elements that are not needed may be left out.
        names: type names of the model.

    Raises:
        ValueError: for a text that is no map, a symbol that is no chemical element's, and a type that the model does
            not have.
    """
    given = parsed_species(species)
    for symbol, name in given.items():
        if symbol not in atomic_numbers:
            raise ValueError(f"species: {symbol!r} is not a chemical symbol; write SYMBOL:TYPE, such as H:{names[0]}.")
        if name not in names:
            raise ValueError(f"species: the model has no type {name!r} for {symbol}; it has {', '.join(names)}.")
    return given


def species_in_file(path: Path) -> dict[str, str]:
    """The type names of chemical symbols that a checkpoint or package states; empty if it states none."""
    if form_of(path) == CHECKPOINT:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        stored: dict[str, str] = checkpoint.get(SPECIES, {})
        return stored or _of_data(checkpoint["hyper_parameters"]["info_dict"].get("data"))
    if form_of(path) == PACKAGE:
        importer = torch.package.PackageImporter(str(path))  # type: ignore[attr-defined]  # not exported in its stub
        run: Document = yaml.safe_load(importer.load_text("model", "config.yaml")) or {}
        return _of_data(run.get("data"))
    return {}


def in_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The type names of chemical symbols that a compiled file states; empty if it states none."""
    stored: dict[str, str] = json.loads(metadata.get(SPECIES, "{}"))
    return stored


def _of_data(data: object) -> dict[str, str]:
    """The maps of all mappers in a configuration of data."""
    species: dict[str, str] = {}
    for mapper in _mappers(data):
        for symbol, name in (mapper.get("chemical_species_to_atom_type_map") or {}).items():
            if species.setdefault(str(symbol), str(name)) != str(name):
                return {}  # data sets that disagree: the user has to say
    return species


def _mappers(config: object) -> Iterator[Mapping[str, Mapping[str, str]]]:
    if isinstance(config, Mapping):
        if str(config.get("_target_", "")).endswith(MAPPER):
            yield config
        for value in config.values():
            yield from _mappers(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _mappers(value)
