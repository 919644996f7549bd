"""Time and memory of ``gaq quantize`` with its gates, and the time to load what it wrote.

    python benchmarks/quantize_time.py --work DIR [--only azobenzene "MP-0 medium"] [--repeats 3]

Two cases: the trained model of azobenzene in ../shared with 20 structures, and the shape of MACE-MP-0 medium (89
elements, 128x0e+128x1o, random weights) with 20 cells of 64 atoms. ``gaq quantize`` runs in a process of its own, on
one thread; its peak memory is that process's. The files are loaded in processes of their own, after the imports and a
first load of a tiny model, which are no model's cost. Times are of the processor, with the wall clock's beside them:
other work on the machine changes them less.

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

CASES = ("azobenzene", "MP-0 medium")


def make(case: str, folder: Path) -> None:
    """Write ``float.model`` and ``structures.xyz``."""
    import torch
    from ase.io import read, write

    if case == "azobenzene":
        (folder / "float.model").write_bytes((SHARED / "models" / "mace_azobenzene.model").read_bytes())
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
    paths = [str(folder / name) for name in ("float.model", "structures.xyz", "gaq.model")]
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


def in_process(stage: str, argument: Path) -> dict[str, Any]:
    """Run a stage in a process of its own and return what it measured, with what it printed under ``text``."""
    command = [sys.executable, "-W", "ignore", __file__, "--stage", stage, "--work", str(argument)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{stage} {argument}: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "text": done.stdout + done.stderr}


def row(case: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Measure a case."""
    import torch
    from mace_speed import big_model

    folder.mkdir(exist_ok=True)
    make(case, folder)
    torch.save(big_model([1]), folder / "tiny.model")
    measured = in_process("quantize", folder)
    text = measured.pop("text")
    distilled = re.search(r"(\d+) steps of self-distillation", text)
    failed = re.search(r"failed: (.*)", text)
    loads = {
        name: [in_process("load", folder / name)["s"] for _ in range(repeats)] for name in ("float.model", "gaq.model")
    }
    return {
        "model": case,
        **measured,
        "distillation steps": int(distilled.group(1)) if distilled else 0,
        "force difference": next(iter(re.findall(r"RMS force difference .*", text)), ""),
        "gates failed": failed.group(1) if failed else "none",
        "stock load s": float(np.median(loads["float.model"])),
        "load s": float(np.median(loads["gaq.model"])),
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stage", choices=("quantize", "load"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps({"quantize": quantize, "load": load}[args.stage](args.work)))
        return
    rounding = slopes(args.repeats)
    print(markdown_table(rounding, list(rounding[0])), flush=True)
    rows = []
    for case in args.only:
        rows.append(row(case, args.work / case, args.repeats))
        print(rows[-1], flush=True)
        write_result("quantize_time", rows, args.work, rounding=rounding)
    shown = [{k: f"{v:.2f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    print(markdown_table(shown, list(shown[0])))


if __name__ == "__main__":
    main()
