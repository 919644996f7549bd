"""Steps replayed as CUDA graphs: which are, on what data, and what a graph cannot compute.

A graph is recorded for a number of edges (`gaq.kernels.gpu.graphs.bucket`), so a step gets further ones that lie beyond
the cutoff.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gaq.kernels.gpu.graphs import Graphs, Outputs, bucket
from gaq_mace.engine.compositions import Composition
from gaq_mace.engine.reading import python_modules

__all__ = ["INPUTS", "beyond", "held_by", "padded", "replayed"]

INPUTS = ("positions", "edge_index", "shifts", "unit_shifts", "cell", "batch", "node_attrs", "head", "ptr")
"""What a step reads."""

Step = Callable[[dict[str, Tensor], Composition, dict[str, bool]], Outputs]
Held = list[tuple[Mapping[str, "Tensor | None"], str]]


def held_by(model: Any) -> Held:
    """What a step reads of the model itself: of each tensor the dictionary that holds it, and its name there."""
    rest = [model.atomic_energies_fn, model.readouts, model.scale_shift, getattr(model, "pair_repulsion_fn", None)]
    return [
        (held, name)
        for part in rest
        if part is not None
        for module in python_modules(part)
        for held in (module._parameters, module._buffers)
        for name in held
    ]


def replayed(
    graphs: Graphs, step: Step, rest: Held, data: dict[str, Tensor], own: Composition, options: dict[str, bool]
) -> Outputs | None:
    """The results by a CUDA graph; None where the step is not one that is recorded."""
    atoms, edges = data["positions"].shape[0], data["edge_index"].shape[1]
    device = data["positions"].device
    given: dict[str, Tensor] = {name: data[name] for name in INPUTS if data.get(name) is not None}
    if own.knots is None or not atoms or not graphs.serves(device, edges):
        return None
    # Who differentiates by something else, or further, needs a graph of autograd.
    inner = data.get("displacement") is not None or any(t.grad_fn is not None for t in given.values())
    asked = any(t.requires_grad for name, t in given.items() if name != "positions")
    if inner or asked or not options.get("compute_force", True) or not torch.is_grad_enabled():
        return None
    size = bucket(edges)
    shapes = tuple(
        (name, t.dtype, t.device, size if name in ("edge_index", "shifts", "unit_shifts") else t.shape)
        for name, t in given.items()
    )
    chosen = tuple(sorted(name for name, on in options.items() if on))
    # The stress is computed from the virial afterwards: the determinant of the cell need not be fit for recording.
    stress = options.get("compute_stress", False)
    inside = {
        **options,
        "compute_stress": False,
        "compute_virials": stress or options.get("compute_virials", False),
    }

    def prepare() -> tuple[Any, dict[str, Tensor]]:
        return (lambda held: step({k: v.detach() for k, v in held.items()}, own, inside)), padded(given, size)

    # A graph reads what the rest of the model holds where it lies.
    places = tuple(t.data_ptr() for held, name in rest if (t := held[name]) is not None)
    key = (own.key, chosen, shapes, places)
    found = graphs(key, {**given, "edges": edges}, prepare, device)
    if found is not None and stress:
        found["stress"] = stress_of(found["virials"], data["cell"])
    return found


def padded(data: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The data of a step with as many edges as asked for, and the number of those that count as `edges`.

    Each further one joins an atom with itself, all atoms in turn, so that no atom gets many.
    """
    edges, atoms = data["edge_index"].shape[1], data["positions"].shape[0]
    device = data["edge_index"].device
    own = torch.arange(size - edges, device=device) % atoms
    found = {**data, "edge_index": torch.cat([data["edge_index"], own.expand(2, -1)], dim=1)}
    for name in ("shifts", "unit_shifts"):
        if name in data:
            found[name] = torch.nn.functional.pad(data[name], (0, 0, 0, size - edges))
    found["edges"] = torch.full((), edges, dtype=torch.int64, device=device)
    return found


def beyond(vectors: Tensor, edges: Tensor, r_max: float) -> Tensor:
    """Edge vectors, with those of number `edges` and more so long that nothing is left of them, and no gradient."""
    # Longer than the cutoff, and than the radii of two atoms together, where a pair repulsion ends.
    far = torch.full((), 2.0 * r_max + 10.0, dtype=vectors.dtype, device=vectors.device)
    counts = torch.arange(vectors.shape[0], device=vectors.device) < edges
    return torch.where(counts[:, None], vectors, far)


def stress_of(virials: Tensor | None, cell: Tensor) -> Tensor:
    """As `mace.modules.utils.compute_forces_virials` has it, (graphs, 3, 3) in eV/Å³."""
    assert virials is not None
    first, second, third = cell.detach().view(-1, 3, 3).unbind(1)
    # Not by a determinant: libraries of linear algebra may wait for the card.
    volume = (torch.linalg.cross(first, second) * third).sum(-1).abs()
    stress = -virials / volume.view(-1, 1, 1)
    return torch.where(torch.abs(stress) < 1e10, stress, torch.zeros_like(stress))
