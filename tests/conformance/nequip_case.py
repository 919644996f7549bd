"""NequIP and Allegro in the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from case import Form, Outcome
from nequip_models import build_model, trained_model, with_key
from nequip_runs import train, write_trained_checkpoint

from gaq_nequip.weights import quantized_weights


class Adapted:
    """See `case.Case`."""

    name = "nequip"
    variants = ("plain", "parity", "wide", "readout", *(("allegro", "spline") if find_spec("allegro") else ()))
    # Checkpoints hold float weights on the quantized grid. Packages fold the self-connection by type, and include
    # the code that reads them, which is as large as these small models.
    forms: Mapping[str, Form] = {
        ".ckpt": Form(packed=False, checked=False),
        ".nequip.zip": Form(packed=False, tolerance=5e-4),
    }
    force_mae = 74.012

    def start(self) -> None:
        from nequip.utils.global_state import set_global_state

        set_global_state()
        torch.set_default_dtype(torch.float64)  # NequIP sets it only once, perhaps for earlier tests

    def build(self, variant: str, dtype: torch.dtype) -> torch.nn.Module:
        model: torch.nn.Module = build_model(variant, str(dtype).removeprefix("torch."))
        return model

    def trained(self, dtype: torch.dtype) -> torch.nn.Module:
        model: torch.nn.Module = trained_model(str(dtype).removeprefix("torch."))
        return model

    def write_trained(self, folder: Path) -> Path:
        return write_trained_checkpoint(folder / "trained.ckpt")

    def codes(self, model: torch.nn.Module) -> Mapping[str, Any]:
        return quantized_weights(model)

    def train(self, folder: Path, quantization: Any) -> Outcome:
        run = train(folder, with_key(quantization))
        return Outcome(run.code, run.text, run.best)
