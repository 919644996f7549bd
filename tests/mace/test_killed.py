"""`gaq quantize` killed while it works: its output is whole or absent, and nothing lies beside it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import mace  # noqa: F401  (before e3nn)
import pytest
import torch
from killed import kill
from mace_models import molecules

import gaq
from gaq.model.state import state_of

COMMAND = ("gaq.cli", "main")
CONFIG = "{preset: gaq, calibration: {frames: 3}, distillation: {steps: 2, batch_atoms: 16}}"


@pytest.fixture(scope="module")
def inputs(float_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of the command, without the output."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.save(float_model(), folder / "float.model")
    ase.io.write(folder / "data.xyz", molecules(), format="extxyz")
    data = ["--calibration", str(folder / "data.xyz"), "--force", "--config", CONFIG]
    return ["quantize", str(folder / "float.model"), *data, "-o", "out.model"]


def trial_is_written(temporary: Path) -> bool:
    return any(temporary.glob("gaq-*/out.model"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_while_it_judges(inputs: list[str], tmp_path: Path, number: signal.Signals) -> None:
    """The file is written where nobody looks, and does not yet lie in its place."""
    left = kill(tmp_path, COMMAND, inputs, number, trial_is_written)
    assert left.code == (-number if number == signal.SIGKILL else 128 + number)
    assert left.beside == []
    assert [name for name in left.temporary if number == signal.SIGTERM] == []


@pytest.mark.slow
def test_at_any_moment(inputs: list[str], tmp_path: Path) -> None:
    """Ten moments from start to end, with both signals; an output of before stays until the new one is whole."""
    start = time.monotonic()
    whole = kill(tmp_path / "whole", COMMAND, inputs, signal.SIGTERM, 1e9)
    duration = time.monotonic() - start
    assert whole.code in (0, 1)
    assert (whole.beside, whole.temporary) == (["out.model"], [])
    new = (tmp_path / "whole" / "output" / "out.model").stat().st_size
    ends = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for step in range(10):
            folder = tmp_path / f"{number.name}-{step}"
            output = folder / "output" / "out.model"
            if step % 2:
                output.parent.mkdir(parents=True)
                output.write_bytes(b"before")
            left = kill(folder, COMMAND, inputs, number, duration * (0.1 + step / 11))
            assert left.beside in ([], ["out.model"])
            if output.exists() and output.read_bytes() != b"before":
                assert abs(output.stat().st_size - new) < 200
                assert state_of(gaq.load(output)).status == "converted"
            else:
                assert bool(step % 2) == output.exists()
            if number == signal.SIGTERM:
                assert left.temporary == []
            ends.add(left.code)
    assert {-signal.SIGKILL, 128 + signal.SIGTERM} <= ends
