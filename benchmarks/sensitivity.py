"""Force error of 8 bits by weight tensor: one tensor is rounded at a time, with the same bits for all.

    python benchmarks/sensitivity.py [--model MODEL] [--frames 20] [--name NAME]

It works for models of both frameworks. `gaq.model.bits` and the presets follow from its results.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from pathlib import Path

import torch
from ase.io import read
from common import SHARED, write_result

import gaq
from gaq.adapter import adapter_for
from gaq.checks.errors import spaced
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document

ALIKE = dict.fromkeys(("sensitive_bits", "first_bits", "mixing_bits", "species_bits"))
SPEC = {"preset": "w8", "weights": ALIKE}


def groups(model: torch.nn.Module) -> dict[str, str]:
    """The group of each weight in the presets, by parameter name."""
    groups_by_name = {}
    package = type(adapter_for(model)).__module__.split(".")[0]
    for site in importlib.import_module(f"{package}.sites").find_sites(model):
        group = "sensitive" if site.sensitive else "first" if site.first else "mixing" if site.mixing else "rest"
        groups_by_name.update({f"{site.name}.{weight.path}": group for weight in site.weights})
    return groups_by_name


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
    group_of = groups(model)
    sensitivities = gaq.sensitivity(model, spaced(read(args.data, ":"), args.frames), SPEC)
    total = sum(tensor.force_difference**2 for tensor in sensitivities)
    rows: list[Document] = [
        {
            "parameter": tensor.parameter,
            "group": group_of[tensor.parameter],
            "weights": tensor.numel,
            "force_difference_mev_per_angstrom": tensor.force_difference,
            "share_of_squares": tensor.force_difference**2 / total,
        }
        for tensor in sensitivities
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
