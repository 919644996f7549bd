"""How far rounding moves forces from the float model's, beside that model's own error and the size of the forces.

    python benchmarks/force_difference.py NAME=MODEL,TRAIN,TEST[,CALIBRATION_FRAMES] ... --name RESULT [--work DIR]

Models of the framework that is installed; ``SHARED`` in a path is the folder of models and data beside the repository,
``DIR`` that of ``--work``. The ethanol model is the one that `mace_models.write_trained_model` of ``tests/helpers``
writes, those of dense matter are made by `benchmarks/dense_models.py`. Rows of other models in the result file stay,
each with the command that measured it. For each model, presets as `gaq quantize` makes them, and worse ones on
purpose: too few bits, nearest rounding, no distillation. The gate
`force_difference` (`gaq.reporting.gates`) follows from the result: rounding adds to the float model's error in
quadrature (columns `mae_ratio` and `by_quadrature`), and ruined models differ by as much as the forces are large.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.io import read
from common import RESULTS, SHARED, load_json, recorded_command, write_result

import gaq
from gaq.adapter import adapter_for
from gaq.checks.errors import spaced
from gaq.reporting.tables import markdown_table


def bad(bits: int) -> dict[str, Any]:
    """All weights at these bits, to nearest, without repair."""
    weights = {"bits": bits, "rounding": "nearest", "compression": None, "least_compression": None}
    alike = dict.fromkeys(("sensitive_bits", "first_bits", "mixing_bits", "species_bits"))
    return {"preset": "gaq", "weights": {**weights, **alike}, "distillation": {"steps": 0}}


CONFIGURATIONS: dict[str, Any] = {
    "gaq": "gaq",
    "w4a16, no distillation": {"preset": "w4a16", "distillation": {"steps": 0}},
    "w8a8, no distillation": {"preset": "w8a8", "distillation": {"steps": 0}},
    "naive_w8a8": "naive_w8a8",
    **{f"{bits} bits, nearest": bad(bits) for bits in (10, 8, 6, 5, 4, 3, 2)},
}


def rms(values: np.ndarray) -> float:
    return 1e3 * float(np.sqrt(np.mean(values**2)))


def measure(case: str, frames: int) -> list[dict[str, Any]]:
    """Rows of one model."""
    name, paths = case.split("=", 1)
    path, train, test, *count = paths.split(",")
    reference = gaq.load(path)
    structures = spaced(read(test, ":"), frames)
    calibration = spaced(read(train, ":"), int(count[0]) if count else 200)
    labels = np.concatenate([atoms.arrays["REF_forces"] for atoms in structures])
    adapter = adapter_for(reference)
    exact = np.concatenate(adapter.potential(reference)(structures)[1])
    force, error = rms(exact), rms(exact - labels)
    mae = 1e3 * float(np.abs(exact - labels).mean())
    rows = []
    for label, configuration in CONFIGURATIONS.items():
        model = gaq.quantize(reference, calibration, configuration, progress=False)
        forces = np.concatenate(adapter.potential(model)(structures)[1])
        difference = rms(forces - exact)
        rows.append(
            {
                "model": name,
                "configuration": label,
                "force_rms_mev_per_angstrom": force,
                "float_force_rmse_mev_per_angstrom": error,
                "float_force_mae_mev_per_angstrom": mae,
                "difference_rms_mev_per_angstrom": difference,
                "difference_over_force": difference / force,
                "float_error_over_force": error / force,
                "difference_over_float_error": difference / error,
                "mae_ratio": 1e3 * float(np.abs(forces - labels).mean()) / mae,
                "rmse_ratio": rms(forces - labels) / error,
                "by_quadrature": math.hypot(1.0, difference / error),
                "calibration_structures": len(calibration),
                "test_structures": len(structures),
                "atoms": sum(map(len, structures)),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="NAME=MODEL,TRAIN,TEST[,FRAMES]")
    parser.add_argument("--frames", type=int, default=50, help="test structures")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="folder that DIR in a path stands for")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before = load_json(RESULTS / f"{args.name}.json")
    rows: list[dict[str, Any]] = [{"command": before["command"], **row} for row in before.get("rows", [])]
    command = recorded_command(args.work)
    for case in args.cases:
        name = case.split("=", 1)[0]
        measured = measure(case.replace("SHARED", str(SHARED)).replace("DIR", str(args.work)), args.frames)
        rows = [row for row in rows if row["model"] != name] + [{**row, "command": command} for row in measured]
        path = write_result(args.name, rows, work=args.work)
    columns = ("model", "configuration", "difference_over_force", "difference_over_float_error", "mae_ratio")
    print(markdown_table(rows, [*columns, "by_quadrature"]))
    print(path)


if __name__ == "__main__":
    main()
