"""Registers, shared memory and spills of every Triton kernel, compiled ahead of time; it needs no GPU.

    python benchmarks/gpu_resources.py [--architectures 80 89 90] [--only NAME]

The shapes are those of MACE 128x0e+128x1o (l <= 3, correlation 3) and NequIP l_max 2 with 64 features, in float32. The
numbers are those of NVIDIA's assembler (`cuobjdump --dump-resource-usage` of the compiled kernel). A stack means that
registers did not suffice and values are in memory. For linear layers the table also has the instructions of the matrix
units in the kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from common import write_result
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gaq.kernels import convolution, harmonics
from gaq.kernels.gpu import contraction, linear, rounding
from gaq.kernels.gpu import convolution as generated
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX = re.compile(r"wgmma\.mma_async[\w.]*|mma\.sync[\w.]*")


def resources(kernel: Any, types: dict[str, str], constants: Document, warps: int, cc: int) -> Document:
    """Compile a kernel, with aligned pointers and integers that are multiples of nothing in particular.

    Args:
        kernel: decorated by triton.jit.
        types: types of its arguments that are not int32, by name.
        constants: values of its constant arguments, by name.
        warps: warps of a program.
        cc: compute capability times ten.
    """
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs=attributes,
    )
    made = triton.compile(source, target=GPUTarget("cuda", cc, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "sm": cc,
        "warps": warps,
        "registers": usage["reg"],
        "stack_bytes": usage["stack"],
        "shared_bytes": made.metadata.shared,
        "matrix_instructions": sorted(set(MATRIX.findall(made.asm["ptx"]))),
    }


def linears() -> list[tuple[str, Any, dict[str, str], Document, int]]:
    types = {"a_ptr": "*fp32", "w_ptr": "*i8", "scale_ptr": "*fp32", "residual_ptr": "*fp32", "out_ptr": "*fp32"}
    types["top"] = "fp32"
    cases = []
    for name, planes, back, packed in (
        ("linear, two planes", 2, False, False),
        ("linear, two planes, 4 bits", 2, False, True),
        ("linear, three planes", 3, False, False),
        ("linear, float features", 0, False, False),
        ("linear, gradient", 0, True, False),
    ):
        for rows in (192, 50000):
            tile = linear.blocks(rows, planes > 0)
            warps = tile.pop("num_warps")
            constants = {"GROUPED": False, "PLANES": planes, "PACKED": packed, "BACKWARD": back, "RESIDUAL": True}
            constants |= {"EMULATED": False, "a_inner": 1, "w_inner" if back else "w_column": 1, **tile}
            pointers = types | ({"w_ptr": "*u8"} if packed else {})
            cases.append((f"{name}, {rows} rows", linear.linear_kernel, pointers, constants, warps))
    return cases


def others() -> list[tuple[str, Any, dict[str, str], Document, int]]:
    types = dict.fromkeys(("x_ptr", "y_ptr", "out_ptr", "coefficient_ptr"), "*fp32")
    types |= {"species_ptr": "*i64", "row_ptr": "*i32", "group_ptr": "*i32", "term_ptr": "*i32"}
    block_a, block_c = contraction.blocks(5000, 128)
    cases = [
        (
            "contraction, 128 channels",
            contraction.polynomial_kernel,
            types,
            {"BLOCK_A": block_a, "BLOCK_C": block_c},
            4,
        )
    ]
    pointers = {"x_ptr": "*fp32", "out_ptr": "*fp32", "int_ptr": "*i64", "top_ptr": "*fp64", "mixing_ptr": "*fp64"}
    for l in (1, 2, 3):  # noqa: E741
        dimensions = sum(1 << (2 * k + 1) for k in range(l + 1))
        for framed in (True, False):
            constants = {"FRAMED": framed, "EPS": 1.2e-7, "DIMENSIONS": dimensions, "C": rounding.block(dimensions)}
            name = f"rounding, l <= {l}, {'local' if framed else 'fixed'} frame"
            cases.append((name, rounding.rounding_kernel, pointers, constants, 1))
    return cases


def problems() -> dict[str, convolution.ConvolutionProblem]:
    """Convolutions of the layers, with couplings of the sparsity that models have."""
    with contextlib.suppress(ImportError):
        import mace  # noqa: F401  (before e3nn)
    from e3nn import o3

    sh = harmonics.fit(lambda d: o3.spherical_harmonics([0, 1, 2, 3], d, True, "component"), 3)

    def make(channels: int, blocks: list[str], groups: list[str], l_max: int) -> convolution.ConvolutionProblem:
        ins, outs = [o3.Irrep(b) for b in blocks], [o3.Irrep(g) for g in groups]
        paths = [
            convolution.Path(i, l, g, o3.wigner_3j(a.l, l, b.l, dtype=torch.float64))
            for g, b in enumerate(outs)
            for i, a in enumerate(ins)
            for l in range(l_max + 1)  # noqa: E741
            if b in a * o3.Irrep(l, (-1) ** l)
        ]
        degrees = [tuple(ir.l for ir in irreps) for irreps in (ins, outs)]
        return convolution.ConvolutionProblem(channels, *degrees, tuple(paths), tuple(sh[: l_max + 1]), 5.0)

    every = ["0e", "0o", "1o", "1e", "2e", "2o"]
    return {
        "MACE, first layer": make(128, ["0e"], ["0e", "1o", "2e", "3o"], 3),
        "MACE, second layer": make(128, ["0e", "1o"], ["0e", "1o", "2e", "3o"], 3),
        "NequIP, inner layer": make(64, every, every, 2),
    }


def written(text: str, folder: Path) -> Any:
    """Write generated kernels as a module, since Triton reads its file, and import it."""
    path = folder / f"kernels_{hashlib.sha256(text.encode()).hexdigest()[:20]}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convolutions(folder: Path) -> list[tuple[str, Any, dict[str, str], Document, int]]:
    cases = []
    floats = ("features", "vectors", "weights", "message", "grad", "grad_features", "grad_vectors", "grad_weights")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("first", "edge", "sender", "receiver", "other"), "*i64")
    for name, problem in problems().items():
        module = written(generated.source(problem, True), folder)
        for kernel in ("gaq_convolution", "gaq_convolution_backward", "gaq_convolution_backward_all"):
            function = getattr(module, kernel)
            pointers = {n: types[n] for n in function.arg_names if n in types}
            # The argument without a type so far is the number of each edge's table; the rest are lengths.
            pointers |= {n: "*i64" for n in function.arg_names if n == "tables"}
            cases.append(
                (f"{kernel.removeprefix('gaq_')}, {name}", function, pointers, {"SEVERAL": False}, module.WARPS)
            )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 89, 90])
    parser.add_argument("--only", default="", help="kernels whose name contains this; nothing is written")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="kernels to leave out, by full name")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    rows = []
    # The same folder in every run, or Triton's cache would not find the kernels again.
    folder = Path(os.environ.get("TRITON_CACHE_DIR", tempfile.gettempdir())) / "gaq_sources"
    folder.mkdir(parents=True, exist_ok=True)
    for name, kernel, types, constants, warps in [*linears(), *others(), *convolutions(folder)]:
        if args.only not in name or name in args.without:
            continue
        for cc in args.architectures:
            rows.append({"kernel": name, **resources(kernel, types, constants, warps, cc)})
            print({k: v for k, v in rows[-1].items() if k != "matrix_instructions"}, flush=True)
    shown = [row | {"matrix_instructions": ", ".join(row["matrix_instructions"])} for row in rows]
    print(markdown_table(shown, list(shown[0])))
    if not args.only:
        write_result("gpu_resources", rows, triton=triton.__version__)


if __name__ == "__main__":
    main()
