"""Measurements of benchmarks/gpu.py: ceilings, steps, their launches, and each operation by itself."""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import flops
import numpy as np
import torch
from gpu_cases import COMPILED, CUEQ, FP32, GRAPH, NO_GRAPH, OEQ, PRESETS, STOCK, VARIANTS, water

from gaq.kernels import contraction, convolution, linear, rounding
from gaq.quantizers.weights import largest_code
from gaq.untyped import Document

MARGIN_SECONDS = 20.0


class Clock:
    """Times of a function on the device, in seconds."""

    def __init__(self, device: str, repeats: int, end: float) -> None:
        self.device, self.repeats, self.end = device, repeats, end

    def left(self) -> float:
        return self.end - time.perf_counter()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def __call__(self, function: Callable[[], Any], longest: float = 4.0) -> list[float]:
        """Times of `repeats` calls, or of as many as fit in `longest` seconds; of one at least."""
        if self.repeats > 1:
            function()
            self.wait()
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < self.repeats and (not times or time.perf_counter() - begin < longest):
            start = time.perf_counter()
            function()
            self.wait()
            times.append(time.perf_counter() - start)
        return times


def median(values: list[float]) -> float:
    return float(np.median(values))


def ceilings(clock: Clock) -> dict[str, float]:
    """Copy in GB/s, matrix product in GFLOP/s, and the shortest launch of a kernel in microseconds."""
    device, n = clock.device, 1 << (28 if clock.device == "cuda" else 20)
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    copied = median(clock(lambda: target.copy_(source)))
    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    product = median(clock(lambda: a @ b))
    single = torch.ones(1, device=device)

    def many() -> None:
        for _ in range(1000):
            single.add_(1.0)

    limits = {
        "copy_gbytes_per_second": 8 * n / copied / 1e9,
        "float32_matmul_gflops": 2 * size**3 / product / 1e9,
        "launch_microseconds": median(clock(many, 1.0)) * 1e3,
    }
    if device == "cuda":
        x, w = (torch.ones(size, size, dtype=torch.int8, device=device) for _ in range(2))
        limits["int8_matmul_gops"] = 2 * size**3 / median(clock(lambda: torch._int_mm(x, w))) / 1e9
    return limits


def launches(step: Callable[[], Any]) -> dict[str, int]:
    """Number of kernels in one step, and number of launches by the host."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profiler.key_averages()}
    calls = ("cudaLaunch", "cudaGraphLaunch", "cuLaunch", "cuGraphLaunch")
    return {
        # Entries that are no functions of the runtime or the driver ran on the GPU.
        "kernels_a_step": sum(n for key, n in counts.items() if not key.startswith(("cuda", "cuLaunch", "cuGraph"))),
        "launches_a_step": sum(n for key, n in counts.items() if key.startswith(calls)),
    }


def floor(framework: Any, clock: Clock) -> list[Document]:
    """A step of one molecule of water: the shortest step, however small the system."""
    rows: list[Document] = []
    for kind in (NO_GRAPH, GRAPH, "gaq"):
        # Without variants the preset itself is measured.
        if framework.missing(kind) is not None or (kind == "gaq" and rows) or clock.left() < MARGIN_SECONDS:
            continue
        box = water(3)
        step = framework.make(kind)(box)
        for _ in range(1 if clock.repeats == 1 else 3):
            step()
        row = {"kind": kind, "atoms": len(box), "median_seconds": median(clock(step))}
        if clock.device == "cuda":
            row |= launches(step)
        rows.append(row)
        print(row, flush=True)
    return rows


def steps(framework: Any, options: argparse.Namespace, clock: Clock) -> list[Document]:
    """Time and memory of every kind at every size."""
    rows: list[Document] = []
    boxes = {size: water(size) for size in options.sizes}
    expected: dict[int, torch.Tensor] = {}
    for kind in (STOCK, FP32, *PRESETS, *VARIANTS, CUEQ, OEQ, COMPILED):
        reason = "left out" if kind in options.without else framework.missing(kind)
        bind: Any = None
        if reason is None and clock.left() > MARGIN_SECONDS:
            try:
                bind = framework.make(kind)
            except Exception as error:  # another package that does not work here gets a note in its row
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for size, box in boxes.items():
            row: Document = {"kind": kind, "atoms": len(box)}
            rows.append(row)
            if reason is not None or clock.left() < MARGIN_SECONDS:
                row["note"] = reason or "no time left"
                continue
            try:
                row |= one_step(bind(box), clock, expected, size, kind)
            except Exception as error:
                out = isinstance(error, torch.OutOfMemoryError)
                row["note"] = "out of memory" if out else f"{type(error).__name__}: {str(error)[:200]}"
            gc.collect()
            if clock.device == "cuda":
                torch.cuda.empty_cache()
            print(row, flush=True)
        del bind
        gc.collect()
    eager = {r["atoms"]: r for r in rows if r["kind"] == STOCK and "median_seconds" in r}
    for row in rows:
        base = eager.get(row["atoms"])
        if base is not None and "median_seconds" in row:
            row["times_stock_eager"] = base["median_seconds"] / row["median_seconds"]
    return rows


def one_step(
    step: Callable[[], torch.Tensor], clock: Clock, expected: dict[int, torch.Tensor], size: int, kind: str
) -> Document:
    forces = step()
    if clock.repeats > 1:
        # The first call compiles kernels, and the second records a graph.
        for _ in range(2):
            forces = step()
    row: Document = {}
    if kind == STOCK:
        expected[size] = forces.clone()
    elif size in expected:
        row["largest_force_difference_to_stock_ev_per_angstrom"] = float((forces - expected[size]).abs().max())
    if clock.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = clock(step)
    row |= {"median_seconds": median(times), "repeats": len(times)}
    if clock.device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        row |= launches(step)
    return row


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in a nested value."""
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    return sum(bytes_of(v) for v in value) if isinstance(value, (tuple, list)) else 0


