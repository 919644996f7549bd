"""Which keys of the configuration act on a model: those that act on one of its sites.

`keys_of_site` is the one place that says what a site lets act. A key that the user wrote and that acts nowhere is an
error. The conditions that follow from the configuration alone are those of `gaq.config.effect`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from gaq.config.effect import OF_THE_MODEL, belongs_to, changed_keys, value_of
from gaq.config.schema import STATIC, ConfigError, QuantizationConfig, preset_of
from gaq.model.bits import bits_of, granularity_of, group_of
from gaq.model.sites import Site

__all__ = ["check_effect", "keys_of_site"]

_SITE_SECTIONS = ("weights", "scalars", "vectors", "attention", "radial_activations", "calibration.headroom")
"""Sections and keys that act on sites; the others are those of training and calibration."""

_ANYWHERE = ("weights.rounding", "vectors.start", "vectors.anneal", "vectors.start_epoch", "vectors.anneal_epochs")
"""Keys of these sections that are not those of a site."""

Resolved = Mapping[str, QuantizationConfig | None]


def keys_of_site(site: Site, given: QuantizationConfig, settled: QuantizationConfig, of_a_file: bool) -> set[str]:
    """Return the keys that act on a site.

    Args:
        site: a site of the model.
        given: configuration of the site as the user wrote it.
        settled: the same with its bits settled (`gaq.model.bits.settle_bits`).
        of_a_file: whether sizes are those of files; see `gaq.model.insertion.FloatSize`.
    """
    keys = _weight_keys(site, given, settled, of_a_file)
    bounded, attention = site.attention, given.attention
    if bounded is not None and attention is not None:
        keys |= {"attention", "attention.bits"}
        if bounded.limit is None:
            keys.add("attention.gate_limit")
            if attention.gate_limit is None:
                keys.add("calibration.headroom")
        elif site.kind == "attention":
            keys |= {"attention.normalize", "attention.temperature", "attention.messages"}
        return keys
    if site.features is None:
        return keys
    if site.radial:
        keys.add("radial_activations")
        if not given.radial_activations:
            return keys
    dimensions = {dimension for multiplicity, dimension in site.features.pieces if multiplicity > 0}
    if 1 in dimensions:
        keys |= {"scalars.bits", "scalars.granularity"}
    if dimensions - {1}:
        keys |= {f"vectors.{key}" for key in ("scheme", "magnitude_bits", "direction_bits", "frame", "granularity")}
    if 3 in dimensions:
        keys.add("vectors.codebook")
    static_scalars = 1 in dimensions and given.scalars.bits is not None and given.scalars.granularity in STATIC
    vectors = given.vectors
    static_vectors = dimensions - {1} and vectors.magnitude_bits is not None and vectors.granularity in STATIC
    if static_scalars or static_vectors:
        keys.add("calibration.headroom")
    return keys


def _weight_keys(site: Site, given: QuantizationConfig, settled: QuantizationConfig, of_a_file: bool) -> set[str]:
    """Return the keys of the section ``weights`` that act on a site."""
    weights = given.weights
    if not site.weights or weights.bits is None:
        return set()
    group = group_of(site, weights)
    if group == "species":
        return {"weights.species_bits", "weights.range"}
    keys = {"weights.bits", "weights.range", "weights.granularity", f"weights.{group}_bits"}
    grouped = granularity_of(bits_of(group, settled.weights), settled.weights) == "per_group"
    if weights.granularity == "per_group" and not grouped:
        keys.remove("weights.granularity")
    if grouped:
        keys.add("weights.group_size")
    if bits_of(group, settled.weights) != bits_of(group, weights):
        keys.add("weights.compression")
    if of_a_file:
        keys.add("weights.least_compression")
    return keys


def check_effect(
    config: QuantizationConfig, sites: Sequence[Site], given: Resolved, settled: Resolved, of_a_file: bool
) -> None:
    """Refuse keys that a user wrote and that act on no site of the model.

    Args:
        config: configuration of the model, as the user wrote it.
        sites: sites of the model.
        given: configuration of each site, from `gaq.config.parse.resolve_overrides`.
        settled: the same with their bits settled.
        of_a_file: whether sizes are those of files; see `gaq.model.insertion.FloatSize`.

    Raises:
        ConfigError: naming the key, why it cannot act, and what to write instead.
    """
    acting: dict[str, set[str]] = {}
    for site in sites:
        site_config, site_settled = given[site.name], settled[site.name]
        if site_config is not None and site_settled is not None:
            acting[site.name] = keys_of_site(site, site_config, site_settled, of_a_file)
    base = preset_of(config.preset, config.version)
    for key in _site_keys(config, base):
        value = value_of(config, key)
        values = {name: value_of(given[name] or config, key) for name in acting}
        # Overrides change the section attention and still start from it.
        sharing = [name for name, other in values.items() if other == value or (key == "attention" and other)]
        if not any(key in acting[name] for name in sharing):
            raise ConfigError(
                f"quantization.{key}: {_shown(value)}has no effect on this model: {_reason(key, sites)}. Leave it out."
            )
    for pattern in config.overrides:
        _check_override(config, pattern, sites, given, acting)


def _site_keys(config: QuantizationConfig, base: QuantizationConfig) -> list[str]:
    keys = (key for key in changed_keys(config, base) if belongs_to(key, _SITE_SECTIONS) and key not in _ANYWHERE)
    return [key for key in keys if key != "radial_activations" or config.radial_activations]


def _reason(key: str, sites: Sequence[Site]) -> str:
    """Say why a key acts on none of the sites."""
    section, _, name = key.partition(".")
    if section == "attention":
        if not any(site.attention is not None for site in sites):
            return "it has no gates, density weights or attention to bound"
        return "it has no attention over messages" if name != "gate_limit" else "it has no gates with calibrated limits"
    reasons = {
        "species_bits": "no weights act on an embedding of few species",
        "least_compression": "sizes of NequIP files are not compared; write weights.compression",
        "compression": "it changes no bits, because the weights given would not be so much smaller, or their bits are "
        "all given; ask for less compression or give fewer weights.bits",
        "granularity": "no weights have few enough bits for groups",
        "group_size": "no weights have few enough bits for groups",
        "headroom": "no range is observed",
    }
    if section in ("weights", "calibration"):
        return reasons.get(name, "it has no such weights to round")
    return "it has no l > 0 features to round" if section == "vectors" else "it has no such features to round"


def _shown(value: object) -> str:
    return f"{value!r} " if isinstance(value, str | int | float) else ""


def _names(sites: Sequence[Site]) -> str:
    names = [site.name for site in sites]
    return ", ".join(names if len(names) < 5 else [*names[:3], f"{len(names) - 3} more"])


def _check_override(
    config: QuantizationConfig, pattern: str, sites: Sequence[Site], given: Resolved, acting: Mapping[str, set[str]]
) -> None:
    """Refuse an override of which nothing is left, or with keys that act on none of its modules."""
    path = f"quantization.overrides['{pattern}']"
    patterns = list(config.overrides)
    later = patterns[patterns.index(pattern) + 1 :]
    matched = [site for site in sites if fnmatch.fnmatchcase(site.name, pattern)]
    members = [site for site in matched if not any(fnmatch.fnmatchcase(site.name, other) for other in later)]
    if not members:
        raise ConfigError(
            f"{path}: has no effect, because later patterns match all its modules. Write it after them, or leave it "
            "out."
        )
    own = given[members[0].name]
    override = config.overrides[pattern]
    if own is None:
        return
    named = isinstance(override, str) or "preset" in override
    for key in _site_keys(own, preset_of(own.preset, own.version) if named else config):
        if belongs_to(key, OF_THE_MODEL) or any(key in acting[site.name] for site in members):
            continue
        notes = sorted({site.input_note for site in members}) if key.startswith(("scalars", "vectors")) else []
        about = f" (input: {'; '.join(notes)})" if notes else ""
        raise ConfigError(
            f"{path}.{key}: {_shown(value_of(own, key))}has no effect on {_names(members)}{about}: "
            f"{_reason(key, members)}. Leave it out, or write it for modules where it acts (gaq inspect lists them)."
        )
