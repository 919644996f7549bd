"""How many bits each weight gets.

Rounding costs most where all that follows takes in the error. Sites therefore belong to groups (`group_of`):
``sensitive`` tensors, the rest of the ``first`` interaction, those that are ``mixing`` what passes through a later one,
and the ``rest``; a ``species`` product is on its own, for its codes are chosen together (`gaq.quantizers.species`).

With `WeightConfig.compression` the groups share what a size allows; with ``least_compression`` they do where the bits
they have are too many for it. The squared force error of a tensor of n weights is
e² / 4^b at b bits, so at given size the sum is least where ``b = c + log2(e² / n) / 2``, one c for all (our derivation,
reverse water-filling). e as `benchmarks/sensitivity.py` measures it makes the groups differ by `LAGS`, in MACE and
NequIP alike within a bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gaq.config.schema import QuantizationConfig, TrainingConfig, WeightConfig
from gaq.files.packing import packed_bytes
from gaq.model.sites import Site

__all__ = ["GROUPS", "LAGS", "bits_of", "granularity_of", "group_of", "settle_bits", "weight_bytes"]

LAGS = {"sensitive": 0, "first": 2, "mixing": 3, "rest": 4}
"""Bits by which a group stays behind the sensitive tensors."""

GROUPS = tuple(LAGS)
SPARE = ("first", "mixing", "sensitive", "rest")
"""Who is given one bit more first, where there is not enough for all."""
HIGHEST_LEVEL = 10
"""Bits the sensitive tensors get at most above ``bits``: from 4 bits, 14, and 10 for the rest."""
FINE_BITS = 14
"""Where all weights have so many, they are rounded when training is over, unless a configuration says otherwise."""
GROUPED_BITS = 5
"""Up to here a scale a group of inputs is worth its bytes: two a group of 32 are half a bit a weight."""


def group_of(site: Site, weights: WeightConfig) -> str:
    """The group a site belongs to."""
    if site.embedding is not None and weights.species_bits is not None:
        return "species"
    return "sensitive" if site.sensitive else "first" if site.first else "mixing" if site.mixing else "rest"


def bits_of(group: str, weights: WeightConfig) -> int:
    """Bits of the weights of a group. A group but that of species never has fewer than ``bits``."""
    assert weights.bits is not None
    if group == "species":
        assert weights.species_bits is not None
        return weights.species_bits
    own = getattr(weights, f"{group}_bits", None)
    return weights.bits if own is None else max(weights.bits, own)


def granularity_of(bits: int, weights: WeightConfig) -> str:
    """How weights of so many bits share scales."""
    return "per_channel" if weights.granularity == "per_group" and bits > GROUPED_BITS else weights.granularity


def weight_bytes(sites: Sequence[Site], weights: WeightConfig) -> int:
    """Bytes of codes and scales of all weights of some sites."""
    total = 0
    for site in sites:
        group = group_of(site, weights)
        bits = bits_of(group, weights)
        granularity = "per_channel" if group == "species" else granularity_of(bits, weights)
        for weight in site.weights:
            total += packed_bytes(weight.layout.numel, bits)
            total += 2 * weight.layout.scales(granularity, weights.group_size)
    return total


def _at_level(level: int, open_groups: Sequence[str], weights: WeightConfig) -> WeightConfig:
    """The configuration in which the sensitive tensors have `level` bits more than the least."""
    assert weights.bits is not None
    bits = {group: min(weights.bits + max(level - LAGS[group], 0), 16) for group in open_groups}
    return _with_bits(bits, weights)


def _with_bits(bits: Mapping[str, int], weights: WeightConfig) -> WeightConfig:
    keys: dict[str, Any] = {"bits" if group == "rest" else f"{group}_bits": value for group, value in bits.items()}
    return dataclasses.replace(weights, **keys)


def spend(sites: Sequence[Site], weights: WeightConfig, budget: float) -> WeightConfig:
    """The bits of all groups, as many as fit.

    Args:
        sites: with weights.
        weights: the groups whose bits are given keep them.
        budget: bytes for all codes and scales.

    Returns:
        The same with the bits of every group set, and no compression asked for. Where not even ``bits`` for all fit,
        these.
    """
    given = {group: getattr(weights, f"{group}_bits", None) for group in GROUPS if group != "rest"}
    open_groups = [group for group in GROUPS if given.get(group) is None]

    def fits(tried: WeightConfig) -> bool:
        return weight_bytes(sites, tried) <= budget

    level = 0
    while level < HIGHEST_LEVEL and fits(_at_level(level + 1, open_groups, weights)):
        level += 1
    best = _at_level(level, open_groups, weights)
    if level == HIGHEST_LEVEL:
        return _settled(best)
    # What is left is less than one more bit for all: perhaps it is enough for some.
    for group in sorted(open_groups, key=SPARE.index):
        if (more := bits_of(group, best) + 1) <= 16 and fits(tried := _with_bits({group: more}, best)):
            best = tried
    return _settled(best)


def _settled(weights: WeightConfig) -> WeightConfig:
    return dataclasses.replace(weights, compression=None, least_compression=None)


def _at_least(sites: Sequence[Site], weights: WeightConfig, budget: float) -> WeightConfig:
    """The bits as they are, or where they do not fit, as `spend` gives them."""
    if weight_bytes(sites, weights) <= budget:
        return _settled(weights)
    keys: dict[str, Any] = {f"{group}_bits": None for group in GROUPS if group != "rest"}
    return spend(sites, dataclasses.replace(weights, **keys), budget)


def settle_bits(
    config: QuantizationConfig,
    sites: Sequence[Site],
    resolved: Mapping[str, QuantizationConfig | None],
    float_bytes: Callable[[], float],
    overhead: int = 0,
    of_a_file: bool = True,
) -> tuple[QuantizationConfig, dict[str, QuantizationConfig | None]]:
    """Replace what is asked of the size by bits, in a configuration and in what it says of each module.

    Args:
        config: of the model.
        sites: of the model.
        resolved: the configuration of each site, as `gaq.config.parse.resolve_overrides` gives it.
        float_bytes: size of the float model. Modules for which an override names a preset with ``compression`` are held
            to it among themselves; ``least_compression`` is for the model as a whole.
        overhead: bytes of the quantized model besides codes and scales.
        of_a_file: whether these are sizes of files, which ``least_compression`` is about.

    Returns:
        Both without ``compression`` and ``least_compression``, and with ``training.round_weights`` decided.
    """
    done: dict[int, QuantizationConfig] = {}
    for own in resolved.values():
        if own is None or own.weights.bits is None or id(own) in done:
            continue
        weights = own.weights
        ratio, least = weights.compression, weights.least_compression if own is config and of_a_file else None
        if ratio is not None or least is not None:
            mine = [site for site in sites if resolved[site.name] is own and site.weights]
            others = [site for site in sites if resolved[site.name] is not own]
            whole = own is config
            size = float_bytes() - _float_bytes(others) if whole else _float_bytes(mine)
            besides = overhead if whole else 0
            if ratio is not None:
                weights = spend(mine, weights, size / ratio - besides)
            if least is not None:
                weights = _at_least(mine, weights, size / least - besides)
        done[id(own)] = dataclasses.replace(own, weights=_settled(weights))
    settled = {name: own if own is None else done.get(id(own), own) for name, own in resolved.items()}
    whole_config = done.get(id(config), config)
    decided = dataclasses.replace(whole_config, training=_decided(whole_config.training, sites, settled))
    return decided, {name: decided if own is whole_config else own for name, own in settled.items()}


def _decided(
    training: TrainingConfig, sites: Sequence[Site], resolved: Mapping[str, QuantizationConfig | None]
) -> TrainingConfig:
    """``round_weights: auto`` as what it comes to with the bits that weights have."""
    if training.round_weights != "auto":
        return training
    rounded = [(site, own.weights) for site in sites if (own := resolved[site.name]) and own.weights.bits is not None]
    groups = [(group_of(site, weights), weights) for site, weights in rounded if site.weights]
    fine = all(group == "species" or bits_of(group, weights) >= FINE_BITS for group, weights in groups)
    at_end = fine and bool(groups)
    return dataclasses.replace(training, round_weights="at_end" if at_end else "throughout")


def _float_bytes(sites: Sequence[Site]) -> int:
    return sum(4 * weight.layout.numel for site in sites for weight in site.weights)
