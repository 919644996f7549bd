"""Which weight tensors 8 bits cost most in: one tensor rounded at a time, with the bits every one would have alike.

    python benchmarks/sensitivity.py [--model MODEL] [--frames 20] [--name NAME]

Works for models of either framework. `gaq.model.bits` and the presets follow from what this shows.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from ase.io import read
from common import SHARED, write_result

import gaq
from gaq.adapter import adapter_for
from gaq.checks.errors import spaced
from gaq.reporting.tables import markdown_table

ALIKE = dict.fromkeys(("sensitive_bits", "first_bits", "mixing_bits", "species_bits"))
SPEC = {"preset": "w8", "weights": ALIKE}


def groups(model: torch.nn.Module) -> dict[str, str]:
    """What the presets take each site for."""
    found = {}
    package = type(adapter_for(model)).__module__.split(".")[0]
    for site in importlib.import_module(f"{package}.sites").find_sites(model):
        group = "sensitive" if site.sensitive else "first" if site.first else "mixing" if site.mixing else "rest"
        found.update({f"{site.name}.{weight.path}": group for weight in site.weights})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models/mace_azobenzene.model")
    parser.add_argument("--data", type=Path, default=SHARED / "data/rmd17/azobenzene_train_01.xyz")
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--name", default="sensitivity_mace", help="of the result file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = gaq.load(args.model)
    group = groups(model)
    found = gaq.sensitivity(model, spaced(read(args.data, ":"), args.frames), SPEC)
    total = sum(own.force_difference**2 for own in found)
    rows: list[dict[str, Any]] = [
        {
            "parameter": own.parameter,
            "group": group[own.parameter],
            "weights": own.numel,
            "force_difference_mev_per_angstrom": own.force_difference,
            "share_of_squares": own.force_difference**2 / total,
        }
        for own in found
    ]
    shares = {
        name: {
            "share_of_squares": sum(row["share_of_squares"] for row in rows if row["group"] == name),
            "share_of_weights": sum(row["weights"] for row in rows if row["group"] == name)
            / sum(row["weights"] for row in rows),
        }
        for name in ("sensitive", "first", "mixing", "rest")
    }
    write_result(args.name, rows, model=args.model.name, data=args.data.name, frames=args.frames, groups=shares)
    print(markdown_table(rows, list(rows[0])))
    print(shares)


if __name__ == "__main__":
    main()
