"""The configuration: every way of writing it means the same, and every mistake is named."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gaq.config.parse import (
    PRESETS,
    ConfigError,
    QuantizationConfig,
    ScalarConfig,
    VectorConfig,
    WeightConfig,
    parse_config,
    parse_stored,
    resolve_overrides,
    type_name,
)
from gaq.config.schema import REMOVED, REMOVED_VALUES, VERSION
from gaq.model.state import same_grid

MAPPING = {
    "preset": "w4a8",
    "weights": {"bits": 5, "granularity": "per_channel"},
    "scalars": None,
    "vectors": {"magnitude_bits": 10, "frame": "fixed"},
    "distillation": {"learning_rate": 2.5e-3},
    "overrides": {"readouts.*": None, "interactions.0.*": "w8", "products.*": {"weights": {"bits": 16}}},
}


# What is accepted.


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_resolves_in_every_form(name: str, tmp_path: Path) -> None:
    file = tmp_path / "quantization.yaml"
    file.write_text(f"quantization: {name}\n")
    config = parse_config(name)
    assert config is PRESETS[name]
    assert config.weights.bits is not None
    for form in ({"preset": name}, f"{{'preset': '{name}'}}", f"{{preset: {name}}}", f" {name} ", config, str(file)):
        assert parse_config(form) == config


def test_presets_are_what_their_names_say() -> None:
    assert PRESETS["gaq"] is PRESETS["w8a16"]
    assert parse_config({}) == PRESETS["gaq"]
    widths = {name: (c.weights.bits, c.scalars.bits, c.vectors.magnitude_bits) for name, c in PRESETS.items()}
    assert widths == {
        "gaq": (8, 24, 16),
        "w8a16": (8, 24, 16),
        "w4a16": (4, 24, 16),
        "w8": (8, None, None),
        "w4": (4, None, None),
        "w8a8": (8, 8, 8),
        "w4a8": (4, 8, 8),
        "naive_w8a8": (8, 8, 8),
    }
    assert {name for name, c in PRESETS.items() if not c.rounds_activations} == {"w8", "w4"}


def test_all_forms_of_a_mapping_give_the_same(tmp_path: Path) -> None:
    expected = parse_config(MAPPING)
    assert expected.weights == WeightConfig(
        bits=5, granularity="per_channel", sensitive_bits=None, species_bits=3, compression=7.0
    )
    assert expected.scalars == ScalarConfig(bits=None)
    assert expected.vectors == VectorConfig(magnitude_bits=10, direction_bits=12, frame="fixed")
    # What is not named stays as in the preset.
    assert expected.distillation == dataclasses.replace(PRESETS["w4a8"].distillation, learning_rate=2.5e-3)
    assert expected.calibration == PRESETS["w4a8"].calibration
    for suffix, content in ((".yml", MAPPING), (".yaml", {"quantization": MAPPING}), (".yml", expected.to_dict())):
        file = tmp_path / f"config{suffix}"
        file.write_text(yaml.safe_dump(content))
        assert parse_config(str(file)) == expected
    for text in (repr(MAPPING), json.dumps(MAPPING), yaml.safe_dump(MAPPING, default_flow_style=True, width=10_000)):
        assert parse_config(text) == expected
    assert parse_config(expected) == expected


@pytest.mark.parametrize("spec", [*sorted(PRESETS), MAPPING], ids=str)
def test_dictionary_round_trips(spec: Any) -> None:
    config = parse_config(spec)
    stored = json.loads(json.dumps(config.to_dict()))
    assert parse_config(stored) == config
    # The copy is the caller's own.
    config.to_dict()["weights"]["bits"] = 2
    assert parse_config(stored) == config


def test_null_means_float() -> None:
    config = parse_config({"weights": None})
    assert config.weights == WeightConfig(
        bits=None, first_bits=16, species_bits=4, compression=5.0, least_compression=4.0
    )
    assert config.scalars == ScalarConfig()
    assert parse_config({"vectors": None}).vectors == VectorConfig(magnitude_bits=None)
    assert parse_config({"weights": {"bits": None, "sensitive_bits": None}}).weights.sensitive_bits is None
    assert not parse_config({"scalars": None, "vectors": None}).rounds_activations


STATIC: dict[str, Any] = {"scalars": {"granularity": "per_channel"}}


def test_numbers_come_out_in_the_type_of_the_field() -> None:
    config = parse_config({"weights": {"bits": 4.0}, "calibration": {"headroom": 3}, **STATIC})
    assert type(config.weights.bits) is int
    assert type(config.calibration.headroom) is float


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", "1.0e-3", "0.001"])
def test_exponents_that_yaml_takes_for_text_are_numbers(number: str) -> None:
    assert parse_config(f"{{distillation: {{learning_rate: {number}}}}}").distillation.learning_rate == 1e-3


def test_a_file_may_hold_the_bare_name_of_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "preset.yml"
    file.write_text("w4\n")
    assert parse_config(str(file)) == PRESETS["w4"]


# What is not: each message names the key path, what stands there, and what is allowed.


def message(spec: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(spec)
    return str(error.value)


SECTIONS = {
    field.name: field
    for field in dataclasses.fields(QuantizationConfig)
    if field.name not in ("version", "preset", "overrides")
}


def defaults(section: str) -> Any:
    """A section as it is where its key is given and empty."""
    return getattr(parse_config({section: {}}), section)


def test_unknown_keys_at_the_top() -> None:
    text = message({"weigths": {"bits": 8}})
    assert text.startswith("quantization.weigths: unknown key.")
    assert "Did you mean 'weights'?" in text
    for name in (*SECTIONS, "version", "preset", "overrides"):
        assert name in text.split("Allowed in quantization:")[1]
    assert "quantization.1: unknown key" in message({1: 2})


@pytest.mark.parametrize("section", [name for name in SECTIONS if name != "radial_activations"])
def test_unknown_keys_in_a_section(section: str) -> None:
    text = message({section: {"no_such_key": 1}})
    assert text.startswith(f"quantization.{section}.no_such_key: unknown key.")
    for field in dataclasses.fields(defaults(section)):
        assert field.name in text.split(f"Allowed in quantization.{section}:")[1]
    for wrong in ("w8", 8, [8], True):
        text = message({section: wrong})
        assert text.startswith(f"quantization.{section}: expected a mapping, got {wrong!r}.")
        assert f"Allowed in quantization.{section}:" in text


FIELDS = [
    (section, field)
    for section in SECTIONS
    if section != "radial_activations"
    for field in dataclasses.fields(defaults(section))
    if field.name != "temperature"
]


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_wrong_types_of_every_field(section: str, field: dataclasses.Field[Any]) -> None:
    kind = type_name(field.type).replace(" | None", "")
    wrong: list[Any] = [[8], (8,), {"bits": 8}, object]
    wrong += [] if kind == "bool" else [True, False]
    wrong += {
        "bool": [1, 0, "true", "yes"],
        "int": ["8", 7.5, math.nan, math.inf, "1e1"],
        "float": ["fast", "0.5", "nan", "1e999", math.nan, math.inf, -math.inf, 10**400],
        "str": [8, 8.0],
    }[kind]
    for value in wrong:
        text = message({section: {field.name: value}})
        assert text.startswith(f"quantization.{section}.{field.name}: expected {kind}")
        assert repr(value) in text
        assert (" or null" in text) == ("None" in type_name(field.type))
    if "None" not in type_name(field.type):
        text = message({section: {field.name: None}})
        assert text == f"quantization.{section}.{field.name}: null is not allowed here; give a value of type {kind}."


@pytest.mark.parametrize(
    "value", [None, True, "hot", "0.5", [1.0], {"bits": 8}, math.nan, math.inf, 0, 0.25, 8.0, -1.0]
)
def test_temperatures_are_learned_or_between_their_bounds(value: Any) -> None:
    text = message({"attention": {"temperature": value}})
    expected = f"quantization.attention.temperature: {value!r} is neither 'learned' nor a number between 0.25 and 8."
    assert text == expected
    assert message({"attention": {"temperature": "learnt"}}).endswith("Did you mean 'learned'?")
    attention = parse_config({"attention": {"temperature": 2}}).attention
    assert attention is not None
    assert attention.temperature == 2.0
    assert attention == dataclasses.replace(defaults("attention"), temperature=2.0)


def test_without_the_key_attention_is_nowhere() -> None:
    for preset, config in PRESETS.items():
        assert config.attention is None
        assert "attention" not in config.to_dict()
        assert parse_config({"preset": preset, "attention": None}) == config
    round_trip = parse_config({"attention": {"bits": 12, "messages": True}})
    assert parse_config(round_trip.to_dict()) == round_trip


def test_attention_follows_the_preset_unless_bits_are_given() -> None:
    for preset, config in PRESETS.items():
        parsed = parse_config({"attention": {}, "preset": preset})
        assert parsed.attention is not None
        assert parsed.attention.bits == (None if config.scalars.bits is None else 16)
        assert parsed.rounds_activations == config.rounds_activations
    assert parse_config({"attention": {"normalize": False}, "scalars": None}).attention.bits is None  # type: ignore[union-attr]
    exact = parse_config({"preset": "w8", "attention": {"bits": 12}})
    assert exact.attention is not None
    assert exact.attention.bits == 12
    assert exact.rounds_activations
    override = {"*": {"attention": {"bits": 8}}}
    resolved = resolve_overrides(parse_config({"attention": {"normalize": False}, "overrides": override}), ["a"])["a"]
    assert resolved is not None
    assert resolved.attention is not None
    assert (resolved.attention.bits, resolved.attention.normalize) == (8, False)


def test_attention_alone_is_something_to_do() -> None:
    nothing = {"weights": None, "scalars": None, "vectors": None}
    for attention in ({}, {"messages": False, "bits": None}):
        assert message({**nothing, "attention": attention}).endswith("so nothing would be quantized.")
    assert parse_config({**nothing, "attention": {"messages": True}}).attention is not None


@pytest.mark.parametrize("value", [1, 0, "true", "yes", None])
def test_a_flag_is_true_or_false(value: Any) -> None:
    assert message({"radial_activations": value}).startswith("quantization.radial_activations: ")
    assert parse_config({"radial_activations": True}).radial_activations


@pytest.mark.parametrize("key", ["bits", "sensitive_bits", "first_bits", "mixing_bits", "species_bits"])
@pytest.mark.parametrize("bits", [-8, 0, 1, 17, 32])
def test_impossible_weight_widths(key: str, bits: int) -> None:
    text = message({"weights": {key: bits}})
    assert text.startswith(f"quantization.weights.{key}: {bits} bits cannot be stored")
    assert "choose one of 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16 or null" in text


@pytest.mark.parametrize(
    ("key", "most"),
    [("scalars.bits", 24), ("vectors.magnitude_bits", 16), ("vectors.direction_bits", 16), ("attention.bits", 16)],
)
@pytest.mark.parametrize("bits", [-1, 0, 1, None, 32])
def test_impossible_activation_widths(key: str, most: int, bits: int | None) -> None:
    section, name = key.split(".")
    bits = most + 1 if bits is None else bits
    text = message({section: {name: bits}})
    assert text.startswith(f"quantization.{key}: {bits} bits cannot be stored; choose one of 2, 3, 4,")
    assert f"{most - 1}, {most}" in text
    assert str(most + 1) not in text.replace(f"{bits} bits", "")
    assert ("or null" in text) == (key != "vectors.direction_bits")


@pytest.mark.parametrize(
    ("key", "wrong", "allowed", "meant"),
    [
        ("weights.granularity", "per_chanel", "per_tensor, per_channel, per_group", "per_channel"),
        ("weights.range", "absmin", "absmax, error", "absmax"),
        ("weights.rounding", "gtpq", "nearest, gptq", "gptq"),
        ("scalars.granularity", "per_tensors", "per_tensor, per_channel, per_atom", "per_tensor"),
        ("vectors.granularity", "per_tensors", "per_tensor, per_channel, per_atom", "per_tensor"),
        ("vectors.scheme", "mdqd", "mddq, components", "mddq"),
        ("vectors.codebook", "octohedral", "octahedral, geodesic", "octahedral"),
        ("vectors.frame", "locale", "local, fixed", "local"),
        ("training.round_weights", "at_the_end", "auto, throughout, at_end", "at_end"),
    ],
)
def test_bad_choices(key: str, wrong: str, allowed: str, meant: str) -> None:
    section, name = key.split(".")
    expected = f"quantization.{key}: '{wrong}' is not one of {allowed}. Did you mean '{meant}'?"
    assert message({section: {name: wrong}}) == expected


def test_groups_are_for_weights_only() -> None:
    weights = {"granularity": "per_group", "bits": 4}
    assert parse_config({"weights": weights}).weights.granularity == "per_group"
    for section in ("scalars", "vectors"):
        assert "not one of per_tensor, per_channel, per_atom." in message({section: {"granularity": "per_group"}})


@pytest.mark.parametrize(
    ("key", "wrong", "least"),
    [
        ("weights.group_size", 1, "2"),
        ("vectors.start", -0.1, "0"),
        ("vectors.start_epoch", -1, "0"),
        ("vectors.anneal_epochs", -1, "0"),
        ("attention.gate_limit", 0.0, "0.001"),
        ("calibration.frames", 0, "1"),
        ("calibration.seed", -1, "0"),
        ("calibration.headroom", 0.99, "1"),
        ("distillation.steps", -1, "0"),
        ("distillation.batch_atoms", 0, "1"),
        ("distillation.learning_rate", -1e-9, "0"),
        ("distillation.max_structures", 0, "1"),
        ("equivariance_loss.weight", -0.1, "0"),
        ("equivariance_loss.rotations", 0, "1"),
    ],
)
def test_numbers_that_are_too_small(key: str, wrong: float, least: str) -> None:
    section, name = key.split(".")
    expected = f"quantization.{key}: {wrong} is too small; the least allowed is {least}."
    assert message({section: {name: wrong}}) == expected
    # With what lets the key act.
    more = {"weights": {"granularity": "per_group", "bits": 4}, "calibration": STATIC["scalars"]}.get(section, {})
    spec = {"weights": {**more, name: float(least)}} if section == "weights" else {section: {name: float(least)}}
    if section == "equivariance_loss" and name == "rotations":
        spec[section]["weight"] = 1.0
    if name == "headroom":
        spec["scalars"] = more
    assert getattr(getattr(parse_config(spec), section), name) == float(least)


@pytest.mark.parametrize("key", ["start", "anneal"])
def test_shares_are_less_than_one(key: str) -> None:
    expected = f"quantization.vectors.{key}: 1.0 is too large; the key is a share, less than 1."
    assert message({"vectors": {key: 1}}) == expected


def test_unknown_presets() -> None:
    presets = "Presets: gaq, naive_w8a8, w4, w4a16, w4a8, w8, w8a16, w8a8."
    text = message("w8a61")
    assert text.startswith("quantization: 'w8a61' is not a preset. Did you mean 'w8a16'?")
    assert text.endswith(presets)
    assert message({"preset": "w16"}).startswith("quantization.preset: 'w16' is not a preset.")
    assert message({"preset": None}).startswith("quantization.preset: None is not a preset.")
    assert message({"preset": ["w8"]}).endswith(presets)
    for wrong in (None, 8, True, ["gaq"], 1.5):
        text = message(wrong)
        assert text.startswith(f"quantization: expected a preset name or a mapping, got {wrong!r}.")
        assert text.endswith(presets)
    assert message("").endswith(presets)


@pytest.mark.parametrize("text", ["{preset: gaq", "{{}: 1}", "{[]: 1}", "{'a': }]", "{\x00}"])
def test_text_that_is_no_mapping(text: str) -> None:
    assert message(text).startswith("quantization: cannot read the mapping ")


def test_text_of_a_set_is_no_mapping() -> None:
    assert "expected a preset name or a mapping" in message("{'w8', 'w8'}")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yml"
    assert message(str(missing)) == f"quantization: there is no file '{missing}'."
    assert message(str(tmp_path) + ".yml").startswith("quantization: there is no file ")
    for content, expected in (
        (b"weights: [", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"", "expected a preset name or a mapping, got None"),
        (b"- w8\n", "expected a preset name or a mapping, got ['w8']"),
        (b"weights: {bits: 17}", "quantization.weights.bits: 17 bits cannot be stored"),
    ):
        file = tmp_path / "wrong.yml"
        file.write_bytes(content)
        assert expected in message(str(file))


def test_tables_with_too_many_bits() -> None:
    text = message({"vectors": {"codebook": "geodesic"}})
    assert text.startswith("quantization.vectors.codebook: a geodesic table of 2 x 16 bits is too large")
    assert "direction_bits: 6 or fewer, or codebook: octahedral" in text
    assert "2 x 7 bits" in message({"vectors": {"codebook": "geodesic", "direction_bits": 7}})
    config = parse_config({"vectors": {"codebook": "geodesic", "direction_bits": 6}})
    assert config.vectors.codebook == "geodesic"


def test_everything_null() -> None:
    text = message({"weights": None, "scalars": None, "vectors": None})
    assert text == "quantization: weights, scalars and vectors are all null, so nothing would be quantized."
    assert message({"preset": "w8", "weights": {"bits": None}}) == text


def test_configurations_made_in_python_are_checked_too() -> None:
    made = QuantizationConfig(weights=WeightConfig(bits=17))
    assert message(made).startswith("quantization.weights.bits: 17 bits cannot be stored")
    made = QuantizationConfig(vectors=VectorConfig(codebook="geodesic"))
    assert "too large to search" in message(made)
    assert "'mine' is not a preset" in message(QuantizationConfig(preset="mine"))


# Overrides.


@pytest.mark.parametrize("wrong", [None, "w8", ["w8"], 8])
def test_overrides_are_a_mapping(wrong: Any) -> None:
    text = message({"overrides": wrong})
    assert text.startswith("quantization.overrides: expected a mapping from module-name patterns to a preset")
    assert repr(wrong) in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("w88", "quantization.overrides['a.*']: 'w88' is not a preset. Did you mean 'w8a8'?"),
        (8, "quantization.overrides['a.*']: expected a preset name or a mapping, got 8."),
        ({"bits": 8}, "quantization.overrides['a.*'].bits: unknown key."),
        ({"weights": {"bit": 8}}, "quantization.overrides['a.*'].weights.bit: unknown key. Did you mean 'bits'?"),
        ({"weights": {"bits": "8"}}, "quantization.overrides['a.*'].weights.bits: expected int or null, got '8'."),
        ({"weights": {"bits": 17}}, "quantization.overrides['a.*'].weights.bits: 17 bits cannot be stored"),
        ({"scalars": {"bits": 1}}, "quantization.overrides['a.*'].scalars.bits: 1 bits cannot be stored"),
        ({"vectors": {"scheme": "md"}}, "quantization.overrides['a.*'].vectors.scheme: 'md' is not one of mddq, "),
        ({"calibration": {"frames": 0}}, "quantization.overrides['a.*'].calibration.frames: 0 is too small"),
        ({"vectors": {"codebook": "geodesic"}}, "quantization.overrides['a.*'].vectors.codebook: a geodesic table"),
        ({"overrides": {"b": None}}, "quantization.overrides['a.*']: an override cannot hold overrides of its own."),
        ({"weights": None, "scalars": None, "vectors": None}, "quantization.overrides['a.*']: weights, scalars and"),
    ],
)
def test_overrides_are_checked_like_the_rest(override: Any, expected: str) -> None:
    assert message({"overrides": {"a.*": override}}).startswith(expected)


def test_patterns_are_strings() -> None:
    assert message({"overrides": {0: None}}).startswith("quantization.overrides['0']: a pattern must be a string")


MODULES = ["embedding", "interactions.0.linear", "interactions.1.linear", "readouts.0", "readouts.1"]


def test_overrides_apply_where_their_pattern_matches() -> None:
    config = parse_config({"overrides": {"interactions.0.*": "w4", "readouts.*": None}})
    resolved = resolve_overrides(config, MODULES)
    assert list(resolved) == MODULES
    assert resolved["embedding"] is config
    assert resolved["interactions.0.linear"] == PRESETS["w4"]
    assert resolved["interactions.1.linear"] is config
    assert resolved["readouts.0"] is None
    assert resolved["readouts.1"] is None
    assert resolve_overrides(parse_config("w8"), MODULES) == dict.fromkeys(MODULES, PRESETS["w8"])


def test_later_patterns_win() -> None:
    first = resolve_overrides(parse_config({"overrides": {"*": None, "readouts.1": "w8"}}), MODULES)
    assert first["readouts.1"] == PRESETS["w8"]
    assert first["embedding"] is None
    second = resolve_overrides(parse_config({"overrides": {"readouts.1": "w8", "*": None}}), MODULES)
    assert set(second.values()) == {None}


def test_patterns_that_match_nothing() -> None:
    config = parse_config({"overrides": {"readout.0": None}})
    with pytest.raises(ConfigError) as error:
        resolve_overrides(config, MODULES)
    text = str(error.value)
    assert text.startswith("quantization.overrides['readout.0']: matches no module. Did you mean 'readouts.0'?")
    assert text.endswith(f"Quantizable modules: {', '.join(MODULES)}.")


def test_the_configuration_needs_no_framework() -> None:
    code = (
        "import sys, gaq.config.parse\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'mace', 'nequip', 'e3nn', 'ase', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Keys of earlier versions.

NO_EFFECT = {
    "vectors.magnitude": "linear",
    "distillation.batch_size": 5,
    "distillation.features": 0.0,
    "training.warm_start": False,
    "training.learned_scales": False,
    "training.anneal_epochs": 0,
}
ACTING = {
    "vectors.magnitude": "log",
    "distillation.batch_size": 8,
    "distillation.features": 1.0,
    "training.warm_start": True,
    "training.learned_scales": True,
    "training.anneal_epochs": 3,
}


def nested(keys: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A mapping of sections from one of key paths."""
    plain: dict[str, Any] = dict(more)
    for path, value in keys.items():
        section, key = path.split(".")
        plain.setdefault(section, {})[key] = value
    return plain


