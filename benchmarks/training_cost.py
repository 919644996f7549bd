"""Cost of an epoch of quantization-aware training, over that of FP32 by the same stock command.

    taskset -c 0 python benchmarks/training_cost.py --framework mace|nequip --work DIR [--presets w8a16 w4a16 ...]

The time of an epoch is the difference of two runs, of one epoch and of ``1 + --epochs``, over ``--epochs``: start and
end are the same in both. Scalars and vectors are rounded from the first epoch on. The runs of a repeat, FP32 and the
presets, run side by side on one core, with one thread each, so all of them meet the same state of the machine. Times
are processor times. Ratios are taken within a repeat, and their median is quoted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ase.io import read, write
from common import SHARED, write_result

from gaq.reporting.tables import markdown_table
from gaq.untyped import Document

VECTORS_AT_ONCE = {"start_epoch": 0, "anneal_epochs": 0}


def seconds(args: argparse.Namespace, preset: str | None, epochs: int) -> float:
    """Processor time of the stock command, in seconds."""
    script: Any = importlib.import_module(f"{args.framework}_presets")
    of_the_tables = script.training_input

    def training_input(given: argparse.Namespace, preset: str | None, seed: int) -> Document:
        config: Document = of_the_tables(given, preset, seed)
        if preset is not None:
            config["quantization"] |= {"distillation": {"steps": 0}}
            if "vectors" in config["quantization"]:
                config["quantization"]["vectors"] = VECTORS_AT_ONCE
        return config

    folder = args.work / f"{epochs}_epochs"
    folder.mkdir(parents=True, exist_ok=True)
    given = argparse.Namespace(**{**vars(args), "epochs": epochs, "work": folder})
    script.training_input = training_input
    try:
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        script.train_model(given, preset, 1)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
    finally:
        script.training_input = of_the_tables
    return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("mace", "nequip"), required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--presets", nargs="+", default=["w8a16", "w4a16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--structures", type=int, default=300, help="of the training data, the first of them")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--train", type=Path, default=SHARED / "data/rmd17/azobenzene_train_01.xyz")
    parser.add_argument("--test", type=Path, default=SHARED / "data/rmd17/azobenzene_test_01.xyz")
    args = parser.parse_args()
    names = {"mace": "mace_azobenzene.model", "nequip": "nequip_azobenzene.ckpt"}
    args.model = args.model or SHARED / "models" / names[args.framework]
    args.seeds = [1]
    os.environ["OMP_NUM_THREADS"] = "1"
    more = args.epochs
    facts = {"model": args.model.name, "data": args.train.name, "structures": args.structures, "epochs": more}
    args.work.mkdir(parents=True, exist_ok=True)
    all_structures, args.train = args.train, args.work / "train.xyz"
    write(args.train, read(all_structures, f":{args.structures}"))

    schemes: list[str | None] = [None, *args.presets]
    runs = [(preset, epochs) for preset in schemes for epochs in (1, 1 + more)]
    times: dict[str, list[float]] = {preset or "fp32": [] for preset in schemes}
    for repeat in range(args.repeats):
        with ProcessPoolExecutor(len(runs)) as pool:
            started = {run: pool.submit(seconds, args, *run) for run in runs}
            took = {run: future.result() for run, future in started.items()}
        for preset in schemes:
            name = preset or "fp32"
            times[name].append((took[preset, 1 + more] - took[preset, 1]) / more)
            over = times[name][-1] / times["fp32"][-1]
            print(f"repeat {repeat + 1}, {name}: {times[name][-1]:.2f} s an epoch, {over:.2f}", flush=True)
    rows = []
    for name, epoch_times in times.items():
        ratios = [seconds / base for seconds, base in zip(epoch_times, times["fp32"], strict=True)]
        rows.append(
            {
                "scheme": name,
                "seconds_per_epoch": statistics.median(epoch_times),
                "over_fp32": statistics.median(ratios),
                "over_fp32_by_repeat": ratios,
            }
        )
    write_result(f"training_cost_{args.framework}", rows, work=args.work, **facts)
    shown = [{k: f"{v:.2f}" if isinstance(v, float) else v for k, v in list(row.items())[:3]} for row in rows]
    print(markdown_table(shown, list(shown[0])))


if __name__ == "__main__":
    main()
