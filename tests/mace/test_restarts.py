"""Runs of the stock `mace_run_train` that go on where another ended or was killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mace_runs import GAQ, check, training_form

from gaq.model.state import feature_quantizers


def first_epoch(log: str) -> int:
    """The epoch that was trained first."""
    return int(re.findall(r"Epoch (\d+): head", log)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"ema": True}, {"quantization": "w4"}, {"quantization": {**GAQ, "scalars": {"granularity": "per_channel"}}}],
    ids=["plain", "ema", "w4", "static"],
)
def test_restart(options: dict[str, Any], train: Any) -> None:
    settings = {"quantization": GAQ, **options}
    first = train(max_num_epochs=2, **settings)
    check(first, activations=settings["quantization"] != "w4")
    ranges = {name: q.ranges() for name, q in feature_quantizers(training_form(first, first.model)).items()}
    second = train(max_num_epochs=4, restart_latest=True, **settings)
    check(second, activations=settings["quantization"] != "w4")
    assert "Quantization ranges taken from the checkpoint" in second.log
    assert "calibrated on" not in second.log
    # MACE itself repeats the epoch of the checkpoint.
    assert first_epoch(second.log) == 1
    initial = re.search(r"Initial: head: Default, loss= *([\d.]+)", second.log)[1]
    assert f"Epoch 1: head: Default, loss={initial}" in first.log
    later = {name: q.ranges() for name, q in feature_quantizers(training_form(second, second.model)).items()}
    assert later.keys() == ranges.keys()
    static = "scalars" in settings["quantization"]
    assert static == any(bool(value.any()) for value in ranges.values())  # others are each atom's own
    for name, value in ranges.items():
        # Ranges forget slowly, a factor a step, so they are those of before and not new ones.
        assert bool((later[name] >= 0.5 * value).all())


@pytest.mark.slow
@pytest.mark.parametrize("preset", [GAQ, "w4"], ids=["gaq", "w4"])
def test_restart_from_float(preset: Any, train: Any) -> None:
    first = train(max_num_epochs=2)
    assert first.code == 0
    second = train(max_num_epochs=4, restart_latest=True, quantization=preset)
    check(second, activations=preset != "w4")
    assert first_epoch(second.log) == 1
    if preset != "w4":
        assert "Activation ranges calibrated on" in second.log
        # Rounding at 16 bits is small, so what training left off with is what it goes on with.
        before = float(re.findall(r"Epoch 1: head: Default, loss= *([\d.]+)", first.log)[0])
        after = float(re.search(r"Initial: head: Default, loss= *([\d.]+)", second.log)[1])
        assert after == pytest.approx(before, rel=0.05)


@pytest.mark.slow
def test_restart_with_other_settings(train: Any) -> None:
    assert train(max_num_epochs=2, quantization=GAQ).code == 0
    second = train(max_num_epochs=3, restart_latest=True, quantization="w4a8")
    assert second.code == 2
    assert "Traceback" not in second.log
    assert "(preset w8a16) than the ones given (preset w4a8)" in second.log
    assert "scalars.bits 24 there, 8 here" in second.log
    assert "Restart with the settings it was written with, or start a new run from its float model." in second.log
    assert "Epoch 1: head" not in second.log


@pytest.mark.slow
def test_killed_run_goes_on(train: Any) -> None:
    run = train(max_num_epochs=0, quantization=GAQ)
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "mace_run_train"), "--config", "run.yml", "--max_num_epochs", "1000"],
        cwd=run.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if "Epoch 2: head" in line:
            process.kill()
            break
    process.wait()
    second = train(max_num_epochs=5, restart_latest=True, quantization=GAQ)
    check(second)
    assert "Quantization ranges taken from the checkpoint" in second.log
    assert first_epoch(second.log) >= 1
