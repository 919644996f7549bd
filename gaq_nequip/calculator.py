"""NequIP's ASE calculators of files and models; none of them changes torch's default dtype."""

from __future__ import annotations

from pathlib import Path

from nequip.integrations.ase import NequIPCalculator
from nequip.integrations.utils import basic_transforms
from nequip.nn import graph_model
from nequip.utils.global_dtype import _GLOBAL_DTYPE

from gaq.process import default_dtype
from gaq.untyped import AnyModule
from gaq_nequip.host import loading
from gaq_nequip.species import species_of, type_names

__all__ = ["Calculator", "compiled_calculator", "model_calculator", "saved_calculator"]


class Calculator(NequIPCalculator):
    """`NequIPCalculator` that computes in NequIP's default dtype.

    NequIP's calculator converts structures in torch's default dtype, but its models expect NequIP's, float64.
    """

    def calculate(self, *args: object, **kwargs: object) -> None:
        with default_dtype(_GLOBAL_DTYPE):
            super().calculate(*args, **kwargs)


def compiled_calculator(path: str | Path, device: str, species: dict[str, str]) -> Calculator:
    """The calculator of a compiled file, with the type name of each chemical symbol."""
    with loading():
        return Calculator.from_compiled_model(str(path), device=device, chemical_species_to_atom_type_map=species)


def saved_calculator(path: str | Path, device: str, species: dict[str, str]) -> Calculator:
    """The calculator of a checkpoint or a package, with the type name of each chemical symbol."""
    with loading():
        return Calculator._from_saved_model(str(path), device=device, chemical_species_to_atom_type_map=species)


def model_calculator(model: AnyModule, device: str) -> Calculator:
    """The calculator of a model in memory, whose types are known by chemical symbols (`species_of`)."""
    metadata = model.metadata
    cutoff = float(metadata[graph_model.R_MAX_KEY])
    with loading():
        transforms = basic_transforms(metadata, cutoff, type_names(model), species_of(model))
        return Calculator(model=model.eval(), device=device, transforms=transforms)
