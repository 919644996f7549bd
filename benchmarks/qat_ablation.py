"""Gain of each part of 4-bit fine-tuning: MACE on azobenzene, preset `w4a16`, stock `mace_run_train`, several seeds.

    python benchmarks/qat_ablation.py --work DIR [--seeds 1 2 3] [--variants fp32 plain ...] [--table]

The runs are those of `mace_presets.py` (same YAML, 8 epochs) with parts of `w4a16` left out or changed, and FP32 with
the same seeds. `after` is that FP32 run, rounded afterwards as `gaq quantize` does. Each run leaves a row in DIR, so
processes can share the work. `--table` gathers the rows into results/qat_ablation.json and a figure.

The rows of the variants in `EARLIER` come from an earlier version, which had the options they are named for. `--table`
keeps them unchanged in the result file.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
import yaml
from ase.io import read
from common import RESULTS, SHARED, load_json, write_result
from mace_presets import training_input

import gaq
from gaq.adapter import adapter_for
from gaq.checks.errors import spaced
from gaq.reporting import open_model, quality
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document

# Given bits instead of bits that follow from a size, and the distillation that was tuned for them.
GIVEN = {"compression": None, "sensitive_bits": 16}
COARSE = {"distillation": {"learning_rate": 3e-3 / 16}}
PLAIN = {"training": {"round_weights": "throughout", "average_rounded": False}, "weights": GIVEN, **COARSE}
MIXING = {"weights": {**GIVEN, "first_bits": 8, "mixing_bits": 6}, **COARSE}
VARIANTS: dict[str, Document | None] = {"fp32": None, "plain": PLAIN, "after": MIXING, "default": {}}
EARLIER = ("anneal", "warm", "learned", "both", "average", "first", "mixing", "throughout", "features")
LABELS = {
    "fp32": "FP32",
    "plain": "straight-through rounding only",
    "anneal": "+ ranges that shrink over 4 epochs",
    "warm": "+ start from calibrated rounding",
    "learned": "+ learned scales",
    "both": "+ both",
    "average": "+ both, averages of rounded weights",
    "first": "+ first interaction at 8 bits",
    "mixing": "+ 6 bits for what all passes through",
    "after": "the same bits, FP32 rounded after training",
    "throughout": "bits by size, rounded throughout",
    "default": "bits by size, rounded at the end (the default)",
    "features": "the same, features distilled beside forces",
}


def train(args: argparse.Namespace, variant: str, seed: int) -> Document:
    """Run the stock command once; return its cost and the errors of its model on the test structures."""
    if variant == "after":
        return rounded_afterwards(args, seed)
    name = f"{variant}_{seed}"
    folder: Path = args.work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = training_input(args, None if variant == "fp32" else "w4a16", seed) | {"name": name}
    if variant != "fp32":
        settings["quantization"].update(VARIANTS[variant] or {})
    (folder / "train.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
    command = Path(sys.executable).with_name("mace_run_train")
    start = time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        subprocess.run([command, "--config", "train.yml"], cwd=folder, stdout=log, stderr=log, check=True)
    seconds = time.perf_counter() - start
    model = gaq.load(folder / f"{name}.model")
    return row_of(args, model, variant, seed, seconds) | {"seconds_per_epoch": epoch_seconds(folder / "log.txt")}


def rounded_afterwards(args: argparse.Namespace, seed: int) -> Document:
    """Round the FP32 model of a seed without labels, and train that model first if it is not there."""
    trained = args.work / f"fp32_{seed}" / f"fp32_{seed}.model"
    if not trained.exists():
        train(args, "fp32", seed)
    start = time.perf_counter()
    model = gaq.quantize(gaq.load(trained), read(args.train, ":"), {"preset": "w4a16", **MIXING}, progress=False)
    return row_of(args, model, "after", seed, time.perf_counter() - start)


def row_of(args: argparse.Namespace, model: Any, variant: str, seed: int, seconds: float) -> Document:
    """The row of a model: its errors on the test structures, and the seconds it took."""
    measured = quality(open_model(adapter_for(model), model), spaced(read(args.test, ":"), args.frames))
    return {
        "variant": variant,
        "seed": seed,
        "epochs": args.epochs,
        **measured.metrics,
        "seconds": seconds,
    }


def epoch_seconds(log: Path) -> float | None:
    """Median time between the validation lines of MACE's log, in seconds."""
    lines = [line for line in log.read_text().splitlines() if "Epoch " in line and "loss=" in line]
    stamps = [datetime.datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in lines]
    steps = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(stamps)]
    return float(np.median(steps)) if steps else None


