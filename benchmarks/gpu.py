"""MACE or NequIP on one NVIDIA GPU: time of energy and forces, peak memory, and rates of each operation.

    python benchmarks/gpu.py [--framework mace|nequip] [--minutes 10] [--sizes 24 192 1000 5000 50000]
    python benchmarks/gpu.py --device cpu --tiny        # runs through Triton's interpreter, measures nothing of use

It needs torch, triton, gaq, and mace-torch with its e3nn or nequip with its own (two environments). cuequivariance
(with its torch and ops packages) and openequivariance are measured where they are installed. Models are made here
with random weights: MACE 128x0e+128x1o, l <= 3, correlation 3, two layers, 5 A; NequIP l_max 2, 64 features, four
layers, 5 A. Structures are boxes of water. A step is energy and forces of the model alone, without the neighbour
list. Times are medians of the repeats, and memory is the peak that torch allocated.

Rows named after a preset run as a user runs them. Those of the quantized engine are the preset gaq with every step
replayed as a CUDA graph, with every kernel launched by the host, and with linear layers in two int8 planes. The launch
floor is the time of a step of one molecule of water, with and without a graph, and its number of kernels.

Ceilings are measured on the same GPU: a copy of 1 GiB (read and written counted) and a matrix product in float32.
`bytes` of an operation are the least it has to read and write, `flops` the least it has to compute.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import time
import warnings
from importlib import metadata
from typing import Any

from gpu_cases import COMPILED


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("mace", "nequip"), default="mace")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model and small boxes; writes no result")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of atoms")
    parser.add_argument("--minutes", type=float, default=10.0, help="rows that do not fit in this time are left out")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--without", nargs="+", default=[], metavar="KIND", help=f"rows to leave out, as {COMPILED!r}")
    options = parser.parse_args()
    options.sizes = options.sizes or ([3, 6] if options.tiny else [24, 192, 1000, 5000, 50000])
    return options


def shown(rows: list[dict[str, Any]], top: dict[str, float]) -> list[dict[str, str]]:
    table = []
    for row in rows:
        measured = "median_seconds" in row
        floor = row.get("kernels_a_step", 0) * top["launch_microseconds"] / 1e3
        table.append(
            {
                "": row["kind"],
                "atoms": str(row["atoms"]),
                "ms a step": f"{1e3 * row['median_seconds']:.2f}" if measured else row.get("note", "-"),
                "x eager": f"{row['times_stock_eager']:.2f}" if "times_stock_eager" in row else "-",
                "peak MiB": f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "-",
                "launch floor ms": f"{floor:.2f}" if floor else "-",
            }
        )
    return table


def launch_table(rows: list[dict[str, Any]]) -> tuple[list[dict[str, str]], list[str]]:
    """The launch floor as a table and its columns."""
    columns = ["launch floor", "atoms", "ms a step", "kernels", "launches"]
    table = [
        {
            "launch floor": row["kind"],
            "atoms": str(row["atoms"]),
            "ms a step": f"{1e3 * row['median_seconds']:.2f}",
            "kernels": str(row.get("kernels_a_step", "-")),
            "launches": str(row.get("launches_a_step", "-")),
        }
        for row in rows
    ]
    return table, columns


def main(options: argparse.Namespace) -> None:
    # Not at the top: triton reads the environment when it is imported, and only one framework may be installed.
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no NVIDIA GPU here; --device cpu --tiny tries the script without one")
    if options.framework == "mace":
        from gpu_mace import Mace as Framework
    else:
        from gpu_nequip import Nequip as Framework
    from common import write_result
    from gpu_measures import Clock, ceilings, floor, operations, steps

    from gaq.reporting.tables import markdown_table

    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    clock = Clock(options.device, 1 if options.tiny else options.repeats, begin + 60 * options.minutes)
    top = ceilings(clock)
    print(top, flush=True)
    framework = Framework(options)
    # Operations come before the other packages, which could use up the time.
    every = operations(framework, options, clock, top) if options.framework == "mace" else []
    least = floor(framework, clock)
    rows = steps(framework, options, clock)
    table = shown(rows, top)
    print(markdown_table(table, list(table[0])))
    print(markdown_table(*launch_table(least)))
    if every:
        listed = [{k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in every]
        print(markdown_table(listed, list(listed[0])))
    if options.tiny or options.device == "cpu":
        print("Tiny sizes or no GPU: nothing written.")
        return
    device_name = re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_").lower()
    name = f"gpu_{device_name}" if options.framework == "mace" else f"gpu_{device_name}_{options.framework}"
    extra: dict[str, Any] = {"ceilings": top, "operations": every, "launch_floor": least}
    extra["seconds"] = time.perf_counter() - begin
    packages = ("triton", "cuequivariance-torch", "openequivariance")
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            extra[package] = metadata.version(package)
    print(write_result(name, rows, cuda=torch.version.cuda, **extra))


if __name__ == "__main__":
    chosen = arguments()
    if chosen.device == "cpu":
        # Triton reads these when it is imported.
        os.environ["TRITON_INTERPRET"], os.environ["GAQ_KERNELS"] = "1", "triton"
    main(chosen)
