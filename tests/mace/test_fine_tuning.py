"""The stock `mace_run_train` from a trained model, and rounding at its start or its end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.io import read, write
from mace_runs import (
    BASE,
    GAQ,
    THROUGHOUT,
    Run,
    check,
    check_errors,
    check_same,
    labelled,
    losses,
    results,
    rounding_errors,
)

from gaq_mace import files


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gaq", "w4"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fine_tuning(preset: str, dtype: str, train: Any, stock: Run) -> None:
    run = train(quantization=preset, foundation_model=str(stock.model), max_num_epochs=2, default_dtype=dtype)
    check(run, activations=preset == "gaq")


@pytest.mark.slow
def test_restarts_of_fine_tuning_take_the_scales_where_they_were(train: Any, stock: Run) -> None:
    options = {
        "quantization": {"preset": "w4", "training": THROUGHOUT},
        "foundation_model": str(stock.model),
        "ema": True,
    }
    run = train(max_num_epochs=2, **options)
    check(run, activations=False)
    again = train(max_num_epochs=4, restart_latest=True, **options)
    check(again, activations=False)
    initial = re.search(r"Initial: head: Default, loss= *([\d.]+)", again.log)[1]
    assert f"Epoch 1: head: Default, loss={initial}" in run.log


@pytest.mark.slow
def test_four_bit_presets_fine_tune_as_fp32_does(train: Any, stock: Run) -> None:
    """Weights are rounded when training is over, and nothing acts on them before."""
    options = {"foundation_model": str(stock.model), "ema": True, "max_num_epochs": 2}
    run = train(quantization={"preset": "w4", "distillation": {"steps": 4}}, **options)
    check(run, activations=False)
    plain = train(name="plain", **options)
    assert losses(run) == losses(plain)


@pytest.mark.slow
def test_weights_are_rounded_when_training_is_over(train: Any, stock: Run) -> None:
    """The run is that of FP32 step by step, its best weights are rounded by calibration, and that is what is saved."""
    run = train(quantization={"preset": "w4", "distillation": {"steps": 40, "batch_atoms": 16}})
    check(run, stock, activations=False)
    assert losses(run) == losses(stock)
    ((before, after),) = rounding_errors(run)
    assert after <= before
    frames = read(run.folder / "test.xyz", ":")
    _, rounded = results(run.model, frames, "float32")
    _, exact = results(stock.model, frames, "float32")
    difference = np.sqrt(np.mean((np.concatenate(rounded) - np.concatenate(exact)) ** 2))
    assert 0 < 1e3 * difference < 2 * after + 1


@pytest.mark.slow
def test_training_from_scratch_at_four_bits(train: Any) -> None:
    run = train(quantization={"preset": "w4", "training": THROUGHOUT}, max_num_epochs=1)
    check(run, activations=False)


@pytest.mark.slow
def test_fine_tuning_a_quantized_model(train: Any, stock: Run) -> None:
    foundation = train(quantization=GAQ, name="foundation")
    check(foundation)
    start = {"foundation_model": str(foundation.model), "max_num_epochs": 2}
    again = train(quantization=GAQ, name="again", **start)
    check(again, stock)
    assert "is quantized: training starts from its rounded weights" in again.log
    plain = train(name="plain", **start)
    assert plain.code == 0, plain.log[-3000:]
    assert "this run trains a float model" in plain.log
    assert not files.load(plain.model).__dict__.get("gaq_state")
    check_errors(plain, plain.model)


def two_heads(folder: Path) -> dict[str, Any]:
    write(folder / "other.xyz", labelled(("CH4", "H2O", "CH3OH"), 12, seed=5))
    return {
        "heads": {
            "first": {"train_file": "train.xyz", "test_file": "test.xyz", "E0s": BASE["E0s"]},
            "second": {"train_file": "other.xyz", "test_file": "test.xyz", "E0s": BASE["E0s"]},
        },
        "train_file": None,
        "test_file": None,
        "E0s": None,
    }


@pytest.mark.slow
def test_heads(train: Any, tmp_path: Path) -> None:
    run = train(quantization=GAQ, **two_heads(tmp_path))
    check(run, errors=False)
    assert files.load(run.model).heads == ["first", "second"]
    check_errors(run, run.model, row="Default_first", head="first")
    check_same(run, run.model)
    # One head of it, cut out by MACE, as the start of another run.
    tuned = train(
        quantization=GAQ, name="tuned", foundation_model=str(run.model), foundation_head="second", max_num_epochs=2
    )
    check(tuned)


@pytest.mark.slow
@pytest.mark.parametrize("quantized_foundation", [False, True], ids=["float", "gaq"])
def test_multihead_fine_tuning(quantized_foundation: bool, train: Any, stock: Run, tmp_path: Path) -> None:
    foundation = stock
    if quantized_foundation:
        foundation = train(quantization=GAQ, name="foundation")
    run = train(
        quantization=GAQ,
        foundation_model=str(foundation.model),
        multiheads_finetuning=True,
        pt_train_file=str(stock.folder / "train.xyz"),
        num_samples_pt=8,
        max_num_epochs=2,
    )
    check(run, errors=False)
    assert sorted(files.load(run.model).heads) == ["Default", "pt_head"]
    check_errors(run, run.model, head="Default")
