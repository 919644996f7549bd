"""Effect of the equivariance loss: MACE on azobenzene, three ways to round vectors, with and without the loss.

    python benchmarks/equivariance_loss.py --work DIR [--variants naive ...] [--weights 0 100] [--seeds 1] [--epochs 4]

The runs are those of `mace_presets.py` (same YAML) on a part of its structures and with fewer epochs. The default
weight of the loss is that of the forces. Each run leaves a row in DIR, so an interrupted script continues where it was.
The rows in DIR are written to results/equivariance_loss.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import mace  # noqa: F401  (before e3nn)
import torch
import yaml
from ase.io import read, write
from common import SHARED, load_json, write_result
from mace_presets import training_input

import gaq
from gaq.adapter import adapter_for
from gaq.checks.errors import force_and_energy_mae, spaced
from gaq.checks.lee import local_equivariance_error
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document

SCHEDULE = {"start_epoch": 1, "anneal_epochs": 1}
VARIANTS: dict[str, Document] = {
    "naive": {"preset": "naive_w8a8"},
    "fixed": {"preset": "w8a8", "vectors": {"frame": "fixed", **SCHEDULE}},
    "local": {"preset": "w8a8", "vectors": SCHEDULE},
}
LABELS = {
    "naive": "components, axes of the laboratory (naive_w8a8)",
    "fixed": "magnitude and direction, axes of the laboratory (w8a8, frame: fixed)",
    "local": "magnitude and direction, local axes (w8a8)",
}


def key_of(variant: str, weight: float, seed: int) -> str:
    """Name of a run."""
    return f"{variant}_{weight:g}_{seed}"


def train(args: argparse.Namespace, variant: str, weight: float, seed: int) -> Document:
    """Run the stock command once; return the errors of its model and the seconds it took."""
    name = key_of(variant, weight, seed)
    folder: Path = args.work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = training_input(args, "w8a8", seed) | {"name": name}
    settings["quantization"] = {**VARIANTS[variant], "equivariance_loss": {"weight": weight}}
    (folder / "train.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
    start = time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        command = [Path(sys.executable).with_name("mace_run_train"), "--config", "train.yml"]
        subprocess.run(command, cwd=folder, stdout=log, stderr=log, check=True)
    seconds = time.perf_counter() - start
    model = gaq.load(folder / f"{name}.model")
    adapter = adapter_for(model)
    test = read(args.test, ":")
    errors = force_and_energy_mae(adapter.potential(model), spaced(test, args.frames))
    double = adapter.potential(adapter.in_float64(model))
    lee = local_equivariance_error(double, spaced(test, 20), rotations=4)
    return {
        "variant": variant,
        "loss_weight": weight,
        "seed": seed,
        "epochs": args.epochs,
        "structures": args.structures,
        "test_structures": args.frames,
        "force_mae_mev_per_angstrom": errors.force_mae_mev_per_angstrom,
        "energy_mae_mev_per_atom": errors.energy_mae_mev_per_atom,
        "lee_mev_per_angstrom": lee.mean_mev_per_angstrom,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--weights", type=float, nargs="*", default=[0.0, 100.0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--structures", type=int, default=200, help="to train on")
    parser.add_argument("--frames", type=int, default=200, help="test structures for the errors")
    args = parser.parse_args()
    args.model = SHARED / "models/mace_azobenzene.model"
    args.test = SHARED / "data/rmd17/azobenzene_test_01.xyz"
    args.work.mkdir(parents=True, exist_ok=True)
    args.train = args.work / "train.xyz"
    write(args.train, spaced(read(SHARED / "data/rmd17/azobenzene_train_01.xyz", ":"), args.structures))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runs = [(v, w, s) for s in args.seeds for v in args.variants for w in args.weights]
    for variant, weight, seed in runs:
        target = args.work / f"row_{key_of(variant, weight, seed)}.json"
        if not target.exists():
            row = train(args, variant, weight, seed)
            target.write_text(json.dumps(row, indent=1))
            print(json.dumps(row), flush=True)
    rows = [row for run in runs if (row := load_json(args.work / f"row_{key_of(*run)}.json"))]
    write_result("equivariance_loss", rows, work=args.work)
    shown = [
        {
            "vectors": LABELS[row["variant"]],
            "weight of the loss": f"{row['loss_weight']:g}",
            "seed": row["seed"],
            "F MAE": f"{row['force_mae_mev_per_angstrom']:.2f}",
            "LEE": f"{row['lee_mev_per_angstrom']:.4f}",
        }
        for row in rows
    ]
    print(markdown_table(shown, list(shown[0])))


if __name__ == "__main__":
    main()
