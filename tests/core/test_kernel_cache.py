"""The folder of compiled kernels: what is in it is whole or built anew, and one that cannot be used has a stand-in.

No test compiles: a library that was built before is copied in the compiler's place.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gaq import settings
from gaq.kernels.cpu import native, store

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")


class Machine:
    """A cache folder and a temporary folder of its own, and a compiler that copies.

    Attributes:
        built: a library that was compiled before.
        builds: a file with a line for each compilation.
    """

    def __init__(self, folder: Path, built: Path) -> None:
        self.cache, self.temporary, self.builds = folder / "cache", folder / "tmp", folder / "builds"
        self.temporary.mkdir()
        self.builds.touch()
        self.built = built

    def compiled(self) -> int:
        return len(self.builds.read_text().splitlines())

    def keep_in(self, folder: Path) -> Path:
        """Put the library where an earlier process would have."""
        place = folder / self.built.parent.name
        shutil.copytree(self.built.parent, place)
        return place / self.built.name

    def load(self, folder: Path | None = None) -> Path:
        """First use of the kernels in a process; returns where the library lies."""
        native.library.cache_clear()  # type: ignore[attr-defined]  # as in functools
        store._say.cache_clear()  # type: ignore[attr-defined]
        try:
            with settings.override(cache=self.cache if folder is None else folder):
                return Path(native.library()._name)
        finally:
            native.library.cache_clear()  # type: ignore[attr-defined]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine(tmp_path, Path(native.library()._name))

    def link(command: list[str]) -> None:
        with machine.builds.open("a") as file:
            file.write("built\n")
        shutil.copyfile(machine.built, command[-1])

    monkeypatch.setattr(tempfile, "tempdir", str(machine.temporary))
    monkeypatch.setattr(native, "_objects", lambda *_: [])
    monkeypatch.setattr(native, "_link", link)
    yield machine
    native.library.cache_clear()  # type: ignore[attr-defined]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in log.records if record.levelno >= logging.WARNING]


def test_a_library_is_built_once(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    first = machine.load()
    assert machine.load() == first
    assert machine.compiled() == 1
    assert names_in(machine.cache) == [first.parent.name]
    assert not list(machine.temporary.iterdir())
    assert not warnings_of(caplog)


@pytest.mark.parametrize("damage", ["empty", "cut off", "altered", "no library", "no checksum"])
def test_a_damaged_library_is_built_anew(machine: Machine, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    """One that is cut off would be a bus error when it is loaded, which ends the process."""
    library = machine.keep_in(machine.cache)
    content = library.read_bytes()
    if damage == "no library":
        library.unlink()
    elif damage == "no checksum":
        (library.parent / store.CHECKSUM).unlink()
    else:
        changed = {
            "empty": b"",
            "cut off": content[: len(content) // 3],
            "altered": content[:5000] + b"altered" + content[5007:],
        }
        library.write_bytes(changed[damage])
    assert machine.load() == library
    assert machine.compiled() == 1
    assert library.read_bytes() == content
    assert names_in(machine.cache) == [library.parent.name]
    (line,) = warnings_of(caplog)
    assert line == f"gaq: {library.parent} was damaged, and is built anew."


def make_unusable(kind: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """A cache folder that cannot be used, also not by root."""
    if kind == "a file":
        machine.cache.touch()
    elif kind == "below a file":
        machine.cache.touch()
        return machine.cache / "gaq"
    elif kind == "no permission":
        return Path("/proc/gaq")  # where nobody can make a folder
    elif kind == "read-only":
        machine.cache.mkdir()
        write = tempfile.TemporaryFile

        def refuse(*args: Any, **options: Any) -> Any:
            if options.get("dir") == machine.cache:
                raise OSError(30, "Read-only file system")
            return write(*args, **options)

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    elif kind == "noexec":
        load = ctypes.CDLL

        def refuse_to_load(path: str) -> ctypes.CDLL:
            if path.startswith(str(machine.cache)):
                raise OSError(f"{path}: failed to map segment from shared object")
            return load(path)

        monkeypatch.setattr(ctypes, "CDLL", refuse_to_load)
    return None


@pytest.mark.parametrize("kind", ["a file", "below a file", "no permission", "read-only", "noexec"])
def test_a_folder_that_cannot_be_used_has_a_stand_in(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """`read-only` and `noexec` are simulated here; `test_real_file_systems` has real ones where it may mount them."""
    folder = make_unusable(kind, machine, monkeypatch)
    first = machine.load(folder)
    assert first.parent.parent == machine.temporary / f"gaq-{os.getuid()}"
    (line,) = warnings_of(caplog)
    for word in ("compiled kernels are kept in", str(first.parent.parent), str(folder or machine.cache), "GAQ_CACHE"):
        assert word in line
    # The next process finds it there.
    assert machine.load(folder) == first
    assert machine.compiled() == 1


def test_a_library_in_a_read_only_folder_serves(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = machine.keep_in(machine.cache)
    monkeypatch.setattr(tempfile, "TemporaryFile", None)  # nothing is to be written
    assert machine.load() == library
    assert machine.compiled() == 0
    assert not warnings_of(caplog)


def test_a_user_without_a_home(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    native.library.cache_clear()  # type: ignore[attr-defined]
    store._say.cache_clear()  # type: ignore[attr-defined]
    with settings.override(cache=None):
        path = Path(native.library()._name)
    assert path.parent.parent == machine.temporary / f"gaq-{os.getuid()}"
    (line,) = warnings_of(caplog)
    assert "this user has no home" in line


def test_a_temporary_folder_that_others_can_write_is_not_used(machine: Machine) -> None:
    machine.cache.touch()
    folder = machine.temporary / f"gaq-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(native.CompilerError, match=r"no folder can keep compiled kernels .* can be written by others"):
        machine.load()
    folder.rmdir()
    folder.symlink_to(machine.cache.parent)
    with pytest.raises(native.CompilerError, match="is not a folder of this user"):
        machine.load()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "broken"])
def test_a_library_that_is_there_needs_no_compiler(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    library = machine.keep_in(machine.cache)
    if compiler == "broken":
        script = machine.temporary / "broken"
        script.write_text("#!/bin/sh\nexit 1\n")
        script.chmod(0o755)
        compiler = str(script)

        def fail(command: list[str]) -> None:
            raise native.CompilerError("it does not work")

        monkeypatch.setattr(native, "_link", fail)
    monkeypatch.setenv("CXX", compiler)
    assert machine.load() == library
    # What is damaged does not serve. A new file, because this process has loaded the old one, and ends by its code.
    library.unlink()
    library.write_bytes(b"")
    with pytest.raises(native.CompilerError, match=r"no C\+\+ compiler found|it does not work"):
        machine.load()


def test_what_a_killed_process_left_goes(machine: Machine) -> None:
    left = machine.cache / f"kernels-0-1{store.PART}"
    left.mkdir(parents=True)
    (left / "kernels.so").touch()
    library = machine.load()
    assert names_in(machine.cache) == [library.parent.name]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_name_of_the_c_compiler_serves(tmp_path: Path) -> None:
    source = tmp_path / "source.cpp"
    source.write_text('#include <vector>\nextern "C" int f(int n) { std::vector<int> v(n, 1); return v.at(0); }\n')
    built = str(tmp_path / "lib.so")
    native._run(["gcc", "-fPIC", "-c", str(source), "-o", str(tmp_path / "source.o")])
    native._link(["gcc", "-shared", str(tmp_path / "source.o"), "-o", built])
    assert ctypes.CDLL(built).f(3) == 1


def test_eight_processes_at_first_use(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiles, seven wait for it."""
    link = native._link

    def slow(command: list[str]) -> None:
        link(command)
        time.sleep(0.5)

    monkeypatch.setattr(native, "_link", slow)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=lambda: results.put(str(machine.load()))) for _ in range(8)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(paths) == 1
    assert machine.compiled() == 1
    assert len(names_in(machine.cache)) == 1


