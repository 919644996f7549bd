"""NequIP for benchmarks/gpu.py: one model in all its forms."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from gpu_cases import COMPILED, CUEQ, FP32, OEQ, PRESETS, VARIANTS, water

import gaq


class Nequip:
    """One model through NequIP's own modifiers and ours."""

    def __init__(self, options: argparse.Namespace) -> None:
        from nequip.model import NequIPGNNModel
        from nequip.utils.global_state import set_global_state

        set_global_state()
        self.device, self.tiny = options.device, options.tiny
        sizes = {"num_layers": 2, "num_features": 8, "l_max": 1} if self.tiny else {"num_layers": 4, "num_features": 64}
        made = {
            "seed": 1,
            "model_dtype": "float32",
            "type_names": ["H", "O"],
            "r_max": 2.5 if self.tiny else 5.0,
            "l_max": 2,
            "parity": True,
            "avg_num_neighbors": 30.0,
            **sizes,
        }
        self.build = lambda **extra: NequIPGNNModel(**made, **extra)

    def missing(self, kind: str) -> str | None:
        if kind in VARIANTS:
            return "of MACE's engine only"
        package = {CUEQ: "cuequivariance_torch", OEQ: "openequivariance"}.get(kind)
        if package is not None and importlib.util.find_spec(package) is None:
            return "not installed"
        return "needs a card" if package is not None and self.device == "cpu" else None

    def make(self, kind: str) -> Any:
        from nequip.model.modify_utils import modify

        model: Any = self.build(compile_mode="compile") if kind == COMPILED else self.build()
        modifier = {CUEQ: "enable_CuEquivariance", OEQ: "enable_OpenEquivariance"}.get(kind)
        if modifier is not None:
            model = modify(model, [{"modifier": modifier}])
        if kind in PRESETS:
            spec = {"preset": kind, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
            model = gaq.prepare(model, spec)
            gaq.calibrate(model, [water(3 if self.tiny else 24)], progress=False)
            model = gaq.convert(model)
        if kind == FP32 or kind in PRESETS:
            from gaq_nequip.fused import fuse

            fuse(model, self.device)
            model.requires_grad_(False)  # as what is compiled has it: tables of weights have no gradient
        model = model.to(self.device).eval()

        def bind(atoms: Any) -> Callable[[], torch.Tensor]:
            from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase

            data = compute_neighborlist_(from_ase(atoms), r_max=2.5 if self.tiny else 5.0)
            data[AtomicDataDict.ATOM_TYPE_KEY] = torch.tensor([0 if z == 1 else 1 for z in atoms.numbers])
            data = AtomicDataDict.to_(data, self.device)
            for key, value in data.items():
                if torch.is_tensor(value) and value.dtype == torch.float32:
                    data[key] = value.double()

            def step() -> torch.Tensor:
                return model(dict(data))[AtomicDataDict.FORCE_KEY].detach()

            return step

        return bind
