"""Second moments of the inputs of NequIP's layers, for calibrated rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from nequip.data import AtomicDataDict
from torch import Tensor

from gaq.model.moments import add_moments
from gaq.model.sites import Site
from gaq.model.state import unquantized
from gaq.untyped import AnyModule, Batch
from gaq_nequip.evaluate import without_derivatives
from gaq_nequip.sites import find_sites

__all__ = ["input_moments"]


def _adder(site: Site, moments: list[Tensor | None]) -> Callable[..., None]:
    """A function that adds ``x^T x`` of a layer's input to `moments`, one entry per weight block."""
    module: AnyModule = site.module

    def add(index: int, moment: Tensor) -> None:
        total = moments[index]
        moments[index] = moment if total is None else total + moment

    def add_input(x: Tensor, *_: Tensor) -> None:
        if site.kind == "scalar_linear":
            add(0, x.T @ x)
            return
        slices = list(module.irreps_in.slices())
        weighted = [ins for ins in module.instructions if ins.i_in != -1 and 0 not in ins.path_shape]
        for index, instruction in enumerate(weighted):
            inputs = instruction.path_shape[0]
            rows = x[:, slices[instruction.i_in]].reshape(x.shape[0], inputs, -1).transpose(1, 2).reshape(-1, inputs)
            add(index, rows.T @ rows)

    return add_input


def input_moments(model: torch.nn.Module, batches: Iterable[Batch]) -> dict[str, list[Tensor | None]]:
    """Sum ``x x^T`` over atoms (or edges) and components, a matrix for each weight block; see `gaq.model.moments`.

    Self-connections have none: their input is the product of features and embedding, which is too wide for a matrix.

    Returns:
        By parameter name, one matrix of shape (inputs, inputs) for each block of the weight's layout, in its order.
    """
    sites = {
        f"{site.name}.{site.weights[0].path}": site
        for site in find_sites(model)
        if site.kind in ("linear", "scalar_linear")
    }
    moments: dict[str, list[Tensor | None]] = {
        name: [None] * len(site.weights[0].layout.blocks) for name, site in sites.items()
    }
    with unquantized(model), without_derivatives(model):
        add_moments(
            {name: site.module for name, site in sites.items()},
            {name: _adder(site, moments[name]) for name, site in sites.items()},
            model,
            batches,
            AtomicDataDict.POSITIONS_KEY,
        )
    return moments
