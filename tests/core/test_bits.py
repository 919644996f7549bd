"""Which weights have how many bits, and how a size is shared among them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaq.config.parse import PRESETS, parse_config, resolve_overrides
from gaq.config.schema import WeightConfig
from gaq.model.bits import (
    GROUPS,
    HIGHEST_LEVEL,
    LAGS,
    bits_of,
    granularity_of,
    group_of,
    settle_bits,
    spend,
    weight_bytes,
)
from gaq.model.sites import Site, WeightSite
from gaq.quantizers.weights import WeightLayout

W4 = PRESETS["w4"].weights


def _site(name: str, shape: tuple[int, int], group: str = "rest", embedding: torch.nn.Module | None = None) -> Site:
    weights = (WeightSite("", "weight", WeightLayout.single(shape, 0)),)
    flags = {"first": group == "first", "mixing": group == "mixing"}
    module = torch.nn.Identity()
    sensitive = group == "sensitive"
    return Site(name, module, "linear", weights, None, "", sensitive, False, "", **flags, embedding=embedding)


def _model(scale: int = 1) -> list[Site]:
    sizes = {"sensitive": 20, "first": 200, "mixing": 300, "rest": 500}
    return [_site(group, (64 * scale, n), group) for group, n in sizes.items()]


def _bits(weights: WeightConfig) -> list[int]:
    return [bits_of(group, weights) for group in GROUPS]


def test_groups() -> None:
    table = torch.nn.Embedding(3, 64)
    for group in GROUPS:
        assert group_of(_site("a", (64, 8), group), W4) == group
        assert group_of(_site("a", (64, 8), group, table), W4) == "species"
        # Without bits of their own such products are as they stand.
        assert group_of(_site("a", (64, 8), group, table), WeightConfig()) == group
    assert bits_of("species", W4) == 3
    assert [bits_of(g, PRESETS["gaq"].weights) for g in (*GROUPS, "species")] == [16, 16, 8, 8, 4]
    assert bits_of("first", WeightConfig(bits=8, first_bits=4)) == 8


def test_scales_are_shared_by_groups_at_few_bits_only() -> None:
    assert [granularity_of(b, W4) for b in (3, 4, 5, 6, 8, 16)] == ["per_group"] * 3 + ["per_channel"] * 3
    assert granularity_of(4, WeightConfig(granularity="per_tensor")) == "per_tensor"


def test_bytes_of_codes_and_scales() -> None:
    site = _site("a", (64, 8))
    assert weight_bytes([site], WeightConfig(bits=6)) == 64 * 8 * 6 // 8 + 2 * 8
    assert weight_bytes([site], dataclasses.replace(W4, compression=None)) == 64 * 8 // 2 + 2 * 16
    product = _site("a", (64, 8), embedding=torch.nn.Embedding(3, 64))
    assert weight_bytes([product, site], W4) == 64 * 8 * 3 // 8 + 2 * 8 + 64 * 8 // 2 + 2 * 16


@given(st.floats(1.5, 12.0))
def test_as_many_bits_as_fit(ratio: float) -> None:
    sites = _model()
    total = sum(4 * site.weights[0].layout.numel for site in sites)
    settled = spend(sites, W4, total / ratio)
    assert settled.compression is None
    bits = _bits(settled)
    least = weight_bytes(sites, dataclasses.replace(W4, compression=None))
    assert weight_bytes(sites, settled) <= max(total / ratio, least)
    level = max(bits[0] - 4, 0)
    # The groups keep their distances, but for what was left over.
    for group, group_bits in zip(GROUPS, bits, strict=True):
        assert group_bits - (4 + max(level - LAGS[group], 0)) in (-1, 0, 1), (group, bits)
    assert level <= HIGHEST_LEVEL + 1
    if level < HIGHEST_LEVEL and bits != [4, 4, 4, 4]:
        more = dataclasses.replace(
            settled, bits=bits[3] + 1, **{f"{g}_bits": b + 1 for g, b in zip(GROUPS[:3], bits[:3], strict=True)}
        )
        assert weight_bytes(sites, more) > total / ratio


def test_examples() -> None:
    sites = _model()
    total = sum(4 * site.weights[0].layout.numel for site in sites)
    expected = {
        1: [14, 12, 11, 10],
        3: [14, 12, 11, 9],
        4: [11, 9, 8, 6],
        5: [10, 8, 6, 5],
        7: [7, 4, 4, 4],
        20: [4] * 4,
    }
    for ratio, bits in expected.items():
        assert _bits(spend(sites, W4, total / ratio)) == bits
    # What is given stays, and the others share the rest.
    fixed = dataclasses.replace(W4, sensitive_bits=16, first_bits=8)
    assert _bits(spend(sites, fixed, total / 5)) == [16, 8, 6, 4]


def test_overrides_have_a_budget_of_their_own() -> None:
    sites = [*_model(), _site("other", (64, 100))]
    names = [site.name for site in sites]
    total = sum(4 * site.weights[0].layout.numel for site in sites)

    def settle(spec: object) -> tuple[WeightConfig, dict[str, WeightConfig | None]]:
        config = parse_config(spec)
        resolved = resolve_overrides(config, names)
        top, site_weights = settle_bits(config, sites, resolved, lambda: float(total))
        return top.weights, {name: None if c is None else c.weights for name, c in site_weights.items()}

    top, site_weights = settle({"preset": "w4", "overrides": {"other": None}})
    assert site_weights["other"] is None
    assert site_weights["rest"] == top
    expected = spend(_model(), W4, (total - 4 * 6400) / 7)
    assert top == expected
    top, site_weights = settle({"preset": "gaq", "weights": {"first_bits": 16}, "overrides": {"other": "w4"}})
    gaq = PRESETS["gaq"].weights
    assert top == dataclasses.replace(gaq, mixing_bits=8, compression=None, least_compression=None)
    assert site_weights["other"] == spend([sites[-1]], W4, 4 * 6400 / 7)
    top, site_weights = settle({"preset": "w4", "overrides": {"other": {"weights": {"bits": 5}}}})
    assert site_weights["other"] == dataclasses.replace(
        W4, bits=5, sensitive_bits=None, first_bits=None, mixing_bits=None, species_bits=None, compression=None
    )
    # Nothing to settle: nothing is asked for.
    config = parse_config({"weights": {"bits": 8, "compression": None}})

    def never() -> float:
        raise AssertionError

    same, _ = settle_bits(config, sites, resolve_overrides(config, names), never)
    assert dataclasses.replace(same, training=config.training) == config


def test_bits_give_way_to_a_least_size() -> None:
    """Where 16 bits for some leave the model too large, all bits follow from the size."""
    sites = _model()
    names = [site.name for site in sites]
    total = sum(4 * site.weights[0].layout.numel for site in sites)
    plain_weights = dataclasses.replace(PRESETS["gaq"].weights, compression=None)
    actual = total / weight_bytes(sites, plain_weights)
    assert actual == pytest.approx(3.2, abs=0.1)

    def settle(spec: object) -> WeightConfig:
        config = parse_config(spec)
        return settle_bits(config, sites, resolve_overrides(config, names), lambda: float(total))[0].weights

    def least(ratio: float) -> dict[str, object]:
        return {"weights": {"compression": None, "least_compression": ratio}}

    assert settle(least(actual - 0.01)) == dataclasses.replace(plain_weights, least_compression=None)
    smaller = settle(least(actual + 0.2))
    assert weight_bytes(sites, smaller) <= total / (actual + 0.2)
    assert _bits(smaller) == [13, 11, 9, 8]
    assert smaller.species_bits == 4
    # It is about files.
    config = parse_config(least(actual + 0.2))
    _, own_bits = settle_bits(config, sites, resolve_overrides(config, names), lambda: float(total), of_a_file=False)
    assert own_bits["rest"] is not None
    assert own_bits["rest"].weights == dataclasses.replace(plain_weights, least_compression=None)
    # Not even 8 bits for all: no fewer.
    assert _bits(settle(least(5.0))) == [8, 8, 8, 8]
    # Bits that somebody names are what they get; what an override is for has no size of its own.
    assert parse_config({"preset": "w8", "weights": {"sensitive_bits": 16}}).weights.least_compression is None
    config = parse_config({"preset": "w4", "overrides": {"rest": "gaq"}})
    _, resolved = settle_bits(config, sites, resolve_overrides(config, names), lambda: float(total))
    assert resolved["rest"] is not None
    assert resolved["rest"].weights == dataclasses.replace(plain_weights, mixing_bits=8, least_compression=None)
    with pytest.raises(ValueError, match=r"weights\.least_compression: 1"):
        parse_config(least(1))


def test_room_is_used_above_a_least_size() -> None:
    """A size that leaves room raises what is not given; one that cannot be kept raises nothing."""
    sites = [*_model(), _site("product", (6400, 24), embedding=torch.nn.Embedding(3, 64))]
    names = [site.name for site in sites]
    total = sum(4 * site.weights[0].layout.numel for site in sites)

    def settle(spec: object, of_a_file: bool = True) -> list[int]:
        config = parse_config(spec)
        resolved = resolve_overrides(config, names)
        settled = settle_bits(config, sites, resolved, lambda: float(total), of_a_file=of_a_file)[0].weights
        return [*_bits(settled), bits_of("species", settled)]

    for of_a_file in (False, True):
        assert settle("gaq", of_a_file) == [16, 16, 11, 10, 4]
        assert settle({"weights": {"compression": 5.2}}, of_a_file) == [16, 16, 10, 9, 4]
        assert settle({"weights": {"compression": 4}}, of_a_file) == [16, 16, 15, 14, 4]
        assert settle({"weights": {"compression": 8, "least_compression": None}}, of_a_file) == [16, 16, 8, 8, 4]


def test_a_size_can_be_asked_for_in_any_preset() -> None:
    assert parse_config({"preset": "gaq", "weights": {"compression": 5}}).weights.compression == 5.0
    with pytest.raises(ValueError, match=r"weights\.compression: 1"):
        parse_config({"weights": {"compression": 1}})


@pytest.mark.parametrize(
    ("spec", "ratio", "when"),
    [
        # Room for 16 bits, of which the rest has 12 in `w4`; for 14 and more; for 8.
        ("gaq", 1.9, "at_end"),
        ("gaq", 2.1, "at_end"),
        ("gaq", 3.0, "throughout"),
        ({"preset": "gaq", "training": {"round_weights": "throughout"}}, 1.9, "throughout"),
        ({"preset": "gaq", "training": {"round_weights": "at_end"}}, 3.0, "at_end"),
        ({"preset": "gaq", "overrides": {"rest": "w4"}}, 1.9, "throughout"),
        ("w4", 7.0, "at_end"),
        ("naive_w8a8", 1.0, "throughout"),
    ],
)
def test_fine_weights_are_rounded_when_training_is_over(spec: Any, ratio: float, when: str) -> None:
    config = parse_config(spec)
    if config.weights.compression is not None:
        config = dataclasses.replace(config, weights=dataclasses.replace(config.weights, compression=ratio))
    sites = [*_model(), _site("species", (64, 30), embedding=torch.nn.Embedding(3, 64))]
    resolved = resolve_overrides(config, [site.name for site in sites])
    config, resolved = settle_bits(config, sites, resolved, lambda: sum(4 * 64 * n for n in (20, 200, 300, 500, 30)))
    assert config.training.round_weights == when
    assert config.rounds_weights_at_end == (when == "at_end")
    assert all(
        site_config is config
        for site_config in resolved.values()
        if site_config is not None and site_config.preset == config.preset
    )
