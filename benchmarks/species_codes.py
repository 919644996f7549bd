"""Gain of codes that are chosen together: only the self-connections of a NequIP model are rounded, either way.

    python benchmarks/species_codes.py [--model MODEL] [--frames 60] [--bits 2 3 4 6 8]

Forces are compared with those of the float model, right after rounding: nothing is calibrated or trained.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.io import read
from common import SHARED, write_result

import gaq
from gaq.adapter import adapter_for
from gaq.checks.errors import spaced
from gaq.quantizers.species import SpeciesWeightQuantizer
from gaq.reporting.tables import markdown_table


def difference(model: Any, frames: list[Any], bits: int, together: bool) -> float:
    """Mean absolute force difference to the float model, meV/Å."""
    adapter = adapter_for(model)
    exact = np.concatenate(adapter.potential(model)(frames)[1])
    species_bits = bits if together else None
    weights = {
        "bits": bits,
        "first_bits": None,
        "sensitive_bits": 16,
        "species_bits": species_bits,
        "compression": None,
    }
    rounded = gaq.prepare(copy.deepcopy(model), {"preset": "w8", "weights": weights})
    for name, quantizer in adapter.weight_quantizers(rounded).items():
        quantizer.enabled = name.endswith(".sc.weight")
        if quantizer.enabled and together != isinstance(quantizer, SpeciesWeightQuantizer):
            raise SystemExit(f"{name}: its model has too many types for codes chosen together.")
    return float(1000 * np.abs(np.concatenate(adapter.potential(rounded)(frames)[1]) - exact).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models/nequip_azobenzene.ckpt")
    parser.add_argument("--data", type=Path, default=SHARED / "data/rmd17/azobenzene_test_01.xyz")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = gaq.load(args.model)
    frames = spaced(read(args.data, ":"), args.frames)
    rows = [
        {
            "bits": bits,
            "nearest_mev_per_angstrom": difference(model, frames, bits, together=False),
            "together_mev_per_angstrom": difference(model, frames, bits, together=True),
        }
        for bits in args.bits
    ]
    print(markdown_table(rows, list(rows[0])))
    write_result("species_codes", rows, model=args.model.name, data=args.data.name, frames=len(frames))


if __name__ == "__main__":
    main()
