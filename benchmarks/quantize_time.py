"""Time and memory of ``gaq quantize`` with its gates, and the time to load what it wrote.

    python benchmarks/quantize_time.py --work DIR --nequip-python PYTHON [--repeats 3]
    python benchmarks/quantize_time.py --work DIR --only azobenzene

The first form writes all rows. With --only, rows are printed and not written. About ten minutes of one quiet core.

Cases: the trained models of azobenzene in ../shared, MACE's and NequIP's, with 20 structures, and the shape of
MACE-MP-0 medium (89 elements, 128x0e+128x1o, random weights) with 20 cells of 64 atoms. NequIP's runs by the
interpreter of an environment that has NequIP, and its files are not loaded here. ``gaq quantize`` runs in a separate
process, on one thread; its peak memory is that process's. The files are loaded in separate processes too, after the
imports and a first load of a tiny model, which are no model's cost. Times are of the processor, with the wall clock's
beside them: other work on the machine changes them less.

With random weights the gates may fail where a trained model's pass, so --force writes the file all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import SHARED, write_result

from gaq.reporting.tables import markdown_table

CASES = ("azobenzene", "NequIP azobenzene", "MP-0 medium")
NAMES = {"NequIP azobenzene": ("float.ckpt", "gaq.ckpt")}
"""Float and quantized file of a case, where they are not those of MACE."""


def files_of(case: str) -> tuple[str, str]:
    """Names of the float and the quantized file of a case."""
    return NAMES.get(case, ("float.model", "gaq.model"))


def make(case: str, folder: Path) -> None:
    """Write the float model and ``structures.xyz``."""
    import torch
    from ase.io import read, write

    if case.endswith("azobenzene"):
        source = "nequip_azobenzene.ckpt" if case in NAMES else "mace_azobenzene.model"
        (folder / files_of(case)[0]).write_bytes((SHARED / "models" / source).read_bytes())
        write(folder / "structures.xyz", read(SHARED / "data" / "rmd17" / "azobenzene_train_01.xyz", ":20"))
        return
    import foundation_shapes

    torch.save(foundation_shapes.build(foundation_shapes.SHAPES[case]), folder / "float.model")
    write(folder / "structures.xyz", foundation_shapes.cells(case, 20))


def quantize(folder: Path) -> dict[str, Any]:
    """Run ``gaq quantize`` in this process and measure it."""
    from gaq.cli import main
    from gaq.reporting.cost import peak_memory

    wall = time.perf_counter()
    given, written = files_of(folder.name)
    paths = [str(folder / name) for name in (given, "structures.xyz", written)]
    # A NequIP checkpoint names its training data by a path relative to where it lies.
    os.chdir(SHARED / "models")
    code = main(["quantize", paths[0], "--calibration", paths[1], "-o", paths[2], "--force"])
    # The processor's time is that of the whole process, imports included.
    return {
        "exit code": code,
        "quantize s": time.process_time(),
        "quantize wall s": time.perf_counter() - wall,
        "peak GiB": (peak_memory() or 0) / 2**30,
    }


def load(path: Path) -> dict[str, Any]:
    """Load a file as MACE's calculator does, and measure it."""
    from mace.calculators import MACECalculator

    # Imports and what torch sets up once are no file's cost.
    MACECalculator(model_paths=str(path.parent / "tiny.model"), device="cpu", default_dtype="float32")
    processor = time.process_time()
    MACECalculator(model_paths=str(path), device="cpu", default_dtype="float32")
    return {"s": time.process_time() - processor}


def in_process(stage: str, argument: Path, python: str = sys.executable) -> dict[str, Any]:
    """Run a stage in a separate process and return what it measured, with what it printed under ``text``."""
    command = [python, "-W", "ignore", __file__, "--stage", stage, "--work", str(argument.resolve())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{stage} {argument}: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "text": done.stdout + done.stderr}


def row(case: str, folder: Path, repeats: int, nequip_python: str | None) -> dict[str, Any]:
    """Measure a case."""
    folder.mkdir(exist_ok=True)
    make(case, folder)
    measured = in_process("quantize", folder, (nequip_python if case in NAMES else None) or sys.executable)
    text = measured.pop("text")
    distilled = re.search(r"(\d+) steps of self-distillation", text)
    failed = re.search(r"failed: (.*)", text)
    return {
        "model": case,
        **measured,
        "distillation steps": int(distilled.group(1)) if distilled else 0,
        "gates failed": failed.group(1) if failed else "none",
        **({} if case in NAMES else loads(folder, repeats)),
    }


