"""Time of one MD step (energy + forces) through the stock MACECalculator: quantized against FP32, in the same run.

    python benchmarks/mace_speed.py [--threads 1] [--repeats 30]

The models alternate step by step on the same structures. The quoted ratio is the median of the ratios of the pairs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import mace
import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read
from common import SHARED, write_result
from mace import modules
from mace.calculators import MACECalculator

import gaq
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document

PRESETS = ("w8", "gaq", "w8a8")


def water_box(molecules: int, seed: int = 0) -> Atoms:
    """A periodic box of water at 1 g/cm³ with random orientations on a cubic grid."""
    rng = np.random.default_rng(seed)
    per_side = round(molecules ** (1 / 3))
    side = (molecules * 18.015 / 6.02214e23 / 1.0) ** (1 / 3) * 1e8
    box = Atoms(cell=[side] * 3, pbc=True)
    for i in range(per_side**3):
        water = molecule("H2O")
        water.rotate(rng.uniform(0, 360), rng.normal(size=3))
        cell = np.array([i % per_side, i // per_side % per_side, i // per_side**2]) + 0.5
        water.translate(cell * side / per_side - water.get_center_of_mass())
        box += water
    box.wrap()
    return box


def big_model(elements: list[int], density: bool = False, **changes: Any) -> torch.nn.Module:
    """128x0e+128x1o, l <= 3, correlation 3, 2 layers, random weights: the size of a foundation model.

    `density` adds what later foundation models have: messages divided by the density of edges, distances scaled by
    covalent radii (Agnesi), and ZBL repulsion. Changes are arguments of the model.
    """
    from e3nn import o3

    torch.manual_seed(0)
    kind = "Density" if density else ""
    options: Document = {"distance_transform": "Agnesi", "pair_repulsion": True} if density else {}
    options = {"hidden_irreps": o3.Irreps("128x0e + 128x1o")} | options | changes
    return modules.ScaleShiftMACE(
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
        r_max=5.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=modules.interaction_classes[f"RealAgnostic{kind}ResidualInteractionBlock"],
        interaction_cls_first=modules.interaction_classes[f"RealAgnostic{kind}InteractionBlock"],
        num_interactions=2,
        num_elements=len(elements),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(len(elements)),
        avg_num_neighbors=30.0,
        atomic_numbers=elements,
        correlation=3,
        radial_type="bessel",
        **options,
    )


def compare(path: Path, structure: Atoms, folder: Path, repeats: int) -> list[Document]:
    calculators = {"fp32": MACECalculator(model_paths=str(path), device="cpu", default_dtype="float32")}
    config = {"distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
    for preset in PRESETS:
        model = gaq.prepare(gaq.load(path), {"preset": preset, **config})
        gaq.calibrate(model, [structure], progress=False)
        out = folder / f"{preset}.model"
        gaq.save(gaq.convert(model), out)
        calculators[preset] = MACECalculator(model_paths=str(out), device="cpu", default_dtype="float32")
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in calculators}
    for repeat in range(repeats + 2):
        atoms = structure.copy()
        atoms.positions += rng.normal(scale=0.01, size=atoms.positions.shape)
        for name, calculator in calculators.items():
            start = time.perf_counter()
            calculator.calculate(atoms, ["energy", "forces"])
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    base = np.array(times["fp32"])
    return [
        {
            "preset": name,
            "median_seconds_per_step": float(np.median(values)),
            "median_ratio_to_fp32": float(np.median(np.array(values) / base)),
        }
        for name, values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        azobenzene = read(SHARED / "data/rmd17/azobenzene_test_01.xyz", 0)
        big = folder / "big.model"
        torch.save(big_model([1, 6, 7, 8]), big)
        cases = [
            ("32x0e+32x1o, l<=2, correlation 2", SHARED / "models/mace_azobenzene.model", azobenzene, args.repeats),
            ("128x0e+128x1o, l<=3, correlation 3", big, azobenzene, args.repeats),
            ("128x0e+128x1o, l<=3, correlation 3", big, water_box(64), max(5, args.repeats // 5)),
        ]
        for label, path, structure, repeats in cases:
            for row in compare(path, structure, folder, repeats):
                rows.append(
                    {"model": label, "structure": f"{structure.get_chemical_formula()} ({len(structure)} atoms)", **row}
                )
                print(rows[-1], flush=True)
    write_result("mace_speed", rows, mace=mace.__version__)
    shown = [
        {
            **r,
            "median_seconds_per_step": f"{r['median_seconds_per_step']:.4f}",
            "median_ratio_to_fp32": f"{r['median_ratio_to_fp32']:.2f}",
        }
        for r in rows
    ]
    print(markdown_table(shown, list(shown[0])))


if __name__ == "__main__":
    main()
