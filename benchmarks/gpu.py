"""MACE or NequIP on one NVIDIA card: energy and forces a step, peak memory, and what each operation achieves.

    python benchmarks/gpu.py [--framework mace|nequip] [--minutes 10] [--sizes 24 192 1000 5000 50000]
    python benchmarks/gpu.py --device cpu --tiny        # runs through Triton's interpreter, measures nothing of use

Needs torch, triton and these packages beside it: gaq, and mace-torch with its e3nn or nequip with its own (two
environments). cuequivariance (with its torch and ops packages) and openequivariance are measured where they are
installed. Models have random weights and are made here: MACE 128x0e+128x1o, l <= 3, correlation 3, two layers, 5 A;
NequIP l_max 2, 64 features, four layers, 5 A. Structures are boxes of water. A step is the model alone, energy and
forces, without the list of neighbours; it is the median of the repeats, and memory is the peak that torch allocated.

Rows named after a preset run as a user's would. Those of the quantized engine are the preset gaq once with every step
replayed as a CUDA graph, once with every kernel launched by the host, and once with linear layers in two int8 planes.
The launch floor is the time of a step of one molecule of water, with and without a graph, and how many kernels it has.

Ceilings are measured on the same card: a copy of 1 GiB (read and written counted) and a product of matrices in float32.
`bytes` of an operation are what it has to read and write at least, `flops` what it has to compute at least.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.util
import os
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

MARGIN_SECONDS = 20.0
STOCK, COMPILED, CUEQ, OEQ = "stock eager", "stock compiled", "cuEquivariance", "OpenEquivariance"
FP32, PRESETS = "engine fp32", ("w8", "gaq")
GRAPH, NO_GRAPH = "engine quantized, CUDA graph", "engine quantized, no graph"
INT8 = "engine quantized, int8 linears"
VARIANTS: dict[str, dict[str, str]] = {
    GRAPH: {"GAQ_CUDA_GRAPHS": str(10**9)},
    NO_GRAPH: {"GAQ_CUDA_GRAPHS": "0"},
    INT8: {"GAQ_LINEAR": "int8"},
}
"""The preset gaq with the variables of the environment that choose how it runs."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("mace", "nequip"), default="mace")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model and small boxes; writes no result")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of atoms")
    parser.add_argument("--minutes", type=float, default=10.0, help="what is not measured by then is left out")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--without", nargs="+", default=[], metavar="KIND", help=f"rows to leave out, as {COMPILED!r}")
    found = parser.parse_args()
    found.sizes = found.sizes or ([3, 6] if found.tiny else [24, 192, 1000, 5000, 50000])
    return found


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
        """At least one time, as many as asked for within `longest` seconds."""
        if self.repeats > 1:
            function()
            self.wait()
        found: list[float] = []
        begin = time.perf_counter()
        while len(found) < self.repeats and (not found or time.perf_counter() - begin < longest):
            start = time.perf_counter()
            function()
            self.wait()
            found.append(time.perf_counter() - start)
        return found


GIVEN = {name: os.environ.get(name) for name in ("GAQ_CUDA_GRAPHS", "GAQ_LINEAR")}


def as_chosen(kind: str) -> None:
    """Set the variables of the environment that a row is about, and the others as they were given."""
    for name, value in GIVEN.items():
        chosen = VARIANTS.get(kind, {}).get(name, value)
        if chosen is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = chosen


def median(values: list[float]) -> float:
    return float(np.median(values))


