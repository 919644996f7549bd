"""Node features before the first layer where they depend on more than the species: on charge, spin or other properties.

Atoms with the same features are of one kind. Where properties belong to structures, as charge and spin do, a kind is a
species of a structure; a program is then given what its first layer makes of each kind, and not of each atom.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gaq.caches import Cache
from gaq.untyped import AnyModule
from gaq_mace.engine.compositions import Composition, alone

__all__ = ["Start", "Starts", "embedded"]

STARTS = 8
"""Starts that are kept: charges and spins of the structures that were computed last."""


class Start(NamedTuple):
    """What a program reads of the kinds of a step's atoms.

    Attributes:
        kinds: of each atom in the order of the composition, (atoms,), int64.
        rows: what the first layer makes of each kind, (kinds, width) each; see `Layer.before_messages`.
        energies: of the embedding's read-out for each kind and head, (kinds, heads); None where there is none.
    """

    kinds: Tensor
    rows: list[Tensor]
    energies: Tensor | None


def embedded(model: AnyModule, features: dict[str, Tensor], batch: Tensor, structures: int | None) -> Tensor:
    """What the properties of structures or atoms add to node features, (atoms, channels).

    Args:
        model: that has a joint embedding.
        features: properties, by their name in the model.
        batch: structure of each atom, (atoms,).
        structures: their number where all properties belong to structures, so that each is embedded once; else None.
    """
    if structures is None:
        made: Tensor = model.joint_embedding(batch, features)
        return made
    of_structures: Tensor = model.joint_embedding(torch.arange(structures, device=batch.device), features)
    return of_structures[batch]


class Starts:
    """Cache of the starts used last, on the CPU.

    Args:
        model: with a joint embedding.
        layer: the engine's first.
        embedding: of the species, (species, channels).
        of_structures: whether all properties belong to structures, and none to atoms.
    """

    def __init__(self, model: AnyModule, layer: AnyModule, embedding: Tensor, of_structures: bool) -> None:
        self.model, self.layer, self.embedding, self.of_structures = model, layer, embedding, of_structures
        self.kept: Cache[tuple[object, ...], Start] = Cache(STARTS)

    def __call__(self, data: dict[str, Tensor], composition: Composition) -> Start:
        """Start of a step.

        Args:
            data: MACE's.
            composition: species of the atoms.
        """
        features = {name: data[name].detach() for name in self.model.embedding_specs}
        batch = data["batch"]
        given = [(name, tuple(of.shape), of.numpy().tobytes()) for name, of in features.items()]
        key = (composition.key, batch.numpy().tobytes(), *given)
        return self.kept.get(key, lambda: self._made(features, batch, data["ptr"].numel() - 1, composition))

    def _made(self, features: dict[str, Tensor], batch: Tensor, structures: int, composition: Composition) -> Start:
        order, species = composition.by_species, composition.ordered
        # Tensors made in inference mode could not be used by later calls outside of it.
        with torch.inference_mode(False), torch.no_grad():
            added = embedded(self.model, features, batch, structures if self.of_structures else None)[order]
            kinds, firsts = torch.arange(order.numel()), torch.arange(order.numel())
            if self.of_structures:
                # By species first, as the composition of the kinds has to be.
                numbers, kinds = torch.unique(species * structures + batch[order], return_inverse=True)
                firsts = torch.empty_like(numbers).scatter_(0, kinds, firsts)
            rows = self.embedding[species[firsts]] + added[firsts]
            energies = None
            if hasattr(self.model, "embedding_readout"):
                energies = self.model.embedding_readout(rows, torch.zeros_like(firsts))
            made = self.layer.before_messages(rows[:, None], alone(species[firsts]))
            return Start(kinds, [of.contiguous() for of in made], energies)
