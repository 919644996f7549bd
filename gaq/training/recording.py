"""What some modules of a model hand on, recorded as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["recorded_outputs"]


@contextmanager
def recorded_outputs(modules: Sequence[torch.nn.Module], pick: Callable[[Any], Tensor]) -> Iterator[list[Tensor]]:
    """Within this context the outputs of modules are appended to the list, in the order they come.

    Args:
        modules: of an eager model.
        pick: takes the tensor wanted out of what such a module returns.
    """
    seen: list[Tensor] = []
    handles = [module.register_forward_hook(lambda _, __, output: seen.append(pick(output))) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