FIRST_USE = "from gaq.kernels.cpu import native; print(native.library()._name)"


def run_as(kind: str, folder: Path, python: list[str], environment: dict[str, str]) -> Any:
    """Run Python where a folder really has a fault; skips where this machine does not allow to make one."""
    if kind == "no permission" and os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv")
        python = ["setpriv", "--reuid=65534", "--clear-groups", *python]
        return subprocess.run(python, env=environment, capture_output=True, text=True, check=False)
    if kind == "no permission":
        folder.chmod(0o500)
        return subprocess.run(python, env=environment, capture_output=True, text=True, check=False)
    # In a mount namespace of its own, which ends with the process.
    options = {"read-only": "ro", "noexec": "noexec"}[kind]
    bind = f'mount --bind "$0" "$0" && mount -o remount,bind,{options} "$0" && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", bind, str(folder)]
    if os.getuid() != 0 or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    return subprocess.run([*command, *python], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["no permission", "read-only", "noexec"])
def test_real_file_systems(machine: Machine, kind: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # that another user can reach
        root = Path(name)
        root.chmod(0o755)
        folder, temporary = root / "cache", root / "tmp"
        folder.mkdir()
        user = 65534 if kind == "no permission" and os.getuid() == 0 else os.getuid()
        temporary.mkdir()
        private = temporary / f"gaq-{user}"
        private.mkdir(mode=0o700)
        machine.keep_in(private)
        if kind == "noexec":
            machine.keep_in(folder)
        for path in (temporary, *temporary.rglob("*")):
            os.chown(path, user, -1)
        environment = {**os.environ, "GAQ_CACHE": str(folder), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        done = run_as(kind, folder, [sys.executable, "-W", "ignore", "-c", FIRST_USE], environment)
        if "No module named" in done.stderr or "failed to execute" in done.stderr:
            pytest.skip("another user cannot read this installation")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().startswith(str(private))
        assert done.stderr.count("compiled kernels are kept in") == 1
        assert done.stderr.count("\n") == 1, done.stderr
