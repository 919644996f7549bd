"""Time to the first step of NequIP's train-time compilation: with `quantization: gaq` against stock.

    python benchmarks/compile_training.py --data quickstart/nequip/train.xyz [--repeats 2] [--layers 3]

The training file of NequIP's quickstart with `compile_mode: compile`, once as it is and once with the key, is given to
the stock `nequip-train`, in turn, on one thread, with an empty Inductor cache for each run. The time is that of the
processor, compilers included, from the start of the command to the end of the first step of the optimizer, which comes
after Lightning's check of the validation; other work on the machine changes it less than the clock. The run ends there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import yaml
from common import ROOT, write_result

sys.path.insert(0, str(ROOT / "examples"))
import quickstart_nequip
from comparison import MODELS

RESULT = "first_step.json"


class EndAfterFirstStep(lightning.Callback):
    """Writes the processor time and the clock after the first step, and ends the process."""

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        Path(RESULT).write_text(json.dumps({"processor_s": sum(os.times()[:4]), "clock": time.time()}))
        os._exit(0)  # what a run does at its end is not measured


def first_step(config: Path, name: str) -> dict[str, float]:
    """Processor time and wall time until the first step of a training file, in seconds.

    Raises:
        RuntimeError: if the run ends before its first step, with the end of its output.
    """
    folder = config.parent
    settings = yaml.safe_load(config.read_text())
    settings["training_module"]["model"]["compile_mode"] = "compile"
    settings["trainer"]["callbacks"] = [{"_target_": "compile_training.EndAfterFirstStep"}]
    settings["trainer"]["logger"] = False
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / RESULT).unlink(missing_ok=True)
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no processes whose time would not be counted
        }
        start = time.time()
        done = subprocess.run(
            [str(Path(sys.executable).with_name("nequip-train")), "-cp", str(folder), "-cn", name],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if not (folder / RESULT).is_file():
        raise RuntimeError(f"{name} ended before its first step:\n{done.stdout[-3000:]}")
    measured = json.loads((folder / RESULT).read_text())
    return {"processor_s": measured["processor_s"], "wall_s": measured["clock"] - start}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="structures of the quickstart")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, default=3)
    arguments = parser.parse_args()
    load, times = os.getloadavg()[0], {name: list[dict[str, float]]() for name in MODELS}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(arguments.data, Path(folder) / "train.xyz")
        for repeat in range(arguments.repeats):
            configs = quickstart_nequip.write_training_files(Path(folder), 1, "cpu", 0, arguments.layers)
            for name in MODELS:
                times[name].append(first_step(configs[name], name))
                print(f"repeat {repeat + 1}, {name}: {times[name][-1]}", flush=True)
    rows = [
        {
            "model": name,
            **{key: median(run[key] for run in runs) for key in ("processor_s", "wall_s")},
            "over_stock": median(
                run["processor_s"] / stock["processor_s"] for run, stock in zip(runs, times["fp32"], strict=True)
            ),
            "runs": runs,
        }
        for name, runs in times.items()
    ]
    print(write_result("compile_training", rows, load=load))


if __name__ == "__main__":
    main()
