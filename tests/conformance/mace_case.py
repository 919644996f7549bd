"""MACE in the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import torch
from case import Form, Outcome
from mace_models import build_model, trained_model, write_trained_model
from mace_runs import BASE, execute, write_data

from gaq_mace.weights import quantized_weights


class Adapted:
    """See `case.Case`."""

    name = "mace"
    variants = ("plain", "heads", "l2", "density", "correlation3", "residual_first")
    forms: Mapping[str, Form] = {".model": Form(), ".safetensors": Form()}
    force_mae = 33.823

    def start(self) -> None:
        torch.set_default_dtype(torch.float32)

    def build(self, variant: str, dtype: torch.dtype) -> torch.nn.Module:
        model: torch.nn.Module = build_model(variant, dtype)
        return model

    def trained(self, dtype: torch.dtype) -> torch.nn.Module:
        model: torch.nn.Module = trained_model(dtype)
        return model

    def write_trained(self, folder: Path) -> Path:
        return write_trained_model(folder / "trained.model")

    def codes(self, model: torch.nn.Module) -> Mapping[str, Any]:
        return quantized_weights(model)

    def train(self, folder: Path, quantization: Any) -> Outcome:
        write_data(folder)
        run = execute(folder, {**BASE, "quantization": quantization})
        return Outcome(run.code, run.log, run.model)
