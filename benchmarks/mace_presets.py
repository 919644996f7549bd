"""Every preset on a trained MACE model: post-training, and after a short quantization-aware training.

    python benchmarks/mace_presets.py --work DIR [--stage ptq|qat|nve|table] [--presets gaq w8 ...]

The stages keep their files in the working directory, so they can run one after the other or side by side.
`table` gathers them into results/mace_presets.json and prints the table.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import yaml
from common import SHARED
from presets import Framework, main, run_name

from gaq.config.schema import PRESETS


def training_input(args: argparse.Namespace, preset: str | None, seed: int) -> dict[str, Any]:
    """The YAML of a fine-tuning run; that of FP32 lacks only the last key."""
    config: dict[str, Any] = {
        "name": run_name(preset, seed, args.seeds),
        "foundation_model": str(args.model.resolve()),
        "multiheads_finetuning": False,
        "train_file": str(args.train.resolve()),
        "valid_fraction": 0.05,
        "E0s": "foundation",
        "energy_key": "REF_energy",
        "forces_key": "REF_forces",
        "energy_weight": 1,
        "forces_weight": 100,
        "batch_size": 5,
        "valid_batch_size": 50,
        "max_num_epochs": args.epochs,
        "lr": 0.002,
        "scheduler": "ExponentialLR",
        # Down to a hundredth: weights near a rounding threshold hop over it until steps are small.
        "lr_scheduler_gamma": 0.01 ** (1 / args.epochs),
        "amsgrad": True,
        "ema": True,
        "ema_decay": 0.99,
        "default_dtype": "float32",
        "device": "cpu",
        "seed": seed,
    }
    if preset is not None:
        config["quantization"] = {"preset": preset}
        if PRESETS[preset].vectors.magnitude_bits is not None:
            config["quantization"]["vectors"] = {"start_epoch": 1, "anneal_epochs": 2}
    return config


def train_model(args: argparse.Namespace, preset: str | None, seed: int) -> Path:
    """Run the stock command on the training input, in a separate folder."""
    name = run_name(preset, seed, args.seeds)
    folder: Path = args.work / name
    # The model of an earlier run must not be taken for that of this run.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "train.yml").write_text(yaml.safe_dump(training_input(args, preset, seed), sort_keys=False))
    command = Path(sys.executable).with_name("mace_run_train")
    with open(folder / "log.txt", "w") as log:
        subprocess.run([command, "--config", "train.yml"], cwd=folder, stdout=log, stderr=log, check=True)
    return folder / f"{name}.model"


if __name__ == "__main__":
    main(
        Framework(
            doc=__doc__ or "",
            name="mace_presets",
            model=SHARED / "models/mace_azobenzene.model",
            train=SHARED / "data/rmd17/azobenzene_train_01.xyz",
            test=SHARED / "data/rmd17/azobenzene_test_01.xyz",
            suffix=".model",
            train_model=train_model,
            float_bytes=lambda args: args.model.stat().st_size,
        )
    )
