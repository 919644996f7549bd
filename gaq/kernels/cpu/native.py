"""The C++ sources of the kernels, compiled for this machine on first use.

They use neither torch's headers nor its ABI (tensors are passed as pointers), so compiling takes seconds and the
result serves any version of torch. Built libraries are kept in ``$GAQ_CACHE`` (default: ``gaq`` in the user's cache
folder), under a name made of everything they depend on.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gaq import settings
from gaq.caches import cached
from gaq.kernels import signatures

__all__ = [
    "STATIC_NAME",
    "CompilerError",
    "available",
    "cache_folder",
    "kernel",
    "library",
    "operation",
    "refuse_second_derivative",
    "static_library",
    "why_not",
]

SOURCES = ("convolution.cpp", "product.cpp", "contraction.cpp", "rounding.cpp")
SHIM_SOURCES = ("convolution.cpp", "product.cpp", "rounding.cpp", "shims.cpp")
HEADERS = ("edges.h", "lanes.h")
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)


class CompilerError(RuntimeError):
    """The kernels could not be built here; the message says why and what helps."""


def _compiler() -> str:
    chosen = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if chosen is None or shutil.which(chosen.split()[0]) is None:
        raise CompilerError(
            f"no C++ compiler found ({'CXX=' + chosen if chosen else 'g++, clang++ and c++ are not on the PATH'}): "
            "models run through the slower reference path. Install g++ (Debian, Ubuntu: `apt install g++`; conda: "
            "`conda install -c conda-forge cxx-compiler`) or set CXX."
        )
    return chosen


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    chosen = settings.current().cache
    if chosen is not None:
        return chosen
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gaq"


def _processor() -> str:
    """What ``-march=native`` depends on: a cache on a shared disk serves more than one kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _openmp() -> list[str]:
    """torch's own OpenMP library where there is one: two in one process would fight over the cores."""
    folder = Path(torch.__file__).parent
    found = sorted([*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")])
    return [str(found[0]), f"-Wl,-rpath,{found[0].parent}"] if found else []


def _place(kind: str, sources: Sequence[str], *parts: str) -> tuple[str, Path]:
    """The compiler, and where what it makes of the sources is kept."""
    folder = Path(__file__).parent
    compiler = _compiler()
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for part in (*FLAGS, *parts, compiler, version, _processor(), signatures.header()):
        digest.update(part.encode() + b"\0")
    for name in (*HEADERS, *sources):
        digest.update((folder / name).read_bytes())
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompilerError(
            f"the folder {cache} for compiled kernels cannot be made ({error}): set GAQ_CACHE to one that can."
        ) from error
    return compiler, cache / f"{kind}-{digest.hexdigest()[:20]}"


@cached(most=1)
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        CompilerError: if there is no compiler, or it fails.
    """
    linked = _openmp()
    compiler, place = _place("kernels", SOURCES, *linked)
    target = place.with_suffix(".so")
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            objects = _objects(compiler, SOURCES, Path(folder), [])
            built = Path(folder) / "kernels.so"
            # With torch's library named, the compiler's own must not be linked beside it.
            _run([*compiler.split(), "-shared", *objects, *(linked or ["-fopenmp"]), "-o", str(built)])
            # Under a name of its own first: processes that start together must not load half a file.
            os.replace(built, target)
    loaded = ctypes.CDLL(str(target))
    _declare(loaded)
    return loaded


STATIC_NAME = "gaqkernels"


@cached(most=2)
def static_library(dtype: torch.dtype) -> Path:
    """Folder of a static library (``-lgaqkernels``) with the operations as AOTInductor calls them.

    Args:
        dtype: that of the model. What a file carries of the kernels is most of its bytes, so it is those of one dtype.

    Raises:
        TypeError: for dtypes other than float32 and float64.
        CompilerError: if there is no compiler, or it fails.
    """
    options = [f"-I{Path(torch.__file__).parent / 'include'}", f"-DGAQ_ONLY_{_name(dtype).upper()}"]
    compiler, place = _place("static", SHIM_SOURCES, torch.__version__, options[1])
    target = place / f"lib{STATIC_NAME}.a"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=place.parent) as name:
            folder = Path(name)
            objects = _objects(compiler, SHIM_SOURCES, folder, options)
            place.mkdir(exist_ok=True)
            built = folder / target.name
            _run(["ar", "rcs", str(built), *objects])
            os.replace(built, target)
    return place


def _objects(compiler: str, sources: Sequence[str], folder: Path, options: list[str]) -> list[str]:
    (folder / "signatures.h").write_text(signatures.header())
    options = [*options, f"-I{folder}"]
    running = []
    for name in sources:
        target = folder / (Path(name).stem + ".o")
        command = [*compiler.split(), *FLAGS, *options, "-c", str(Path(__file__).parent / name), "-o", str(target)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append((process, str(target)))
    for process, output in [(process, process.communicate()[0]) for process, _ in running]:
        if process.returncode != 0:
            raise CompilerError(_FAILED.format(compiler=compiler, output=output))
    return [target for _, target in running]


_FAILED = "{compiler} could not compile the kernels, models run through the slower reference path:\n{output}"


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise CompilerError(_FAILED.format(compiler=command[0], output=error)) from error
    if done.returncode != 0:
        raise CompilerError(_FAILED.format(compiler=command[0], output=done.stdout))


def _declare(loaded: ctypes.CDLL) -> None:
    for name in signatures.KERNELS:
        for dtype in signatures.DTYPES:
            function = getattr(loaded, signatures.c_name(name, dtype))
            function.argtypes, function.restype = signatures.argument_types(name), None


@cached(most=1)
def why_not() -> str | None:
    """None where the kernels can run, else the reason (`gaq doctor` prints it)."""
    try:
        library()
    except CompilerError as error:
        return str(error)
    return None


def available() -> bool:
    """Whether the kernels can run here."""
    return why_not() is None


@cached(most=32)
def kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The compiled function of a kernel for a dtype.

    Raises:
        TypeError: for dtypes other than float32 and float64.
        CompilerError: where the kernels cannot be built.
    """
    return getattr(library(), signatures.c_name(name, _name(dtype)))  # type: ignore[no-any-return]


def operation(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that registers a function as the operation ``gaq::NAME`` of torch on the CPU.

    Graphs can be traced through it, and compiled files can hold it: `shims.cpp` defines its C function.

    Args:
        name: a key of `gaq.kernels.signatures.OPERATIONS`.
    """
    schema = signatures.OPERATIONS[name]
    return torch.library.custom_op(f"gaq::{name}", mutates_args=(), device_types="cpu", schema=schema)


def _name(dtype: torch.dtype) -> str:
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the CPU kernels compute in float32 or float64, not {dtype}")
    return str(dtype).removeprefix("torch.")


def refuse_second_derivative() -> None:
    """For the backward pass of a kernel: its result has no derivative, and must not be taken for a constant.

    Raises:
        RuntimeError: if a graph of the backward pass is being made.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused kernels are differentiable once, and create_graph=True asks for more (a Hessian, training on "
            "forces). Use the reference path: call the model with training=True, or set GAQ_ENGINE=0."
        )
