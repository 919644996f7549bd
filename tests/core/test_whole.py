"""Files are whole or absent, however the process that writes them ends."""

from __future__ import annotations

import ast
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from gaq.files import whole

ROOT = Path(__file__).parents[2]

WRITE = """
import signal, sys, time
from pathlib import Path
from gaq.files.whole import written_whole
from gaq.process import command_output
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a shell is without
with command_output(20), written_whole(Path(sys.argv[1])) as part:
    part.write_bytes(b"half")
    print("half", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["same file system", "another one"])
def file_systems(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether a finished file can be renamed to its place, or has to be copied."""
    if request.param == "another one":
        replace = os.replace

        def refuse(source: Any, target: Any) -> None:
            if Path(source).parent != Path(target).parent:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            replace(source, target)

        monkeypatch.setattr(os, "replace", refuse)
    return str(request.param)


@pytest.mark.usefixtures("file_systems")
def test_a_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out.model"
    for content in ("first", "second"):
        with whole.written_whole(path) as part:
            assert part.name == path.name
            part.write_text(content)
            part.with_name("another").touch()
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == content
        assert list(tmp_path.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.usefixtures("file_systems")
def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.model"
    path.write_text("before")

    def write() -> None:
        with whole.written_whole(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_left_of_a_copy_goes(tmp_path: Path) -> None:
    path, left, copying = (tmp_path / name for name in ("[1].model", "[1].model.12.part", "[1].model.13.part"))
    for part in (left, copying):
        part.touch()
    old = time.time() - whole.STALE - 60
    os.utime(left, (old, old))
    with whole.written_whole(path) as part:
        part.touch()
    assert sorted(tmp_path.iterdir()) == sorted([path, copying])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_leaves_nothing_beside_the_output(tmp_path: Path, number: signal.Signals) -> None:
    """After SIGKILL, to which no process can react, its folder in the system's temporary one is left."""
    output, temporary = tmp_path / "output", tmp_path / "temporary"
    output.mkdir()
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", WRITE, str(output / "out.model")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    process.send_signal(number)
    process.stdout.close()
    assert process.wait(30) != 0
    assert not list(output.iterdir())
    assert len(list(temporary.iterdir())) == (1 if number == signal.SIGKILL else 0)


def test_nothing_else_writes_beside_the_output() -> None:
    """No temporary folder or file is made in a folder that is named, but by the two modules that keep files whole."""
    makers = {"TemporaryDirectory", "NamedTemporaryFile", "mkdtemp", "mkstemp"}
    assert makers <= set(dir(tempfile))
    found = []
    for package in ("gaq", "gaq_mace", "gaq_nequip"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in makers:
                    found += [str(path.relative_to(ROOT)) for keyword in node.keywords if keyword.arg == "dir"]
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".part"):
                    found.append(str(path.relative_to(ROOT)))
    assert set(found) <= {"gaq/files/whole.py", "gaq/kernels/cpu/store.py"}


def test_others_may_read_what_is_written(tmp_path: Path, file_systems: str) -> None:
    before = os.umask(0o027)
    try:
        with whole.written_whole(tmp_path / "file") as part:
            part.write_text("text")
            part.chmod(0o600)
            whole.let_others_read(part)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
