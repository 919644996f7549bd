"""Train a float NequIP model from scratch on other data, with the settings of the model for azobenzene.

    python benchmarks/nequip_base.py --train DATA.xyz --test DATA.xyz --elements H C O --epochs 100 --work DIR

It leaves DIR/nequip_fp32.ckpt, which `nequip_presets.py --model` quantizes.
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
from ase.io import read
from common import SHARED


def training_input(args: argparse.Namespace) -> dict[str, Any]:
    """The training YAML of the model for azobenzene, with other data and another number of epochs."""
    template = yaml.safe_load((SHARED / "models/nequip_azobenzene.yaml").read_text())
    structures = len(read(args.train, ":"))
    validation = structures // 10
    data = template["data"]
    data["split_dataset"] = {
        "file_path": str(args.train.resolve()),
        "train": structures - validation,
        "val": validation,
    }
    data["test_file_path"] = str(args.test.resolve())
    trainer = {**template["trainer"], "max_epochs": args.epochs}
    trainer.pop("max_time", None)
    template["training_module"]["lr_scheduler"]["scheduler"]["T_max"] = args.epochs
    return {**template, "run": ["train"], "model_type_names": args.elements, "trainer": trainer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--elements", nargs="+", required=True)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "config.yaml").write_text(yaml.safe_dump(training_input(args), sort_keys=False))
    command = [str(Path(sys.executable).with_name("nequip-train")), "-cp", str(args.work.resolve()), "-cn", "config"]
    subprocess.run([*command, f"hydra.run.dir={args.work.resolve() / 'run'}"], cwd=args.work, check=True)
    last = torch.load(args.work / "run/last.ckpt", map_location="cpu", weights_only=False)
    print(f"trained for {last['epoch'] + 1} epochs")
    shutil.copy(args.work / "run/last.ckpt", args.work / "nequip_fp32.ckpt")


if __name__ == "__main__":
    main()
