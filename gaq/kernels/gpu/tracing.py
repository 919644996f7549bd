"""Registration of operations made of Triton kernels, over the versions of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["operation", "wrapped"]

operation: Callable[..., Any] = getattr(torch.library, "triton_op", torch.library.custom_op)
"""`torch.library.triton_op`, through which a trace sees the kernels; torch 2.5 has opaque operations only."""


def wrapped(kernel: Any) -> Any:
    """A kernel as an operation has to call it; what the interpreter runs cannot be traced and is called as it is."""
    wrap = getattr(torch.library, "wrap_triton", None)
    return wrap(kernel) if wrap is not None and hasattr(kernel, "cache_key") else kernel
