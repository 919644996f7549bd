"""Checkpoints of other runs in the folder of a quantized one: left aside, or one line says why they cannot serve."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import pytest
import torch
from mace.tools import CheckpointHandler, CheckpointState
from mace_models import build_model
from mace_runs import BRIEF, GAQ, THROUGHOUT, check

import gaq
from gaq_mace.checkpoints import CheckpointError, check_restart, checkpoints_in, load_own

TAG = "tiny_run-1"


def state_for(model: Any) -> CheckpointState:
    optimizer = torch.optim.Adam(model.parameters())
    return CheckpointState(model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))


def handler_for(folder: Path, **options: Any) -> CheckpointHandler:
    return CheckpointHandler(directory=str(folder), tag=TAG, keep=True, **options)


def write(folder: Path, model: Any, epoch: int, **options: Any) -> Path:
    """A checkpoint as MACE writes it."""
    handler_for(folder, **options).save(state_for(model), epoch)
    return folder / f"{TAG}_epoch-{epoch}{'_swa' if options else ''}.pt"


def shifted(model: Any, by: float) -> Any:
    """The model with other weights, by which it is known again."""
    with torch.no_grad():
        next(model.parameters()).add_(by)
    return model


@pytest.fixture(scope="module")
def float_one() -> Any:
    return build_model()


@pytest.fixture
def model(float_one: Any) -> Any:
    return gaq.prepare(copy.deepcopy(float_one), "gaq")


@pytest.fixture(scope="module")
def other_models(float_one: Any) -> dict[str, Any]:
    """Models that a run with the preset gaq cannot go on from; why not."""
    return {
        "the key `quantization`": float_one,
        "(preset w4a8) than the ones given (preset w8a16): ": gaq.prepare(copy.deepcopy(float_one), "w4a8"),
        "has the shape": gaq.prepare(build_model(num_bessel=4), "gaq"),
        "it has no": gaq.prepare(build_model(num_interactions=1), "gaq"),
    }


def test_a_run_ends_with_its_own(model: Any, float_one: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever an earlier run has left; MACE alone would load the highest epoch."""
    first = next(model.parameters()).detach().clone()
    write(tmp_path, shifted(copy.deepcopy(model), 1.0), 7)
    stale = write(tmp_path, float_one, 9)
    handler = handler_for(tmp_path)
    load_own(handler, model, checkpoints_in(tmp_path, TAG), goes_on=False)
    write(tmp_path, shifted(model, 2.0), 3)
    shifted(model, 5.0)
    assert handler.load_latest(state=state_for(model), swa=False, device="cpu") == 3
    torch.testing.assert_close(next(model.parameters()).detach(), first + 2.0)
    assert f"{stale} is left aside" in caplog.text
    # One of the same name that this run wrote anew is its own.
    write(tmp_path, shifted(model, 3.0), 9)
    assert handler.load_latest(state=state_for(model)) == 9
    torch.testing.assert_close(next(model.parameters()).detach(), first + 5.0)


