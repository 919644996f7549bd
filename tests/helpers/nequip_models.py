"""Small NequIP and Allegro models with random weights, the same on every machine, and structures to run them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ase import Atoms

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


def without_distillation(preset: Any, **keys: Any) -> dict[str, Any]:
    """The mapping of a preset whose calibration takes no time."""
    return {"preset": preset, "distillation": {"steps": 0}, **keys}


def few_bits(preset: str) -> dict[str, Any]:
    """The same, with as few bits as larger models have: these here are so small that a size leaves room for many."""
    weights: dict[str, Any] = {} if preset.startswith("naive") else {"compression": None}
    if preset.startswith("w4"):
        weights |= {"sensitive_bits": 8, "first_bits": 6, "mixing_bits": 5}
    return without_distillation(preset, weights=weights)


def molecules(seed: int = 0, amplitude: float = 0.1) -> list[Atoms]:
    """Four small molecules, distorted."""
    import numpy as np
    from ase.build import molecule

    structures = [molecule(name) for name in ("CH3CH2OH", "H2O", "CH4", "CO2")]
    generator = np.random.default_rng(seed)
    for atoms in structures:
        atoms.positions += generator.normal(scale=amplitude, size=atoms.positions.shape)
    return structures


def diamond() -> Atoms:
    """A distorted diamond cell, smaller than the cutoff: atoms see their own images."""
    from ase.build import bulk

    atoms = bulk("C", "diamond", a=3.6)
    atoms.rattle(0.08, seed=3)
    return atoms


def with_key(value: Any) -> Callable[[Any], None]:
    """An edit of a training configuration that puts the key ``quantization`` at its top level."""

    def edit(config: Any) -> None:
        config["quantization"] = value

    return edit
