"""The library of the kernels for a kind of processor, which is built when the package is installed.

``setup.py`` builds one for each of `VARIANTS` where it finds a compiler; `gaq.kernels.cpu.native` takes the one that
suits the processor, and compiles one on first use where there is none. This module imports no torch: where a package
is built there need not be any. The libraries are not linked with an OpenMP library, because which one torch brings is
known only when they are loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gaq.kernels import signatures

__all__ = [
    "FLAGS",
    "FOLDER",
    "HEADERS",
    "SOURCES",
    "VARIANTS",
    "Variant",
    "build_all",
    "compilers",
    "features",
    "installed",
    "objects",
]

SOURCES = (
    *("convolution.cpp", "convolution_backward.cpp", "product.cpp", "contraction.cpp", "rounding.cpp"),
    *("program.cpp", "potential.cpp"),
)
HEADERS = (
    *("activations.h", "batch.h", "edges.h", "lanes.h", "matrices.h", "passes.h", "plan.h"),
    "potential.h",
)
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)
FOLDER = Path(__file__).parent / "built"


@dataclass(frozen=True)
class Variant:
    """A kind of processor.

    Attributes:
        name: of the kind, for messages.
        flags: of the compiler.
        needs: features of a processor, as ``/proc/cpuinfo`` names them.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_AVX2 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
VARIANTS = (
    Variant(
        "AVX-512",
        ("-march=x86-64-v4",),
        _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    ),
    Variant("AVX2", ("-march=x86-64-v3",), _AVX2),
)
"""Kinds of processors, the first that suits is taken."""


def features() -> frozenset[str]:
    """Features of this processor; empty where nobody says which."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())


def compilers() -> list[str]:
    """Commands of C++ compilers to try: the one of ``CXX``, or the usual ones that are there."""
    chosen = os.environ.get("CXX")
    return [chosen] if chosen else [name for name in ("g++", "clang++", "c++") if shutil.which(name)]


def digest(variant: Variant) -> str:
    """Hash of all that the library of a variant is made of."""
    made_of = hashlib.sha256()
    for part in (*FLAGS, *variant.flags, signatures.header()):
        made_of.update(part.encode() + b"\0")
    for name in (*HEADERS, *SOURCES):
        made_of.update((Path(__file__).parent / name).read_bytes())
    return made_of.hexdigest()[:20]


def _path(variant: Variant, folder: Path) -> Path:
    return folder / f"kernels-{variant.name.lower()}-{digest(variant)}.so"


def installed(of_processor: Iterable[str], folder: Path = FOLDER) -> tuple[Variant, Path] | None:
    """The library that was built with this package for a processor; None where there is none, or not a whole one.

    Args:
        of_processor: its features.
        folder: of the libraries.
    """
    for variant in VARIANTS:
        if variant.needs <= set(of_processor):
            path = _path(variant, folder)
            try:
                whole = path.with_suffix(".sha256").read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError:
                return None
            return (variant, path) if whole else None
    return None


def objects(compiler: str, sources: Sequence[str], folder: Path, options: Sequence[str]) -> list[str]:
    """Compile sources at the same time, and return the paths of the object files.

    Raises:
        RuntimeError: if the compiler fails; the message is its output.
        OSError: if there is none.
    """
    (folder / "signatures.h").write_text(signatures.header())
    running = []
    for name in sources:
        target = folder / (Path(name).stem + ".o")
        source = str(Path(__file__).parent / name)
        command = [*compiler.split(), *FLAGS, *options, f"-I{folder}", "-c", source, "-o", str(target)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append((process, str(target)))
    for process, output in [(process, process.communicate()[0]) for process, _ in running]:
        if process.returncode != 0:
            raise RuntimeError(output)
    return [target for _, target in running]


def build_all(folder: Path) -> str:
    """Build the libraries of all variants, and return a sentence that says what came of it. Nothing is raised: where
    they cannot be built, the kernels are compiled on first use.

    Args:
        folder: for the libraries, made anew.
    """
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"the kernels are compiled on first use: none are built for {sys.platform}, {platform.machine()}."
    found = compilers()
    if not found:
        return "the kernels are compiled on first use, which needs a C++ compiler: there is none here."
    shutil.rmtree(folder, ignore_errors=True)  # an earlier build left libraries of other sources
    folder.mkdir(parents=True)
    try:
        for variant in VARIANTS:
            with tempfile.TemporaryDirectory(prefix="gaq-") as work:
                built = Path(work) / "kernels.so"
                made = objects(found[0], SOURCES, Path(work), variant.flags)
                subprocess.run([*found[0].split(), "-shared", *made, "-o", str(built)], check=True)
                path = _path(variant, folder)
                shutil.copyfile(built, path)
                path.with_suffix(".sha256").write_text(hashlib.sha256(built.read_bytes()).hexdigest())
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"the kernels are compiled on first use, because {found[0]} could not build them here: {error}"
    return f"kernels were built by {found[0]} for {' and '.join(variant.name for variant in VARIANTS)}."
