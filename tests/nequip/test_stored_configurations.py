"""Checkpoints of earlier versions: removed keys without effect are dropped, and those with an effect are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import torch
from nequip_models import with_key

import gaq
from gaq.config.parse import ConfigError, parse_config
from gaq.model.state import feature_quantizers, state_of

IDLE = {
    "vectors": {"magnitude": "linear"},
    "distillation": {"features": 0.0},
    "training": {"warm_start": False, "learned_scales": False, "anneal_epochs": 0},
}


def named_only(source: Path, target: Path, version: int) -> None:
    """Write a checkpoint whose key is the name of a preset, trained when that preset was of a version."""
    checkpoint = torch.load(source, map_location="cpu", weights_only=False)
    assert isinstance(checkpoint["hyper_parameters"]["model"]["quantization"], str)
    for name, value in checkpoint["state_dict"].items():
        if name.endswith("_extra_state") and isinstance(value, torch.Tensor):
            stored = json.loads(bytes(value.numpy().tobytes()))
            then = parse_config({"preset": "gaq", "version": version}).to_dict()
            stored["meta"]["config"] |= {"version": version, "scalars": then["scalars"]}
            text = bytearray(json.dumps(stored).encode())
            checkpoint["state_dict"][name] = torch.frombuffer(text, dtype=torch.uint8).clone()
    torch.save(checkpoint, target)


@pytest.mark.parametrize(("version", "bits"), [(1, 16), (2, 24)])
def test_a_checkpoint_means_the_preset_of_its_time(
    trained: Any, train: Callable[..., Any], tmp_path: Path, version: int, bits: int
) -> None:
    """It is rebuilt from the name; its state says what the name meant. Saved again, it says so itself."""
    path = tmp_path / "before.ckpt"
    named_only(trained.best, path, version)
    for _ in range(2):
        model = gaq.load(path)
        state = state_of(model)
        assert state is not None
        assert (state.config.version, state.config.scalars.bits) == (version, bits)
        widths = {q.scalar_bits for q in feature_quantizers(model).values()}
        assert widths == {bits}
        assert f"l=0: {bits} bits" in str(gaq.summary(model))
        path = tmp_path / "again.ckpt"
        gaq.save(gaq.convert(model) if state.status == "training" else model, path)


def of_before(source: Path, target: Path, keys: dict[str, dict[str, Any]]) -> None:
    """Write a checkpoint like an earlier version: with further keys in its configuration and in its state."""
    checkpoint = torch.load(source, map_location="cpu", weights_only=False)
    model = checkpoint["hyper_parameters"]["model"]
    model["quantization"] = {"preset": model["quantization"], **keys}
    for name, value in checkpoint["state_dict"].items():
        if name.endswith("_extra_state") and isinstance(value, torch.Tensor):
            stored = json.loads(bytes(value.numpy().tobytes()))
            for section, more in keys.items():
                stored["meta"]["config"][section] |= more
            text = bytearray(json.dumps(stored).encode())
            checkpoint["state_dict"][name] = torch.frombuffer(text, dtype=torch.uint8).clone()
    torch.save(checkpoint, target)


def test_checkpoints_of_before(trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "before.ckpt"
    of_before(trained.best, path, IDLE)
    loaded, model = gaq.load(path), gaq.load(trained.best)
    assert state_of(loaded).config == state_of(model).config
    for name, value in model.state_dict().items():
        if "extra_state" not in name:
            assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"magnitude": "log"}, r"quantization\.vectors\.magnitude: 'log' is at work in this file, and the key is gone"),
        ({"codebook": "fibonacci"}, r"quantization\.vectors\.codebook: 'fibonacci' is gone; write geodesic"),
    ],
)
def test_checkpoints_whose_keys_act(trained: Any, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    path = tmp_path / "before.ckpt"
    of_before(trained.best, path, {"vectors": keys})
    with pytest.raises(ConfigError, match=message):
        gaq.load(path)


@pytest.mark.slow
def test_a_restart_goes_on_from_a_checkpoint_of_before(trained: Any, train: Callable[..., Any], tmp_path: Path) -> None:
    """A removed key without effect does not stop it; one with an effect, or one in the user's file, does."""
    path = tmp_path / "before.ckpt"
    of_before(trained.last, path, IDLE)
    run = train(tmp_path / "float", None, "trainer.max_epochs=3", f"++ckpt_path={path}")
    assert run.code == 0, run.text
    of_before(trained.last, path, {"training": {"learned_scales": True}})
    run = train(tmp_path / "acting", None, "trainer.max_epochs=3", f"++ckpt_path={path}")
    assert run.code != 0
    assert "quantization.training.learned_scales: True is at work in this file" in run.text
    run = train(tmp_path / "written", with_key({"preset": "gaq", "training": {"learned_scales": False}}))
    assert run.code != 0
    assert "quantization.training.learned_scales: this key is gone; leave it out" in run.text
