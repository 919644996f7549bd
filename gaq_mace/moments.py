"""Second moments of the inputs of MACE's layers, which calibrated rounding needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

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


def _collector(site: Site, store: dict[str, list[Tensor | None]]) -> Callable[..., None]:
    """A forward pre-hook that adds the moments of a site's input to the store."""
    key = f"{site.name}.{site.weights[0].path}"
    module: AnyModule = site.module

    def add(index: int, moment: Tensor) -> None:
        total = store[key][index]
        store[key][index] = moment if total is None else total + moment

    def collect(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach().double()
        if site.kind == "layer":
            add(0, x.T @ x)
        elif site.kind == "linear":
            active = [i for i in module.instructions if i.i_in != -1 and 0 not in i.path_shape]
            for index, instruction in enumerate(active):
                rows = _rows(x, _slices(module)[instruction.i_in], instruction.path_shape[0])
                rows = rows.reshape(-1, instruction.path_shape[0])
                add(index, rows.T @ rows)
        elif site.kind == "tensor_product":
            species = arguments[1].detach().double()
            active = [i for i in module.instructions if i.has_weight]
            for index, instruction in enumerate(active):
                rows = _rows(x, _slices(module)[instruction.i_in1], instruction.path_shape[0])
                add(index, torch.einsum("bcu,bcv,bs->suv", rows, rows, species))

    return collect


def input_moments(model: torch.nn.Module, batches: Sequence[Batch]) -> dict[str, list[Tensor | None]]:
    """Sum ``x x^T`` over atoms (or edges) and components, a matrix for each weight block.

    Returns:
        By parameter name, a list in the order of the blocks of its layout: shape (inputs, inputs), or
        (species, inputs, inputs) for the skip tensor product, whose block is one matrix a species.
    """
    store: dict[str, list[Tensor | None]] = {}
    handles = []
    for site in find_sites(model):
        if site.kind in ("layer", "linear", "tensor_product"):
            store[f"{site.name}.{site.weights[0].path}"] = [None] * len(site.weights[0].layout.blocks)
            handles.append(site.module.register_forward_pre_hook(_collector(site, store)))
    try:
        with unquantized(model), torch.no_grad():
            for batch in batches:
                model(dict(batch), training=False, compute_force=False)
    finally:
        for handle in handles:
            handle.remove()
    return store