def label_of(variant: str) -> str:
    """The name of a variant in the figure and in the table."""
    return LABELS[variant] + (" (earlier version)" if variant in EARLIER else "")


def table(args: argparse.Namespace) -> None:
    """Write the result file and the figure and print the table, for the runs in the working directory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    before = load_json(RESULTS / "qat_ablation.json")
    rows = [row for v in VARIANTS for s in range(20) if (row := load_json(args.work / f"row_{v}_{s}.json"))]
    base = {row["seed"]: row for row in rows if row["variant"] == "fp32"}
    summary = [entry for entry in before.get("summary", []) if entry["variant"] in EARLIER]
    for variant in VARIANTS:
        runs = [row for row in rows if row["variant"] == variant and row["seed"] in base]
        if not runs:
            continue
        ratios = np.array(
            [row["force_mae_mev_per_angstrom"] / base[row["seed"]]["force_mae_mev_per_angstrom"] for row in runs]
        )
        summary.append(
            {
                "variant": variant,
                "seeds": [row["seed"] for row in runs],
                "force_ratio_by_seed": ratios.tolist(),
                "force_ratio": float(ratios.mean()),
                "standard_error": float(ratios.std(ddof=1) / len(runs) ** 0.5) if len(runs) > 1 else None,
            }
        )
    rows += [row for row in before.get("rows", []) if row["variant"] in EARLIER]
    summary.sort(key=lambda entry: list(LABELS).index(entry["variant"]))
    write_result("qat_ablation", rows, work=args.work, summary=summary, of_an_earlier_version=EARLIER)
    figure, axis = pyplot.subplots(figsize=(7.5, 3.2), layout="constrained")
    for place, entry in enumerate(summary):
        axis.plot(entry["force_ratio_by_seed"], [place] * len(entry["seeds"]), "o", alpha=0.5)
        axis.plot(entry["force_ratio"], place, "k|", markersize=16)
    axis.set_yticks(range(len(summary)), [label_of(entry["variant"]) for entry in summary])
    axis.invert_yaxis()
    axis.set_xlabel("force error over that of FP32 with the same seed and epochs")
    figure.savefig(RESULTS / "qat_ablation.png", dpi=150)
    shown = [
        {
            "training": label_of(entry["variant"]),
            "F over FP32": f"{entry['force_ratio']:.4f}"
            + (f" ± {entry['standard_error']:.4f}" if entry["standard_error"] is not None else ""),
            "seeds": len(entry["seeds"]),
        }
        for entry in summary
    ]
    print(markdown_table(shown, list(shown[0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--frames", type=int, default=1000, help="test structures")
    parser.add_argument("--table", action="store_true", help="only gather rows of earlier runs")
    args = parser.parse_args()
    args.model = SHARED / "models/mace_azobenzene.model"
    args.train = SHARED / "data/rmd17/azobenzene_train_01.xyz"
    args.test = SHARED / "data/rmd17/azobenzene_test_01.xyz"
    args.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if not args.table:
        for seed in args.seeds:
            for variant in args.variants:
                target = args.work / f"row_{variant}_{seed}.json"
                if not target.exists():
                    row = train(args, variant, seed)
                    target.write_text(json.dumps(row, indent=1))
                    print(json.dumps(row), flush=True)
    table(args)


if __name__ == "__main__":
    main()
