"""Keys that act on no site of a NequIP or Allegro model are errors that say why."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

from nequip_models import build_model

import gaq
from gaq.config.parse import ConfigError


@pytest.mark.parametrize(
    ("variant", "spec", "expected"),
    [
        ("plain", {"weights": {"species_bits": 2}}, "weights.species_bits: 2 has no effect on this model: no weights"),
        (
            "plain",
            {"weights": {"least_compression": 3.0}},
            "weights.least_compression: 3.0 has no effect on this model",
        ),
        ("plain", {"attention": {"temperature": 2.0}}, "attention.temperature: 2.0 has no effect on this model"),
        ("scalar", {"vectors": {"frame": "fixed"}}, "vectors.frame: 'fixed' has no effect on this model: it has no l"),
        ("allegro", {"attention": {"normalize": False}}, "attention.normalize: False has no effect on this model"),
        (
            "wide",
            {"overrides": {"*.edge_mlp.*": {"scalars": {"bits": 8}}}},
            "overrides['*.edge_mlp.*'].scalars.bits: 8",
        ),
        ("wide", {"overrides": {"*readout*": {"attention": {"bits": 8}}}}, "overrides['*readout*'].attention: has no"),
    ],
)
def test_keys_that_no_site_follows(variant: str, spec: dict[str, Any], expected: str) -> None:
    model = build_model("plain", l_max=0) if variant == "scalar" else build_model(variant)
    with pytest.raises(ConfigError) as error:
        gaq.prepare(model, spec)
    assert str(error.value).startswith(f"quantization.{expected}"), error.value


@pytest.mark.parametrize(
    ("variant", "spec"),
    [
        ("wide", {"weights": {"species_bits": 2}}),
        ("plain", {"attention": {"bits": 8, "gate_limit": 3.0}}),
        ("allegro", {"attention": {}}),
        ("plain", {"attention": {"messages": True, "temperature": 2.0}}),
        ("plain", {"overrides": {"*.equivariant_nonlin": {"attention": {"bits": 8}}}, "attention": {}}),
        ("allegro", "naive_w8a8"),
        ("spline", "w4a8"),
    ],
)
def test_keys_that_act(variant: str, spec: Any) -> None:
    gaq.prepare(build_model(variant), spec)
