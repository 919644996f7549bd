"""Time of a linear layer on 16-bit features: float32 matrix product against two int8 planes, forward, one thread.

    python benchmarks/int8_linear.py [--repeats 51]

The shapes are those of the second interaction of the benchmark model (128x0e+128x1o, l <= 3) on a box of 192 atoms.
`two planes` rounds to codes of 16 bits, ``256 hi + lo``, multiplies each plane by the int8 weights with int32 sums and
adds the two. This is exact, but for the last scaling. `codes given` counts only the two products and their sum, as if
the features already were in memory as planes. The derivative by positions needs a float product in any case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from common import write_result
from torch import Tensor

from gaq.reporting.tables import markdown_table

ATOMS, CHANNELS = 192, 128
# (2 l + 1, paths) of the messages, and the linear layers between layers, which have one input block.
SHAPES = {"message l=0": (1, 2), "message l=1": (3, 3), "message l=2": (5, 3), "message l=3": (7, 2), "up l=1": (3, 1)}


def planes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """High and low int8 plane of 16-bit codes."""
    high = torch.div(codes + 128, 256, rounding_mode="floor")
    return high.to(torch.int8), (codes - 256 * high).to(torch.int8)


def products(high: Tensor, low: Tensor, weight: Tensor, scale: Tensor, columns: Tensor) -> Tensor:
    """The layer on planes; `scale` has one number for each row, `columns` one for each output channel."""
    total = torch._int_mm(high, weight).double().mul_(256).add_(torch._int_mm(low, weight))
    return total.float() * scale * columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=51)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, (components, paths) in SHAPES.items():
        x = torch.randn(ATOMS * components, paths * CHANNELS)
        codes_w = torch.randint(-127, 128, (paths * CHANNELS, CHANNELS), dtype=torch.int8)
        columns = torch.rand(CHANNELS) + 0.5
        weight = codes_w.float() * columns
        scale = x.abs().amax(1, keepdim=True) / 32639
        codes = torch.round(x / scale).int()
        exact = (codes.double() @ codes_w.double()) * scale * columns
        given = planes(codes)

        def two_planes(x: Tensor = x, w: Tensor = codes_w, columns: Tensor = columns) -> Tensor:
            step = x.abs().amax(1, keepdim=True) / 32639
            return products(*planes(torch.round(x / step).int()), w, step, columns)

        kinds: dict[str, Callable[[], Tensor]] = {
            "float32": lambda x=x, w=weight: x @ w,  # type: ignore[misc]
            "two planes": two_planes,
            "codes given": lambda g=given, w=codes_w, s=scale, c=columns: products(*g, w, s, c),  # type: ignore[misc]
        }
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(args.repeats + 5):
            for kind, function in kinds.items():
                start = time.perf_counter()
                result = function()
                times[kind].append(time.perf_counter() - start)
        torch.testing.assert_close(result.double(), exact.double(), rtol=1e-5, atol=1e-5)
        for kind, values in times.items():
            rows.append(
                {
                    "layer": name,
                    "shape": f"{x.shape[0]} x {x.shape[1]} x {CHANNELS}",
                    "kind": kind,
                    "median_ms": float(1e3 * np.median(values[5:])),
                    "ratio_to_float32": float(np.median(np.array(values[5:]) / np.array(times["float32"][5:]))),
                }
            )
    write_result(
        "int8_linear", rows, mkldnn=torch.backends.mkldnn.is_available(), cpu=torch.backends.cpu.get_cpu_capability()
    )
    shown = [{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    print(markdown_table(shown, list(shown[0])))


if __name__ == "__main__":
    main()
