"""Registration of operations made of Triton kernels, compiled or interpreted.

Where kernels are compiled, a trace sees through the operations (`torch.library.triton_op`), and compilers find the
kernels in it. A kernel of Triton's interpreter cannot be traced. There a trace holds the operation itself, and infers
result shapes from the allocated outputs; nothing is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gaq.kernels.gpu import interpreted
from gaq.untyped import Operation, TritonKernel

__all__ = ["has_data", "operation", "wrapped"]


def has_data(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read: while a graph is traced, it stands for any tensor of its shape."""
    return not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def operation(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., object]], Operation]:
    """Make a decorator that registers a function as an operation of torch.

    Args:
        name: with its namespace.
        mutates_args: names of the arguments that the function writes to.
    """
    if not interpreted():
        return torch.library.triton_op(name, mutates_args=mutates_args)

    def register(function: Callable[..., object]) -> Operation:
        registered: Operation = torch.library.custom_op(name, function, mutates_args=mutates_args)
        registered.register_fake(function)
        return registered

    return register


class _Direct:
    """An interpreted kernel: launched as it is, or not at all where its arguments have no data."""

    def __init__(self, kernel: TritonKernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            if not any(isinstance(a, FakeTensor) for a in args):
                self.kernel[grid](*args, **options)

        return launch


def wrapped(kernel: TritonKernel) -> TritonKernel:
    """Wrap a kernel in the form in which an operation must call it."""
    compiled = hasattr(kernel, "cache_key")
    return torch.library.wrap_triton(kernel) if compiled else _Direct(kernel)
