"""Files of earlier versions: keys that are gone are dropped where they do nothing, and named where they act."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mace", reason="needs MACE: pip install '.[mace]'")

import gaq
from gaq.model.state import state_of
from gaq_mace import packed
from gaq_mace.files import ModelFileError

# As the earlier version stored its presets of 4 bits, which round weights at the end.
IDLE = {
    "vectors": {"magnitude": "linear"},
    "distillation": {"features": 0.0},
    "training": {"warm_start": True, "learned_scales": True, "anneal_epochs": 0},
}


def of_before(monkeypatch: pytest.MonkeyPatch, keys: dict[str, dict[str, Any]]) -> None:
    """Store configurations with more keys, as an earlier version did."""
    meta_of = packed.meta_of

    def with_keys(model: torch.nn.Module) -> dict[str, Any]:
        meta = meta_of(model)
        for section, more in keys.items():
            meta["config"][section] |= more
        return meta

    monkeypatch.setattr(packed, "meta_of", with_keys)


@pytest.mark.parametrize("suffix", [".model", ".safetensors"])
def test_files_of_before(
    quantized: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"before{suffix}"
    model = quantized("w4a16")
    with monkeypatch.context() as patch:
        of_before(patch, IDLE)
        gaq.save(model, path)
    loaded = gaq.load(path)
    assert state_of(loaded).config == state_of(model).config
    for name, value in model.state_dict().items():
        if name != "_extra_state":
            assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"magnitude": "log"}, r"quantization\.vectors\.magnitude: 'log' is at work in this file, and the key is gone"),
        ({"codebook": "fibonacci"}, r"quantization\.vectors\.codebook: 'fibonacci' is gone; write geodesic"),
    ],
)
def test_files_whose_keys_act(
    quantized: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    message: str,
) -> None:
    path = tmp_path / "before.model"
    with monkeypatch.context() as patch:
        of_before(patch, {"vectors": keys})
        gaq.save(quantized("gaq"), path)
    with pytest.raises(ModelFileError, match=message):
        gaq.load(path)


def test_checkpoints_of_before(quantized: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in training takes its ranges from a state that an earlier version wrote."""
    model, fresh = quantized("w8a8", status="training"), quantized("w8a8", status="training")
    with monkeypatch.context() as patch:
        of_before(patch, {**IDLE, "training": {"warm_start": False}})
        state = model.state_dict()
    fresh.load_state_dict(state)
    assert state_of(fresh).resumed
