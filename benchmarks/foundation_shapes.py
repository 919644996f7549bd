"""Models of the shapes of published MACE foundation models, with random weights, and cells to run them on.

The options are those of the published configurations, as far as they shape the computation: the numbers of elements,
channels and radial functions, the blocks, the transform of distances, heads, embeddings of charge and spin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule

RESIDUAL = "RealAgnosticResidualInteractionBlock"
NON_LINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
ALL_ELEMENTS = [*range(1, 84), *range(89, 95)]
ORGANIC = [1, 6, 7, 8, 9, 15, 16, 17, 35, 53]
METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")


def _embeddings(channels: int) -> dict[str, dict[str, Any]]:
    common = {"type": "categorical", "per": "graph", "in_dim": 1, "emb_dim": channels}
    return {
        "total_spin": {**common, "num_classes": 101, "offset": 0},
        "total_charge": {**common, "num_classes": 201, "offset": 100},
    }


MP0: dict[str, Any] = {"interaction_cls": RESIDUAL, "interaction_cls_first": RESIDUAL, "r_max": 6.0, "num_bessel": 10}
DENSITY: dict[str, Any] = {
    "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
    "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
    "pair_repulsion": True,
    "distance_transform": "Agnesi",
    "r_max": 6.0,
    "num_bessel": 8,
}
OFF: dict[str, Any] = {
    "interaction_cls_first": "RealAgnosticInteractionBlock",
    "interaction_cls": RESIDUAL,
    "num_bessel": 8,
    "atomic_numbers": ORGANIC,
}
MH: dict[str, Any] = {
    "interaction_cls_first": NON_LINEAR,
    "interaction_cls": NON_LINEAR,
    "readout_cls": "NonLinearBiasReadoutBlock",
    "pair_repulsion": True,
    "distance_transform": "Agnesi",
    "apply_cutoff": False,
    "use_edge_irreps_first": True,
    "use_agnostic_product": True,
    "r_max": 6.0,
    "num_bessel": 10,
}
OMOL: dict[str, Any] = {
    "interaction_cls_first": NON_LINEAR,
    "interaction_cls": NON_LINEAR,
    "apply_cutoff": False,
    "num_interactions": 3,
    "correlation": 2,
    "r_max": 6.0,
    "num_bessel": 8,
}
HEADS = ["omat_pbe", "matpes_r2scan", "spice_wb97m", "rgd1_b3lyp", "oc20_pbe", "default"]

SHAPES: dict[str, dict[str, Any]] = {
    "MP-0 small": {**MP0, "hidden_irreps": "128x0e"},
    "MP-0 medium": {**MP0, "hidden_irreps": "128x0e+128x1o"},
    "MP-0 large": {**MP0, "hidden_irreps": "128x0e+128x1o+128x2e"},
    "OMAT small": {**DENSITY, "hidden_irreps": "128x0e"},
    "MPA/OMAT medium": {**DENSITY, "hidden_irreps": "128x0e+128x1o"},
    "OFF small": {**OFF, "hidden_irreps": "96x0e", "r_max": 4.5},
    "OFF medium": {**OFF, "hidden_irreps": "128x0e+128x1o", "r_max": 5.0},
    "OFF large": {**OFF, "hidden_irreps": "192x0e+192x1o+192x2e", "r_max": 5.0},
    "MH-1 (a quarter of its channels)": {**MH, "hidden_irreps": "128x0e+128x1o", "edge_irreps": "32x0e+32x1o"},
    "MH-1": {**MH, "hidden_irreps": "512x0e+512x1o", "edge_irreps": "128x0e+128x1o", "heads": HEADS},
    "OMOL (a sixteenth of its channels)": {
        **OMOL,
        "hidden_irreps": "64x0e+64x1o+64x2e",
        "edge_irreps": "32x0e+32x1o+32x2e",
        "embedding_specs": _embeddings(64),
    },
    "OMOL": {
        **OMOL,
        "hidden_irreps": "1024x0e+1024x1o+1024x2e",
        "edge_irreps": "128x0e+128x1o+128x2e",
        "embedding_specs": _embeddings(1024),
    },
}


def build(options: dict[str, Any], channels: int | None = None) -> Any:
    """A float32 model of a shape, with random weights.

    Args:
        options: one of `SHAPES`.
        channels: channels of an irrep instead of the shape's own, for tests.
    """
    import mace  # noqa: F401  (before e3nn)
    import torch
    from e3nn import o3
    from mace import modules

    numbers = options.get("atomic_numbers", ALL_ELEMENTS)
    heads = options.get("heads", ["Default"])
    config: dict[str, Any] = {
        "num_polynomial_cutoff": 5,
        "max_ell": 3,
        "num_interactions": 2,
        "correlation": 3,
        "num_elements": len(numbers),
        "atomic_numbers": numbers,
        "atomic_energies": np.zeros((len(heads), len(numbers))),
        "MLP_irreps": "16x0e",
        "gate": torch.nn.functional.silu,
        "avg_num_neighbors": 60.0,
        "radial_type": "bessel",
        "radial_MLP": [64, 64, 64],
        "atomic_inter_scale": [0.8] * len(heads),
        "atomic_inter_shift": [0.0] * len(heads),
        "heads": heads,
        **options,
    }
    for key in ("hidden_irreps", "edge_irreps", "MLP_irreps"):
        if key in config:
            irreps = o3.Irreps(config[key])
            few = channels is not None and key != "MLP_irreps"
            config[key] = o3.Irreps([(channels, ir) for _, ir in irreps]) if few else irreps
    if channels is not None and "embedding_specs" in config:
        config["embedding_specs"] = _embeddings(channels)
    for key in ("interaction_cls", "interaction_cls_first"):
        config[key] = modules.interaction_classes[config[key]]
    if "readout_cls" in config:
        config["readout_cls"] = getattr(modules, config["readout_cls"])
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return modules.ScaleShiftMACE(**config)
    finally:
        torch.set_default_dtype(before)


def alloy_cell(rng: np.random.Generator, side: int = 4) -> Atoms:
    """A random alloy of seven elements on a distorted fcc lattice, side³ atoms (64)."""
    atoms = bulk("Cu", "fcc", a=rng.uniform(3.85, 4.05)).repeat(side)
    atoms.symbols[:] = rng.choice(METALS, len(atoms))
    atoms.rattle(0.08, rng=rng)
    return atoms


def molecular_cell(rng: np.random.Generator, side: int = 4) -> Atoms:
    """Water, methanol and methane in a periodic box, `side` times 16 atoms (64)."""
    names = [*["H2O"] * 10, *["CH3OH"] * 4, *["CH4"] * 2]
    grid = np.array([side, 2, 2])
    names = names if side == 4 else names[-4 * side :]
    rng.shuffle(names)
    spacing = 3.7  # Å
    box = Atoms(cell=spacing * grid, pbc=True)
    for place, name in zip(np.ndindex(*grid), names, strict=True):
        one = molecule(name)
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.translate(spacing * (np.array(place) + 0.5) - one.get_center_of_mass())
        box += one
    box.rattle(0.03, rng=rng)
    # Under the names that MACE's readers of files and its calculator look for.
    box.info.update(total_charge=0, total_spin=1, charge=0, spin=1)
    return box


def cells(name: str, count: int, side: int = 4) -> list[Atoms]:
    """Cells of 64 atoms that a shape is calibrated and timed on: molecules for OFF and OMOL, alloys for the others."""
    rng = np.random.default_rng(0)
    make = molecular_cell if name.startswith(("OFF", "OMOL")) else alloy_cell
    return [make(rng, side) for _ in range(count)]
