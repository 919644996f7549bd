"""The arguments of the command ``gaq``."""

from __future__ import annotations

import argparse

__all__ = ["parser"]


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="gaq", description="Geometric-aware quantization of interatomic potentials.")
    commands = root.add_subparsers(dest="command", required=True)

    quantize = commands.add_parser("quantize", help="quantize a trained model, without reference labels")
    quantize.add_argument("model", help="float model: MACE .model, NequIP .ckpt or .nequip.zip")
    quantize.add_argument(
        "-o",
        "--output",
        required=True,
        help="file to write: .model or .safetensors (runs no code); .ckpt or .nequip.zip",
    )
    quantize.add_argument("--config", default="gaq", help="preset, YAML file or mapping (default: gaq)")
    quantize.add_argument(
        "--calibration",
        help="structures like those the model will be used on (any format ASE reads); no labels needed",
    )
    quantize.add_argument(
        "--elements",
        metavar="LIST",
        help="keep only these of the model's elements, such as Li,P,S,Cl: those of the calibration data",
    )
    quantize.add_argument("--head", help="keep only this head of a model with several")
    quantize.add_argument("--device", default="cpu", help="cpu or cuda")
    quantize.add_argument("--force", action="store_true", help="write the model even if a gate fails, and mark it")

    report = commands.add_parser("report", help="measure a model: errors, equivariance, conservation, speed, size")
    report.add_argument("model")
    report.add_argument("--data", required=True, help="labelled structures")
    report.add_argument("-o", "--output", required=True, help="directory for report.json and report.html")
    report.add_argument("--reference", help="the float model to compare with")
    report.add_argument(
        "--trained",
        action="store_true",
        help="judge the model as trained with its rounding; files of training with the key `quantization` say so",
    )
    report.add_argument("--nve-ps", type=float, default=50.0, help="length of the NVE runs in ps; 0 leaves them out")
    report.add_argument("--frames", type=int, default=200, help="structures used for errors (evenly spaced)")
    report.add_argument("--device", default="cpu")

    inspect = commands.add_parser("inspect", help="one row per module: bits, scales, bytes, and why the rest is float")
    inspect.add_argument("model")
    inspect.add_argument("--device", default="cpu")
    inspect.add_argument(
        "--sensitivity", metavar="DATA", help="also round one tensor at a time on these structures (float models)"
    )

    for command in (quantize, report, inspect):
        command.add_argument(
            "--species",
            metavar="MAP",
            help="the model's type of each element, such as H:myH,C:myC, if its file does not say (NequIP, Allegro)",
        )

    commands.add_parser("doctor", help="versions, state of the hook, which kernels can run here and why not")
    return root
