"""Compilation of the C++ kernels for this machine, on first use.

The sources use neither torch's headers nor its ABI (tensors are passed as pointers), so compiling takes seconds and the
library works with any version of torch. Libraries are kept in ``$GAQ_CACHE`` (default: ``gaq`` in the user's cache
folder), under a name that is a hash of all they depend on.
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

import torch

from gaq import settings
from gaq.caches import cached
from gaq.kernels import signatures
from gaq.untyped import Operation

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

SOURCES = ("convolution.cpp", "convolution_backward.cpp", "product.cpp", "contraction.cpp", "rounding.cpp")
SHIM_SOURCES = ("convolution.cpp", "convolution_backward.cpp", "product.cpp", "rounding.cpp", "shims.cpp")
HEADERS = ("batch.h", "edges.h", "lanes.h", "passes.h", "plan.h")
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)


class CompilerError(RuntimeError):
    """The kernels cannot be built here; the message says why and what helps."""


def _compiler() -> str:
    """Command of the C++ compiler.

    Raises:
        CompilerError: if there is none.
    """
    chosen = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if chosen is None or shutil.which(chosen.split()[0]) is None:
        raise CompilerError(
            f"no C++ compiler found ({'CXX=' + chosen if chosen else 'g++, clang++ and c++ are not on the PATH'}): "
            "models run through the slower reference path. Install g++ (Debian, Ubuntu: `apt install g++`; conda: "
            "`conda install -c conda-forge cxx-compiler`) or set CXX."
        )
    return chosen


def cache_folder() -> Path:
    """Folder in which compiled kernels are kept."""
    chosen = settings.current().cache
    if chosen is not None:
        return chosen
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gaq"


def _processor() -> str:
    """Features of the processor, on which ``-march=native`` depends: different machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _openmp() -> list[str]:
    """Linker options for torch's own OpenMP library, if it has one: two in one process would compete for the cores."""
    folder = Path(torch.__file__).parent
    libraries = sorted([*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")])
    return [str(libraries[0]), f"-Wl,-rpath,{libraries[0].parent}"] if libraries else []


def _place(kind: str, sources: Sequence[str], *parts: str) -> tuple[str, Path]:
    """Command of the compiler, and the path for what it builds from the sources, without a suffix."""
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
    """Load the compiled kernels, building them first where they are not in the cache.

    Raises:
        CompilerError: if there is no compiler, or if it fails.
    """
    linked = _openmp()
    compiler, place = _place("kernels", SOURCES, *linked)
    target = place.with_suffix(".so")
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            objects = _objects(compiler, SOURCES, Path(folder), [])
            built = Path(folder) / "kernels.so"
            # If torch's OpenMP library is linked, the compiler's own must not be.
            _run([*compiler.split(), "-shared", *objects, *(linked or ["-fopenmp"]), "-o", str(built)])
            # Under a temporary name first: processes that start together must not load half a file.
            os.replace(built, target)
    loaded = ctypes.CDLL(str(target))
    _declare(loaded)
    return loaded


STATIC_NAME = "gaqkernels"


@cached(most=2)
def static_library(dtype: torch.dtype) -> Path:
    """Build a static library (``-lgaqkernels``) of the operations that AOTInductor calls, and return its folder.

    Args:
        dtype: of the model. The kernels are most of a compiled file, so they are built for one dtype only.

    Raises:
        TypeError: for dtypes other than float32 and float64.
        CompilerError: if there is no compiler, or if it fails.
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
    """Compile sources at the same time, and return the paths of the object files."""
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
    """Give every kernel of a library its argument types."""
    for name in signatures.KERNELS:
        for dtype in signatures.DTYPES:
            function = getattr(loaded, signatures.c_name(name, dtype))
            function.argtypes, function.restype = signatures.argument_types(name), None


@cached(most=1)
def why_not() -> str | None:
    """Reason why the kernels cannot run here; None where they can. `gaq doctor` prints it."""
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
    """Compiled function of a kernel for a dtype.

    Raises:
        TypeError: for dtypes other than float32 and float64.
        CompilerError: if the kernels cannot be built.
    """
    function: Callable[..., None] = getattr(library(), signatures.c_name(name, _name(dtype)))
    return function


def operation(name: str) -> Callable[[Callable[..., object]], Operation]:
    """Make a decorator that registers a function as the operation ``gaq::NAME`` of torch on the CPU.

    Graphs can be traced through the operation, and compiled files can hold it: `shims.cpp` defines its C function.

    Args:
        name: a key of `gaq.kernels.signatures.OPERATIONS`.
    """
    schema = signatures.OPERATIONS[name]
    return torch.library.custom_op(f"gaq::{name}", mutates_args=(), device_types="cpu", schema=schema)


def _name(dtype: torch.dtype) -> str:
    """Key of a dtype in `gaq.kernels.signatures.DTYPES`."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the CPU kernels compute in float32 or float64, not {dtype}")
    return str(dtype).removeprefix("torch.")


def refuse_second_derivative() -> None:
    """Refuse to differentiate a kernel's backward pass, whose result would otherwise count as a constant.

    Raises:
        RuntimeError: if autograd records the backward pass.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused kernels are differentiable once, and create_graph=True asks for more (a Hessian, training on "
            "forces). Use the reference path: call the model with training=True, or set GAQ_ENGINE=0."
        )
