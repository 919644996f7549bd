"""Batched energies and forces of a MACE model for lists of ASE structures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from mace import data
from mace.tools import torch_geometric, utils
from torch import Tensor

from gaq.caches import cached
from gaq.model.elements import check_known
from gaq.process import default_dtype
from gaq.training.sampling import by_atoms
from gaq.untyped import AnyModule
from gaq_mace.elements import head_names
from gaq_mace.engine.serving import Served, engine_for

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["MACEPotential", "collated", "energy_and_forces", "keys_of", "make_batches"]

FUSED_ATOMS = 512
"""Atoms in a batch for the fused kernels, from which on larger batches are no faster."""

REFERENCE_ATOMS = 128
"""Atoms in a batch for the reference path, which holds the features of every edge: about 2 GB for 128x0e+128x1o."""


def make_batches(
    model: torch.nn.Module, structures: Sequence[Atoms], atoms: int, head: str | None = None
) -> list[dict[str, Tensor]]:
    """Make the graphs of structures, in batches, on the device and in the dtype of the model.

    Args:
        model: any MACE model.
        structures: at least one.
        atoms: most atoms in a batch; a larger structure is a batch of its own.
        head: for a model with several; by default the one called ``default``, or else the last.

    Raises:
        ValueError: if there are no structures, one has an element the model does not know, or lacks a property that
            the model embeds.
    """
    if not structures:
        raise ValueError("no structures were given.")
    numbers = [int(z) for z in model.atomic_numbers]  # type: ignore[union-attr]  # a tensor
    table = utils.AtomicNumberTable(numbers)
    check_known([_symbol(z) for z in numbers], structures)
    first = next(model.parameters())
    heads = head_names(model)
    if head is None:
        head = next((h for h in heads if str(h).lower() == "default"), heads[-1])
    keys = keys_of(model)
    with default_dtype(first.dtype):
        graphs = []
        for number, structure in enumerate(structures):
            config = data.config_from_atoms(structure, key_specification=keys, head_name=head)
            cutoff = float(model.r_max)  # type: ignore[arg-type]  # a tensor
            graph = data.AtomicData.from_config(config, z_table=table, cutoff=cutoff, heads=heads)
            graphs.append(_checked_graph(graph, keys, structure, number))
        return collated(graphs, atoms, first.device)


def collated(graphs: Sequence[Any], atoms: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Join MACE's graphs to batches of at most so many atoms, on a device."""
    batches = []
    for span in by_atoms([int(graph.num_nodes) for graph in graphs], atoms):
        batch: Any = torch_geometric.Batch.from_data_list(list(graphs[span]), [None], [None])
        # Not `Batch.to`, which takes a millisecond to list the keys again for each of them.
        batches.append({key: v.to(device) if torch.is_tensor(v) else v for key, v in batch.to_dict().items()})
    return batches


@cached(most=1)
def _calculator_keys() -> dict[str, dict[str, str]]:
    """Where `MACECalculator` looks for properties, by name, in ``info`` and ``arrays`` of a structure: it is asked."""
    from gaq_mace.calculator import Calculator

    any_model: AnyModule = torch.nn.Linear(1, 1)
    any_model.r_max, any_model.atomic_numbers, any_model.heads = torch.ones(()), [1], ["Default"]
    calculator = Calculator(models=[any_model], device="cpu", default_dtype="float32")
    return {"info": dict(calculator.info_keys), "arrays": {calculator.charges_key: "charges", **calculator.arrays_keys}}


def keys_of(model: torch.nn.Module) -> data.KeySpecification:
    """Where structures hold the properties that a model embeds.

    It is where `MACECalculator` looks for them, and where training did for those that the calculator does not know.
    """
    keys = data.KeySpecification()
    for name, spec in (getattr(model, "embedding_specs", None) or {}).items():
        place, of_place = ("info", keys.info_keys) if spec["per"] == "graph" else ("arrays", keys.arrays_keys)
        of_place[name] = _calculator_keys()[place].get(name, spec.get("key", name))
    return keys


def _checked_graph(graph: Any, keys: data.KeySpecification, structure: Atoms, number: int) -> Any:
    """The graph of a structure, if it has the properties that the model embeds.

    Raises:
        ValueError: naming the structure and the key of a property that has no default.
    """
    for place, of_place in (("info", keys.info_keys), ("arrays", keys.arrays_keys)):
        for name, key in of_place.items():
            if getattr(graph, name, None) is None:
                raise ValueError(
                    f"structure {number} ({structure.get_chemical_formula()}) has no {place}[{key!r}], the property "
                    f"{name!r} that the model reads."
                )
    return graph


def _symbol(number: int) -> str:
    """Chemical symbol of an atomic number."""
    from ase.data import chemical_symbols

    return str(chemical_symbols[number])


@contextmanager
def _fixed_weights(model: torch.nn.Module) -> Iterator[None]:
    """Within this context no weight of a model requires a gradient.

    MACE adds embeddings of charge and spin in place to what a scripted layer returns. From its second call on,
    TorchScript returns a view on which autograd refuses that if weights require gradients, which forces do not need.
    """
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


def energy_and_forces(
    model: torch.nn.Module, batch: dict[str, Tensor], create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies (graphs,) in eV, forces (atoms, 3) in eV/Å, and the number of atoms of each graph."""
    with nullcontext() if create_graph else _fixed_weights(model):
        output = model(dict(batch), training=create_graph, compute_force=True)
    counts = batch["ptr"][1:] - batch["ptr"][:-1]
    return output["energy"], output["forces"], counts


class MACEPotential:
    """A `gaq.checks.potential.Potential` of a MACE model, evaluated in batches.

    Args:
        model: any MACE model.
        atoms: most atoms in a batch; by default `FUSED_ATOMS`, or `REFERENCE_ATOMS` on the reference path.
        head: see `make_batches`.
    """

    def __init__(self, model: torch.nn.Module, atoms: int | None = None, head: str | None = None) -> None:
        self.model = model
        self.atoms = atoms
        self.head = head

    def _batches(self, structures: Sequence[Atoms]) -> list[dict[str, Tensor]]:
        atoms = self.atoms
        if atoms is None:
            atoms = FUSED_ATOMS if isinstance(self.model, Served) and engine_for(self.model, {}) else REFERENCE_ATOMS
        return make_batches(self.model, structures, atoms, self.head)

    def energies(self, structures: Sequence[Atoms]) -> np.ndarray:
        """Energies alone, shape (len(structures),), eV."""
        with default_dtype(next(self.model.parameters()).dtype), torch.no_grad():
            outputs = [self.model(batch, compute_force=False)["energy"] for batch in self._batches(structures)]
        return torch.cat(outputs).cpu().numpy()

    def __call__(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        energies: list[np.ndarray] = []
        forces: list[np.ndarray] = []
        with default_dtype(next(self.model.parameters()).dtype):
            for batch in self._batches(structures):
                energy, force, counts = energy_and_forces(self.model, batch)
                energies.append(energy.detach().cpu().numpy())
                forces.extend(np.split(force.detach().cpu().numpy(), np.cumsum(counts.cpu().numpy())[:-1]))
        return np.concatenate(energies), forces
