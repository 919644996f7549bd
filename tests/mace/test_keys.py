"""Keys that act on no site of a MACE model are errors that say why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("mace", reason="needs MACE: pip install '.[mace]'")

import torch
from mace_models import build_model

import gaq
from gaq.config.parse import ConfigError, parse_config
from gaq.model.insertion import weight_quantizers
from gaq.model.state import state_of
from gaq_mace.model import HOST


@pytest.mark.parametrize(
    ("variant", "spec", "expected"),
    [
        ("plain", {"weights": {"species_bits": 2}}, "weights.species_bits: 2 has no effect on this model: no weights"),
        ("plain", {"attention": {"bits": 8}}, "attention: has no effect on this model: it has no gates"),
        ("density", {"attention": {"normalize": False}}, "attention.normalize: False has no effect on this model"),
        ("density", {"attention": {"gate_limit": 2.0}}, "attention.gate_limit: 2.0 has no effect on this model"),
        ("plain", {"weights": {"bits": 16, "compression": 3.0}}, "weights.compression: 3.0 has no effect on this"),
    ],
)
def test_keys_that_no_site_follows(variant: str, spec: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        gaq.prepare(build_model(variant), spec)
    assert str(error.value).startswith(f"quantization.{expected}"), error.value
    assert "Leave it out" in str(error.value)


LINEAR = "interactions.1.linear_up"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {LINEAR: {"scalars": {"bits": 2}}},
            "scalars.bits: 2 has no effect on interactions.1.linear_up (input: round",
        ),
        ({LINEAR: {"vectors": {"magnitude_bits": 2}}}, "vectors.magnitude_bits: 2 has no effect on interactions.1.lin"),
        ({"readouts.*": {"attention": {"bits": 4}}}, "attention: has no effect on readouts.0.linear, "),
        ({"readouts.*": {"radial_activations": True}}, "radial_activations: True has no effect on readouts.0.linear, "),
        ({"*.conv_tp_weights.*": {"scalars": {"bits": 8}}}, "scalars.bits: 8 has no effect on interactions.0.conv_tp_"),
        ({"products.0": {"weights": {"bits": 4}}}, "weights.bits: 4 has no effect on products.0"),
        ({"readouts.*": {"weights": {"first_bits": 12}}}, "weights.first_bits: 12 has no effect on readouts.0.linear"),
    ],
)
def test_overrides_that_their_modules_do_not_follow(overrides: dict[str, Any], expected: str) -> None:
    (pattern,) = overrides
    with pytest.raises(ConfigError) as error:
        gaq.prepare(build_model(), {"overrides": overrides})
    assert str(error.value).startswith(f"quantization.overrides['{pattern}'].{expected}"), error.value


def test_overrides_that_later_ones_undo() -> None:
    with pytest.raises(ConfigError, match=r"overrides\['readouts\.\*'\]: has no effect, because later patterns match"):
        gaq.prepare(build_model(), {"overrides": {"readouts.*": None, "*": "w8"}})
    gaq.prepare(build_model(), {"overrides": {"*": "w8", "readouts.*": None}})


@pytest.mark.parametrize("preset", ["gaq", "w4a16", "w8a8", "naive_w8a8"])
@pytest.mark.parametrize("variant", ["plain", "density", "scalar"])
def test_what_a_preset_sets_is_no_error(preset: str, variant: str) -> None:
    model = build_model("plain", hidden_irreps="8x0e") if variant == "scalar" else build_model(variant)
    spec = {**parse_config(preset).to_dict(), "preset": preset}
    spec["overrides"] = {"readouts.*": "w8a8", "products.*": {"weights": {"bits": 16}}}
    gaq.prepare(model, spec)


def test_an_override_without_weights_leaves_their_bits_alone(float_model: Callable[..., Any]) -> None:
    """It shares the budget of the model: here its scalars alone are others."""
    widths = [
        {name: q.bits for name, q in weight_quantizers(HOST, gaq.prepare(float_model("plain"), spec)).items()}
        for spec in ({"preset": "w4a16"}, {"preset": "w4a16", "overrides": {"products.0": {"scalars": {"bits": 8}}}})
    ]
    assert widths[0] == widths[1]


def test_a_file_with_a_key_that_never_acted_still_loads(quantized: Callable[..., Any], tmp_path: Any) -> None:
    model = quantized("gaq")
    state = state_of(model)
    stored = {**state.config.to_dict(), "calibration": {"frames": 64, "seed": 0, "headroom": 7.0}}
    with pytest.raises(ConfigError, match="headroom"):
        parse_config(stored)
    before = state.config
    state.config = type(before)(**{**vars(before), "calibration": type(before.calibration)(headroom=7.0)})
    gaq.save(model, tmp_path / "before.model")
    loaded = gaq.load(tmp_path / "before.model")
    assert state_of(loaded).config.calibration.headroom == 7.0
    assert torch.equal(next(loaded.parameters()), next(model.parameters()))
