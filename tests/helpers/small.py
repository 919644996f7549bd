"""Small structures, the same on every machine, and configurations whose calibration takes no time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ase import Atoms


def without_distillation(preset: Any, **keys: Any) -> dict[str, Any]:
    """The mapping of a preset whose calibration takes no time."""
    return {"preset": preset, "distillation": {"steps": 0}, **keys}


def few_bits(preset: str, layered: bool = True) -> dict[str, Any]:
    """The same, with as few bits as larger models have: these here are so small that a size leaves room for many.

    Args:
        preset: name of the preset.
        layered: whether the model has interactions, as all but Allegro models do.
    """
    weights: dict[str, Any] = {} if preset.startswith("naive") else {"compression": None}
    if preset.startswith("w4"):
        weights |= {"sensitive_bits": 8} | ({"first_bits": 6, "mixing_bits": 5} if layered else {})
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