def operations(framework: Any, options: argparse.Namespace, clock: Clock, top: dict[str, float]) -> list[Document]:
    """Each operation of a step of the quantized engine by itself, on the arguments it has in the step."""
    size = options.sizes[0] if options.tiny else max(s for s in options.sizes if s <= 5000)
    bind = framework.make("gaq")
    calls: list[tuple[str, Any, tuple[Any, ...]]] = []
    with contextlib.ExitStack() as stack:
        for module, name in ((convolution, "convolution"), (contraction, "contraction"), (rounding, "round_features")):
            function = getattr(module, name)

            def recorded(*args: Any, function: Any = function, name: str = name) -> Any:
                calls.append((name, function, args))
                return function(*args)

            setattr(module, name, recorded)
            stack.callback(setattr, module, name, function)
        bind(water(size))()
    rows = []
    for number, (name, function, args) in enumerate(calls):
        if clock.left() < MARGIN_SECONDS / 2:
            break
        inputs = tuple(
            a.detach().requires_grad_(a.is_floating_point() and (name != "contraction" or i == 1))
            if torch.is_tensor(a) and not (name == "convolution" and i == 4)
            else a
            for i, a in enumerate(args)
        )
        differentiable = [a for a in inputs if torch.is_tensor(a) and a.requires_grad]
        with torch.no_grad():
            out = function(*inputs)
            forward = median(clock(lambda f=function, i=inputs: f(*i), 1.0))  # type: ignore[misc]
        kept = function(*inputs)
        probe = torch.ones_like(kept)

        def back(kept: Any = kept, differentiable: Any = differentiable, probe: Any = probe) -> Any:
            return torch.autograd.grad(kept, differentiable, probe, retain_graph=True, allow_unused=True)

        moved = bytes_of(inputs) + bytes_of(out)
        work = work_of(name, args)
        ways = [("forward", forward, moved, work[0])]
        if name != "round_features":
            # The backward also reads the gradient of the output, and writes one for each input that has one.
            ways.append(("backward", median(clock(back, 1.0)), moved + bytes_of(differentiable), work[1]))
        for way, seconds, amount, done in ways:
            row = {
                "operation": f"{number}: {name}, {way}",
                "atoms": size,
                "seconds": seconds,
                "gbytes_per_second": amount / seconds / 1e9,
                "share_of_copy": amount / seconds / 1e9 / top["copy_gbytes_per_second"],
                "gflops": done / seconds / 1e9,
                "share_of_matmul": done / seconds / 1e9 / top["float32_matmul_gflops"],
            }
            rows.append(row)
            print(row, flush=True)
    return rows + linear_rows(options, clock, size, top)


def work_of(name: str, args: tuple[Any, ...]) -> tuple[float, float]:
    """Floating-point operations of a call, forward and backward."""
    if name == "convolution":
        problem, vectors = args[0], args[3]
        return flops.of_convolution(problem, vectors.shape[0])
    if name == "contraction":
        polynomial, features = args[:2]
        return flops.of_contraction(polynomial, features.shape[0], features.shape[2])
    return 0.0, 0.0


def linear_rows(options: argparse.Namespace, clock: Clock, atoms: int, top: dict[str, float]) -> list[Document]:
    """The linear layer of the messages of l = 1, rounded and not, and torch's layer in float32."""
    rows = 3 * atoms
    inner, outputs = (16, 8) if options.tiny else (384, 128)
    x = torch.randn(rows, inner, device=clock.device)
    codes = torch.randint(-127, 128, (inner, outputs), dtype=torch.int8, device=clock.device)
    scale = torch.rand(1, outputs, device=clock.device)
    weight = codes.float() * scale
    work = 2.0 * rows * inner * outputs
    table = []
    for name, function in (
        ("linear, torch float32", lambda: x @ weight),
        ("linear, two planes", lambda: linear.linear(x, codes, scale)),
        ("linear, three planes", lambda: linear.linear(x, codes, scale, None, largest_code(24))),
        ("linear, float features", lambda: linear.linear(x, codes, scale, None, 0)),
    ):
        seconds = median(clock(function, 1.0))
        amount = bytes_of((x, weight if "torch" in name else codes)) + 4 * rows * outputs
        row = {
            "operation": name,
            "atoms": atoms,
            "seconds": seconds,
            "gbytes_per_second": amount / seconds / 1e9,
            "share_of_copy": amount / seconds / 1e9 / top["copy_gbytes_per_second"],
            "gflops": work / seconds / 1e9,
            "share_of_matmul": work / seconds / 1e9 / top["float32_matmul_gflops"],
        }
        table.append(row)
        print(row, flush=True)
    return table
