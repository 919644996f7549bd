"""The errors of a model with and without quantization, side by side, for the log of NequIP's test run."""

from __future__ import annotations

import torch
from nequip.data import AtomicDataDict
from torch import Tensor

from gaq.model.state import unquantized
from gaq_nequip.root import eager

__all__ = ["ErrorComparison"]

_QUANTITIES = (("energy", "energy MAE per atom"), ("forces", "forces MAE"))


def _error_sums(output: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum and number of the absolute errors of each labelled quantity, shape (2,); energies per atom."""
    sums = {}
    for key, quantity in ((AtomicDataDict.FORCE_KEY, "forces"), (AtomicDataDict.TOTAL_ENERGY_KEY, "energy")):
        if key in target:
            error = output[key].detach() - target[key]
            if quantity == "energy":
                error = error / target[AtomicDataDict.NUM_NODES_KEY].reshape(error.shape)
            sums[quantity] = torch.stack([error.abs().sum(), error.new_tensor(error.numel())])
    return sums


class ErrorComparison:
    """Mean absolute errors of the same weights with quantization and without, collected batch by batch."""

    def __init__(self) -> None:
        self._batches: list[dict[str, dict[str, Tensor]]] = []

    def add(self, model: torch.nn.Module, batch: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        """Evaluate a quantized model on a batch twice, the second time without quantization."""
        with torch.enable_grad(), eager(model):
            sums = {"quantized": _error_sums(model(dict(batch)), target)}
            with unquantized(model):
                sums["float"] = _error_sums(model(dict(batch)), target)
        self._batches.append(sums)

    def lines(self) -> list[str]:
        """The comparison as text, in the units of the labels; empty if no batch was added."""
        if not self._batches:
            return []
        lines = ["The same weights without quantization (float) and with it, on the test data:"]
        for quantity, title in _QUANTITIES:
            sums = {
                name: torch.stack([batch[name][quantity] for batch in self._batches]).sum(0)
                for name in ("float", "quantized")
                if all(quantity in batch[name] for batch in self._batches)
            }
            if sums:
                values = ", ".join(f"{name} {float(s[0] / s[1]):.6f}" for name, s in sums.items())
                lines.append(f"  {title}: {values}")
        return lines
