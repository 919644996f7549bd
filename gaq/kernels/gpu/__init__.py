"""The operations of `gaq.kernels` in Triton, for NVIDIA GPUs.

Each operation has one file, called by the function of the same name in `gaq.kernels`: callers never choose. `graphs`
replays whole steps, and `tracing` registers the operations. Without a GPU, the tests run the operations on CPU tensors
through Triton's interpreter: ``TRITON_INTERPRET=1``, set before triton is imported, with ``GAQ_KERNELS=triton``.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from gaq import settings
from gaq.caches import cached

__all__ = ["chosen", "interpreted", "why_not"]


def interpreted() -> bool:
    """Whether kernels run through Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cached(most=1)
def why_not() -> str | None:
    """Reason why Triton kernels cannot run here; None where they can. `gaq doctor` prints it."""
    if not interpreted() and not torch.cuda.is_available():
        return "there is no NVIDIA GPU (or torch was built without CUDA)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install 'gaq[gpu]'`"
    return None


def chosen(device: torch.device) -> bool:
    """Whether operations on the tensors of a device run in Triton.

    On a GPU they always do; on the CPU with ``GAQ_KERNELS=triton``, which needs the interpreter.
    """
    return device.type == "cuda" or (settings.current().kernels == "triton" and interpreted())
