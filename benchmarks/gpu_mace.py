"""MACE for benchmarks/gpu.py: one model in all its forms."""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import mace  # before e3nn
import mace.modules
import numpy as np
import torch
from e3nn import o3
from gpu_cases import COMPILED, CUEQ, FP32, GRAPH, OEQ, PRESETS, VARIANTS, as_chosen, water
from mace.calculators import MACECalculator
from mace_speed import big_model

import gaq
from gaq_mace.engine import accelerate, engine_of


def mace_model(tiny: bool) -> torch.nn.Module:
    if not tiny:
        return big_model([1, 8])
    torch.manual_seed(0)
    return mace.modules.ScaleShiftMACE(
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
        r_max=1.6,
        num_bessel=4,
        num_polynomial_cutoff=5,
        max_ell=1,
        interaction_cls=mace.modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=mace.modules.interaction_classes["RealAgnosticInteractionBlock"],
        num_interactions=2,
        num_elements=2,
        hidden_irreps=o3.Irreps("8x0e + 8x1o"),
        MLP_irreps=o3.Irreps("4x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(2),
        avg_num_neighbors=3.0,
        atomic_numbers=[1, 8],
        correlation=2,
        radial_type="bessel",
    )


class Mace:
    """Calculators of one model in all its forms."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.tiny = options.device, options.tiny
        self.model = mace_model(options.tiny).float()

    def missing(self, kind: str) -> str | None:
        """The reason why a row cannot be measured here, None if it can."""
        package = {CUEQ: "cuequivariance_torch", OEQ: "openequivariance"}.get(kind)
        if package is not None and importlib.util.find_spec(package) is None:
            return "not installed"
        return "needs a GPU" if (package is not None or kind == GRAPH) and self.device == "cpu" else None

    def make(self, kind: str) -> Any:
        """A function that takes a structure and returns a step: a function without arguments that returns forces."""
        model = copy.deepcopy(self.model)
        options: dict[str, Any] = {
            COMPILED: {"compile_mode": "default"},
            CUEQ: {"enable_cueq": True},
            OEQ: {"enable_oeq": True},
        }.get(kind, {})
        as_chosen(kind)
        if kind in PRESETS or kind in VARIANTS:
            preset = "gaq" if kind in VARIANTS else kind
            spec = {"preset": preset, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
            model = gaq.prepare(model, spec)
            gaq.calibrate(model, [water(3 if self.tiny else 24)], progress=False)
            model = gaq.convert(model)
        model = model.to(self.device)
        calculator = MACECalculator(models=[model], device=self.device, default_dtype="float32", **options)
        used = calculator.models[0]
        if kind == FP32:
            accelerate(used)

        def bind(atoms: Any) -> Callable[[], torch.Tensor]:
            batch = calculator._atoms_to_batch(atoms)

            def step() -> torch.Tensor:
                data = calculator._clone_batch(batch).to_dict()
                compiled = bool(calculator.use_compile)
                output = used(data, compute_stress=False, training=compiled)
                engine = engine_of(used) if kind == GRAPH else None
                if engine is not None and engine.graphs.failed is not None:
                    raise RuntimeError(f"not recorded: {engine.graphs.failed}")
                # A compiled calculator pads the batch with an atom.
                return output["forces"].detach()[: len(atoms)]

            return step

        return bind
