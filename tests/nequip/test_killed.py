"""`nequip-deploy build` killed while it works: its output is whole or absent, and nothing lies beside it."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

from killed import kill

from gaq_nequip.deploy.cli import main

COMMAND = ("gaq_nequip.deploy.cli", "main")


def written(name: str) -> Any:
    """Whether something of that pattern is in the command's own folder in the temporary one."""
    return lambda temporary: any(temporary.glob(f"gaq-*/{name}"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_while_it_packages(trained: Any, tmp_path: Path, number: signal.Signals) -> None:
    arguments = ["build", trained.best, "out.nequip.zip"]
    left = kill(tmp_path, COMMAND, arguments, number, written("out.nequip.zip"))
    assert left.code == (-number if number == signal.SIGKILL else 128 + number)
    assert left.beside == []
    assert [name for name in left.temporary if number == signal.SIGTERM] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.nequip.zip", "out.nequip.pt2"])
def test_at_any_moment(trained: Any, tmp_path: Path, name: str) -> None:
    """Moments from start to end, with both signals; an output of before stays until the new one is whole."""
    arguments = ["build", trained.best, name]
    start = time.monotonic()
    whole = kill(tmp_path / "whole", COMMAND, arguments, signal.SIGTERM, 1e9)
    duration = time.monotonic() - start
    assert whole.code == 0
    assert whole.beside == [name]
    assert not [left for left in whole.temporary if left.startswith("gaq-")]
    steps = 6
    for number in (signal.SIGTERM, signal.SIGKILL):
        for step in range(steps):
            folder = tmp_path / f"{number.name}-{step}"
            output = folder / "output" / name
            if step % 2:
                output.parent.mkdir(parents=True)
                output.write_bytes(b"before")
            left = kill(folder, COMMAND, arguments, number, duration * (0.15 + step / (steps + 0.5)))
            assert left.beside in ([], [name])
            if output.exists() and output.read_bytes() != b"before":
                assert main(["info", str(output)]) == 0
            else:
                assert bool(step % 2) == output.exists()
            if number == signal.SIGTERM:
                assert not [entry for entry in left.temporary if entry.startswith("gaq-")]
