"""Second moments of the inputs of layers, which calibrated rounding needs, whatever the framework.

A rounded layer is to keep its outputs and, for the sake of the forces, the change of its outputs with the positions. So
the inputs count, and so do their slopes: differences between the inputs at the positions of a structure and those a
small random step away (``benchmarks/quantize_time.py`` measures rounding with and without them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_moments"]

SLOPE_WEIGHT = 0.1
"""Weight of the squared slopes (per Å²) relative to that of the squared inputs, in Å²."""

STEP = 0.005
"""Standard deviation of each component of a random step, Å."""

Add = Callable[..., None]


@contextmanager
def _recording(modules: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, ...]]]]:
    """Record the arguments of each call of some modules within this context, by the names given."""
    calls: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in modules}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            calls[name].append(tuple(x.detach() for x in arguments if isinstance(x, Tensor)))

        return record

    handles = [module.register_forward_pre_hook(recorder(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def add_moments(
    modules: Mapping[str, torch.nn.Module],
    add: Mapping[str, Add],
    run: Callable[[dict[str, Any]], Any],
    batches: Iterable[dict[str, Any]],
    positions: str,
) -> None:
    """Run a model on batches and add up the moments of its layers' inputs and slopes.

    Args:
        modules: the layers by name.
        add: for each layer a function that adds the moments of an input, given in float64, and of the further
            arguments of the call.
        run: runs the model on a batch.
        batches: graphs; their edges stay as they are while atoms move.
        positions: key of the positions, shape (atoms, 3) in Å, in a batch.
    """
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        start = batch[positions].detach()
        move = STEP * torch.randn(start.shape, generator=generator, dtype=torch.float64)
        with _recording(modules) as here:
            run({**batch, positions: start.clone()})
        with _recording(modules) as there:
            run({**batch, positions: start + move.to(start)})
        for name in modules:
            for (x, *rest), (moved, *_) in zip(here[name], there[name], strict=True):
                add[name](x.double(), *rest)
                add[name]((moved - x).double() * (math.sqrt(SLOPE_WEIGHT) / STEP), *rest)
