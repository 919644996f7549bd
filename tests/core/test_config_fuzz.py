"""Random configurations and files: each is accepted or refused with our own error, and what is accepted means itself.

Seeds are kept: a case is made again by its number.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from gaq.config.effect import changed_keys, check_keys, value_of
from gaq.config.parse import PRESETS, ConfigError, QuantizationConfig, parse_config, parse_stored
from gaq.config.schema import AttentionConfig, preset_of

CASES = 300
"""Cases of the default suite; the slow one has ten thousand."""

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 5, 6, 8, 10, 16, 17, 24, 2.5, 0.2, 1e308, float("nan"), float("inf"),
    10**30, "", "gaq", "w4", "8", "1e-3", "null", "{}", "{a", "ünïcode", "\x00", [], [1, 2], {}, {"bits": 8}, {1: 2},
)  # fmt: skip


def _value(draw: random.Random, field: dataclasses.Field[Any]) -> Any:
    """A value of a field: one that is allowed in most cases, else anything."""
    if draw.random() < 0.1:
        return draw.choice(ODD)
    if (choices := field.metadata.get("choices")) is not None:
        return draw.choice(choices)
    if (bits := field.metadata.get("bits")) is not None:
        return draw.choice((*bits, None)) if "None" in str(field.type) else draw.choice(bits)
    if "below" in field.metadata:
        return round(draw.random(), 3)
    if field.type is bool or str(field.type) == "bool":
        return draw.random() < 0.5
    return draw.choice((0, 1, 2, 3, 5, 8, 32, 1.5, 4.0, None))


def _section(draw: random.Random, section: Any, most: int) -> dict[str, Any]:
    fields = list(dataclasses.fields(section))
    return {field.name: _value(draw, field) for field in draw.sample(fields, min(len(fields), draw.randint(1, most)))}


def specification(draw: random.Random, nested: bool = True) -> Any:
    """What a user might write: a preset or a mapping, with mistakes."""
    if draw.random() < 0.05:
        return draw.choice(ODD)
    spec: dict[str, Any] = {}
    if draw.random() < 0.6:
        spec["preset"] = draw.choice((*sorted(PRESETS), "w88")) if draw.random() < 0.9 else draw.choice(ODD)
    for field in dataclasses.fields(QuantizationConfig):
        if draw.random() > 0.25 or field.name in ("preset", "version", "overrides"):
            continue
        default = getattr(PRESETS["gaq"], field.name)
        section = AttentionConfig() if field.name == "attention" else default
        if draw.random() < 0.1:
            spec[field.name] = draw.choice(ODD)
        elif dataclasses.is_dataclass(section):
            spec[field.name] = _section(draw, section, 2)
        else:
            spec[field.name] = _value(draw, field)
    if nested and draw.random() < 0.2:
        spec["overrides"] = {draw.choice(("a.*", "*", "b")): specification(draw, nested=False)}
    if draw.random() < 0.03:
        spec[draw.choice(("wieghts", "bits", "", "version", 7))] = draw.choice(ODD)
    return spec


def outcome(spec: Any) -> QuantizationConfig | str:
    """The configuration, or the message of our own error; any other error ends the test."""
    try:
        return parse_config(spec)
    except ConfigError as error:
        return str(error)


def check(spec: Any) -> bool:
    """Check one case; returns whether it was accepted."""
    config = outcome(spec)
    if isinstance(config, str):
        assert config.startswith("quantization"), config
        assert len(config) < 5000, config
        return False
    # It means itself in every form in which it is stored.
    assert parse_config(config) == config
    assert parse_config(config.to_dict()) == config
    assert parse_stored(config.to_dict(), finished=False) == config
    # Each key that was written and changes something acts: without it the configuration is another one.
    base = preset_of(config.preset, config.version)
    check_keys(config, "quantization")
    for key in changed_keys(config, base):
        section, _, name = key.partition(".")
        if isinstance(spec, dict) and name and isinstance(spec.get(section), dict):
            written = {k: v for k, v in spec[section].items() if k != name}
            without = outcome({**spec, section: written})
            assert isinstance(without, str) or value_of(without, key) != value_of(config, key), (spec, key)
    return True


def run(first: int, count: int) -> None:
    accepted = sum(check(specification(random.Random(seed))) for seed in range(first, first + count))
    # Neither nearly all nor nearly none are accepted, or the cases try one side only.
    assert 0.1 * count < accepted < 0.7 * count


def test_configurations() -> None:
    run(0, CASES)


@pytest.mark.slow
def test_ten_thousand_configurations() -> None:
    run(CASES, 10_000)


def _damaged(draw: random.Random, text: str) -> bytes:
    """The bytes of a text with some of them changed, dropped, doubled or replaced by what YAML has a meaning for."""
    data = bytearray(text.encode())
    pieces = (b"&a ", b"*a", b"<<: ", b"!!int ", b"!!float ", b"!!timestamp ", b"? ", b"- ", b": ", b"{", b"]", b"\t")
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0:
                data[place:place] = draw.choice(pieces)
            case 1:
                del data[place : place + draw.randint(1, 5)]
            case 2:
                data[place : place + 1] = bytes([draw.randrange(256)])
            case 3:
                end = place + draw.randint(1, 30)
                data[place:place] = data[place:end]
            case 4:
                data[place:place] = b"9" * draw.choice((1, 30, 5000))
    return bytes(data)


def run_files(folder: Path, first: int, count: int) -> None:
    file = folder / "quantization.yml"
    for seed in range(first, first + count):
        draw = random.Random(seed)
        spec = specification(draw)
        document = {"quantization": spec, "model": "MACE"} if draw.random() < 0.5 else spec
        text = yaml.safe_dump(document, default_flow_style=draw.choice((True, False, None)))
        file.write_bytes(_damaged(draw, text))
        outcome(str(file))
        # As the text of a mapping, which is what training commands pass.
        outcome("{" + file.read_bytes().decode(errors="replace") + "}")


def test_damaged_files(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run_files(tmp_path, 0, CASES)
    assert not recwarn.list  # of Python, which reads the text of a mapping first


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run_files(tmp_path, CASES, 10_000)
    assert not recwarn.list


@pytest.mark.parametrize(
    "text",
    [
        "quantization: {weights: {bits: " + "9" * 5000 + "}}",
        "quantization: {weights: {bits: 2020-13-45}}",
        "quantization: '{weights: {bits: \"\\:\"}}'",
        "quantization: '{weights: {bits: 9or 8}}'",
        "quantization: !!int abc",
        "quantization: !!bool maybe",
        "quantization: !!timestamp never",
        "quantization: &a {overrides: {x: *a}}",
        "quantization: &a [*a]",
        "? {a: 1}\n: 2",
        "[" * 2000,
        "{" * 2000,
        "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(f"{b}: &{b} [{','.join('*' + a for _ in range(9))}]\n"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)) + "quantization: {weights: *i}",
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_files_that_python_cannot_hold(text: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Numbers without end, dates that are none, mappings that hold themselves, lists that grow by their aliases."""
    file = tmp_path / "odd.yml"
    file.write_text(text)
    message = outcome(str(file))
    assert isinstance(message, str)
    assert len(message) < 5000
    assert not recwarn.list
