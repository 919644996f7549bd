"""Number of bits of each weight.

Rounding costs most where all later layers receive the error. Sites therefore belong to groups (`group_of`): the
``sensitive`` tensors; the rest of the ``first`` interaction; the weights ``mixing`` all that passes through a later
interaction; and the ``rest``. A ``species`` product is a group of its own, because its codes are chosen together
(`gaq.quantizers.species`).

`WeightConfig.compression` gives a size, and the groups share the bits it allows. ``least_compression`` does so only
where the configured bits exceed the size. The squared force error of a tensor of n weights is e² / 4^b at b bits, so at
a given size the sum is least for ``b = c + log2(e² / n) / 2`` with one c for all tensors (our derivation, reverse
water-filling). With e from `benchmarks/sensitivity.py` the groups differ by `LAGS`, in MACE and NequIP alike to within
one bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from gaq.config.schema import GROUPED_BITS, QuantizationConfig, TrainingConfig, WeightConfig
from gaq.files.packing import packed_bytes
from gaq.model.sites import Site
from gaq.untyped import Document

__all__ = ["GROUPS", "LAGS", "bits_of", "granularity_of", "group_of", "settle_bits", "weight_bytes"]

LAGS = {"sensitive": 0, "first": 2, "mixing": 3, "rest": 4}
"""Bits that each group has less than the sensitive tensors."""

GROUPS = tuple(LAGS)
SPARE = ("first", "mixing", "sensitive", "rest")
"""Order in which groups receive the spare bits when the budget cannot raise all of them."""
HIGHEST_LEVEL = 10
"""Most bits that the sensitive tensors get above ``bits``: at 4 bits they reach 14, and the rest 10."""
FINE_BITS = 14
"""If all weights have at least so many bits, they are rounded at the end of training, unless configured otherwise."""


def group_of(site: Site, weights: WeightConfig) -> str:
    """Return the group that a site belongs to."""
    if site.embedding is not None and weights.species_bits is not None:
        return "species"
    return "sensitive" if site.sensitive else "first" if site.first else "mixing" if site.mixing else "rest"


def bits_of(group: str, weights: WeightConfig) -> int:
    """Return the bits of a group's weights: at least ``bits``, except for the species group."""
    assert weights.bits is not None
    if group == "species":
        assert weights.species_bits is not None
        return weights.species_bits
    group_bits = getattr(weights, f"{group}_bits", None)
    return weights.bits if group_bits is None else max(weights.bits, group_bits)


def granularity_of(bits: int, weights: WeightConfig) -> str:
    """Return the granularity of scales for weights of so many bits."""
    return "per_channel" if weights.granularity == "per_group" and bits > GROUPED_BITS else weights.granularity


def weight_bytes(sites: Sequence[Site], weights: WeightConfig) -> int:
    """Return the bytes of codes and scales of all weights of the sites."""
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
    """Return the configuration that gives the sensitive tensors `level` bits more than ``bits``."""
    assert weights.bits is not None
    bits = {group: min(weights.bits + max(level - LAGS[group], 0), 16) for group in open_groups}
    return _with_bits(bits, weights)


def _with_bits(bits: Mapping[str, int], weights: WeightConfig) -> WeightConfig:
    keys: Document = {"bits" if group == "rest" else f"{group}_bits": value for group, value in bits.items()}
    return dataclasses.replace(weights, **keys)


def spend(sites: Sequence[Site], weights: WeightConfig, budget: float) -> WeightConfig:
    """Give all groups as many bits as the budget allows.

    Args:
        sites: sites with weights.
        weights: configuration; groups with configured bits keep them.
        budget: bytes for all codes and scales.

    Returns:
        The configuration with the bits of every group set and no compression requested. If even ``bits`` for all groups
        exceed the budget, they stay.
    """
    configured = {group: getattr(weights, f"{group}_bits", None) for group in GROUPS if group != "rest"}
    open_groups = [group for group in GROUPS if configured.get(group) is None]

    def fits(candidate: WeightConfig) -> bool:
        return weight_bytes(sites, candidate) <= budget

    level = 0
    while level < HIGHEST_LEVEL and fits(_at_level(level + 1, open_groups, weights)):
        level += 1
    best = _at_level(level, open_groups, weights)
    if level == HIGHEST_LEVEL:
        return _settled(best)
    # The rest of the budget cannot raise all groups by a bit; it may raise some.
    for group in sorted(open_groups, key=SPARE.index):
        if (more := bits_of(group, best) + 1) <= 16 and fits(candidate := _with_bits({group: more}, best)):
            best = candidate
    return _settled(best)


