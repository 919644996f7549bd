"""Keys that cannot act are errors that say why and what to write; what a preset sets and a value that holds are not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gaq.config.effect import CONDITIONS, OF_THE_MODEL, TRAINING_ONLY
from gaq.config.parse import PRESETS, ConfigError, QuantizationConfig, parse_config, parse_stored

COMPONENTS = {"scheme": "components"}


def message(spec: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(spec)
    return str(error.value)


IDLE: list[tuple[str, Any, dict[str, Any]]] = [
    ("weights.group_size", 4, {}),
    ("weights.granularity", "per_group", {}),
    ("weights.sensitive_bits", 4, {"weights": {"bits": None}}),
    ("weights.sensitive_bits", 4, {}),
    ("weights.first_bits", 6, {}),
    ("weights.mixing_bits", 7, {}),
    ("weights.rounding", "nearest", {"weights": {"bits": None}}),
    ("weights.compression", 3.0, {"weights": {"bits": None}}),
    ("scalars.granularity", "per_tensor", {"preset": "w8"}),
    ("scalars.granularity", "per_tensor", {"scalars": {"bits": None}}),
    ("vectors.frame", "fixed", {"preset": "w8"}),
    ("vectors.direction_bits", 8, {"vectors": COMPONENTS}),
    ("vectors.frame", "fixed", {"vectors": COMPONENTS}),
    ("vectors.codebook", "geodesic", {"vectors": COMPONENTS}),
    ("vectors.start", 0.5, {"vectors": {"start_epoch": 2}}),
    ("vectors.anneal", 0.5, {"vectors": {"anneal_epochs": 2}}),
    ("vectors.start", 0.5, {"preset": "w4"}),
    ("radial_activations", True, {"preset": "w8"}),
    ("calibration.headroom", 4.0, {}),
    ("calibration.headroom", 4.0, {"attention": {"gate_limit": 5.0}}),
    ("calibration.frames", 3, {"weights": {"rounding": "nearest"}, "distillation": {"steps": 0}}),
    ("distillation.steps", 5, {"weights": None}),
    ("distillation.batch_atoms", 50, {"distillation": {"steps": 0}}),
    ("training.round_weights", "at_end", {"weights": None}),
    ("equivariance_loss.rotations", 3, {}),
]


def put(path: str, value: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """A mapping with one more key."""
    section, _, key = path.partition(".")
    if not key:
        return {**spec, section: value}
    return {**spec, section: {**(spec.get(section) or {"bits": None} if section in spec else {}), key: value}}


@pytest.mark.parametrize(("path", "value", "spec"), IDLE)
def test_keys_that_cannot_act(path: str, value: Any, spec: dict[str, Any]) -> None:
    written = put(path, value, spec)
    text = message(written)
    assert text.startswith(f"quantization.{path}: {value!r} has no effect, because "), text
    assert "Write " in text
    assert text.endswith("or leave this key out.")
    # In files of before it still loads.
    assert parse_stored(written, finished=True) == parse_stored(written, finished=False)


@pytest.mark.parametrize(
    ("path", "value", "spec"),
    [
        ("weights.group_size", 4, {"preset": "w4"}),
        ("weights.group_size", 4, {"weights": {"granularity": "per_group", "bits": 5}}),
        ("weights.sensitive_bits", 8, {}),
        ("scalars.granularity", "per_tensor", {}),
        ("vectors.direction_bits", 8, {}),
        ("vectors.direction_bits", 8, {"preset": "w8", "vectors": {"magnitude_bits": 8}}),
        ("radial_activations", False, {"preset": "naive_w8a8", "scalars": None}),
        ("calibration.headroom", 4.0, {"scalars": {"granularity": "per_channel"}}),
        ("calibration.headroom", 4.0, {"attention": {}}),
        ("calibration.frames", 3, {"preset": "w8"}),
        ("distillation.steps", 0, {"weights": None}),
        ("equivariance_loss.rotations", 3, {"equivariance_loss": {"weight": 1.0}}),
    ],
)
def test_the_same_keys_where_they_act(path: str, value: Any, spec: dict[str, Any]) -> None:
    parse_config(put(path, value, spec))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_and_what_is_stored_of_them_are_no_errors(preset: str) -> None:
    """A mapping with all keys written out says nothing new, so it may be copied."""
    config = parse_config(preset)
    assert parse_config(config.to_dict()) == config
    for section, keys in config.to_dict().items():
        if isinstance(keys, dict) and section != "overrides":
            assert parse_config({"preset": preset, section: keys}) == config
    for off in ("weights", "scalars", "vectors"):
        if preset in ("gaq", "w8a16", "w4a8"):
            parse_config({"preset": preset, off: None})


def test_configurations_made_in_python() -> None:
    made = QuantizationConfig(vectors=dataclasses.replace(PRESETS["gaq"].vectors, scheme="components", frame="fixed"))
    assert message(made).startswith("quantization.vectors.frame: 'fixed' has no effect")


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("distillation", {"steps": 5}),
        ("training", {"round_weights": "throughout"}),
        ("calibration", {"frames": 3}),
        ("equivariance_loss", {"weight": 1.0}),
        ("attention", {"normalize": False}),
        ("attention", {"temperature": 2.0}),
        ("weights", {"rounding": "nearest"}),
        ("weights", {"least_compression": 3.0}),
        ("vectors", {"start": 0.5}),
        ("vectors", {"start_epoch": 5}),
    ],
)
@pytest.mark.parametrize("more", [{}, {"preset": "w4a8"}])
def test_keys_of_the_complete_model_have_no_place_in_overrides(section: str, keys: Any, more: Any) -> None:
    text = message({"attention": {}, "overrides": {"readouts.*": {**more, section: keys}}})
    (key,) = keys
    expected = f"quantization.overrides['readouts.*'].{section}.{key}: {keys[key]!r} has no effect in overrides"
    assert text.startswith(expected)
    assert f"Write it under quantization.{section}" in text


def test_overrides_are_judged_by_what_holds_them() -> None:
    spec = {"vectors": COMPONENTS, "overrides": {"a.*": {"vectors": {"frame": "fixed"}}}}
    assert message(spec).startswith("quantization.overrides['a.*'].vectors.frame: 'fixed' has no effect, because")
    parse_config({"vectors": COMPONENTS, "overrides": {"a.*": {"vectors": {"scheme": "mddq", "frame": "fixed"}}}})
    parse_config({"overrides": {"a.*": "w4", "b.*": {"preset": "w8a8"}}})


def test_every_condition_names_a_key() -> None:
    fields = {field.name: field for field in dataclasses.fields(QuantizationConfig)}
    for path in (*CONDITIONS, *OF_THE_MODEL, *TRAINING_ONLY):
        section, _, key = path.partition(".")
        default = getattr(parse_config({"attention": {}}), section)
        assert section in fields
        assert not key or hasattr(default, key), path


# Texts and files.


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("quantization: {preset: gaq}\nquantization: w4\n", "quantization"),
        ("weights: {bits: 8}\nweights: {bits: 4}\n", "weights"),
        ("quantization:\n  weights: {bits: 8, bits: 4}\n", "bits"),
        ("overrides: {a: w4, a: w8}\n", "a"),
    ],
)
def test_a_key_given_twice_in_a_file(tmp_path: Path, text: str, key: str) -> None:
    file = tmp_path / "twice.yml"
    file.write_text(text)
    assert f"the key '{key}' is given twice" in message(str(file))


def test_a_key_given_twice_in_text() -> None:
    assert message("{'weights': {'bits': 8, 'bits': 4}}") == "quantization: the key 'bits' is given twice."
    assert "the key 'bits' is given twice" in message("{weights: {bits: 8, bits: 4}}")
    parse_config("{weights: &w {bits: 8}, overrides: {a: {weights: {<<: *w, bits: 4}}}}")


def test_keys_beside_the_key_quantization(tmp_path: Path) -> None:
    file = tmp_path / "beside.yml"
    file.write_text("preset: w4\nquantization: w8\nmodel: MACE\n")
    assert f"{file} has preset beside the key quantization, where it has no effect." in message(str(file))
    file.write_text("quantization: w8\nmodel: MACE\n")
    assert parse_config(str(file)) == PRESETS["w8"]


def test_files_that_name_themselves(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yml", tmp_path / "two.yml"
    one.write_text(f"quantization: {one}\n")
    assert message(str(one)) == f"quantization: {one} names {one}: no configuration is in any of them."
    one.write_text(f"quantization: {two}\n")
    two.write_text(f"{one}\n")
    assert message(str(one)) == f"quantization: {one} names {two} names {one}: no configuration is in any of them."
    two.write_text("w4\n")
    assert parse_config(str(one)) == PRESETS["w4"]
    one.write_text(f"overrides: {{'a.*': {one}}}\n")
    assert message(str(one)) == "quantization.overrides['a.*']: an override cannot hold overrides of its own."


def test_a_file_under_overrides_is_read_at_once(tmp_path: Path) -> None:
    """What it holds is stored in the model, which loads where the file is not."""
    file = tmp_path / "readouts.yml"
    file.write_text("weights: {bits: 16}\n")
    assert parse_config({"overrides": {"a": str(file)}}).overrides == {"a": {"weights": {"bits": 16}}}