def test_a_run_that_writes_none_takes_the_latest(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As stock MACE does; silently only where the run goes on from it."""
    handler = handler_for(tmp_path)
    load_own(handler, model, [], goes_on=False)
    assert handler.load_latest(state=state_for(model)) is None
    caplog.clear()
    path = write(tmp_path, model, 4)
    for goes_on in (True, False):
        handler = handler_for(tmp_path)
        load_own(handler, model, checkpoints_in(tmp_path, TAG), goes_on)
        assert handler.load_latest(state=state_for(model)) == 4
        warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        told = f"{path} is loaded, which was there before this run: this run wrote no checkpoint"
        assert warnings == ([] if goes_on else [told])


def test_stages_are_told_apart(model: Any, tmp_path: Path) -> None:
    handler = handler_for(tmp_path, swa_start=5)
    load_own(handler, model, [], goes_on=False)
    write(tmp_path, model, 2)
    write(tmp_path, model, 6, swa_start=5)
    (tmp_path / "tiny_run-12_epoch-30.pt").write_bytes(b"of another seed")
    assert handler.load_latest(state=state_for(model), swa=False) == 2
    assert handler.load_latest(state=state_for(model), swa=True) == 6


def test_another_run_in_the_same_folder(model: Any, other_models: dict[str, Any], tmp_path: Path) -> None:
    """It writes while this one trains: nothing of it fits, and the reason is said."""
    for words, other in other_models.items():
        handler = handler_for(tmp_path)
        load_own(handler, model, [], goes_on=False)
        path = write(tmp_path, other, 5)
        with pytest.raises(CheckpointError) as error:
            handler.load_latest(state=state_for(model))
        assert str(error.value).startswith(f"cannot use {path}: ")
        assert words in str(error.value)
        assert str(error.value).endswith("end this run with restart_latest: true.")
    # The weights fit, and the optimizer does not.
    state = state_for(model)
    state.optimizer = torch.optim.Adam([{"params": [weight]} for weight in model.parameters()])
    write(tmp_path, model, 5)
    with pytest.raises(CheckpointError, match="ValueError: loaded state dict"):
        handler.load_latest(state=state)


def test_what_a_run_cannot_go_on_from(model: Any, float_one: Any, other_models: dict[str, Any], tmp_path: Path) -> None:
    check_restart(model, tmp_path, TAG)  # there is none
    path = write(tmp_path, float_one, 3)
    check_restart(model, tmp_path, TAG)  # of a float run
    path = write(tmp_path, model, 4)
    check_restart(model, tmp_path, TAG)
    content = path.read_bytes()
    damaged: dict[str, Any] = {"cannot be read": content[: len(content) // 2], "EOFError": b"", "UnpicklingError": b"x"}
    for words, written in damaged.items():
        path.write_bytes(written)
        with pytest.raises(CheckpointError, match=words):
            check_restart(model, tmp_path, TAG)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a checkpoint of MACE"):
        check_restart(model, tmp_path, TAG)
    for words in ("has the shape", "it has no"):
        write(tmp_path, other_models[words], 4)
        with pytest.raises(CheckpointError) as error:
            check_restart(model, tmp_path, TAG)
        assert str(error.value).startswith(f"cannot go on from {path}: it is of another model: ")
        assert words in str(error.value)


@pytest.mark.slow
def test_the_command_says_it_in_one_line(float_one: Any, train: Any, tmp_path: Path) -> None:
    """Stock MACE trains from the start, silently, with those of the weights that fit."""
    write(tmp_path / "checkpoints", float_one, 8)
    run = train(restart_latest=True, quantization=GAQ)
    assert run.code == 2, run.log[-3000:]
    assert "Traceback" not in run.log
    error = "mace_run_train: error: cannot go on from checkpoints/tiny_run-1_epoch-8.pt: it is of another model"
    assert error in run.log
    assert "Epoch 0: head" not in run.log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("earlier", "throughout"),
    [("float", False), ("w4a8", False), ("shape", False), ("same", False), ("w4a8", True)],
)
def test_a_stale_checkpoint_of_a_later_epoch(earlier: str, throughout: bool, train: Any, tmp_path: Path) -> None:
    """Once, training ended in a traceback, or silently in the weights of the earlier run."""
    before = {
        "float": {},
        "w4a8": {"quantization": {"preset": "w4a8", **BRIEF}},
        "shape": {"hidden_irreps": "2x0e + 2x1o"},
        "same": {"quantization": GAQ, "lr": 0.1},
    }[earlier]
    assert train(max_num_epochs=2, **before).code == 0
    (stale,) = (tmp_path / "checkpoints").glob("*_epoch-*.pt")
    stale = stale.rename(stale.with_name(f"{TAG}_epoch-40.pt"))
    run = train(max_num_epochs=3, quantization={**GAQ, **({"training": THROUGHOUT} if throughout else {})})
    stale.unlink()
    check(run)
    assert f"{stale.name} is left aside" in run.log
    assert "Loaded Stage one model from epoch 40" not in run.log


@pytest.mark.slow
def test_a_run_that_another_one_disturbs(train: Any, tmp_path: Path) -> None:
    """No epoch is trained, so what is there is all there is: a model of another shape."""
    write(tmp_path / "checkpoints", build_model(), 8)
    run = train(max_num_epochs=0, quantization=GAQ)
    assert run.code == 2
    assert "Traceback" not in run.log
    assert "mace_run_train: error: cannot use checkpoints/tiny_run-1_epoch-8.pt: it is of another model" in run.log
