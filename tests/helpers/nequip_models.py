"""Small NequIP and Allegro models, with random weights and trained, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trained
from small import diamond, few_bits, molecules, without_distillation

__all__ = [
    "VARIANTS",
    "build_model",
    "diamond",
    "few_bits",
    "molecules",
    "trained_model",
    "with_key",
    "without_distillation",
]

COMMON: dict[str, Any] = {
    "seed": 0,
    "r_max": 4.0,
    "type_names": ["H", "C", "O"],
    "avg_num_neighbors": 6.0,
    "per_type_energy_scales": 0.8,
    "per_type_energy_shifts": 0.1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"l_max": 1, "parity": False, "num_layers": 2, "num_features": 8, "radial_mlp_width": 16},
    "parity": {"l_max": 2, "parity": True, "num_layers": 3, "num_features": 4, "radial_mlp_width": 8},
    "wide": {"l_max": 1, "parity": False, "num_layers": 2, "num_features": 32, "radial_mlp_width": 16},
    "unequal": {"l_max": 2, "parity": True, "num_layers": 3, "num_features": [20, 9, 4], "radial_mlp_width": 8},
    "readout": {
        "l_max": 1,
        "parity": False,
        "num_layers": 2,
        "num_features": 8,
        "radial_mlp_width": 16,
        "readout_mlp_hidden_layers_depth": 1,
    },
    "allegro": {
        "_target_": "allegro",
        "l_max": 2,
        "parity": True,
        "num_layers": 2,
        "num_scalar_features": 8,
        "num_tensor_features": 4,
        "scalar_embed_mlp_hidden_layers_width": 16,
        "allegro_mlp_hidden_layers_width": 16,
        "readout_mlp_hidden_layers_width": 8,
        "radial_chemical_embed": {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed"},
    },
    "spline": {
        "_target_": "allegro",
        "l_max": 1,
        "parity": False,
        "num_layers": 3,
        "num_scalar_features": 8,
        "num_tensor_features": 4,
        "tp_path_channel_coupling": False,
        "allegro_mlp_hidden_layers_depth": 2,
        "allegro_mlp_nonlinearity": None,
        "radial_chemical_embed": {
            "_target_": "allegro.nn.TwoBodySplineScalarEmbed",
            "num_splines": 8,
            "spline_span": 6,
        },
    },
}


def build_model(variant: str = "plain", dtype: str = "float32", **changes: Any) -> Any:
    """A model over H, C and O with random weights."""
    options = {**COMMON, **VARIANTS[variant], "model_dtype": dtype, **changes}
    if options.pop("_target_", "nequip") == "allegro":
        pytest.importorskip("allegro", reason="needs Allegro: pip install '.[allegro]'")
        from allegro.model import AllegroModel

        return AllegroModel(**options)
    from nequip.model import NequIPGNNModel

    return NequIPGNNModel(**options)


def trained_model(dtype: str = "float32") -> Any:
    """The model of ``tests/data/nequip.safetensors``, trained on ethanol."""
    model = build_model(dtype=dtype, **trained.options("nequip"))
    return trained.load_parameters(model, "nequip")


def with_key(value: Any) -> Callable[[Any], None]:
    """An edit of a training configuration that puts the key ``quantization`` at its top level."""

    def edit(config: Any) -> None:
        config["quantization"] = value

    return edit
