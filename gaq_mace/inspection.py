"""What is quantized in a MACE model, module by module, and why the rest is not."""

from __future__ import annotations

import torch

from gaq.packing import packed_bytes
from gaq.quantizers.features import FeatureQuantizer
from gaq.summary_table import SummaryRow
from gaq_mace import sites as mace_sites
from gaq_mace.model import feature_quantizers, quantized_weights, state_of

__all__ = ["rows"]


def _describe_input(quantizer: FeatureQuantizer | None, site: mace_sites.Site) -> str:
    if quantizer is None:
        return "float" if site.input_note == mace_sites.ROUNDED else f"float: {site.input_note}"
    return quantizer.describe()


def rows(model: torch.nn.Module, bystanders: bool = True) -> list[SummaryRow]:
    """A row a module; with `bystanders`, also those that are never quantized, with the reason."""
    state = state_of(model)
    quantized = quantized_weights(model) if state is not None else {}
    features = feature_quantizers(model)
    parameters = dict(model.named_parameters())
    table = []
    for site in mace_sites.find_sites(model):
        own = {w.path: quantized.get(f"{site.name}.{w.path}") for w in site.weights}
        present = [q for q in own.values() if q is not None]
        total = 0
        for path, tensor in own.items():
            if tensor is None:
                weight = parameters[f"{site.name}.{path}"]
                total += weight.numel() * weight.element_size()
            else:
                total += packed_bytes(tensor.codes.numel(), tensor.bits)
                total += tensor.scale.numel() * (2 if tensor.bits <= 8 else 4)
        scales = torch.cat([q.scale for q in present]) if present else torch.zeros(0)
        shares = sorted({f"int{q.bits} {q.granularity}" for q in present})
        if present:
            status = "in training" if state is not None and state.status == "training" else "rounded"
        elif state is None:
            status = "float: this model is not quantized"
        else:
            status = "float: left alone by overrides or preset"
        table.append(
            SummaryRow(
                site.name,
                site.irreps,
                ", ".join(shares) or "float",
                _describe_input(features.get(site.name), site),
                f"{float(scales.min()):.1e} .. {float(scales.max()):.1e}" if present else "-",
                total,
                status,
            )
        )
    if bystanders:
        table += [
            SummaryRow(b.name, b.kind, "-", "-", "-", 4 * b.parameters, f"not quantized: {b.reason}")
            for b in mace_sites.bystanders(model)
        ]
    return table
