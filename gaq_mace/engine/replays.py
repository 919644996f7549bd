"""Steps replayed as CUDA graphs: which steps are, on what data, and what is computed outside the graph.

A graph is recorded for a fixed number of edges (`gaq.kernels.gpu.graphs.bucket`). A step with fewer edges is padded
with edges that lie beyond the cutoff.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gaq.kernels.gpu.graphs import Graphs, Outputs, bucket
from gaq.untyped import AnyModule
from gaq_mace.engine.compositions import Composition
from gaq_mace.engine.reading import python_modules

__all__ = ["INPUTS", "beyond", "held_by", "inputs_of", "padded", "replayed"]

INPUTS = ("positions", "edge_index", "shifts", "unit_shifts", "cell", "batch", "node_attrs", "head", "ptr")
"""Entries of the data that a step of any model reads; see `inputs_of`."""

Step = Callable[[dict[str, Tensor], Composition, dict[str, bool]], Outputs]
Held = list[tuple[Mapping[str, "Tensor | None"], str]]


def held_by(model: AnyModule) -> Held:
    """List the tensors of the model that a step reads where they lie.

    Returns:
        For each tensor the dictionary that holds it, and its name there.
    """
    names = ["atomic_energies_fn", "readouts", "scale_shift", "radial_embedding"]
    names += ["pair_repulsion_fn", "joint_embedding", "embedding_readout"]
    parts = [getattr(model, name, None) for name in names]
    return [
        (held, name)
        for part in parts
        if part is not None
        for module in python_modules(part)
        for held in (module._parameters, module._buffers)
        for name in held
    ]


def inputs_of(model: AnyModule) -> tuple[str, ...]:
    """Entries of the data that a step of a model reads, with the properties of structures or atoms that it embeds."""
    return (*INPUTS, *(getattr(model, "embedding_specs", None) or ()))


def replayed(
    graphs: Graphs,
    step: Step,
    names: Sequence[str],
    rest: Held,
    data: dict[str, Tensor],
    composition: Composition,
    options: dict[str, bool],
) -> Outputs | None:
    """Compute a step by replaying its CUDA graph.

    Args:
        graphs: recorded so far.
        step: computes the step itself.
        names: entries of the data that the step reads; see `inputs_of`.
        rest: tensors of the model that the step reads; see `held_by`.
        data: of the step.
        composition: species of the atoms.
        options: of the call, by the names that MACE gives them.

    Returns:
        The results; None for a step that is not recorded.
    """
    atoms, edges = data["positions"].shape[0], data["edge_index"].shape[1]
    device = data["positions"].device
    inputs: dict[str, Tensor] = {name: data[name] for name in names if data.get(name) is not None}
    if composition.tables is None or not atoms or not graphs.serves(device, edges):
        return None
    # A caller who differentiates by anything but the positions, or further, needs an autograd graph.
    inputs_have_graph = data.get("displacement") is not None or any(t.grad_fn is not None for t in inputs.values())
    other_gradients = any(t.requires_grad for name, t in inputs.items() if name != "positions")
    if inputs_have_graph or other_gradients or not options.get("compute_force", True) or not torch.is_grad_enabled():
        return None
    size = bucket(edges)
    shapes = tuple(
        (name, t.dtype, t.device, size if name in ("edge_index", "shifts", "unit_shifts") else t.shape)
        for name, t in inputs.items()
    )
    chosen = tuple(sorted(name for name, on in options.items() if on))
    # The stress is computed from the virial afterwards: the determinant of the cell may not be recordable.
    stress = options.get("compute_stress", False)
    inside = {
        **options,
        "compute_stress": False,
        "compute_virials": stress or options.get("compute_virials", False),
    }

    def prepare() -> tuple[AnyModule, dict[str, Tensor]]:
        return (lambda held: step({k: v.detach() for k, v in held.items()}, composition, inside)), padded(inputs, size)

    # A graph reads these tensors where they lay when it was recorded.
    places = tuple(t.data_ptr() for held, name in rest if (t := held[name]) is not None)
    key = (composition.key, chosen, shapes, places)
    outputs = graphs(key, {**inputs, "edges": edges}, prepare, device)
    if outputs is not None and stress:
        outputs["stress"] = stress_of(outputs["virials"], data["cell"])
    return outputs


def padded(data: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Pad the data of a step to `size` edges; the entry `edges` holds the number of edges that count.

    Each padding edge joins an atom with itself, all atoms in turn, so that no atom gets many.
    """
    edges, atoms = data["edge_index"].shape[1], data["positions"].shape[0]
    device = data["edge_index"].device
    ends = torch.arange(size - edges, device=device) % atoms
    enlarged = {**data, "edge_index": torch.cat([data["edge_index"], ends.expand(2, -1)], dim=1)}
    for name in ("shifts", "unit_shifts"):
        if name in data:
            enlarged[name] = torch.nn.functional.pad(data[name], (0, 0, 0, size - edges))
    enlarged["edges"] = torch.full((), edges, dtype=torch.int64, device=device)
    return enlarged


def beyond(vectors: Tensor, edges: Tensor, r_max: float) -> Tensor:
    """Replace the vectors of edges from number `edges` on by ones beyond the cutoff: no contribution, no gradient."""
    # Beyond the cutoff, and beyond the sum of two atomic radii, where the pair repulsion ends.
    far = torch.full((), 2.0 * r_max + 10.0, dtype=vectors.dtype, device=vectors.device)
    counts = torch.arange(vectors.shape[0], device=vectors.device) < edges
    return torch.where(counts[:, None], vectors, far)


def stress_of(virials: Tensor | None, cell: Tensor) -> Tensor:
    """Stress as `mace.modules.utils.compute_forces_virials` computes it, (graphs, 3, 3) in eV/Å³."""
    assert virials is not None
    first, second, third = cell.detach().view(-1, 3, 3).unbind(1)
    # Not by a determinant: a linear algebra library may make the host wait for the GPU.
    volume = (torch.linalg.cross(first, second) * third).sum(-1).abs()
    stress = -virials / volume.view(-1, 1, 1)
    # NaN stays NaN (`gaq_mace.engine.soundness`).
    return torch.where(torch.abs(stress) >= 1e10, torch.zeros_like(stress), stress)
