"""The operations of `gaq.kernels` in Triton, for NVIDIA cards.

One file an operation, called by the function of the same name in `gaq.kernels`: callers never choose. (`graphs` replays
whole steps, `tracing` registers the operations.) Without a card they run through Triton's interpreter
(``TRITON_INTERPRET=1``, set before triton is imported), on tensors of the CPU: that is what the tests do, with
``GAQ_KERNELS=triton``.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from gaq import settings
from gaq.caches import cached

__all__ = ["chosen", "interpreted", "why_not"]


def interpreted() -> bool:
    """Whether Triton's kernels run through its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cached(most=1)
def why_not() -> str | None:
    """None where Triton kernels can run, else the reason (`gaq doctor` prints it)."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install 'gaq[gpu]'`"
    if not interpreted() and not torch.cuda.is_available():
        return "there is no NVIDIA card (or torch was built without CUDA)"
    return None


def chosen(device: torch.device) -> bool:
    """Whether an operation on tensors of a device goes to Triton.

    Always on a card; on the CPU where ``GAQ_KERNELS=triton`` asks for it, which needs the interpreter.
    """
    return device.type == "cuda" or (settings.current().kernels == "triton" and interpreted())
