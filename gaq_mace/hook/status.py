"""The state of the hook: whether MACE is patched, and what helps if it is not."""

from __future__ import annotations

import os
import sys

from gaq_mace.hook import targets
from gaq_mace.names import PATCHED, TARGETS

__all__ = ["describe", "is_installed"]


def is_installed() -> bool:
    """Whether the MACE modules loaded so far are patched."""
    return all(getattr(sys.modules[name], PATCHED, False) for name in TARGETS if name in sys.modules)


def describe() -> str:
    """One line for ``gaq doctor``: whether MACE's training command knows the key, and if not, what helps."""
    if problems := targets.problems():
        return f"NOT active: {targets.advice(problems)}"
    disabled = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0"
    waiting = any(type(finder).__module__ == "gaq_mace.hook.autoload" for finder in sys.meta_path)
    if disabled:
        return "off (TORCH_DEVICE_BACKEND_AUTOLOAD=0): use gaq_mace_train in place of mace_run_train"
    if waiting and is_installed():
        return "active: mace_run_train knows the key `quantization`"
    return "NOT active: reinstall gaq in this environment, or use gaq_mace_train"