def test_every_removed_key_is_tested() -> None:
    assert NO_EFFECT.keys() == ACTING.keys() == REMOVED.keys()
    assert {path: gone.no_effect for path, gone in REMOVED.items()} == NO_EFFECT


@pytest.mark.parametrize("path", sorted(REMOVED))
def test_keys_that_are_gone_say_what_to_write(path: str) -> None:
    for value in (ACTING[path], NO_EFFECT[path]):
        expected = f"quantization.{path}: this key is gone; {REMOVED[path].advice}."
        assert message(nested({path: value})) == expected
        override = message({"overrides": {"a.*": nested({path: value})}})
        assert override == expected.replace("quantization", "quantization.overrides['a.*']", 1)
    assert "leave it out" in REMOVED[path].advice or path == "distillation.batch_size"


@pytest.mark.parametrize(("path", "value"), sorted(REMOVED_VALUES))
def test_values_that_are_gone_say_what_to_write(path: str, value: str) -> None:
    expected = f"quantization.{path}: '{value}' is gone; {REMOVED_VALUES[path, value]}."
    assert message(nested({path: value})) == expected
    with pytest.raises(ConfigError, match=f"'{value}' is gone"):
        parse_stored(nested({path: value}), finished=True)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_stored_configurations_of_before_still_load(preset: str, finished: bool) -> None:
    """As the version with these keys wrote them: with the values of its presets."""
    config = PRESETS[preset]
    stored = json.loads(json.dumps(config.to_dict()))
    trains = config.rounds_weights_at_end
    before = {**NO_EFFECT, "training.warm_start": trains, "training.learned_scales": trains}
    for path, value in before.items():
        section, key = path.split(".")
        stored[section][key] = value
    stored["overrides"] = {"a.*": {"vectors": {"magnitude": "linear", "magnitude_bits": 12}}, "b.*": None}
    parsed = parse_stored(stored, finished)
    assert dataclasses.replace(parsed, overrides={}) == config
    assert parsed.overrides == {"a.*": {"vectors": {"magnitude_bits": 12}}, "b.*": None}
    assert same_grid(parsed.to_dict(), stored)
    assert not same_grid(parsed.to_dict(), {**stored, "vectors": {**stored["vectors"], "magnitude": "log"}})


