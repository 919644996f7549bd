"""Packed files read by another MACE: one whose parameters have other names, number or shapes is refused, by name.

The other MACE is this one with a changed constructor, so that nothing here depends on how a file is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mace
import pytest
import torch
from mace.modules import models as mace_models

import gaq
from gaq_mace import files, packed, packed_pickle
from gaq_mace.files import ModelFileError

CHANGES = """
import torch

def renamed(model):
    own = model.readouts[1].linear_2
    own.weights_of_another_name = own.weight
    del own._parameters["weight"]
def added(model):
    model.products[0].linear.offset = torch.nn.Parameter(torch.randn(3))
def removed(model):
    del model.readouts[1].linear_2._parameters["weight"]
def reshaped(model):
    own = model.readouts[1].linear_2
    own.weight = torch.nn.Parameter(torch.randn(own.weight.numel() + 1))
"""

BLOCKED = """
import importlib.abc, json, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("gaq"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import mace
from mace.modules import models
original = models.ScaleShiftMACE.__init__
result = {}
for name in ("as_written", "renamed", "added", "removed", "reshaped"):
    def changed(self, *args, change=globals().get(name), **kwargs):
        original(self, *args, **kwargs)
        if change is not None:
            change(self)
    models.ScaleShiftMACE.__init__ = changed
    before = torch.get_default_dtype(), torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        torch.load(sys.argv[1], map_location="cpu", weights_only=False)
        result[name] = "loaded"
    except Exception as error:
        result[name] = f"{type(error).__name__}: {error}"
assert not [name for name in sys.modules if name.split(".")[0].startswith("gaq")]
print("RESULT" + json.dumps(result))
"""

# What the message has to say of each.
WORDS = {
    "renamed": ("readouts.1.linear_2.weight", "readouts.1.linear_2.weights_of_another_name"),
    "added": ("products.0.linear.offset",),
    "removed": ("readouts.1.linear_2.weight",),
    "reshaped": ("readouts.1.linear_2.weight", "(8,)", "(9,)"),
}
REMEDY = f"pip install mace-torch=={mace.__version__}"


def another_mace(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make MACE build models with a change of that name."""
    made: dict[str, Any] = {}
    exec(CHANGES, made)
    original = mace_models.ScaleShiftMACE.__init__

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made[name](self)

    monkeypatch.setattr(mace_models.ScaleShiftMACE, "__init__", changed)


@pytest.mark.parametrize("name", list(WORDS))
@pytest.mark.parametrize("suffix", [".model", ".safetensors"])
def test_another_mace(
    quantized: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    suffix: str,
) -> None:
    path = tmp_path / f"model{suffix}"
    gaq.save(quantized("w8"), path)
    another_mace(monkeypatch, name)
    with pytest.raises(ModelFileError) as caught:
        files.load(path)
    message = str(caught.value)
    for word in (str(path), *WORDS[name], f"mace-torch {mace.__version__}", REMEDY):
        assert word in message, message
    assert "\n" not in message


@pytest.mark.slow
def test_another_mace_without_this_package(
    quantized: Callable[..., Any], python: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "model.model"
    gaq.save(quantized("gaq"), path)
    done = python(CHANGES + BLOCKED, str(path), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.split("RESULT")[1])
    assert result.pop("as_written") == "loaded"
    assert result.keys() == WORDS.keys()
    for name, message in result.items():
        for word in (*WORDS[name], f"mace-torch {mace.__version__}", REMEDY):
            assert word in message, (name, message)


@pytest.mark.parametrize("suffix", [".model", ".safetensors"])
def test_a_model_that_its_configuration_does_not_give_is_not_saved(
    quantized: Callable[..., Any], tmp_path: Path, suffix: str
) -> None:
    """Saving a model that nobody could load again would lose it."""
    model = quantized("w8")
    model.products[0].linear.offset = torch.nn.Parameter(torch.randn(3))
    with pytest.raises(ModelFileError, match=r"products\.0\.linear\.offset"):
        gaq.save(model, tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".model", ".safetensors"])
def test_every_parameter_is_in_the_file(quantized: Callable[..., Any], tmp_path: Path, suffix: str) -> None:
    """Also one that a constructor would make with the same value."""
    model = quantized("w8")
    path = tmp_path / f"model{suffix}"
    weight = model.readouts[0].linear.weight
    made = packed.build(packed.model_config(model), weight.dtype).readouts[0].linear.weight
    with torch.no_grad():
        weight.copy_(made)
    gaq.save(model, path)
    assert torch.equal(gaq.load(path).readouts[0].linear.weight, weight)


@pytest.mark.parametrize("suffix", [".model", ".safetensors"])
def test_changed_buffers_are_kept(quantized: Callable[..., Any], tmp_path: Path, suffix: str) -> None:
    """A buffer that is not what the constructor makes is stored."""
    model = quantized("w8")
    name = next(n for n, _ in model.named_buffers() if "U_matrix" in n)
    with torch.no_grad():
        model.get_buffer(name).mul_(1.5)
    path = tmp_path / f"model{suffix}"
    gaq.save(model, path)
    assert torch.equal(gaq.load(path).get_buffer(name), model.get_buffer(name))


@pytest.mark.parametrize("suffix", [".model", ".safetensors"])
def test_saving_twice_builds_one_model(
    quantized: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """What a constructor makes is found out once for a configuration."""
    model = quantized("w8")
    packed.constructed.cache_clear()
    built = []
    original = packed.build
    monkeypatch.setattr(packed, "build", lambda *args: built.append(args) or original(*args))
    gaq.save(model, tmp_path / f"model{suffix}")
    gaq.save(model, tmp_path / f"model{suffix}")
    assert len(built) == 1


@pytest.mark.parametrize("suffix", [".model", ".safetensors"])
def test_ranges_of_sites_that_are_not_there(
    quantized: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Ranges that belong to no site of the model that was built are not dropped in silence."""
    path = tmp_path / f"model{suffix}"
    model = quantized("naive_w8a8")
    take_apart = packed.take_apart

    def renamed(model: Any) -> Any:
        apart = take_apart(model)
        apart.ranges = {name.replace("products.1", "products.elsewhere"): r for name, r in apart.ranges.items()}
        return apart

    with monkeypatch.context() as patch:
        patch.setattr(files, "take_apart", renamed)
        patch.setattr(packed_pickle, "take_apart", renamed)
        gaq.save(model, path)
    with pytest.raises(ModelFileError, match=r"products\.elsewhere"):
        files.load(path)