def _settled(weights: WeightConfig) -> WeightConfig:
    return dataclasses.replace(weights, compression=None, least_compression=None)


def _at_least(sites: Sequence[Site], weights: WeightConfig, budget: float) -> WeightConfig:
    """Keep the configured bits if they fit the budget; otherwise let `spend` choose."""
    if weight_bytes(sites, weights) <= budget:
        return _settled(weights)
    keys: Document = {f"{group}_bits": None for group in GROUPS if group != "rest"}
    return spend(sites, dataclasses.replace(weights, **keys), budget)


def settle_bits(
    config: QuantizationConfig,
    sites: Sequence[Site],
    resolved: Mapping[str, QuantizationConfig | None],
    float_bytes: Callable[[], float],
    overhead: int = 0,
    of_a_file: bool = True,
) -> tuple[QuantizationConfig, dict[str, QuantizationConfig | None]]:
    """Replace size requests by bits, in the configuration of the model and in those of its sites.

    Args:
        config: configuration of the model.
        sites: sites of the model.
        resolved: configuration of each site, from `gaq.config.parse.resolve_overrides`.
        float_bytes: returns the size of the float model. Modules for which an override names a preset with
            ``compression`` meet that ratio among themselves; ``least_compression`` applies to the complete model.
        overhead: bytes of the quantized model besides codes and scales.
        of_a_file: whether sizes are those of files, to which ``least_compression`` applies.

    Returns:
        Both without ``compression`` and ``least_compression``, and with ``training.round_weights`` decided.
    """
    settled_weights: dict[int, WeightConfig] = {}
    of_site = {name: None if site_config is None else site_config.weights for name, site_config in resolved.items()}
    # An override that says nothing about weights has the weights of the model itself, and shares its budget.
    for given in of_site.values():
        if given is None or given.bits is None or id(given) in settled_weights:
            continue
        weights = given
        is_main = given is config.weights
        ratio, least = weights.compression, weights.least_compression if is_main and of_a_file else None
        if ratio is not None or least is not None:
            members = [site for site in sites if of_site[site.name] is given and site.weights]
            others = [site for site in sites if of_site[site.name] is not given]
            size = float_bytes() - _float_bytes(others) if is_main else _float_bytes(members)
            besides = overhead if is_main else 0
            if ratio is not None:
                weights = spend(members, weights, size / ratio - besides)
            if least is not None:
                weights = _at_least(members, weights, size / least - besides)
        settled_weights[id(given)] = _settled(weights)

    def settle(site_config: QuantizationConfig) -> QuantizationConfig:
        weights = settled_weights.get(id(site_config.weights), site_config.weights)
        return dataclasses.replace(site_config, weights=weights)

    main = settle(config)
    settled = {
        name: site_config if site_config is None else main if site_config is config else settle(site_config)
        for name, site_config in resolved.items()
    }
    decided = dataclasses.replace(main, training=_decided(main.training, sites, settled))
    return decided, {name: decided if site_config is main else site_config for name, site_config in settled.items()}


def _decided(
    training: TrainingConfig, sites: Sequence[Site], resolved: Mapping[str, QuantizationConfig | None]
) -> TrainingConfig:
    """Replace ``round_weights: auto`` by the value that follows from the bits of the weights."""
    if training.round_weights != "auto":
        return training
    configs = [(site, resolved[site.name]) for site in sites if site.weights]
    rounded = [(site, config.weights) for site, config in configs if config and config.weights.bits is not None]
    groups = [(group_of(site, weights), weights) for site, weights in rounded]
    fine = all(group == "species" or bits_of(group, weights) >= FINE_BITS for group, weights in groups)
    at_end = fine and bool(groups)
    return dataclasses.replace(training, round_weights="at_end" if at_end else "throughout")


def _float_bytes(sites: Sequence[Site]) -> int:
    return sum(4 * weight.layout.numel for site in sites for weight in site.weights)
