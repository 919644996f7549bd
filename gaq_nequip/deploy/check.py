"""Checking that a deployed file computes the same as the model it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from ase.data import atomic_numbers

from gaq.deployed.check import Check, compare
from gaq.untyped import AnyModule
from gaq_nequip.calculator import compiled_calculator, model_calculator, saved_calculator
from gaq_nequip.forms import COMPILED
from gaq_nequip.species import species_of, type_names

if TYPE_CHECKING:
    from ase import Atoms
    from torch import Tensor

__all__ = ["check", "is_checked", "structures_of"]


def check(model: AnyModule, example: dict[str, Tensor], deployed: Path, target: str, device: str) -> Check | None:
    """Compare a deployed file with its model; None for a target that ASE cannot run (`is_checked`).

    The compiled graphs of such targets differ from that of ``ase`` in their outputs only.
    """
    if not is_checked(deployed, target):
        return None
    species = species_of(model)
    make = compiled_calculator if deployed.name.endswith(COMPILED) else saved_calculator
    structures = structures_of(example, species, type_names(model))
    return compare(model_calculator(model, device), make(deployed, device, species), structures)


def is_checked(deployed: Path, target: str) -> bool:
    """Whether ASE can run a deployed file, so that `check` compares it with its model."""
    return target == "ase" or not deployed.name.endswith(COMPILED)


def structures_of(
    example: dict[str, Tensor],
    species: Mapping[str, str],
    names: Sequence[str],
    count: int = 4,
    amplitude: float = 0.05,
) -> list[Atoms]:
    """The example structure and copies of it with atoms moved at random by `amplitude` Å.

    Args:
        example: a graph with types of atoms.
        species: type names by chemical symbol.
        names: type names of the model, in its order.
        count: number of structures.
        amplitude: standard deviation of a displacement, Å.

    Raises:
        ValueError: if no chemical symbol stands for the type of an atom.
    """
    from nequip.data import AtomicDataDict, to_ase

    types = [names[int(index)] for index in example[AtomicDataDict.ATOM_TYPE_KEY].reshape(-1)]
    symbols = {name: symbol for symbol, name in species.items()}
    if unnamed := sorted(set(types) - set(symbols)):
        raise ValueError(
            f"the example structure holds the types {', '.join(unnamed)}, and no element stands for them: "
            "add them to --species."
        )
    # One frame, without labels.
    fields = (AtomicDataDict.POSITIONS_KEY, AtomicDataDict.CELL_KEY, AtomicDataDict.PBC_KEY)
    numbers = torch.tensor([atomic_numbers[symbols[name]] for name in types])
    original = to_ase({**{k: example[k] for k in fields}, AtomicDataDict.ATOMIC_NUMBERS_KEY: numbers})[0]
    structures = [original]
    for seed in range(count - 1):
        distorted = original.copy()
        distorted.rattle(amplitude, seed=seed)
        structures.append(distorted)
    return structures
