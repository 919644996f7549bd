"""Encodings of features at equal bits, on a trained MACE model with 8-bit weights: what each costs the forces.

    python benchmarks/mace_encodings.py

One l = 1 vector takes the bits in the first column. All numbers are in float64, so they are the encoding's alone.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase.io import read
from common import SHARED, spaced, write_result

import gaq
from gaq import ptq
from gaq.adapter import adapter_for
from gaq.physics.conservation import central_difference_error
from gaq.physics.lee import local_equivariance_error
from gaq.reporting.tables import markdown_table
from gaq_mace.evaluate import MACEPotential


def mddq(magnitude: int, direction: int, kind: str = "linear", codebook: str = "octahedral") -> dict[str, Any]:
    return {
        "scheme": "mddq",
        "magnitude_bits": magnitude,
        "direction_bits": direction,
        "magnitude": kind,
        "codebook": codebook,
    }


def components(bits: int, granularity: str = "per_channel") -> dict[str, Any]:
    return {"scheme": "components", "magnitude_bits": bits, "granularity": granularity}


CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    ("components, one range a tensor", 24, 8, components(8, "per_tensor")),
    ("components, one range a channel", 24, 8, components(8)),
    ("8 log + 2x8 octahedral", 24, 8, mddq(8, 8, "log")),
    ("8 linear + 2x8 octahedral", 24, 8, mddq(8, 8)),
    ("12 linear + 2x6 geodesic table", 24, 8, mddq(12, 6, codebook="geodesic")),
    ("12 linear + 2x6 Fibonacci table", 24, 8, mddq(12, 6, codebook="fibonacci")),
    ("12 linear + 2x6 octahedral", 24, 8, mddq(12, 6)),
    ("8 linear + 2x12 octahedral", 32, 8, mddq(8, 12)),
    ("8 log + 2x12 octahedral", 32, 8, mddq(8, 12, "log")),
    ("components, one range a channel", 36, 12, components(12)),
    ("12 linear + 2x12 octahedral", 36, 12, mddq(12, 12)),
    ("components, one range a channel", 48, 16, components(16)),
    ("16 log + 2x16 octahedral", 48, 16, mddq(16, 16, "log")),
    ("16 linear + 2x16 octahedral (gaq)", 48, 16, mddq(16, 16)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reference = gaq.load(SHARED / "models/mace_azobenzene.model").double()
    test = read(SHARED / "data/rmd17/azobenzene_test_01.xyz", ":")
    calibration = read(SHARED / "data/rmd17/azobenzene_train_01.xyz", ":64")
    sample = spaced(test, 40)
    rows = []
    for name, bits, scalar_bits, vectors in CASES:
        spec = {"preset": "gaq", "scalars": {"bits": scalar_bits}, "vectors": vectors}
        model = gaq.prepare(copy.deepcopy(reference), spec)
        adapter = adapter_for(model)
        ptq.observe_ranges(adapter, model, calibration)
        gaq.convert(model)
        potential = MACEPotential(model, 20)
        forces = np.concatenate(potential(sample)[1])
        with adapter.unquantized(model):
            smooth = np.concatenate(potential(sample)[1])
        lee = local_equivariance_error(potential, spaced(test, 10), rotations=4)
        central = central_difference_error(potential, spaced(test, 6), components_per_structure=8)
        rows.append(
            {
                "bits_per_vector": bits,
                "scalar_bits": scalar_bits,
                "encoding": name,
                "lee_mev_per_angstrom": lee.mean_mev_per_angstrom,
                "force_difference_to_smooth_twin_mev_per_angstrom": float(1000 * np.abs(forces - smooth).mean()),
                "central_difference_relative_error": {f"{h:g}": e.relative_error for h, e in central.items()},
            }
        )
        print(rows[-1], flush=True)
    write_result("mace_encodings", rows)
    shown = [
        {
            "bits a vector": row["bits_per_vector"],
            "encoding": row["encoding"],
            "LEE": f"{row['lee_mev_per_angstrom']:.3f}",
            "dF": f"{row['force_difference_to_smooth_twin_mev_per_angstrom']:.3f}",
            "central differences at 0.01 A": f"{100 * row['central_difference_relative_error']['0.01']:.2f} %",
        }
        for row in rows
    ]
    print(markdown_table(shown, list(shown[0])))


if __name__ == "__main__":
    main()
