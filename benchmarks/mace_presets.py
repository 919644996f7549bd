"""Every preset on a trained MACE model: post-training, and after a short quantization-aware training.

    python benchmarks/mace_presets.py --work DIR [--stage ptq|qat|nve|table] [--presets gaq w8 ...]

The stages keep their files in the working directory, so they can run one after the other or side by side;
`table` gathers them into results/mace_presets.json and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
import yaml
from ase.io import read
from common import SHARED, load_json, nve_replicas, spaced, write_result

import gaq
from gaq.adapter import adapter_for
from gaq.config import parse_config
from gaq.physics.conservation import central_difference_error
from gaq.physics.errors import force_and_energy_mae
from gaq.physics.lee import local_equivariance_error
from gaq.reporting.gates import BOUNDS
from gaq.reporting.tables import markdown_table
from gaq_mace.evaluate import MACEPotential

PRESETS = ("naive_w8a8", "w8a8", "w4a8", "w8", "w4", "w8a16", "w4a16")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and partial results")
    parser.add_argument("--stage", choices=("ptq", "qat", "nve", "table", "all"), default="all")
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--model", type=Path, default=SHARED / "models/mace_azobenzene.model")
    parser.add_argument("--train", type=Path, default=SHARED / "data/rmd17/azobenzene_train_01.xyz")
    parser.add_argument("--test", type=Path, default=SHARED / "data/rmd17/azobenzene_test_01.xyz")
    parser.add_argument("--epochs", type=int, default=3, help="extra epochs of the QAT and of the FP32 run beside it")
    parser.add_argument("--frames", type=int, default=1000, help="test structures for the errors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="mace_presets", help="of the result file")
    return parser.parse_args()


def measure(
    model: torch.nn.Module, reference: torch.nn.Module, test: list[Any], path: Path, frames: int
) -> dict[str, Any]:
    """All metrics of one model: errors in its own dtype, the rest in float64."""
    errors = force_and_energy_mae(MACEPotential(model, 50), spaced(test, frames))
    double = copy.deepcopy(model).double()
    potential = MACEPotential(double, 20)
    sample = spaced(test, 40)
    adapter = adapter_for(double)
    forces = np.concatenate(potential(sample)[1])
    with adapter.unquantized(double):
        smooth = np.concatenate(potential(sample)[1])
    ideal = np.concatenate(MACEPotential(copy.deepcopy(reference).double(), 20)(sample)[1])
    lee = local_equivariance_error(potential, spaced(test, 20), rotations=4)
    naive_lee = lee.mean_mev_per_angstrom
    central = central_difference_error(potential, spaced(test, 10), components_per_structure=8)
    return {
        "force_mae_mev_per_angstrom": errors.force_mae_mev_per_angstrom,
        "energy_mae_mev_per_atom": errors.energy_mae_mev_per_atom,
        "test_structures": min(frames, len(test)),
        "force_difference_to_fp32_mev_per_angstrom": float(1000 * np.abs(forces - ideal).mean()),
        "force_difference_to_smooth_twin_mev_per_angstrom": float(1000 * np.abs(forces - smooth).mean()),
        "lee_mev_per_angstrom": naive_lee,
        "central_difference_relative_error": {f"{h:g}": e.relative_error for h, e in central.items()},
        "file_bytes": path.stat().st_size,
    }


def store(work: Path, key: str, row: dict[str, Any]) -> None:
    (work / f"row_{key}.json").write_text(json.dumps(row, indent=1))
    print(key, json.dumps(row), flush=True)


def ptq(args: argparse.Namespace, train: list[Any], test: list[Any]) -> None:
    reference = gaq.load(args.model)
    if not (args.work / "row_fp32.json").exists():
        store(args.work, "fp32", measure(reference, reference, test, args.model, args.frames))
    for preset in args.presets:
        start = time.time()
        model = gaq.prepare(copy.deepcopy(reference), preset)
        gaq.calibrate(model, train, progress=False)
        path = args.work / f"ptq_{preset}.model"
        gaq.save(gaq.convert(model), path)
        seconds = time.time() - start
        row = measure(gaq.load(path), reference, test, path, args.frames)
        store(args.work, f"ptq_{preset}", {**row, "seconds_to_quantize": seconds})


def training_input(args: argparse.Namespace, preset: str | None) -> dict[str, Any]:
    """The YAML of a fine-tuning run: the same for FP32 but for the last key."""
    config: dict[str, Any] = {
        "name": f"qat_{preset or 'fp32'}",
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
        # Down to a hundredth: weights near a rounding threshold go on hopping over it until steps are small.
        "lr_scheduler_gamma": 0.01 ** (1 / args.epochs),
        "amsgrad": True,
        "ema": True,
        "ema_decay": 0.99,
        "default_dtype": "float32",
        "device": "cpu",
        "seed": 1,
    }
    if preset is not None:
        config["quantization"] = {"preset": preset, "vectors": {"start_epoch": 1, "anneal_epochs": 2}}
    return config


def qat(args: argparse.Namespace, test: list[Any]) -> None:
    reference = gaq.load(args.model)
    command = Path(sys.executable).with_name("mace_run_train")
    for preset in (None, *args.presets):
        name = f"qat_{preset or 'fp32'}"
        if preset is None and (args.work / f"row_{name}.json").exists():
            continue
        folder = args.work / name
        folder.mkdir(exist_ok=True)
        (folder / "train.yml").write_text(yaml.safe_dump(training_input(args, preset), sort_keys=False))
        start = time.time()
        with open(folder / "log.txt", "w") as log:
            subprocess.run([command, "--config", "train.yml"], cwd=folder, stdout=log, stderr=log, check=True)
        path = folder / f"{name}.model"
        seconds = time.time() - start
        row = measure(gaq.load(path), reference, test, path, args.frames)
        store(args.work, name, {**row, "seconds_to_train": seconds, "epochs": args.epochs})


def nve(args: argparse.Namespace, test: list[Any]) -> None:
    """6 x 2 ps without thermostat, 0.5 fs, float32, for each post-training model there is."""
    paths = {"fp32": args.model, **{f"ptq_{p}": args.work / f"ptq_{p}.model" for p in args.presets}}
    for key, path in paths.items():
        if not path.exists() or (args.work / f"nve_{key}.json").exists():
            continue
        result = nve_replicas(MACEPotential(gaq.load(path), 6), test[0])
        (args.work / f"nve_{key}.json").write_text(json.dumps(result))
        print(key, result, flush=True)


def gate_summary(row: dict[str, Any], fp32: dict[str, Any], naive: dict[str, Any], preset: str, trained: bool) -> str:
    """Which of the bounds a row keeps: accuracy, LEE, LEE against naive, central differences, size."""
    bounds = BOUNDS[preset]
    allowed = bounds.force_mae_qat if trained or bounds.force_mae_ptq is None else bounds.force_mae_ptq
    verdicts = {
        "F": row["force_mae_mev_per_angstrom"] <= allowed * fp32["force_mae_mev_per_angstrom"],
        "LEE": row["lee_mev_per_angstrom"] <= bounds.lee
        and naive["lee_mev_per_angstrom"] >= bounds.lee_against_naive * row["lee_mev_per_angstrom"],
        "CD": row["central_difference_relative_error"]["0.01"] <= bounds.central_difference,
        "size": row["size_ratio"] >= bounds.file_size,
    }
    failed = [name for name, passed in verdicts.items() if not passed]
    return "all pass" if not failed else "fails " + ", ".join(failed)


def table(args: argparse.Namespace) -> None:
    rows = []
    size = args.model.stat().st_size
    for training in ("float", "ptq", "qat"):
        keys = {
            "float": ["fp32"],
            "ptq": [f"ptq_{p}" for p in PRESETS],
            "qat": ["qat_fp32", *(f"qat_{p}" for p in PRESETS)],
        }
        base = load_json(args.work / ("row_qat_fp32.json" if training == "qat" else "row_fp32.json"))
        for key in keys[training]:
            row = load_json(args.work / f"row_{key}.json")
            if not row:
                continue
            preset = key.removeprefix("ptq_").removeprefix("qat_")
            row = {"scheme": preset, "training": training, **row, "size_ratio": size / row["file_bytes"]}
            row["nve"] = load_json(args.work / f"nve_{key}.json") or None
            naive = load_json(args.work / f"row_{'qat' if training == 'qat' else 'ptq'}_naive_w8a8.json")
            if preset != "fp32" and naive:
                row["gates"] = gate_summary(row, base, naive, preset, training == "qat")
            rows.append(row)
    configs = {p: dataclasses.asdict(parse_config(p)) for p in PRESETS}
    path = write_result(args.name, rows, work=args.work, model=args.model.name, test=args.test.name, presets=configs)
    shown = []
    for row in rows:
        central = row["central_difference_relative_error"]
        drift = row["nve"]
        shown.append(
            {
                "scheme": row["scheme"],
                "training": row["training"],
                "F MAE": f"{row['force_mae_mev_per_angstrom']:.2f}",
                "E MAE": f"{row['energy_mae_mev_per_atom']:.2f}",
                "LEE": f"{row['lee_mev_per_angstrom']:.4f}",
                "dF twin": f"{row['force_difference_to_smooth_twin_mev_per_angstrom']:.3f}",
                "central differences 0.1 / 0.03 / 0.01 A, %": " / ".join(f"{100 * v:.2f}" for v in central.values()),
                "NVE drift": f"{drift['drift_mev_per_atom_per_ps']:.4f} ± {drift['standard_error']:.4f}"
                if drift
                else "-",
                "KiB": f"{row['file_bytes'] / 1024:.0f}",
                "smaller": f"{row['size_ratio']:.1f}x",
                "gates": row.get("gates", ""),
            }
        )
    print(markdown_table(shown, list(shown[0])))
    print(f"written: {path.name}")


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    train, test = read(args.train, ":"), read(args.test, ":")
    if args.stage in ("ptq", "all"):
        ptq(args, train, test)
    if args.stage in ("qat", "all"):
        qat(args, test)
    if args.stage in ("nve", "all"):
        nve(args, test)
    if args.stage in ("table", "all"):
        table(args)


if __name__ == "__main__":
    main()
