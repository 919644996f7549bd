"""Rows of the summary of a MACE model, a row per module; modules left in float give the reason."""

from __future__ import annotations

import torch

from gaq.model import summary as inspection
from gaq.model.state import feature_quantizers, state_of
from gaq.model.summary_table import SummaryRow
from gaq_mace import sites as mace_sites
from gaq_mace.weights import quantized_weights

__all__ = ["rows"]


def rows(model: torch.nn.Module, bystanders: bool = True) -> list[SummaryRow]:
    """A row for each site; with `bystanders` also one, with the reason, for each module that is never quantized."""
    state = state_of(model)
    return inspection.rows(
        mace_sites.find_sites(model),
        state,
        dict(model.named_parameters()),
        quantized_weights(model) if state is not None else {},
        feature_quantizers(model),
        mace_sites.bystanders(model) if bystanders else (),
    )