def loads(folder: Path, repeats: int) -> dict[str, float]:
    """Times to load the float and the quantized file of a case of MACE."""
    import torch
    from mace_speed import big_model

    torch.save(big_model([1]), folder / "tiny.model")
    times = {
        name: [in_process("load", folder / name)["s"] for _ in range(repeats)] for name in ("float.model", "gaq.model")
    }
    return {"stock load s": float(np.median(times["float.model"])), "load s": float(np.median(times["gaq.model"]))}


def slopes(repeats: int) -> list[dict[str, Any]]:
    """RMS force difference to the float model after calibrated rounding, with and without slopes of the inputs.

    Azobenzene's model, on 20 structures drawn anew in each repeat, measured on 100 others.
    """
    import copy

    from ase.io import read

    import gaq
    from gaq.checks.errors import force_difference
    from gaq.model import moments
    from gaq_mace.evaluate import MACEPotential

    model = gaq.load(SHARED / "models" / "mace_azobenzene.model")
    structures = read(SHARED / "data" / "rmd17" / "azobenzene_train_01.xyz", ":")
    rows = []
    for preset in ("gaq", "w4"):
        for weight in (0.0, moments.SLOPE_WEIGHT):
            differences = []
            for repeat in range(repeats):
                sample = structures[100 + 20 * repeat : 120 + 20 * repeat]
                spec = {"preset": preset, "distillation": {"steps": 0}}
                before, moments.SLOPE_WEIGHT = moments.SLOPE_WEIGHT, weight
                rounded = gaq.quantize(copy.deepcopy(model), sample, spec, progress=False)
                moments.SLOPE_WEIGHT = before
                measured = force_difference(MACEPotential(rounded), MACEPotential(model), structures[:100])
                differences.append(measured.rms_mev_per_angstrom)
            rows.append({"preset": preset, "slopes": weight > 0, "force differences meV/Å": differences})
    return rows


def descents() -> list[dict[str, Any]]:
    """Errors during self-distillation of azobenzene's model at 4 bits, meV/Å, at three learning rates and no target."""
    import copy
    import dataclasses

    from ase.io import read

    import gaq
    from gaq.adapter import adapter_for
    from gaq.training import distillation, ptq

    model = gaq.load(SHARED / "models" / "mace_azobenzene.model")
    structures = read(SHARED / "data" / "rmd17" / "azobenzene_train_01.xyz", ":")[120:136]
    prepared = gaq.prepare(model, "w4")
    adapter, teacher = adapter_for(prepared), copy.deepcopy(prepared)
    ptq.gptq(adapter, prepared, structures)
    default = adapter.config(prepared).distillation
    rows, measure, target = [], distillation.force_rms, distillation.TARGET
    for factor in (1 / 3, 1.0, 3.0):
        config = dataclasses.replace(default, learning_rate=factor * default.learning_rate)
        errors: list[float] = []

        def remembered(*args: Any, errors: list[float] = errors) -> float:
            errors.append(measure(*args))
            return errors[-1]

        student = copy.deepcopy(prepared)
        distillation.TARGET, distillation.force_rms = target / 10.0, remembered
        result = distillation.distill(adapter, student, structures, config, progress=False, teacher=teacher)
        distillation.TARGET, distillation.force_rms = target, measure
        row = {"learning rate": config.learning_rate, "target": 10.0 * result.target, "steps": result.steps}
        rows.append({**row, "errors meV/Å": errors})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=CASES)
    parser.add_argument("--nequip-python", help="interpreter of an environment with NequIP and this package")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stage", choices=("quantize", "load"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps({"quantize": quantize, "load": load}[args.stage](args.work)))
        return
    if args.only is None and args.nequip_python is None:
        parser.error("all rows need --nequip-python; --only prints some of them")
    rows = []
    for case in args.only or CASES:
        rows.append(row(case, args.work / case, args.repeats, args.nequip_python))
        print(rows[-1], flush=True)
    if args.only is None:
        write_result("quantize_time", rows, args.work, rounding=slopes(args.repeats), descents=descents())
    shown = [{k: f"{v:.2f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    print(markdown_table(shown, list(rows[0])))


if __name__ == "__main__":
    main()
