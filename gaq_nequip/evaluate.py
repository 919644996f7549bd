"""Batched energies and forces of a NequIP model on ASE structures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase.calculators.calculator import all_properties
from nequip.data import AtomicDataDict, from_ase
from nequip.integrations.utils import basic_transforms
from nequip.nn import graph_model
from nequip.utils.global_dtype import _GLOBAL_DTYPE
from torch import Tensor

from gaq.model.elements import check_known
from gaq.process import default_dtype
from gaq.training.sampling import by_atoms
from gaq.untyped import AnyModule
from gaq_nequip.sites import class_name
from gaq_nequip.species import species_of, type_names

if TYPE_CHECKING:
    from ase import Atoms

__all__ = [
    "NequIPPotential",
    "device_of",
    "energies",
    "energy_and_forces",
    "make_batches",
    "without_derivatives",
]

REFERENCE_ATOMS = 128
"""Atoms in a batch: the features of every edge are in memory."""


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of a model; a frozen model has buffers only."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def make_batches(model: torch.nn.Module, structures: Sequence[Atoms], atoms: int) -> list[dict[str, Tensor]]:
    """Convert structures to graphs, in batches, on the model's device.

    Args:
        model: a complete NequIP model, whose types are known by chemical symbols (`gaq_nequip.species.species_of`).
        structures: at least one.
        atoms: most atoms in a batch; a larger structure is a batch of its own.

    Raises:
        ValueError: if there are no structures, one has an element that the model does not know, or the model does not
            say which elements its types are.
    """
    if not structures:
        raise ValueError("no structures were given.")
    metadata: dict[str, str] = model.metadata  # type: ignore[assignment]  # NequIP's property
    species = species_of(model)
    check_known(list(species), structures)
    r_max = float(metadata[graph_model.R_MAX_KEY])
    transforms = basic_transforms(metadata, r_max, type_names(model), species)
    # As `NequIPCalculator` reads structures, but without what the model does not read: labels that only some have
    # cannot be joined to batches.
    unread = set(all_properties) - set(model.model_input_fields)  # type: ignore[arg-type]  # names, of NequIP's root
    graphs = []
    with default_dtype(_GLOBAL_DTYPE):
        for structure in structures:
            data = from_ase(structure, exclude_keys=list(unread))
            for transform in transforms:
                data = transform(data)
            graphs.append(data)
    device = device_of(model)
    spans = by_atoms([len(structure) for structure in structures], atoms)
    batches = [AtomicDataDict.batched_from_list(graphs[span]) for span in spans]
    return [AtomicDataDict.to_(batch, device) for batch in batches]


@contextmanager
def _mode(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """Within this context the ``training`` flags are set: NequIP keeps the graph of the forces in training mode only.

    `torch.nn.Module.train` is not called, so what modules do when their mode changes does not happen.
    """
    modules = list(model.modules())
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, flag in zip(modules, before, strict=True):
            module.training = flag


def energy_and_forces(
    model: torch.nn.Module, batch: dict[str, Tensor], create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies (graphs,) in eV, forces (atoms, 3) in eV/Å, and the number of atoms of each graph (graphs,)."""
    with default_dtype(_GLOBAL_DTYPE), _mode(model, create_graph):
        output: dict[str, Tensor] = model(dict(batch))
    energy = output[AtomicDataDict.TOTAL_ENERGY_KEY].reshape(-1)
    counts = batch[AtomicDataDict.NUM_NODES_KEY].reshape(-1)
    return energy, output[AtomicDataDict.FORCE_KEY], counts


@contextmanager
def without_derivatives(model: torch.nn.Module) -> Iterator[None]:
    """Within this context a model computes energies alone, and keeps no graph of them."""
    outputs: list[AnyModule] = [m for m in model.modules() if class_name(m) == "ForceStressOutput"]
    before = [output.do_derivatives for output in outputs]
    try:
        for output in outputs:
            output.do_derivatives = False
        with torch.no_grad():
            yield
    finally:
        for output, flag in zip(outputs, before, strict=True):
            output.do_derivatives = flag


def energies(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Energies alone, (graphs,) in eV."""
    with default_dtype(_GLOBAL_DTYPE), _mode(model, False), without_derivatives(model):
        output: dict[str, Tensor] = model(dict(batch))
    return output[AtomicDataDict.TOTAL_ENERGY_KEY].reshape(-1)


class NequIPPotential:
    """A NequIP model as a `gaq.checks.potential.Potential`, evaluated in batches.

    Args:
        model: a complete NequIP model.
        atoms: most atoms in a batch.
    """

    def __init__(self, model: torch.nn.Module, atoms: int | None = None) -> None:
        self.model = model
        self.atoms = REFERENCE_ATOMS if atoms is None else atoms

    def energies(self, structures: Sequence[Atoms]) -> np.ndarray:
        """Energies alone, shape (len(structures),), eV."""
        batches = make_batches(self.model, structures, self.atoms)
        return torch.cat([energies(self.model, batch) for batch in batches]).cpu().numpy()

    def __call__(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        energy_arrays: list[np.ndarray] = []
        forces: list[np.ndarray] = []
        for batch in make_batches(self.model, structures, self.atoms):
            energy, force, counts = energy_and_forces(self.model, batch)
            energy_arrays.append(energy.detach().cpu().numpy())
            forces.extend(np.split(force.detach().cpu().numpy(), np.cumsum(counts.cpu().numpy())[:-1]))
        return np.concatenate(energy_arrays), forces
