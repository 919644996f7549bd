"""The C++ sources of the kernels, compiled for this machine on first use.

They use neither torch's headers nor its ABI (tensors are passed as pointers), so compiling takes seconds and the
result serves any version of torch. Built libraries are kept in ``$GAQ_CACHE`` (default: ``gaq`` in the user's cache
folder), under a name made of everything they depend on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

__all__ = ["CompilerError", "available", "library", "refuse_second_derivative", "why_not"]

SOURCES = ("convolution.cpp", "contraction.cpp", "rounding.cpp")
HEADERS = ("lanes.h",)
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


def _cache_folder() -> Path:
    base = os.environ.get("GAQ_CACHE")
    if base:
        return Path(base)
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


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        CompilerError: if there is no compiler, or it fails.
    """
    folder = Path(__file__).parent
    compiler = _compiler()
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False).stdout
    linked = _openmp()
    digest = hashlib.sha256()
    for part in (*FLAGS, *linked, compiler, version, _processor()):
        digest.update(part.encode() + b"\0")
    for name in (*HEADERS, *SOURCES):
        digest.update((folder / name).read_bytes())
    cache = _cache_folder()
    target = cache / f"kernels-{digest.hexdigest()[:20]}.so"
    if not target.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CompilerError(
                f"the folder {cache} for compiled kernels cannot be made ({error}): set GAQ_CACHE to one that can."
            ) from error
        _build(compiler, [folder / name for name in SOURCES], linked, target)
    loaded = ctypes.CDLL(str(target))
    _declare(loaded)
    return loaded


def _build(compiler: str, sources: list[Path], linked: list[str], target: Path) -> None:
    # Under a name of its own first: processes that start together must not load half a file.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / "kernels.so"
        running = []
        for source in sources:
            command = [*compiler.split(), *FLAGS, "-c", str(source), "-o", str(Path(folder) / (source.stem + ".o"))]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        outputs = [(process, process.communicate()[0]) for process in running]
        objects = [str(Path(folder) / (source.stem + ".o")) for source in sources]
        failed = next((output for process, output in outputs if process.returncode != 0), None)
        if failed is None:
            # With torch's library named, the compiler's own must not be linked beside it.
            openmp = linked or ["-fopenmp"]
            done = subprocess.run(
                [*compiler.split(), "-shared", *objects, *openmp, "-o", str(built)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            failed = done.stdout if done.returncode != 0 else None
        if failed is not None:
            raise CompilerError(
                f"{compiler} could not compile the kernels, models run through the slower reference path:\n{failed}"
            )
        os.replace(built, target)


_POINTER = ctypes.c_void_p
_INT = ctypes.c_int64


def _declare(loaded: ctypes.CDLL) -> None:
    p, i = _POINTER, _INT
    signatures = {
        "convolution": [p, p, i, p, p, p, p, p, p, p, i],
        "convolution_backward": [p, p, i, i, p, p, p, p, p, p, p, p, p, p, i],
        "contraction": [p, i, p, p, p, p, i],
        "contraction_backward": [p, i, p, p, p, p, p, i],
        "round": [p, p, i, p, p, i],
    }
    for name, arguments in signatures.items():
        for dtype in ("float32", "float64"):
            function = getattr(loaded, f"gaq_{name}_{dtype}")
            function.argtypes, function.restype = arguments, None
    loaded.gaq_sort_edges.argtypes, loaded.gaq_sort_edges.restype = [i, i, p, p, p], None


@functools.cache
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
