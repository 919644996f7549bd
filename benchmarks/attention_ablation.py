"""What robust attention buys: MACE from scratch with different interaction blocks, in float and quantized.

    python benchmarks/attention_ablation.py --work DIR [--stage train|table] [--blocks residual ...] [--seeds 1 2 3]

Trains with the stock `mace_run_train`, the same data, settings and epochs for every block, preset and seed:

* ``residual``: RealAgnosticResidualInteractionBlock, a sum over neighbours divided by their average number;
* ``density``: RealAgnosticDensityResidualInteractionBlock, divided by a learned density;
* ``attention``: GAQAttentionResidualInteractionBlock;
* ``attention_dot``: the same without normalised queries and keys (``attention.normalize: false``; no fp32).

The first interaction is MACE's default or, for ``density``, its density form. Quantized presets have the key
``attention``, with as many bits as the preset has for scalars, 16 at most. Models and a JSON file for each run stay in
the working directory, so an interrupted script continues where it was. `table` gathers them into
results/attention_ablation.json and draws the figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
import yaml
from ase.io import read, write
from common import SHARED, load_json, write_result

import gaq
from gaq.adapter import adapter_for
from gaq.checks.errors import spaced
from gaq.config.parse import PRESETS
from gaq.quantizers.attention import RobustAttention
from gaq.reporting import open_model, quality
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document

ATTENTION = "GAQAttentionResidualInteractionBlock"
BLOCKS: dict[str, dict[str, str]] = {
    "residual": {"interaction": "RealAgnosticResidualInteractionBlock"},
    "density": {
        "interaction": "RealAgnosticDensityResidualInteractionBlock",
        "interaction_first": "RealAgnosticDensityInteractionBlock",
    },
    "attention": {"interaction": ATTENTION},
    "attention_dot": {"interaction": ATTENTION},
}
SCHEMES = ("fp32", "gaq", "w4a8")


def quantization(block: str, scheme: str, epochs: int) -> Document | None:
    """The key of a run; vectors are rounded in the last third of the epochs."""
    if scheme == "fp32":
        return None
    start = 2 * epochs // 3
    scalars = PRESETS[scheme].scalars.bits
    key: Document = {
        "preset": scheme,
        "vectors": {"start_epoch": start, "anneal_epochs": max(1, (epochs - start) // 2)},
    }
    if block != "residual":  # it has nothing to bound
        key["attention"] = {"bits": scalars and min(scalars, 16)}
    if block == "attention_dot":
        key["attention"]["normalize"] = False
    return key


def training_input(args: argparse.Namespace, block: str, scheme: str, seed: int, train: Path) -> Document:
    """The MACE training file of a run."""
    config: Document = {
        "name": "model",
        "model": "MACE",
        **BLOCKS[block],
        "train_file": str(train.resolve()),
        "valid_fraction": 0.05,
        "E0s": "average",
        "hidden_irreps": f"{args.channels}x0e + {args.channels}x1o",
        "r_max": 5.0,
        "max_ell": 2,
        "correlation": 2,
        "num_interactions": 2,
        "energy_key": "REF_energy",
        "forces_key": "REF_forces",
        "energy_weight": 1,
        "forces_weight": 100,
        "batch_size": 5,
        "valid_batch_size": 50,
        "max_num_epochs": args.epochs,
        "lr": 0.01,
        "scheduler": "ExponentialLR",
        "lr_scheduler_gamma": 0.01 ** (1 / args.epochs),
        "amsgrad": True,
        "ema": True,
        "ema_decay": 0.99,
        "default_dtype": "float32",
        "device": args.device,
        "seed": seed,
        "plot": False,
    }
    key = quantization(block, scheme, args.epochs)
    if key is not None:
        config["quantization"] = key
    return config


def measure(path: Path, test: list[Any], frames: int) -> Document:
    """Errors, equivariance and conservation, and the force difference to the same model with unrounded features."""
    model = gaq.load(path)
    adapter = adapter_for(model)
    chosen = spaced(test, frames)
    measured = quality(
        open_model(adapter, model), chosen, rotated=spaced(chosen, 10), displaced=spaced(chosen, 5), components=8
    )
    double = adapter.in_float64(model)
    potential = adapter.potential(double)
    sample = spaced(chosen, 20)
    forces = np.concatenate(potential(sample)[1])
    with adapter.unquantized(double):
        smooth = np.concatenate(potential(sample)[1])
    temperatures = [m.temperature().tolist() for m in model.modules() if isinstance(m, RobustAttention)]
    return {
        **measured.metrics,
        "force_difference_to_smooth_twin_mev_per_angstrom": float(1000 * np.abs(forces - smooth).mean()),
        "temperatures": temperatures,
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": path.stat().st_size,
        "test_structures": len(chosen),
    }


def run_one(args: argparse.Namespace, block: str, scheme: str, seed: int, train: Path, test: list[Any]) -> None:
    """Train and measure one model, unless its row is there already."""
    key = f"{block}_{scheme}_seed{seed}"
    target = args.work / f"row_{key}.json"
    if target.exists():
        return
    folder: Path = args.work / key
    # The model of an earlier run must not be taken for that of this run.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "train.yml").write_text(yaml.safe_dump(training_input(args, block, scheme, seed, train), sort_keys=False))
    start = time.time()
    with open(folder / "log.txt", "w") as log:
        command = [Path(sys.executable).with_name("mace_run_train"), "--config", "train.yml"]
        subprocess.run(command, cwd=folder, stdout=log, stderr=log, check=True)
    seconds = time.time() - start
    row = {
        "block": block,
        "scheme": scheme,
        "seed": seed,
        **measure(folder / "model.model", test, args.test_frames),
        "seconds_to_train": seconds,
        "epochs": args.epochs,
        "train_structures": args.train_frames,
        "channels": args.channels,
    }
    target.write_text(json.dumps(row, indent=1))
    print(key, json.dumps(row), flush=True)


def stage_train(args: argparse.Namespace) -> None:
    frames, test = list(read(args.train, ":")), list(read(args.test, ":"))
    train = args.work / "train.xyz"
    write(train, spaced(frames, args.train_frames))
    for seed in args.seeds:
        for scheme in args.presets:
            for block in args.blocks:
                if not (block == "attention_dot" and scheme == "fp32"):
                    run_one(args, block, scheme, seed, train, test)


def summary(rows: list[Document]) -> list[Document]:
    """Mean and standard error over the seeds, and the force error over that of the same block and seed in fp32."""
    means = []
    floats = {(r["block"], r["seed"]): r["force_mae_mev_per_angstrom"] for r in rows if r["scheme"] == "fp32"}
    for block in BLOCKS:
        for scheme in SCHEMES:
            runs = [r for r in rows if (r["block"], r["scheme"]) == (block, scheme)]
            if not runs:
                continue
            force = np.array([r["force_mae_mev_per_angstrom"] for r in runs])
            reference = block.removesuffix("_dot")
            ratios = [
                r["force_mae_mev_per_angstrom"] / floats[reference, r["seed"]]
                for r in runs
                if (reference, r["seed"]) in floats
            ]
            means.append(
                {
                    "block": block,
                    "scheme": scheme,
                    "seeds": len(runs),
                    "force_mae_mev_per_angstrom": float(force.mean()),
                    "standard_error": float(force.std(ddof=1) / len(runs) ** 0.5) if len(runs) > 1 else None,
                    "energy_mae_mev_per_atom": float(np.mean([r["energy_mae_mev_per_atom"] for r in runs])),
                    "force_over_fp32": float(np.mean(ratios)) if ratios else None,
                    "rounding_noise_mev_per_angstrom": float(
                        np.mean([r["force_difference_to_smooth_twin_mev_per_angstrom"] for r in runs])
                    ),
                    "central_difference_relative_error_0.01": float(
                        np.mean([r["central_difference_relative_error"]["0.01"] for r in runs])
                    ),
                    "lee_mev_per_angstrom": float(np.mean([r["lee_mev_per_angstrom"] for r in runs])),
                    "seconds_per_epoch": float(np.mean([r["seconds_to_train"] / r["epochs"] for r in runs])),
                }
            )
    return means


def figure(means: list[Document], path: Path) -> None:
    """Plot force error and rounding noise of each block, one bar for each preset."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    blocks = list(dict.fromkeys(row["block"] for row in means))
    panels = (
        ("force_mae_mev_per_angstrom", "force MAE, meV/Å"),
        ("rounding_noise_mev_per_angstrom", "rounding noise of the force, meV/Å"),
    )
    for axis, (key, label) in zip(axes, panels, strict=True):
        for i, scheme in enumerate(SCHEMES):
            rows_by_block = {row["block"]: row for row in means if row["scheme"] == scheme}
            if not rows_by_block or (key != panels[0][0] and scheme == "fp32"):
                continue
            places = [blocks.index(block) + 0.25 * i for block in rows_by_block]
            errors = [row["standard_error"] or 0.0 for row in rows_by_block.values()] if key == panels[0][0] else None
            axis.bar(
                places, [row[key] for row in rows_by_block.values()], 0.25, yerr=errors, label=scheme, color=f"C{i}"
            )
        axis.set_xticks(np.arange(len(blocks)) + 0.25, blocks, fontsize=8)
        axis.set_ylabel(label)
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=len(SCHEMES), frameon=False)
    axes[1].set_yscale("log")
    drawing.tight_layout()
    drawing.savefig(path, dpi=130)


def stage_table(args: argparse.Namespace) -> None:
    rows = [load_json(path) for path in sorted(args.work.glob("row_*.json"))]
    if not rows:
        raise SystemExit(f"{args.work}: no runs to gather; run --stage train first.")
    means = summary(rows)
    path = write_result(args.name, rows, work=args.work, means=means, train=args.train.name, test=args.test.name)
    print(markdown_table([{k: _shown(v) for k, v in row.items()} for row in means], list(means[0])))
    figure(means, path.with_suffix(".png"))
    print(f"written: {path.name}, {path.with_suffix('.png').name}")


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and partial results")
    parser.add_argument("--stage", choices=("train", "table", "all"), default="all")
    parser.add_argument("--blocks", nargs="*", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--presets", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--train-frames", type=int, default=500)
    parser.add_argument("--test-frames", type=int, default=200)
    parser.add_argument("--train", type=Path, default=SHARED / "data/rmd17/azobenzene_train_01.xyz")
    parser.add_argument("--test", type=Path, default=SHARED / "data/rmd17/azobenzene_test_01.xyz")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="attention_ablation", help="of the result file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage in ("train", "all"):
        stage_train(args)
    if args.stage in ("table", "all"):
        stage_table(args)


if __name__ == "__main__":
    main()
