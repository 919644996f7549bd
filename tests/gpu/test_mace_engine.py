"""MACE's engine through the kernels for cards: the reference path's energies, forces and stresses."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("mace") is None:
    pytest.skip("MACE is not installed", allow_module_level=True)

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from e3nn import o3
from mace import modules

import gaq
from gaq.adapter import adapter_for
from gaq_mace import engine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(kind: str, hidden: str, lmax: int, correlation: int, **options: Any) -> torch.nn.Module:
    torch.manual_seed(3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return modules.ScaleShiftMACE(
            atomic_inter_scale=0.7,
            atomic_inter_shift=0.1,
            r_max=3.0,
            num_bessel=4,
            num_polynomial_cutoff=5,
            max_ell=lmax,
            interaction_cls=modules.interaction_classes[f"RealAgnostic{kind}ResidualInteractionBlock"],
            interaction_cls_first=modules.interaction_classes[f"RealAgnostic{kind}InteractionBlock"],
            num_interactions=2,
            num_elements=3,
            hidden_irreps=o3.Irreps(hidden),
            MLP_irreps=o3.Irreps("4x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=np.array([-1.0, -2.0, -3.0]),
            avg_num_neighbors=4.0,
            atomic_numbers=[1, 6, 8],
            correlation=correlation,
            radial_type="bessel",
            **options,
        )
    finally:
        torch.set_default_dtype(before)


WATER = molecule("H2O")
CRYSTAL = bulk("C", "diamond", a=3.6)
CRYSTAL.rattle(0.05, seed=0)
LONELY = Atoms("OH", positions=[[0, 0, 0], [0, 0, 9.0]])


def converted(model: torch.nn.Module, preset: str, structures: list[Atoms]) -> torch.nn.Module:
    plain = {"preset": preset, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
    prepared = gaq.prepare(model, plain)
    gaq.calibrate(prepared, structures, progress=False)
    return gaq.convert(prepared)


def batch_of(model: torch.nn.Module, structures: list[Atoms]) -> dict[str, Any]:
    batch: Any = next(iter(adapter_for(model).batches(model, structures, len(structures))))
    plain = batch if isinstance(batch, dict) else batch.to_dict()
    return {key: value.clone().to(DEVICE) if torch.is_tensor(value) else value for key, value in plain.items()}


@pytest.mark.parametrize(
    ("kind", "hidden", "lmax", "correlation", "options", "preset"),
    [
        ("", "4x0e+4x1o", 3, 2, {}, "gaq"),
        ("", "6x0e", 2, 3, {"distance_transform": "Agnesi"}, "w8"),
        ("Density", "4x0e+4x1o", 1, 2, {}, "gaq"),
    ],
)
def test_the_engine_is_the_reference(
    kind: str, hidden: str, lmax: int, correlation: int, options: dict[str, Any], preset: str
) -> None:
    model = converted(make(kind, hidden, lmax, correlation, **options), preset, [WATER, CRYSTAL]).to(DEVICE)
    structures = [WATER, CRYSTAL, LONELY]
    assert engine.serves(model, {})
    ours = model(batch_of(model, structures), training=False, compute_stress=True)
    with engine.disabled():
        theirs = model(batch_of(model, structures), training=False, compute_stress=True)
    for key in ("energy", "forces", "stress", "node_feats"):
        scale = max(1.0, float(theirs[key].detach().abs().max()))
        torch.testing.assert_close(
            ours[key].detach(), theirs[key].detach(), rtol=0, atol=2e-6 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert float(theirs["forces"].abs().max()) > 1e-3
