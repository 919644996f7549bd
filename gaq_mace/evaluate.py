"""Batched energies and forces of a MACE model for lists of ASE structures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from mace import data
from mace.tools import torch_geometric, utils
from torch import Tensor

from gaq.process import default_dtype

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["MACEPotential", "energy_and_forces", "make_batches"]


def make_batches(
    model: torch.nn.Module, structures: Sequence[Atoms], batch_size: int, head: str | None = None
) -> list[dict[str, Tensor]]:
    """Make the graphs of structures, in batches, on the device and in the dtype of the model.

    Args:
        model: any MACE model.
        structures: at least one.
        batch_size: structures in a batch.
        head: for a model with several; by default the one called ``default``, or else the last.

    Raises:
        ValueError: if there are no structures, or one has an element the model does not know.
    """
    if not structures:
        raise ValueError("no structures were given.")
    numbers = [int(z) for z in model.atomic_numbers]  # type: ignore[union-attr]  # a tensor
    table = utils.AtomicNumberTable(numbers)
    for i, atoms in enumerate(structures):
        unknown = sorted(set(atoms.get_chemical_symbols()) - {_symbol(z) for z in numbers})
        if unknown:
            raise ValueError(
                f"structure {i} ({atoms.get_chemical_formula()}) has {', '.join(unknown)}, which the model does not "
                f"know; its elements are {', '.join(_symbol(z) for z in numbers)}."
            )
    first = next(model.parameters())
    heads = getattr(model, "heads", ["Default"])
    if head is None:
        head = next((h for h in heads if str(h).lower() == "default"), heads[-1])
    keys = _keys_of(model)
    # A DataLoader draws a seed from torch's random numbers, whether or not it shuffles.
    with default_dtype(first.dtype), torch.random.fork_rng(devices=[]):
        graphs = [
            data.AtomicData.from_config(
                data.config_from_atoms(atoms, key_specification=keys, head_name=head),
                z_table=table,
                cutoff=float(model.r_max),  # type: ignore[arg-type]  # a tensor
                heads=heads,
            )
            for atoms in structures
        ]
        loader = torch_geometric.dataloader.DataLoader(
            graphs,  # type: ignore[arg-type]  # MACE's graphs are of a class of its own
            batch_size=batch_size,
            shuffle=False,
            drop_last=False,
        )
        return [batch.to(first.device).to_dict() for batch in loader]


_CALCULATOR_KEYS = {"total_charge": "charge", "total_spin": "spin"}


def _keys_of(model: torch.nn.Module) -> data.KeySpecification:
    """Where structures hold the properties that a model embeds: where `MACECalculator` looks for them."""
    info: dict[str, str] = {}
    arrays: dict[str, str] = {}
    for name, spec in (getattr(model, "embedding_specs", None) or {}).items():
        place = info if spec["per"] == "graph" else arrays
        place[name] = _CALCULATOR_KEYS.get(name, spec.get("key", name))
    return data.KeySpecification(info_keys=info, arrays_keys=arrays)


def _symbol(number: int) -> str:
    """Chemical symbol of an atomic number."""
    from ase.data import chemical_symbols

    return str(chemical_symbols[number])


def energy_and_forces(
    model: torch.nn.Module, batch: dict[str, Tensor], create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies (graphs,) in eV, forces (atoms, 3) in eV/Å, and the number of atoms of each graph."""
    output = model(dict(batch), training=create_graph, compute_force=True)
    counts = batch["ptr"][1:] - batch["ptr"][:-1]
    return output["energy"], output["forces"], counts


class MACEPotential:
    """A `gaq.checks.potential.Potential` of a MACE model, evaluated in batches.

    Args:
        model: any MACE model.
        batch_size: structures in a batch.
    """

    def __init__(self, model: torch.nn.Module, batch_size: int = 16) -> None:
        self.model = model
        self.batch_size = batch_size

    def __call__(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        energies: list[np.ndarray] = []
        forces: list[np.ndarray] = []
        with default_dtype(next(self.model.parameters()).dtype):
            for batch in make_batches(self.model, structures, self.batch_size):
                energy, force, counts = energy_and_forces(self.model, batch)
                energies.append(energy.detach().cpu().numpy())
                forces.extend(np.split(force.detach().cpu().numpy(), np.cumsum(counts.cpu().numpy())[:-1]))
        return np.concatenate(energies), forces
