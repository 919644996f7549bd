"""Every preset on a trained NequIP model: post-training, and after a short quantization-aware training.

    python benchmarks/nequip_presets.py --work DIR [--model MODEL.ckpt] [--stage ptq|qat|nve|table] [--presets gaq ...]

The stages keep their files in the working directory, so they can run one after the other or side by side.
`table` gathers them into results/nequip_presets.json and prints the table. Sizes are those of packages: ours,
with integer codes, against that of the stock command for the float model.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from common import SHARED
from presets import Framework, main, run_name

from gaq.config.schema import PRESETS
from gaq_nequip.deploy.sizes import packed_bytes


def training_input(args: argparse.Namespace, preset: str | None, seed: int) -> dict[str, Any]:
    """The YAML of a fine-tuning run, made from that of the model's training; that of FP32 lacks only the last key."""
    stored = torch.load(args.model, map_location="cpu", weights_only=False)["hyper_parameters"]["info_dict"]
    module = dict(stored["training_module"])
    data = dict(stored["data"])
    data["split_dataset"] = {**data["split_dataset"], "file_path": str(args.train.resolve())}
    data["test_file_path"] = str(args.test.resolve())
    data["seed"] = seed
    module["_target_"] = "nequip.train.EMALightningModule"
    module["ema_decay"] = 0.99
    module["optimizer"] = {"_target_": "torch.optim.Adam", "lr": 0.002}
    module["lr_scheduler"] = {
        # Down to a hundredth: weights near a rounding threshold hop over it until steps are small.
        "scheduler": {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.01 ** (1 / args.epochs)},
        "interval": "epoch",
        "frequency": 1,
    }
    module["model"] = {"_target_": "nequip.model.ModelFromCheckpoint", "checkpoint_path": str(args.model.resolve())}
    config: dict[str, Any] = {
        "run": ["train"],
        "data": data,
        "trainer": {
            "_target_": "lightning.Trainer",
            "max_epochs": args.epochs,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "logger": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "out"},
            "callbacks": [
                {
                    "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "monitor": "val0_epoch/forces_mae",
                    "dirpath": "out",
                    "filename": "best",
                    "save_last": True,
                }
            ],
        },
        "training_module": module,
    }
    if preset is not None:
        config["quantization"] = {"preset": preset}
        if PRESETS[preset].vectors.magnitude_bits is not None:
            config["quantization"]["vectors"] = {"start_epoch": 1, "anneal_epochs": 2}
    return config


def train_model(args: argparse.Namespace, preset: str | None, seed: int) -> Path:
    """Run the stock command on the training input, in a separate folder."""
    folder: Path = args.work / run_name(preset, seed, args.seeds)
    # The model of an earlier run must not be taken for that of this run.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(training_input(args, preset, seed), sort_keys=False))
    command = [str(Path(sys.executable).with_name("nequip-train")), "-cp", str(folder.resolve()), "-cn", "config"]
    with open(folder / "log.txt", "w") as log:
        subprocess.run([*command, "hydra.run.dir=hydra"], cwd=folder, stdout=log, stderr=log, check=True)
    return folder / "out" / "last.ckpt"


def forms(model: torch.nn.Module) -> dict[str, Any]:
    """Sizes of the weights with the self-connection unfolded, and folded by type as packages store it."""
    return {
        f"{name}_weight_bytes": packed_bytes(model, fold)[0] for name, fold in (("unfolded", False), ("folded", True))
    }


def float_package_bytes(args: argparse.Namespace) -> int:
    """Size of the package that the stock command makes of the float model."""
    path: Path = args.work / "fp32.nequip.zip"
    if not path.exists():
        command = Path(sys.executable).with_name("nequip-package")
        subprocess.run([command, "build", args.model, path], check=True, stdout=subprocess.DEVNULL)
    return path.stat().st_size


if __name__ == "__main__":
    main(
        Framework(
            doc=__doc__ or "",
            name="nequip_presets",
            model=SHARED / "models/nequip_azobenzene.ckpt",
            train=SHARED / "data/rmd17/azobenzene_train_01.xyz",
            test=SHARED / "data/rmd17/azobenzene_test_01.xyz",
            suffix=".nequip.zip",
            train_model=train_model,
            float_bytes=float_package_bytes,
            more=forms,
        )
    )
