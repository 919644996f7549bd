"""NequIP's process-wide settings: in force while this package calls NequIP, and restored afterwards.

NequIP computes with its own settings (float64 as torch's default dtype, e3nn without TorchScript, seeds, compiler
options, TF32 off). It makes them once per process and never undoes them. A program that only loads a quantized model
must not be left with them, so this module restores the earlier settings. It also resets NequIP's note that it was set
up, so that NequIP makes its settings again when it is next used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import e3nn
import torch
from nequip.scripts import _workflow_utils as workflow
from nequip.utils import global_state
from nequip.utils.global_dtype import _GLOBAL_DTYPE

from gaq import process

__all__ = ["loading", "nequip_state"]


@contextmanager
def nequip_state() -> Iterator[None]:
    """Within this context NequIP is set up; afterwards the process is as before, also if the context raises.

    Threads may be in it at once; the last of them restores the process.
    """
    with process.default_dtype(_GLOBAL_DTYPE), _together():
        yield


@contextmanager
def loading() -> Iterator[None]:
    """`nequip_state` for code that builds models, for which NequIP changes torch's default dtype: no other thread
    relies on it meanwhile."""
    with nequip_state(), process.alone(), process.default_dtype(_GLOBAL_DTYPE):
        yield


@contextmanager
def _nequip_state() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(process.unchanged())
        stack.callback(workflow.set_workflow_state, workflow.get_workflow_state())
        stack.enter_context(_tf32_unchanged())
        if not global_state.global_state_initialized():
            stack.enter_context(_set_up())
        yield


_together = process.Together(_nequip_state)


@contextmanager
def _set_up() -> Iterator[None]:
    """Within this context NequIP's global state is set; afterwards the settings it changed are restored."""
    dynamo: Any = torch._dynamo.config  # its settings are made at run time
    flags = ("capture_dynamic_output_shape_ops", "capture_scalar_outputs")
    before = {name: getattr(dynamo, name) for name in flags}
    optimizations = dict(e3nn.get_optimization_defaults())
    sharing = torch.multiprocessing.get_sharing_strategy()
    # Reading the present strategy is only possible by setting one.
    fusion = torch.jit.set_fusion_strategy(global_state._JIT_FUSION_STRATEGY)
    latest = dict(global_state._latest_global_config)
    try:
        global_state.set_global_state()
        yield
    finally:
        torch.jit.set_fusion_strategy(fusion)
        torch.multiprocessing.set_sharing_strategy(sharing)
        e3nn.set_optimization_defaults(**optimizations)
        for name, value in before.items():
            setattr(dynamo, name, value)
        global_state._latest_global_config.clear()
        global_state._latest_global_config.update(latest)
        global_state._GLOBAL_STATE_INITIALIZED = False


@contextmanager
def _tf32_unchanged() -> Iterator[None]:
    """Restore the precision of matrix products on GPUs afterwards: NequIP sets it whenever it loads a model."""
    if not torch.cuda.is_available():
        yield
        return
    backends: Any = torch.backends  # which settings it has depends on torch's version
    new = hasattr(backends, "fp32_precision")  # torch 2.9 and later, where reading the old flags may raise
    before = backends.fp32_precision if new else (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32)
    latest = dict(global_state._latest_global_config)
    try:
        yield
    finally:
        if new:
            backends.fp32_precision = before
        else:
            backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before
        global_state._latest_global_config.clear()
        global_state._latest_global_config.update(latest)
