"""The C++ kernels: those that were built with the package, or their compilation for this machine on first use.

The sources use neither torch's headers nor its ABI (tensors are passed as pointers), so compiling takes seconds and the
library works with any version of torch. `gaq.kernels.cpu.variants` has those that are built at installation; what is
compiled here is kept in ``$GAQ_CACHE`` (default: ``gaq`` in the user's cache
folder; see `gaq.kernels.cpu.store`), under a name that is a hash of all they depend on.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch

from gaq.caches import cached
from gaq.kernels import signatures
from gaq.kernels.cpu import store, variants
from gaq.kernels.cpu.variants import FLAGS, HEADERS, SOURCES
from gaq.untyped import Operation

__all__ = [
    "STATIC_NAME",
    "CompilerError",
    "available",
    "compiler",
    "kernel",
    "library",
    "operation",
    "origin",
    "processor",
    "refuse_second_derivative",
    "static_library",
    "why_not",
]

SHIM_SOURCES = ("convolution.cpp", "convolution_backward.cpp", "product.cpp", "rounding.cpp", "shims.cpp")
NATIVE = "-march=native"

logger = logging.getLogger(__name__)

Used = TypeVar("Used")


class CompilerError(RuntimeError):
    """The kernels cannot be built here; the message says why and what helps."""


def compiler(consequence: str = "models run through the slower reference path") -> str:
    """Command of the C++ compiler.

    Args:
        consequence: what it means for the user if there is none, for the message.

    Raises:
        CompilerError: if there is none.
    """
    chosen = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if chosen is None or shutil.which(chosen.split()[0]) is None:
        raise CompilerError(
            f"no C++ compiler found ({'CXX=' + chosen if chosen else 'g++, clang++ and c++ are not on the PATH'}): "
            f"{consequence}. Install g++ (Debian, Ubuntu: `apt install g++`; conda: "
            "`conda install -c conda-forge cxx-compiler`) or set CXX."
        )
    return chosen


def processor() -> str:
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


def _identified(kind: str, sources: Sequence[str], *parts: str) -> str:
    """Beginning of the names of libraries that are built from the sources as they are.

    Any library of that beginning computes the same: without a compiler, one that another compiler built will do.
    """
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for part in (*FLAGS, NATIVE, *parts, processor(), signatures.header()):
        digest.update(part.encode() + b"\0")
    for name in (*HEADERS, *sources):
        digest.update((folder / name).read_bytes())
    return f"{kind}-{digest.hexdigest()[:20]}"


def _obtain(prefix: str, file: str, build: Callable[[str, Path], Path], use: Callable[[Path], Used]) -> Used:
    """Use a library from a cache folder, building it first where it is in none.

    Args:
        prefix: see `_identified`.
        file: name of the library's file.
        build: builds the library by the command of a compiler in a folder, and returns its path.
        use: of the library's path.

    Raises:
        CompilerError: if it is in no cache folder and cannot be built, or if there is no folder to keep it in.
    """
    with ExitStack() as stack:
        try:
            command = compiler()

            def make() -> Path:
                # Not in the cache folder: there a process that is killed would leave it.
                return build(command, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gaq-"))))

            return store.obtain(f"{prefix}-{_digest_of(command)}", file, make, use)
        except OSError as error:
            raise CompilerError(f"no folder can keep compiled kernels ({error}): set GAQ_CACHE.") from error
        except CompilerError:
            try:
                return store.obtain_any(prefix, file, use)
            except OSError:
                pass
            raise


def _digest_of(compiler: str) -> str:
    try:
        version = subprocess.run([*compiler.split(), "--version"], capture_output=True, check=False).stdout
    except OSError as error:
        raise CompilerError(_FAILED.format(compiler=compiler, output=error)) from error
    return hashlib.sha256(compiler.encode() + version).hexdigest()[:8]


@cached(most=1)
def library() -> ctypes.CDLL:
    """Load the compiled kernels: those that were built with this package, or else those in a cache folder.

    They are compiled first where neither has any for this processor.

    Raises:
        CompilerError: if there is no compiler, or if it fails.
    """
    built = variants.installed(variants.features())
    if built is not None:
        try:
            loaded = _with_openmp(built[1])
        except OSError as error:
            logger.warning(f"gaq: the kernels that were installed cannot be loaded ({error}), others are compiled.")
        else:
            _declare(loaded)
            return loaded
    return _compiled()


def origin() -> str:
    """Where the kernels in use come from, for `gaq doctor`."""
    path = Path(library()._name)
    built = variants.installed(variants.features())
    if built is not None and built[1] == path:
        return f"built for {built[0].name} when this package was installed"
    return f"compiled on this machine, {path}"


def _with_openmp(path: Path) -> ctypes.CDLL:
    """Load a library that is linked with no OpenMP library, with torch's own, or the system's where torch has none.

    Raises:
        OSError: if it cannot be loaded.
    """
    for openmp in _openmp()[:1] or ["libgomp.so.1"]:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def _compiled() -> ctypes.CDLL:
    """Load kernels that are compiled for this processor, building them first where they are in no cache folder."""
    linked = _openmp()

    def build(compiler: str, folder: Path) -> Path:
        objects = _objects(compiler, SOURCES, folder, [])
        built = folder / "kernels.so"
        # If torch's OpenMP library is linked, the compiler's own must not be.
        _link([*compiler.split(), "-shared", *objects, *(linked or ["-fopenmp"]), "-o", str(built)])
        return built

    loaded = _obtain(_identified("kernels", SOURCES, *linked), "kernels.so", build, lambda path: ctypes.CDLL(str(path)))
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
    file = f"lib{STATIC_NAME}.a"

    def build(compiler: str, folder: Path) -> Path:
        objects = _objects(compiler, SHIM_SOURCES, folder, options)
        _run(["ar", "rcs", str(folder / file), *objects])
        return folder / file

    prefix = _identified("static", SHIM_SOURCES, torch.__version__, options[1])
    return _obtain(prefix, file, build, lambda path: path.parent)


def _link(command: list[str]) -> None:
    """Link a shared library that needs no other than those it names.

    Raises:
        CompilerError: if that fails.
    """
    if not sys.platform.startswith("linux"):
        _run(command)
        return
    try:
        _run([*command, "-Wl,-z,defs"])
    except CompilerError:
        # With the name of its C compiler (CXX=gcc) a compiler leaves out the libraries of C++.
        _run([*command, "-lstdc++", "-lm", "-Wl,-z,defs"])


def _objects(compiler: str, sources: Sequence[str], folder: Path, options: list[str]) -> list[str]:
    """Compile sources for this processor, and return the paths of the object files.

    Raises:
        CompilerError: if that fails.
    """
    try:
        return variants.objects(compiler, sources, folder, [NATIVE, *options])
    except (RuntimeError, OSError) as error:
        raise CompilerError(_FAILED.format(compiler=compiler, output=error)) from error


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
