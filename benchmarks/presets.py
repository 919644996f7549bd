"""Every preset on a trained model, post-training and after a short training: what both frameworks' scripts share."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.io import read
from common import load_json, mean_of_runs, write_result

import gaq
from gaq.adapter import adapter_for, adapter_for_file
from gaq.checks.errors import spaced
from gaq.checks.nve import nve_drift
from gaq.config.parse import parse_config
from gaq.reporting import open_model, quality
from gaq.reporting.gates import evaluate_gates, quotient
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document

__all__ = ["PRESETS", "Framework", "main", "run_name"]

PRESETS = ("naive_w8a8", "w8a8", "w4a8", "w8", "w4", "w8a16", "w4a16")


@dataclasses.dataclass(frozen=True)
class Framework:
    """What differs between the frameworks.

    Attributes:
        doc: docstring of the script, for ``--help``.
        name: name of the result file.
        model: default float model.
        train: default training data.
        test: default test data.
        suffix: suffix of quantized files.
        train_model: trains by the stock command; ``(arguments, preset or None, seed) -> path of the model``.
        float_bytes: ``(arguments) -> size`` of the float file to compare with.
        more: ``(converted model) -> entries`` that only rows of this framework have.
    """

    doc: str
    name: str
    model: Path
    train: Path
    test: Path
    suffix: str
    train_model: Callable[[argparse.Namespace, str | None, int], Path]
    float_bytes: Callable[[argparse.Namespace], int]
    more: Callable[[torch.nn.Module], Document] = lambda model: {}


def arguments(framework: Framework) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=framework.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and partial results")
    parser.add_argument("--stage", choices=("ptq", "qat", "nve", "table", "all"), default="all")
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--model", type=Path, default=framework.model)
    parser.add_argument("--train", type=Path, default=framework.train)
    parser.add_argument("--test", type=Path, default=framework.test)
    parser.add_argument("--epochs", type=int, default=3, help="extra epochs of the QAT and of the FP32 run beside it")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="of the trainings in --repeat and FP32")
    parser.add_argument(
        "--repeat", nargs="*", default=["w8a16"], help="presets trained with every seed, not the first only"
    )
    parser.add_argument("--frames", type=int, default=1000, help="test structures for the errors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default=framework.name, help="of the result file")
    return parser.parse_args()


def measure(model: torch.nn.Module, reference: torch.nn.Module, test: list[Any], path: Path, frames: int) -> Document:
    """All metrics of one model, and the difference of its forces to those of FP32 and of its unrounded twin."""
    adapter = adapter_for(model)
    measured = quality(
        open_model(adapter, model),
        spaced(test, frames),
        rotated=spaced(test, 20),
        displaced=spaced(test, 10),
        components=8,
    )
    double = adapter.in_float64(model)
    potential = adapter.potential(double)
    sample = spaced(test, 40)
    forces = np.concatenate(potential(sample)[1])
    with adapter.unquantized(double):
        smooth = np.concatenate(potential(sample)[1])
    ideal = np.concatenate(adapter.potential(adapter.in_float64(reference))(sample)[1])
    return {
        **measured.metrics,
        "test_structures": min(frames, len(test)),
        "force_difference_to_fp32_mev_per_angstrom": float(1000 * np.abs(forces - ideal).mean()),
        "force_difference_to_smooth_twin_mev_per_angstrom": float(1000 * np.abs(forces - smooth).mean()),
        "file_bytes": path.stat().st_size,
        "weight_bytes": sum(row.bytes for row in adapter.rows(model)),
    }


def run_name(preset: str | None, seed: int, seeds: Sequence[int]) -> str:
    """Name of a training; that of the first seed does not contain the seed."""
    return f"qat_{preset or 'fp32'}" + ("" if seed == seeds[0] else f"_seed{seed}")


def store(work: Path, key: str, row: Document) -> None:
    (work / f"row_{key}.json").write_text(json.dumps(row, indent=1))
    print(key, json.dumps(row), flush=True)


def ptq(framework: Framework, args: argparse.Namespace, train: list[Any], test: list[Any]) -> None:
    reference = gaq.load(args.model)
    if not (args.work / "row_fp32.json").exists():
        row = measure(reference, reference, test, args.model, args.frames)
        store(args.work, "fp32", {**row, "file_bytes": framework.float_bytes(args)})
    for preset in args.presets:
        start = time.time()
        model = gaq.prepare(copy.deepcopy(reference), preset)
        gaq.calibrate(model, train, progress=False)
        path = args.work / f"ptq_{preset}{framework.suffix}"
        gaq.save(gaq.convert(model), path)
        seconds = time.time() - start
        more = framework.more(model)
        row = measure(gaq.load(path), reference, test, path, args.frames)
        store(args.work, f"ptq_{preset}", {**row, **more, "seconds_to_quantize": seconds})


def qat(framework: Framework, args: argparse.Namespace, test: list[Any]) -> None:
    reference = gaq.load(args.model)
    runs = [(preset, args.seeds[0]) for preset in (None, *args.presets)]
    runs += [(p, seed) for p in (None, *args.presets) if p is None or p in args.repeat for seed in args.seeds[1:]]
    for preset, seed in runs:
        name = run_name(preset, seed, args.seeds)
        if (args.work / f"row_{name}.json").exists():
            continue
        start = time.time()
        path = framework.train_model(args, preset, seed)
        seconds = time.time() - start
        model = gaq.load(path)
        if preset is not None and not path.name.endswith(framework.suffix):
            trained, path = path, args.work / f"{name}{framework.suffix}"
            gaq.save(model, path)
            model = gaq.load(trained)
        row = measure(model, reference, test, path, args.frames)
        if preset is None:
            row["file_bytes"] = framework.float_bytes(args)
        store(args.work, name, {**row, "seconds_to_train": seconds, "epochs": args.epochs})


def nve(framework: Framework, args: argparse.Namespace, test: list[Any]) -> None:
    """Run 6 x 2 ps without thermostat, 0.5 fs, in the stock calculator, for each post-training model in the folder."""
    paths = {"fp32": args.model, **{f"ptq_{p}": args.work / f"ptq_{p}{framework.suffix}" for p in args.presets}}
    for key, path in paths.items():
        if not path.exists() or (args.work / f"nve_{key}.json").exists():
            continue
        options = {"duration_ps": 2.0, "timestep_fs": 0.5}
        calculator = adapter_for_file(path).calculator(path)
        runs = [nve_drift(calculator, test[0], **options, equilibrate_ps=0.2, seed=seed) for seed in range(6)]
        result = {**mean_of_runs([dataclasses.asdict(run) for run in runs]), "replicas": len(runs), **options}
        (args.work / f"nve_{key}.json").write_text(json.dumps(result))
        print(key, result, flush=True)


def ratios_by_seed(args: argparse.Namespace, preset: str) -> dict[str, float]:
    """Force errors after training over those of FP32 trained with the same seed."""
    ratios = {}
    for seed in args.seeds:
        row, fp32 = (load_json(args.work / f"row_{run_name(p, seed, args.seeds)}.json") for p in (preset, None))
        if row and fp32:
            ratios[str(seed)] = row["force_mae_mev_per_angstrom"] / fp32["force_mae_mev_per_angstrom"]
    return ratios


SHORT = {
    "force_mae_ratio": "F",
    "lee": "LEE",
    "lee_against_naive": "LEE",
    "central_difference": "CD",
    "file_size_ratio": "size",
}
"""Gates of a row, with the names that the table gives them."""


def gate_summary(row: Document, fp32: Document, naive: Document, preset: str, trained: bool) -> str:
    """The gates that a row fails, enforced or not: accuracy, LEE, LEE against naive, central differences, size.

    Args:
        row: metrics of `measure`, with the ratio of sizes. Of force errors of several seeds the mean is judged.
        fp32: row of the float model.
        naive: row of `naive_w8a8`.
        preset: of the row.
        trained: whether its model was trained with its rounding.
    """
    judged = {
        **row,
        "training": "qat" if trained else "ptq",
        "lee_naive_ratio": quotient(naive["lee_mev_per_angstrom"], row["lee_mev_per_angstrom"]),
        "nve": None,
    }
    if row.get("force_ratio_by_seed"):
        ratio = float(np.mean(list(row["force_ratio_by_seed"].values())))
        judged["force_mae_mev_per_angstrom"] = ratio * fp32["force_mae_mev_per_angstrom"]
    reference = {
        "force_mae_mev_per_angstrom": fp32["force_mae_mev_per_angstrom"],
        "file_bytes": row["size_ratio"] * row["file_bytes"],
    }
    gates = evaluate_gates(judged, preset, reference)
    failed = list(dict.fromkeys(short for name, short in SHORT.items() if gates[name].passed is False))
    return "all pass" if not failed else "fails " + ", ".join(failed)


def table_row(args: argparse.Namespace, key: str, training: str, float_size: int) -> Document | None:
    """The row of a result file: what was measured, ratios to the float model, drift and gates.

    Args:
        args: of the script.
        key: name of the model in the working directory.
        training: ``float``, ``ptq`` or ``qat``.
        float_size: bytes of the float file.

    Returns:
        The row; None if the model was not measured.
    """
    measured = load_json(args.work / f"row_{key}.json")
    if not measured:
        return None
    fp32 = load_json(args.work / "row_fp32.json")
    preset = key.removeprefix("ptq_").removeprefix("qat_")
    row = {"scheme": preset, "training": training, **measured, "size_ratio": float_size / measured["file_bytes"]}
    weights = fp32.get("weight_bytes")
    for form in ("", "folded_", "unfolded_"):
        if weights and f"{form}weight_bytes" in row:
            row[f"{form}weight_ratio"] = weights / row[f"{form}weight_bytes"]
    if training == "qat" and preset in args.repeat:
        row["force_ratio_by_seed"] = ratios_by_seed(args, preset)
    row["nve"] = load_json(args.work / f"nve_{key}.json") or None
    trained = training == "qat"
    naive = load_json(args.work / f"row_{'qat' if trained else 'ptq'}_naive_w8a8.json")
    if preset != "fp32" and naive:
        base = load_json(args.work / "row_qat_fp32.json") if trained else fp32
        row["gates"] = gate_summary(row, base, naive, preset, trained)
        if trained:
            # As `gaq report` judges one file: against the model that training started from.
            alone = {name: value for name, value in row.items() if name != "force_ratio_by_seed"}
            row["gates_of_report"] = gate_summary(alone, fp32, naive, preset, trained=True)
    return row


def shown(row: Document) -> dict[str, str]:
    """A row as the printed table has it."""
    central = row["central_difference_relative_error"]
    drift = row["nve"]
    return {
        "scheme": row["scheme"],
        "training": row["training"],
        "F MAE": f"{row['force_mae_mev_per_angstrom']:.2f}",
        "E MAE": f"{row['energy_mae_mev_per_atom']:.2f}",
        "LEE": f"{row['lee_mev_per_angstrom']:.4f}",
        "dF twin": f"{row['force_difference_to_smooth_twin_mev_per_angstrom']:.3f}",
        "central differences 0.1 / 0.03 / 0.01 A, %": " / ".join(f"{100 * v:.2f}" for v in central.values()),
        "NVE drift": f"{drift['drift_mev_per_atom_per_ps']:.4f} ± {drift['standard_error']:.4f}" if drift else "-",
        "KiB": f"{row['file_bytes'] / 1024:.0f}",
        "smaller": f"{row['size_ratio']:.1f}x",
        "weights smaller": f"{row['weight_ratio']:.2f}x" if "weight_ratio" in row else "-",
        "F over FP32, by seed": ", ".join(f"{r:.4f}" for r in row.get("force_ratio_by_seed", {}).values()),
        "gates": row.get("gates", ""),
        "gates against the float model before": row.get("gates_of_report", ""),
    }


def table(framework: Framework, args: argparse.Namespace) -> None:
    """Gather the rows in the working directory into the result file, and print them."""
    size = framework.float_bytes(args)
    keys = [("fp32", "float"), *((f"ptq_{p}", "ptq") for p in PRESETS)]
    keys += [("qat_fp32", "qat"), *((f"qat_{p}", "qat") for p in PRESETS)]
    rows = [row for key, training in keys if (row := table_row(args, key, training, size)) is not None]
    configs = {p: dataclasses.asdict(parse_config(p)) for p in PRESETS}
    path = write_result(args.name, rows, work=args.work, model=args.model.name, test=args.test.name, presets=configs)
    printed = [shown(row) for row in rows]
    print(markdown_table(printed, list(printed[0])))
    print(f"written: {path.name}")


def main(framework: Framework) -> None:
    """Run the stages asked for."""
    args = arguments(framework)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    train, test = read(args.train, ":"), read(args.test, ":")
    if args.stage in ("ptq", "all"):
        ptq(framework, args, train, test)
    if args.stage in ("qat", "all"):
        qat(framework, args, test)
    if args.stage in ("nve", "all"):
        nve(framework, args, test)
    if args.stage in ("table", "all"):
        table(framework, args)
