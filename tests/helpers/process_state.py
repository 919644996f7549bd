"""State that a whole process shares, as values that can be compared; for scripts that run in a fresh process."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from typing import Any

import numpy as np
import torch


def of_nequip() -> dict[str, Any]:
    """What NequIP and e3nn keep, where they have been imported."""
    found: dict[str, Any] = {}
    global_state: Any = sys.modules.get("nequip.utils.global_state")
    if global_state is not None:
        found["nequip is set up"] = global_state._GLOBAL_STATE_INITIALIZED
        found["nequip's latest state"] = dict(global_state._latest_global_config)
        found["workflow"] = sys.modules["nequip.scripts._workflow_utils"].get_workflow_state()  # type: ignore[attr-defined]
        found["tolerance"] = sys.modules["nequip.utils.dtype"]._FLOAT32_MODEL_TOL  # type: ignore[attr-defined]
        found["e3nn"] = dict(sys.modules["e3nn"].get_optimization_defaults())  # type: ignore[attr-defined]
        found["dynamo"] = torch._dynamo.config.capture_scalar_outputs
        compile_: Any = sys.modules.get("nequip.scripts.compile")
        if compile_ is not None:
            found["compile"] = (compile_.load_saved_model, compile_.modify)
    return found


def state() -> dict[str, Any]:
    """Everything a call might change."""
    root = logging.getLogger()
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": (
            random.getstate(),
            np.random.get_state()[1].tobytes(),  # noqa: NPY002 (its state)
            torch.get_rng_state().numpy().tobytes(),
        ),
        "environment": dict(os.environ),
        "arguments": list(sys.argv),
        "logging": (root.manager.disable, root.level, list(root.handlers)),
        "warnings": list(warnings.filters),
        **of_nequip(),
    }


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not as it was. Modules that were imported in between are new, not changed."""
    return [f"{name}: {before[name]!r} -> {after[name]!r}"[:300] for name in before if before[name] != after[name]]