@pytest.mark.parametrize("path", sorted(REMOVED))
def test_stored_keys_that_act_are_refused(path: str) -> None:
    stored = nested({path: ACTING[path]}, preset="gaq")
    with pytest.raises(ConfigError) as error:
        parse_stored(stored, finished=False)
    text = str(error.value)
    assert text.startswith(f"quantization.{path}: {ACTING[path]!r} is at work in this file, and the key is gone.")
    assert REMOVED[path].advice in text
    # What is about training does nothing to weights that are rounded for good, or when training is over.
    if path == "vectors.magnitude":
        with pytest.raises(ConfigError, match="is at work in this file"):
            parse_stored(stored, finished=True)
    else:
        assert parse_stored(stored, finished=True) == PRESETS["gaq"]
    if path.startswith("training."):
        assert parse_stored({**stored, "preset": "w4"}, finished=False) == PRESETS["w4"]
    with pytest.raises(ConfigError, match="is gone"):
        parse_stored({"overrides": {"a.*": nested({path: ACTING[path]})}}, finished=True)


def test_stored_configurations_need_not_be_mappings() -> None:
    assert parse_stored("w4", finished=False) == PRESETS["w4"]
    with pytest.raises(ConfigError, match="is not a preset"):
        parse_stored("w44", finished=True)


