"""Force errors of feature encodings at equal bits, on a trained MACE model with 8-bit weights.

    python benchmarks/mace_encodings.py

One l = 1 vector takes the bits in the first column. All numbers are in float64, so they show the encoding alone. Rows
of the encodings in `EARLIER` come from an earlier version, which had them; the result file keeps them unchanged.
"""

from __future__ import annotations

import argparse
import copy

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase.io import read
from common import RESULTS, SHARED, load_json, write_result

import gaq
from gaq.adapter import adapter_for
from gaq.checks.errors import spaced
from gaq.reporting import open_model, quality
from gaq.reporting.tables import markdown_table
from gaq.training import ptq
from gaq.untyped import Document
from gaq_mace.evaluate import MACEPotential


def mddq(
    magnitude: int,
    direction: int,
    frame: str = "local",
    granularity: str = "per_atom",
    codebook: str = "octahedral",
) -> Document:
    return {
        "scheme": "mddq",
        "magnitude_bits": magnitude,
        "direction_bits": direction,
        "frame": frame,
        "granularity": granularity,
        "codebook": codebook,
    }


def components(bits: int, granularity: str = "per_channel") -> Document:
    return {"scheme": "components", "magnitude_bits": bits, "granularity": granularity}


def four_ways(magnitude: int, direction: int) -> list[tuple[str, int, int, Document]]:
    """Cases with axes of the laboratory or of the atom, and static or per-atom ranges."""
    bits = magnitude + 2 * direction
    return [
        (
            f"{magnitude} + 2x{direction}, {axes} axes, {ranges} ranges",
            bits,
            magnitude,
            mddq(magnitude, direction, frame, granularity),
        )
        for axes, frame in (("fixed", "fixed"), ("local", "local"))
        for ranges, granularity in (("static", "per_channel"), ("own", "per_atom"))
    ]


CASES: list[tuple[str, int, int, Document]] = [
    ("components, one static range a tensor", 24, 8, components(8, "per_tensor")),
    ("components, one static range a channel", 24, 8, components(8)),
    ("components, the atom's own range", 24, 8, components(8, "per_atom")),
    *four_ways(8, 8),
    ("12 + 2x6 geodesic table, local axes, own ranges", 24, 8, mddq(12, 6, codebook="geodesic")),
    *four_ways(8, 12),
    ("components, one static range a channel", 36, 12, components(12)),
    *four_ways(12, 12),
    ("components, one static range a channel", 48, 16, components(16)),
    ("components, the atom's own range", 48, 16, components(16, "per_atom")),
    *four_ways(16, 16),
]
EARLIER = ("8 log + 2x8, local axes, own ranges", "12 + 2x6 Fibonacci table, local axes, own ranges")


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
        scalars = {"bits": scalar_bits, "granularity": vectors["granularity"]}
        spec = {"preset": "gaq", "scalars": scalars, "vectors": vectors}
        model = gaq.prepare(copy.deepcopy(reference), spec)
        adapter = adapter_for(model)
        ptq.observe_ranges(adapter, model, calibration)
        gaq.convert(model)
        potential = MACEPotential(model, 20)
        forces = np.concatenate(potential(sample)[1])
        with adapter.unquantized(model):
            smooth = np.concatenate(potential(sample)[1])
        measured = quality(
            open_model(adapter, model), rotated=spaced(test, 10), displaced=spaced(test, 6), components=8
        )
        rows.append(
            {
                "bits_per_vector": bits,
                "scalar_bits": scalar_bits,
                "encoding": name,
                "lee_mev_per_angstrom": measured.metrics["lee_mev_per_angstrom"],
                "force_difference_to_smooth_twin_mev_per_angstrom": float(1000 * np.abs(forces - smooth).mean()),
                "central_difference_relative_error": measured.metrics["central_difference_relative_error"],
            }
        )
        print(rows[-1], flush=True)
    before = load_json(RESULTS / "mace_encodings.json").get("rows", [])
    rows += [row for row in before if row["encoding"] in EARLIER]
    write_result("mace_encodings", rows, of_an_earlier_version=EARLIER)
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
