"""Runs of `nequip-train` that go on from a checkpoint with another key, or begin with a package without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import torch
from nequip_models import with_key

import gaq
from gaq.model.state import state_of
from gaq_nequip.freeze import freeze
from gaq_nequip.hook.patches import _check_restart
from gaq_nequip.training import QuantizationCallback


def test_a_restart_with_a_key_that_rounds_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(preset w8a16\) than the ones given \(preset w4a8\)") as error:
        _check_restart("w4a8", "gaq")
    assert "scalars.bits 24 there, 8 here" in str(error.value)
    assert "Restart with the settings it was written with" in str(error.value)
    # Schedule, losses and distillation may change, and the presets of before mean the same.
    _check_restart({"preset": "gaq", "vectors": {"start": 0.5}, "distillation": {"steps": 3}}, "w8a16")
    _check_restart("gaq", {"preset": "gaq", "version": 2})


@pytest.mark.slow
@pytest.mark.parametrize("place", ["top", "model"])
def test_such_a_run_stops(trained: Any, train: Callable[..., Any], tmp_path: Path, place: str) -> None:
    def changes(config: Any) -> None:
        with_key("w4a8")(config if place == "top" else config["training_module"]["model"])

    run = train(tmp_path, changes, "trainer.max_epochs=3", f"++ckpt_path={trained.last}")
    assert run.code != 0
    assert "(preset w8a16) than the ones given (preset w4a8)" in run.text


class _Module(torch.nn.Module):
    """What the callback reads of a training module."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = torch.nn.ModuleDict({"sole_model": model})


def test_a_package_without_weights_cannot_be_trained(
    quantized: Callable[..., Any], float_model: Callable[..., Any]
) -> None:
    """Without this the run ends in torch's "optimizer got an empty parameter list"."""
    callback = QuantizationCallback()
    frozen = freeze(quantized("gaq", "plain"))
    assert state_of(frozen).status == "frozen"
    with pytest.raises(ValueError, match="holds integer codes and no weights that could be trained") as error:
        callback.setup(None, _Module(frozen), "fit")
    assert "quantization: w8a16" in str(error.value)
    callback.setup(None, _Module(frozen), "test")
    callback.setup(None, _Module(gaq.prepare(float_model("plain"), "gaq")), "fit")
