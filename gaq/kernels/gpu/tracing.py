"""Registration of operations made of Triton kernels, over the versions of torch.

Where kernels are compiled a trace sees through the operations (`torch.library.triton_op`): compilers find the kernels
in it. What Triton's interpreter runs is no kernel to them, and torch 2.5 knows opaque operations only; there a trace
holds the operation itself, whose results it knows by the shapes that are allocated, without anything being launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gaq.kernels.gpu import interpreted

__all__ = ["has_data", "operation", "wrapped"]


def has_data(tensor: Tensor) -> bool:
    """Whether a tensor can be looked at: while a graph is traced it stands for any of its shape."""
    return not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def operation(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that makes a function an operation of torch.

    Args:
        name: with its namespace.
        mutates_args: names of the arguments that the function writes to.
    """
    transparent = getattr(torch.library, "triton_op", None)
    if transparent is not None and not interpreted():
        return transparent(name, mutates_args=mutates_args)  # type: ignore[no-any-return]

    def register(function: Callable[..., Any]) -> Any:
        made: Any = torch.library.custom_op(name, function, mutates_args=mutates_args)
        made.register_fake(function)
        return made

    return register


class _Direct:
    """A kernel that is called as it is, and not at all where its arguments have no data."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            if not any(isinstance(a, FakeTensor) for a in args):
                self.kernel[grid](*args, **options)

        return launch


def wrapped(kernel: Any) -> Any:
    """A kernel as an operation has to call it."""
    wrap = getattr(torch.library, "wrap_triton", None)
    return wrap(kernel) if wrap is not None and hasattr(kernel, "cache_key") else _Direct(kernel)