def water(atoms: int) -> Any:
    """A periodic box of water at 1 g/cm³, turned at random on a grid of whole layers; about as many atoms as asked."""
    rng = np.random.default_rng(0)
    molecules = max(1, round(atoms / 3))
    side = round(molecules ** (1 / 3)) or 1
    layers = max(1, round(molecules / side**2))
    spacing = (18.015 / 6.02214e23) ** (1 / 3) * 1e8
    box = Atoms(cell=np.array([side, side, layers]) * spacing, pbc=True)
    for i in range(side * side * layers):
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        place = np.array([i % side, i // side % side, i // side**2]) + 0.5
        one.translate(place * spacing - one.get_center_of_mass())
        box += one
    box.wrap()
    return box


# -- MACE --


def mace_model(tiny: bool) -> torch.nn.Module:
    if not tiny:
        return big_model([1, 8])
    from e3nn import o3

    torch.manual_seed(0)
    return mace.modules.ScaleShiftMACE(
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
        r_max=1.6,
        num_bessel=4,
        num_polynomial_cutoff=5,
        max_ell=1,
        interaction_cls=mace.modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=mace.modules.interaction_classes["RealAgnosticInteractionBlock"],
        num_interactions=2,
        num_elements=2,
        hidden_irreps=o3.Irreps("8x0e + 8x1o"),
        MLP_irreps=o3.Irreps("4x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(2),
        avg_num_neighbors=3.0,
        atomic_numbers=[1, 8],
        correlation=2,
        radial_type="bessel",
    )


class Mace:
    """Calculators of one model in all its forms."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.tiny = options.device, options.tiny
        self.model = mace_model(options.tiny).float()

    def missing(self, kind: str) -> str | None:
        """Why a row cannot be measured here."""
        package = {CUEQ: "cuequivariance_torch", OEQ: "openequivariance"}.get(kind)
        if package is not None and importlib.util.find_spec(package) is None:
            return "not installed"
        return "needs a card" if (package is not None or kind == GRAPH) and self.device == "cpu" else None

    def make(self, kind: str) -> Any:
        """A function of structures that returns a step: a function without arguments, that returns forces."""
        model = copy.deepcopy(self.model)
        options: dict[str, Any] = {
            COMPILED: {"compile_mode": "default"},
            CUEQ: {"enable_cueq": True},
            OEQ: {"enable_oeq": True},
        }.get(kind, {})
        as_chosen(kind)
        if kind in PRESETS or kind in VARIANTS:
            preset = "gaq" if kind in VARIANTS else kind
            spec = {"preset": preset, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
            model = gaq.prepare(model, spec)
            gaq.calibrate(model, [water(3 if self.tiny else 24)], progress=False)
            model = gaq.convert(model)
        model = model.to(self.device)
        calculator = MACECalculator(models=[model], device=self.device, default_dtype="float32", **options)
        used = calculator.models[0]
        own: Any = Engine(used) if kind == FP32 else None

        def bind(atoms: Any) -> Callable[[], torch.Tensor]:
            batch = calculator._atoms_to_batch(atoms)

            def step() -> torch.Tensor:
                data = calculator._clone_batch(batch).to_dict()
                compiled = bool(calculator.use_compile)
                found = (own if own is not None else used)(data, compute_stress=False, training=compiled)
                if kind == GRAPH and (reason := used.__dict__["gaq_engine"][1].graphs.failed) is not None:
                    raise RuntimeError(f"not recorded: {reason}")
                # Where it compiles, the calculator pads with an atom.
                return found["forces"].detach()[: len(atoms)]

            return step

        return bind


# -- NequIP --


class Nequip:
    """One model through NequIP's own modifiers and ours."""

    def __init__(self, options: argparse.Namespace) -> None:
        from nequip.model import NequIPGNNModel
        from nequip.utils.global_state import set_global_state

        set_global_state()
        self.device, self.tiny = options.device, options.tiny
        sizes = {"num_layers": 2, "num_features": 8, "l_max": 1} if self.tiny else {"num_layers": 4, "num_features": 64}
        made = {
            "seed": 1,
            "model_dtype": "float32",
            "type_names": ["H", "O"],
            "r_max": 2.5 if self.tiny else 5.0,
            "l_max": 2,
            "parity": True,
            "avg_num_neighbors": 30.0,
            **sizes,
        }
        self.build = lambda **extra: NequIPGNNModel(**made, **extra)

    def missing(self, kind: str) -> str | None:
        if kind in VARIANTS:
            return "of MACE's engine only"
        package = {CUEQ: "cuequivariance_torch", OEQ: "openequivariance"}.get(kind)
        if package is not None and importlib.util.find_spec(package) is None:
            return "not installed"
        return "needs a card" if package is not None and self.device == "cpu" else None

    def make(self, kind: str) -> Any:
        from nequip.model.modify_utils import modify

        model: Any = self.build(compile_mode="compile") if kind == COMPILED else self.build()
        modifier = {CUEQ: "enable_CuEquivariance", OEQ: "enable_OpenEquivariance"}.get(kind)
        if modifier is not None:
            model = modify(model, [{"modifier": modifier}])
        if kind in PRESETS:
            spec = {"preset": kind, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
            model = gaq.prepare(model, spec)
            gaq.calibrate(model, [water(3 if self.tiny else 24)], progress=False)
            model = gaq.convert(model)
        if kind == FP32 or kind in PRESETS:
            from gaq_nequip.fused import fuse

            fuse(model, self.device)
            model.requires_grad_(False)  # as what is compiled has it: tables of weights have no gradient
        model = model.to(self.device).eval()

        def bind(atoms: Any) -> Callable[[], torch.Tensor]:
            from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase

            data = compute_neighborlist_(from_ase(atoms), r_max=2.5 if self.tiny else 5.0)
            data[AtomicDataDict.ATOM_TYPE_KEY] = torch.tensor([0 if z == 1 else 1 for z in atoms.numbers])
            data = AtomicDataDict.to_(data, self.device)
            for key, value in data.items():
                if torch.is_tensor(value) and value.dtype == torch.float32:
                    data[key] = value.double()

            def step() -> torch.Tensor:
                return model(dict(data))[AtomicDataDict.FORCE_KEY].detach()

            return step

        return bind


# -- measurements --


def ceilings(clock: Clock) -> dict[str, float]:
    """Copy in GB/s and product of matrices in GFLOP/s, and what launching a kernel takes at least, in microseconds."""
    device, n = clock.device, 1 << (28 if clock.device == "cuda" else 20)
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    copied = median(clock(lambda: target.copy_(source)))
    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    product = median(clock(lambda: a @ b))
    one = torch.ones(1, device=device)

    def many() -> None:
        for _ in range(1000):
            one.add_(1.0)

    found = {
        "copy_gbytes_per_second": 8 * n / copied / 1e9,
        "float32_matmul_gflops": 2 * size**3 / product / 1e9,
        "launch_microseconds": median(clock(many, 1.0)) * 1e3,
    }
    if device == "cuda":
        x, w = (torch.ones(size, size, dtype=torch.int8, device=device) for _ in range(2))
        found["int8_matmul_gops"] = 2 * size**3 / median(clock(lambda: torch._int_mm(x, w))) / 1e9
    return found


def launches(step: Callable[[], Any]) -> dict[str, int]:
    """Kernels of one step, and how often the host launches something for them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profiler.key_averages()}
    calls = ("cudaLaunch", "cudaGraphLaunch", "cuLaunch", "cuGraphLaunch")
    return {
        # What is not a function of the runtime or the driver ran on the card.
        "kernels_a_step": sum(n for key, n in counts.items() if not key.startswith(("cuda", "cuLaunch", "cuGraph"))),
        "launches_a_step": sum(n for key, n in counts.items() if key.startswith(calls)),
    }


def floor(framework: Any, clock: Clock) -> list[dict[str, Any]]:
    """A step of one molecule of water: what a step takes at least, however small the system."""
    rows: list[dict[str, Any]] = []
    for kind in (NO_GRAPH, GRAPH, "gaq"):
        # Where there are no variants the preset itself is measured.
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


def steps(framework: Any, options: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Time and memory of every kind at every size."""
    rows: list[dict[str, Any]] = []
    boxes = {size: water(size) for size in options.sizes}
    expected: dict[int, torch.Tensor] = {}
    for kind in (STOCK, FP32, *PRESETS, *VARIANTS, CUEQ, OEQ, COMPILED):
        reason = "left out" if kind in options.without else framework.missing(kind)
        bind: Any = None
        if reason is None and clock.left() > MARGIN_SECONDS:
            try:
                bind = framework.make(kind)
            except Exception as error:  # a peer that does not work here is a row, not the end
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for size, box in boxes.items():
            row: dict[str, Any] = {"kind": kind, "atoms": len(box)}
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
) -> dict[str, Any]:
    forces = step()
    if clock.repeats > 1:
        # A graph is recorded the second time, and kernels are compiled the first.
        for _ in range(2):
            forces = step()
    found: dict[str, Any] = {}
    if kind == STOCK:
        expected[size] = forces.clone()
    elif size in expected:
        found["largest_force_difference_to_stock_ev_per_angstrom"] = float((forces - expected[size]).abs().max())
    if clock.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = clock(step)
    found |= {"median_seconds": median(times), "repeats": len(times)}
    if clock.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found |= launches(step)
    return found


def numbers(value: Any) -> int:
    """Bytes of all tensors within."""
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    return sum(numbers(v) for v in value) if isinstance(value, (tuple, list)) else 0


def operations(
    framework: Any, options: argparse.Namespace, clock: Clock, top: dict[str, float]
) -> list[dict[str, Any]]:
    """Each operation of a step of the quantized engine by itself, on the arguments it has there."""
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
        wanted = [a for a in inputs if torch.is_tensor(a) and a.requires_grad]
        with torch.no_grad():
            out = function(*inputs)
            forward = median(clock(lambda f=function, i=inputs: f(*i), 1.0))  # type: ignore[misc]
        kept = function(*inputs)
        probe = torch.ones_like(kept)

        def back(kept: Any = kept, wanted: Any = wanted, probe: Any = probe) -> Any:
            return torch.autograd.grad(kept, wanted, probe, retain_graph=True, allow_unused=True)

        moved = numbers(inputs) + numbers(out)
        work = flops(name, args)
        ways = [("forward", forward, moved, work[0])]
        if name != "round_features":
            # The gradient of the output is read as well, and one written for each input that has one.
            ways.append(("backward", median(clock(back, 1.0)), moved + numbers(wanted), work[1]))
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


def flops(name: str, args: tuple[Any, ...]) -> tuple[float, float]:
    """Additions and multiplications over channels, forward and backward, as benchmarks/cpu_engine.py counts them."""
    if name == "convolution":
        problem, vectors = args[0], args[3]
        forward = backward = 0.0
        for path in problem.paths:
            d1, d3 = 2 * problem.blocks[path.block] + 1, 2 * problem.groups[path.group] + 1
            forward += 2 * (6 + d1 / 2 + d1 * d3)
            backward += 2 * (12 + d1 / 2 + 2 * d1 * d3 + 2 * d1)
        scale = float(vectors.shape[0] * problem.channels)
        return forward * scale, backward * scale
    if name == "contraction":
        polynomial, features = args[:2]
        nodes, terms = len(polynomial.monomials), len(polynomial.terms)
        scale = float(features.shape[0] * features.shape[2])
        return scale * (nodes + 2 * terms), scale * (5 * nodes + 2 * terms)
    return 0.0, 0.0


def linear_rows(options: argparse.Namespace, clock: Clock, atoms: int, top: dict[str, float]) -> list[dict[str, Any]]:
    """The linear layer of the messages of l = 1, rounded and not, beside torch's own in float32."""
    rows = 3 * atoms
    inner, outputs = (16, 8) if options.tiny else (384, 128)
    x = torch.randn(rows, inner, device=clock.device)
    codes = torch.randint(-127, 128, (inner, outputs), dtype=torch.int8, device=clock.device)
    scale = torch.rand(1, outputs, device=clock.device)
    weight = codes.float() * scale
    work = 2.0 * rows * inner * outputs
    found = []
    for name, function in (
        ("linear, torch float32", lambda: x @ weight),
        ("linear, two planes", lambda: linear.linear(x, codes, scale)),
        ("linear, float features", lambda: linear.linear(x, codes, scale, None, False)),
    ):
        seconds = median(clock(function, 1.0))
        amount = numbers((x, weight if "torch" in name else codes)) + 4 * rows * outputs
        row = {
            "operation": name,
            "atoms": atoms,
            "seconds": seconds,
            "gbytes_per_second": amount / seconds / 1e9,
            "share_of_copy": amount / seconds / 1e9 / top["copy_gbytes_per_second"],
            "gflops": work / seconds / 1e9,
            "share_of_matmul": work / seconds / 1e9 / top["float32_matmul_gflops"],
        }
        found.append(row)
        print(row, flush=True)
    return found


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
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no NVIDIA card here; --device cpu --tiny tries the script without one")
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    clock = Clock(options.device, 1 if options.tiny else options.repeats, begin + 60 * options.minutes)
    top = ceilings(clock)
    print(top, flush=True)
    framework = Mace(options) if options.framework == "mace" else Nequip(options)
    # The profile of the operations comes before the peers, lest these use up the time.
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
        print("Tiny sizes or no card: nothing written.")
        return
    card = re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_").lower()
    name = f"gpu_{card}" if options.framework == "mace" else f"gpu_{card}_{options.framework}"
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
        # Read as triton is imported.
        os.environ["TRITON_INTERPRET"], os.environ["GAQ_KERNELS"] = "1", "triton"

from importlib import metadata  # noqa: E402

if importlib.util.find_spec("mace") is not None:
    import mace  # before e3nn
    import mace.modules
    from mace.calculators import MACECalculator

    from gaq_mace.engine import Engine
import numpy as np  # noqa: E402
import torch  # noqa: E402
from ase import Atoms  # noqa: E402
from ase.build import molecule  # noqa: E402
from common import write_result  # noqa: E402

import gaq  # noqa: E402
from gaq.kernels import contraction, convolution, linear, rounding  # noqa: E402
from gaq.reporting.tables import markdown_table  # noqa: E402

with contextlib.suppress(ImportError):
    from mace_speed import big_model

if __name__ == "__main__":
    main(chosen)
