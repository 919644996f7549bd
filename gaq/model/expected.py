"""Which widths to expect of a model, for those who read its table: a preset's name says only the least."""

from __future__ import annotations

from collections.abc import Collection

from gaq.config.schema import PRESETS, QuantizationConfig
from gaq.model.bits import bits_of, group_of
from gaq.model.sites import Site

__all__ = ["expected_width", "legend"]


def expected_width(site: Site, widths: Collection[int], config: QuantizationConfig) -> str:
    """Say in a few words why the weights of a site have their width.

    Args:
        site: the site.
        widths: bits of its weights; empty if they are not rounded.
        config: configuration of the model, its bits decided.
    """
    asked = PRESETS[config.preset].weights.bits
    if not widths or config.weights.bits is None or asked is None:
        return "-"
    group = group_of(site, config.weights)
    if set(widths) != {bits_of(group, config.weights)}:
        return "set by overrides"
    width = max(widths)
    if group == "species":
        return f"{width}: its codes are chosen together"
    if width == asked:
        return f"{asked}, as in {config.preset}"
    return f"{asked} or more: {group}" if width > asked else f"{width}: configured"


def legend(config: QuantizationConfig) -> str:
    """Explain the widths in the table of a model in a few lines.

    Args:
        config: configuration of the model.
    """
    preset = PRESETS[config.preset].weights
    lines = []
    if config.weights.bits is not None and preset.bits is not None:
        line = f"weights: {config.preset} asks for {preset.bits} bits or more, so wider ones are as intended."
        if preset.compression is not None:
            line += (
                f" It sets the size, {preset.compression:g} times smaller than FP32, and the bits that fit go where "
                "rounding costs most: sensitive (errors reach the complete model), first (they pass through all later "
                "layers), mixing (all features pass through), rest."
            )
        lines.append(line)
    scalars, vectors = config.scalars.bits, config.vectors.magnitude_bits
    if scalars is not None and vectors is not None:
        line = f"inputs: the a of a preset counts the bits of vectors (l>0), {vectors} here"
        if scalars != vectors:
            line += f"; scalars (l=0) have {scalars}, because coarser ones make steps in the energy"
        lines.append(f"{line}. 'float' says why an input is not rounded.")
    return "\n".join(lines)