def test_fields_carry_what_is_allowed_in_them() -> None:
    """The parser has no table of its own: every bound and choice stands beside the default."""
    fields = {field.name: field for field in dataclasses.fields(WeightConfig)}
    assert fields["granularity"].metadata["choices"] == ("per_tensor", "per_channel", "per_group")
    assert fields["bits"].metadata["bits"] == tuple(range(2, 17))
    assert fields["group_size"].metadata["minimum"] == 2


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_of_version_1_round_scalars_to_at_most_16_bits(preset: str) -> None:
    """Files hold names of presets, under `overrides` too; they mean what they meant when the file was written."""
    today = PRESETS[preset]
    before = parse_config({"preset": preset, "version": 1})
    bits = today.scalars.bits
    assert before.scalars.bits == (bits if bits is None else min(bits, 16))
    assert dataclasses.replace(before, scalars=today.scalars, vectors=today.vectors, version=VERSION) == today
    assert parse_config(preset, version=1) == before
    assert parse_stored(before.to_dict(), finished=True) == before
    holder = parse_config({"version": 1, "overrides": {"a": preset, "b": {"preset": preset}, "c": {}}})
    resolved = resolve_overrides(holder, ["a", "b", "c"])
    assert resolved["a"] == resolved["b"] == before
    assert resolved["c"] == dataclasses.replace(parse_config({"version": 1}), overrides={})
    resolved = resolve_overrides(parse_config({"overrides": {"a": preset, "b": {"preset": preset}}}), ["a", "b"])
    assert resolved["a"] == resolved["b"] == today


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_before_version_3_have_a_schedule_of_epochs(preset: str) -> None:
    today = PRESETS[preset]
    before = parse_config({"preset": preset, "version": 2})
    epochs = (0, 0) if preset == "naive_w8a8" else (10, 5)
    assert (before.vectors.start_epoch, before.vectors.anneal_epochs) == epochs
    assert (today.vectors.start_epoch, today.vectors.anneal_epochs) == (None, None)
    assert dataclasses.replace(before, vectors=today.vectors, version=VERSION) == today
    stored = before.to_dict()
    for key in ("start", "anneal"):
        del stored["vectors"][key]  # as version 2 stored it
    assert parse_stored(stored, finished=False) == before
    assert same_grid(stored, today.to_dict())


def test_versions_of_the_configuration() -> None:
    assert parse_config("gaq").to_dict()["version"] == VERSION
    assert parse_config({"version": VERSION}) == parse_config("gaq")
    with pytest.raises(ConfigError, match=rf"^quantization\.version: {VERSION + 1} is later than this gaq reads"):
        parse_config({"version": VERSION + 1})
    with pytest.raises(ConfigError, match=r"quantization\.version: 0 is too small; the least allowed is 1"):
        parse_config({"version": 0})
