"""Second moments of the inputs of MACE's layers, which calibrated rounding needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

from gaq.model.moments import add_moments
from gaq.model.sites import Site
from gaq.model.state import unquantized
from gaq.untyped import AnyModule, Batch
from gaq_mace.sites import find_sites

__all__ = ["input_moments"]


def _slices(module: AnyModule) -> list[slice]:
    irreps = module.irreps_in1 if hasattr(module, "irreps_in1") else module.irreps_in
    return list(irreps.slices())


def _rows(x: Tensor, span: slice, multiplicity: int) -> Tensor:
    """Inputs of one path, a row for each atom and component: (atoms, components, multiplicity)."""
    return x[:, span].reshape(x.shape[0], multiplicity, -1).transpose(1, 2)


def _adder(site: Site, moments: list[Tensor | None]) -> Callable[..., None]:
    """A function that adds the moments of a site's input, one entry per weight block."""
    module: AnyModule = site.module

    def add(index: int, moment: Tensor) -> None:
        total = moments[index]
        moments[index] = moment if total is None else total + moment

    def add_input(x: Tensor, *rest: Tensor) -> None:
        if site.kind == "layer":
            add(0, x.T @ x)
        elif site.kind == "linear":
            active = [i for i in module.instructions if i.i_in != -1 and 0 not in i.path_shape]
            for index, instruction in enumerate(active):
                rows = _rows(x, _slices(module)[instruction.i_in], instruction.path_shape[0])
                rows = rows.reshape(-1, instruction.path_shape[0])
                add(index, rows.T @ rows)
        elif site.kind == "tensor_product":
            species = rest[0].double()
            active = [i for i in module.instructions if i.has_weight]
            for index, instruction in enumerate(active):
                rows = _rows(x, _slices(module)[instruction.i_in1], instruction.path_shape[0])
                add(index, _by_species(rows, species))

    return add_input


def _by_species(rows: Tensor, species: Tensor) -> Tensor:
    """Moments (species, inputs, inputs) of rows (atoms, components, inputs), of the few species that are present."""
    inputs = rows.shape[2]
    moments = rows.new_zeros(species.shape[1], inputs, inputs)
    for z in species.any(0).nonzero().flatten().tolist():
        atoms = species[:, z].nonzero().flatten()
        flat = rows[atoms].reshape(-1, inputs)
        weights = species[atoms, z].repeat_interleave(rows.shape[1])[:, None]
        moments[z] = flat.T @ (weights * flat)
    return moments


def input_moments(model: torch.nn.Module, batches: Iterable[Batch]) -> dict[str, list[Tensor | None]]:
    """Sum ``x x^T`` over atoms (or edges) and components, a matrix for each weight block; see `gaq.model.moments`.

    Returns:
        By parameter name, a list in the order of the blocks of its layout: shape (inputs, inputs), or
        (species, inputs, inputs) for the skip tensor product, whose block is one matrix a species.
    """
    sites = {
        f"{site.name}.{site.weights[0].path}": site
        for site in find_sites(model)
        if site.kind in ("layer", "linear", "tensor_product")
    }
    moments: dict[str, list[Tensor | None]] = {
        name: [None] * len(site.weights[0].layout.blocks) for name, site in sites.items()
    }
    with unquantized(model), torch.no_grad():
        add_moments(
            {name: site.module for name, site in sites.items()},
            {name: _adder(site, moments[name]) for name, site in sites.items()},
            lambda batch: model(batch, training=False, compute_force=False),
            batches,
            "positions",
        )
    return moments
