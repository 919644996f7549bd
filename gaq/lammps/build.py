"""Compilation of the plugin on the user's machine, for the user's LAMMPS, with the C++ kernels in it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

from gaq.kernels import signatures
from gaq.kernels.cpu import native, store, variants
from gaq.lammps.installation import Installation, LammpsError
from gaq.lammps.simulation import run

__all__ = ["PLUGIN", "compile_plugin", "obtain", "write_sources"]

PLUGIN = "gaqplugin.so"
"""Name of the file: LAMMPS loads files that end so from the folders in LAMMPS_PLUGIN_PATH."""
PAIR_STYLE = Path(__file__).parent / "pair_style"
PAIR_FILES = ("pair_gaq.cpp", "pair_gaq.h")
ENTRY_POINT = "gaq_plugin.cpp"


def write_sources(folder: Path, plugin: bool = True) -> list[str]:
    """Write all files into a folder that the pair style is compiled from, and return their names.

    Args:
        folder: such as LAMMPS's ``src``.
        plugin: whether a plugin is made of them, which has an entry point.

    Raises:
        OSError: if they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kernels = Path(native.__file__).parent
    copied = [PAIR_STYLE / name for name in (*PAIR_FILES, *([ENTRY_POINT] if plugin else []))]
    copied += [kernels / name for name in (*variants.SOURCES, *variants.HEADERS)]
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    (folder / "signatures.h").write_text(signatures.header())
    return sorted([*(path.name for path in copied), "signatures.h"])


def obtain(lammps: Installation, processor: str = "native") -> Path:
    """Path of the plugin for a LAMMPS in the cache folder, built first where it is not there.

    Args:
        lammps: for which it is.
        processor: for which the compiler's ``-march`` is; one that this machine runs.

    Raises:
        LammpsError: if it cannot be compiled, or LAMMPS cannot load it.
        OSError: if no folder can keep it.
    """
    compiler = _compiler()
    with tempfile.TemporaryDirectory(prefix="gaq-") as scratch:
        folder = Path(scratch)
        write_sources(folder)
        digest = hashlib.sha256(native.processor().encode())
        program = lammps.program.stat()  # another one after LAMMPS was built anew
        for part in (
            *_options(lammps, processor),
            str(lammps.program),
            str(program.st_mtime_ns),
            str(program.st_size),
            compiler,
        ):
            digest.update(part.encode() + b"\0")
        for path in sorted(folder.iterdir()):
            digest.update(path.read_bytes())

        def build() -> Path:
            built = compile_plugin(lammps, sorted(folder.glob("*.cpp")), folder, folder / PLUGIN, processor)
            check_loads(lammps, built)
            return built

        return store.obtain(f"lammps-{digest.hexdigest()[:20]}", PLUGIN, build, lambda path: path)


def compile_plugin(
    lammps: Installation, sources: Sequence[Path], headers: Path, output: Path, processor: str = "native"
) -> Path:
    """Compile sources to a plugin.

    Args:
        lammps: for which it is.
        sources: C++ files.
        headers: folder of their headers; object files go there too.
        output: the file to write.
        processor: see `obtain`.

    Raises:
        LammpsError: if there is no compiler, or it fails.
    """
    compiler = _compiler().split()

    def compiled(source: Path) -> str:
        target = headers / f"{source.stem}.o"
        # LAMMPS prints the name of the source with its errors.
        folders = [f"-I{headers}", f"-ffile-prefix-map={headers}=gaq"]
        _run([*compiler, *_options(lammps, processor), *folders, "-c", str(source), "-o", str(target)], lammps)
        return str(target)

    with ThreadPoolExecutor(cpu_count() or 1) as pool:
        objects = list(pool.map(compiled, sources))
    openmp = ["-fopenmp"]
    if lammps.openmp is not None:  # two libraries in one process would compete for the cores
        openmp = [str(lammps.openmp), f"-Wl,-rpath,{lammps.openmp.parent}"]
    # What LAMMPS and MPI define is found when the plugin is loaded.
    _run([*compiler, "-shared", *objects, *openmp, "-lstdc++", "-lm", "-o", str(output)], lammps)
    return output


def check_loads(lammps: Installation, plugin: Path) -> None:
    """Load a plugin in LAMMPS.

    Raises:
        LammpsError: if that fails.
    """
    with tempfile.TemporaryDirectory(prefix="gaq-") as folder:
        output = run(lammps, f"plugin load {plugin}\nplugin list\n", Path(folder))
    if "pair style plugin gaq" not in output:
        lines = [line for line in output.splitlines() if "fail" in line.lower() or "error" in line.lower()]
        raise LammpsError(f"LAMMPS {lammps.version} does not load the plugin: {' '.join(lines)}")


def _options(lammps: Installation, processor: str) -> list[str]:
    """Options of the compiler; the plugin exports nothing but its entry point."""
    folders = [f"-I{lammps.headers}", f"-I{lammps.mpi_header}"]
    return [*variants.FLAGS, f"-march={processor}", "-fvisibility=hidden", f"-D{lammps.integers}", *folders]


def _compiler() -> str:
    if not sys.platform.startswith("linux"):
        raise LammpsError("the plugin is built on Linux only.")
    try:
        return native.compiler("the plugin cannot be built")
    except native.CompilerError as error:
        raise LammpsError(str(error)) from error


def _run(command: list[str], lammps: Installation) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise LammpsError(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if "error" in line] or done.stdout.splitlines()
        raise LammpsError(
            f"{command[0]} cannot compile the plugin against LAMMPS {lammps.version} ({lammps.headers}): "
            f"{' '.join(lines[:3])}"
        )
