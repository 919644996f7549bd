"""The structure on which NequIP traces a model when it packages or compiles it.

NequIP takes one from the training data, at the path that the training file gave. Where a model was calibrated on
structures, one of them serves, and the training data need not be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gaq.model.state import ModelFileError
from gaq_nequip.evaluate import make_batches
from gaq_nequip.forms import PACKAGE, form_of, named
from gaq_nequip.names import EXAMPLE

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["edges_of", "example_data", "example_of", "from_structures", "with_cell"]

FEWEST_ATOMS = 4
"""Fewest atoms of a structure to compile with: NequIP traces the model again on a copy that lacks two atoms."""


def from_structures(model: torch.nn.Module, structures: Sequence[Atoms]) -> dict[str, Tensor]:
    """The graph of the first structure that has enough atoms, or else of the largest, in a box if it has no cell.

    Raises:
        ValueError: if there are no structures, or it has an element that the model does not know.
    """
    from ase import Atoms

    if not structures:
        raise ValueError("no structures were given.")
    chosen = next((s for s in structures if len(s) >= FEWEST_ATOMS), max(structures, key=len))
    bare = Atoms(chosen.numbers, chosen.positions, cell=chosen.cell, pbc=chosen.pbc)
    (graph,) = make_batches(model, [bare], len(bare))
    return with_cell({name: value.cpu() for name, value in graph.items()})


def example_of(model: torch.nn.Module, source: Path) -> dict[str, Tensor]:
    """The graph that calibration kept with a model, or else that of the model's file; see `example_data`."""
    kept: dict[str, Tensor] | None = model.__dict__.get(EXAMPLE)
    return example_data(source) if kept is None else kept


def example_data(source: Path) -> dict[str, Tensor]:
    """The graph that NequIP compiles with, from a package, a checkpoint that has one, or its training data.

    Raises:
        ModelFileError: if the training data that a checkpoint names cannot be read.
    """
    from hydra.errors import InstantiationException
    from nequip.model.saved_models.checkpoint import data_dict_from_checkpoint
    from nequip.model.saved_models.package import data_dict_from_package

    if form_of(source) == PACKAGE:
        with named(source) as link:
            return data_dict_from_package(str(link))
    checkpoint = torch.load(source, map_location="cpu", weights_only=False, mmap=True)
    if EXAMPLE in checkpoint:
        return {name: value.clone() for name, value in checkpoint[EXAMPLE].items()}
    try:
        return data_dict_from_checkpoint(str(source))
    except (OSError, InstantiationException) as error:
        cause = error.__cause__ or error
        raise ModelFileError(
            f"{source}: the training data it names cannot be read ({cause}). NequIP needs one structure of it to "
            "package or compile: give one with `nequip-deploy build --example FILE`, quantize with --calibration, or "
            "run from the folder that the training was started in."
        ) from error


def edges_of(data: dict[str, Tensor]) -> int:
    """Number of pairs of atoms within the cutoff, each counted in both directions."""
    from nequip.data import AtomicDataDict

    return int(data[AtomicDataDict.EDGE_INDEX_KEY].shape[1])


def with_cell(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The example structure, in a box if it is a molecule without a cell.

    NequIP's compilation divides the virial by the volume and compares the stress, so without a cell it fails.
    """
    from nequip.data import AtomicDataDict

    cell = data[AtomicDataDict.CELL_KEY]
    if bool((torch.linalg.det(cell) != 0).all()):
        return data
    positions = data[AtomicDataDict.POSITIONS_KEY]
    size = positions.amax(0) - positions.amin(0) + 20.0
    return {**data, AtomicDataDict.CELL_KEY: torch.diag(size).unsqueeze(0).to(cell)}
