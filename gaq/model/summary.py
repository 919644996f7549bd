"""Rows of the summary: bits, scales and bytes of each module, and the reason where it stays in float."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gaq.files.packing import packed_bytes
from gaq.model.expected import expected_width
from gaq.model.sites import ROUNDED, Bystander, Site
from gaq.model.state import ModelState
from gaq.model.summary_table import SummaryRow
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import QuantizedTensor

__all__ = ["rows"]


def _describe_input(quantizer: FeatureQuantizer | None, site: Site) -> str:
    if quantizer is None:
        return "float" if site.input_note == ROUNDED else f"float: {site.input_note}"
    return quantizer.describe()


def rows(
    sites: Iterable[Site],
    state: ModelState | None,
    weights: Mapping[str, Tensor],
    quantized: Mapping[str, QuantizedTensor],
    features: Mapping[str, FeatureQuantizer],
    bystanders: Iterable[Bystander] = (),
) -> list[SummaryRow]:
    """Make the summary table, one row per module.

    Args:
        sites: sites of the model.
        state: state of the model, None for a float model.
        weights: parameters, by name.
        quantized: codes and scales, by parameter name.
        features: feature quantizers, by site name.
        bystanders: modules that are never quantized, listed with the reason.
    """
    table = []
    for site in sites:
        codes_by_path = {w.path: quantized.get(f"{site.name}.{w.path}") for w in site.weights}
        present = [tensor for tensor in codes_by_path.values() if tensor is not None]
        total = 0
        for path, tensor in codes_by_path.items():
            if tensor is None:
                weight = weights[f"{site.name}.{path}"]
                total += weight.numel() * weight.element_size()
            else:
                total += packed_bytes(tensor.codes.numel(), tensor.bits)
                total += 2 * tensor.scale.numel()
        scales = torch.cat([q.scale for q in present]) if present else torch.zeros(0)
        shares = sorted({f"int{q.bits} {q.granularity}" for q in present})
        if present:
            status = "in training" if state is not None and state.status == "training" else "rounded"
        elif state is None:
            status = "float: this model is not quantized"
        elif not site.weights and site.name in features:
            status = "rounded"
        else:
            status = "float: left alone by overrides or preset"
        table.append(
            SummaryRow(
                site.name,
                site.irreps,
                ", ".join(shares) or ("float" if site.weights else "-"),
                _describe_input(features.get(site.name), site),
                f"{float(scales.min()):.1e} .. {float(scales.max()):.1e}" if present else "-",
                total,
                status,
                "-" if state is None else expected_width(site, {q.bits for q in present}, state.config),
            )
        )
    table += [
        SummaryRow(b.name, b.kind, "-", "-", "-", 4 * b.parameters, f"not quantized: {b.reason}") for b in bystanders
    ]
    return table
