"""Rows of the summary of a NequIP model, a row per module; modules left in float give the reason."""

from __future__ import annotations

import torch

from gaq.model import summary
from gaq.model.state import feature_quantizers, state_of
from gaq.model.summary_table import SummaryRow
from gaq.untyped import AnyModule
from gaq_nequip.sites import bystanders, find_sites
from gaq_nequip.weights import quantized_weights

__all__ = ["rows"]


def rows(model: torch.nn.Module) -> list[SummaryRow]:
    """One row per module, with the reason for those that are never quantized."""
    state = state_of(model)
    table = summary.rows(
        find_sites(model),
        state,
        dict(model.named_parameters()),
        quantized_weights(model) if state is not None else {},
        feature_quantizers(model),
        bystanders(model),
    )
    for name, module in model.named_modules():
        if getattr(module, "gaq_folded", False):
            packed: AnyModule = module.weight_quantizer
            scale = packed.scale.float()
            table.append(
                SummaryRow(
                    name,
                    f"{packed.numel} weights",
                    f"int{packed.bits} {packed.granularity}",
                    "float: rounded at the output of the layer before",
                    f"{float(scale.min()):.1e} .. {float(scale.max()):.1e}",
                    packed.bytes,
                    "rounded, folded by type",
                    "of its self-connection",
                )
            )
    return table
