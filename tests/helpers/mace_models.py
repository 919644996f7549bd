"""Small MACE models, with random weights and trained, the same on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trained
from small import diamond, few_bits, molecules, without_distillation

__all__ = [
    "VARIANTS",
    "agree",
    "build_model",
    "diamond",
    "few_bits",
    "molecules",
    "trained_model",
    "without_distillation",
    "write_trained_model",
]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads": {
        "heads": ["Default", "other"],
        "atomic_energies": [[-1.0, -3.0, -5.0], [-1.5, -2.5, -4.5]],
        "atomic_inter_scale": [0.8, 1.1],
        "atomic_inter_shift": [0.1, -0.2],
    },
    "l2": {"hidden_irreps": "8x0e+8x1o+8x2e"},
    "density": {
        "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
        "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
    },
    "correlation3": {"correlation": 3},
    # Radial functions of the species of both atoms.
    "agnesi": {"distance_transform": "Agnesi"},
    "residual_first": {"interaction_cls_first": "RealAgnosticResidualInteractionBlock"},
    "large": {"hidden_irreps": "32x0e+32x1o", "MLP_irreps": "16x0e", "radial_MLP": [64, 64, 64], "num_bessel": 8},
    # As many elements as foundation models have.
    "elements": {
        "hidden_irreps": "64x0e",
        "correlation": 3,
        "num_elements": 89,
        "atomic_energies": [-1.0] * 89,
        "atomic_numbers": list(range(1, 90)),
        "interaction_cls_first": "RealAgnosticResidualInteractionBlock",
    },
}


def build_model(variant: str = "plain", dtype: Any = None, seed: int = 0, **changes: Any) -> Any:
    """A ScaleShiftMACE over H, C and O with random weights."""
    import mace  # noqa: F401  (before e3nn)
    import numpy as np
    import torch
    from e3nn import o3
    from mace import modules

    options: dict[str, Any] = {
        "r_max": 4.0,
        "num_bessel": 6,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": "RealAgnosticResidualInteractionBlock",
        "interaction_cls_first": "RealAgnosticInteractionBlock",
        "num_interactions": 2,
        "num_elements": 3,
        "hidden_irreps": "8x0e+8x1o",
        "MLP_irreps": "8x0e",
        "gate": torch.nn.functional.silu,
        "atomic_energies": [-1.0, -3.0, -5.0],
        "avg_num_neighbors": 6.0,
        "atomic_numbers": [1, 6, 8],
        "correlation": 2,
        "radial_type": "bessel",
        "radial_MLP": [16, 16],
        "atomic_inter_scale": 0.8,
        "atomic_inter_shift": 0.1,
        **VARIANTS[variant],
        **changes,
    }
    for key in ("hidden_irreps", "MLP_irreps"):
        options[key] = o3.Irreps(options[key])
    for key in ("interaction_cls", "interaction_cls_first"):
        options[key] = modules.interaction_classes[options[key]]
    options["atomic_energies"] = np.array(options["atomic_energies"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return modules.ScaleShiftMACE(**options)
    finally:
        torch.set_default_dtype(before)


def trained_model(dtype: Any = None) -> Any:
    """The model of ``tests/data/mace.safetensors``, trained on ethanol."""
    model = build_model(dtype=dtype, **trained.options("mace"))
    return trained.load_parameters(model, "mace")


def write_trained_model(path: Path) -> Path:
    """Write it as `mace_run_train` writes its models."""
    import torch

    torch.save(trained_model(), path)
    return path


def agree(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """All outputs of a model are those of another way to compute them, within a share of the largest."""
    import torch

    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        if value is None:
            assert ours[key] is None, key
            continue
        assert ours[key].shape == value.shape, key
        assert ours[key].dtype == value.dtype, key
        tensor, value = ours[key].detach(), value.detach()
        scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
        torch.testing.assert_close(tensor, value, rtol=0, atol=tolerance * scale, msg=lambda m, k=key: f"{k}: {m}")
