"""Cases of benchmarks/gpu.py: kinds of models, by the names of their rows, and boxes of water."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import molecule

from gaq import settings
from gaq.untyped import Document

STOCK, COMPILED, CUEQ, OEQ = "stock eager", "stock compiled", "cuEquivariance", "OpenEquivariance"
FP32, PRESETS = "engine fp32", ("w8", "gaq")
GRAPH, NO_GRAPH = "engine quantized, CUDA graph", "engine quantized, no graph"
INT8 = "engine quantized, int8 linears"
VARIANTS: dict[str, Document] = {
    GRAPH: {"cuda_graphs": 10**9},
    NO_GRAPH: {"cuda_graphs": 0},
    INT8: {"linear": "int8"},
}
"""Rows of the preset gaq, with the settings that choose how it runs."""

_chosen = ExitStack()


def as_chosen(kind: str) -> None:
    """Set the settings of a row until the next call; all others are those of the environment."""
    _chosen.close()
    _chosen.enter_context(settings.override(**VARIANTS.get(kind, {})))


def water(atoms: int) -> Any:
    """A periodic box of about `atoms` atoms of water at 1 g/cm³, randomly rotated on a grid of complete layers."""
    rng = np.random.default_rng(0)
    molecules = max(1, round(atoms / 3))
    side = round(molecules ** (1 / 3)) or 1
    layers = max(1, round(molecules / side**2))
    spacing = (18.015 / 6.02214e23) ** (1 / 3) * 1e8
    box = Atoms(cell=np.array([side, side, layers]) * spacing, pbc=True)
    for i in range(side * side * layers):
        water_molecule = molecule("H2O")
        water_molecule.rotate(rng.uniform(0, 360), rng.normal(size=3))
        place = np.array([i % side, i // side % side, i // side**2]) + 0.5
        water_molecule.translate(place * spacing - water_molecule.get_center_of_mass())
        box += water_molecule
    box.wrap()
    return box
