"""Declarations of the C functions in `shims.cpp`, by which compiled files call the operations, for Inductor."""

from __future__ import annotations

import torch

from gaq.kernels import convolution, product, rounding, signatures  # noqa: F401  (they register the operations)
from gaq.untyped import Operation

__all__ = ["c_shims"]


def c_shims() -> dict[Operation, list[str]]:
    """Declarations by operation, for Inductor's option ``aot_inductor.custom_ops_to_c_shims``."""
    return {getattr(torch.ops.gaq, name).default: [signatures.c_shim(name)] for name in signatures.OPERATIONS}
