"""What an epoch of quantization-aware training costs, over one of FP32 by the same stock command.

    python benchmarks/training_cost.py --framework mace|nequip --work DIR [--presets w8a16 w4a16 ...] [--repeats 3]

An epoch is the difference of two runs, of one epoch and of ``1 + --epochs``, over ``--epochs``: what is done before the
first and after the last is in both. All branches are rounded from the first epoch on. Times are those of the processor,
which other work on the machine disturbs less; run on one thread (``OMP_NUM_THREADS=1``). Each repeat runs FP32 and the
presets in turn; ratios are taken within a repeat, and their median is what counts.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import statistics
from pathlib import Path
from typing import Any

from common import SHARED, write_result

from gaq.reporting.tables import markdown_table

VECTORS_AT_ONCE = {"start_epoch": 0, "anneal_epochs": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("mace", "nequip"), required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--presets", nargs="+", default=["w8a16", "w4a16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--train", type=Path, default=SHARED / "data/rmd17/azobenzene_train_01.xyz")
    parser.add_argument("--test", type=Path, default=SHARED / "data/rmd17/azobenzene_test_01.xyz")
    args = parser.parse_args()
    names = {"mace": "mace_azobenzene.model", "nequip": "nequip_azobenzene.ckpt"}
    args.model = args.model or SHARED / "models" / names[args.framework]
    args.seeds = [1]
    args.work.mkdir(parents=True, exist_ok=True)
    script: Any = importlib.import_module(f"{args.framework}_presets")
    of_the_tables = script.training_input

    def training_input(given: argparse.Namespace, preset: str | None, seed: int) -> dict[str, Any]:
        config: dict[str, Any] = of_the_tables(given, preset, seed)
        if preset is not None:
            config["quantization"] |= {"vectors": VECTORS_AT_ONCE, "distillation": {"steps": 0}}
        return config

    script.training_input = training_input
    more = args.epochs

    def seconds(preset: str | None, epochs: int) -> float:
        args.epochs = epochs
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        script.train_model(args, preset, 1)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime

    schemes: list[str | None] = [None, *args.presets]
    times: dict[str, list[float]] = {preset or "fp32": [] for preset in schemes}
    for repeat in range(args.repeats):
        for preset in schemes:
            took = (seconds(preset, 1 + more) - seconds(preset, 1)) / more
            times[preset or "fp32"].append(took)
            print(f"repeat {repeat + 1}, {preset or 'fp32'}: {took:.2f} s an epoch", flush=True)
    rows = []
    for name, found in times.items():
        ratios = [own / base for own, base in zip(found, times["fp32"], strict=True)]
        rows.append(
            {
                "scheme": name,
                "seconds_per_epoch": statistics.median(found),
                "over_fp32": statistics.median(ratios),
                "over_fp32_by_repeat": ratios,
            }
        )
    facts = {"model": args.model.name, "data": args.train.name, "epochs": more}
    write_result(f"training_cost_{args.framework}", rows, work=args.work, **facts)
    shown = [{k: f"{v:.2f}" if isinstance(v, float) else v for k, v in list(row.items())[:3]} for row in rows]
    print(markdown_table(shown, list(shown[0])))


if __name__ == "__main__":
    main()
