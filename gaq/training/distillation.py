"""Self-distillation without labels: a rounded model learns the forces of its float model.

The float weights beneath the rounding are trained (straight-through estimator), and the scales with them (Esser et al.
2020, LSQ, arXiv 1902.08153).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gaq.adapter import Adapter
from gaq.config.schema import DistillationConfig
from gaq.model.state import exact_features
from gaq.quantizers.weights import WeightQuantizer
from gaq.training.sampling import choose
from gaq.untyped import Batch, Document

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["DistillationResult", "Labelled", "distill", "force_rms", "label"]

ENERGY_WEIGHT = 0.1
"""Weight of the squared energy difference per atom (eV²) relative to that of the forces (eV²/Å²): forces dominate."""


@dataclass(frozen=True)
class DistillationResult:
    """Result of self-distillation.

    Attributes:
        before: RMS force difference to the float model, meV/Å, on the held-out structures.
        after: RMS force difference at the end, meV/Å, on the same structures.
        steps: optimiser steps taken.
        structures: number of training structures, without the held-out ones.
    """

    before: float
    after: float
    steps: int
    structures: int


@dataclass
class Labelled:
    """A batch with the float model's energies (graphs,) in eV and forces (atoms, 3) in eV/Å."""

    batch: Batch
    energy: Tensor
    forces: Tensor


def label(adapter: Adapter, model: torch.nn.Module, structures: Sequence[Atoms], batch_size: int) -> list[Labelled]:
    """Make batches of the structures, with the energies and forces of the model without rounding."""
    labelled = []
    with adapter.unquantized(model):
        for batch in adapter.batches(model, structures, batch_size):
            energy, forces, _ = adapter.energy_and_forces(model, batch)
            labelled.append(Labelled(batch, energy.detach(), forces.detach()))
    return labelled


def force_rms(adapter: Adapter, model: torch.nn.Module, labelled: Sequence[Labelled]) -> float:
    """Return the RMS difference between a model's forces and the labels, meV/Å."""
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for item in labelled:
        _, forces, _ = adapter.energy_and_forces(model, item.batch)
        total += ((forces.detach() - item.forces) ** 2).sum().double().cpu()
        count += forces.numel()
    return 1000.0 * math.sqrt(float(total) / max(count, 1))


def distill(
    adapter: Adapter,
    model: torch.nn.Module,
    structures: Sequence[Atoms],
    config: DistillationConfig,
    seed: int = 0,
    progress: bool = True,
    teacher: torch.nn.Module | None = None,
) -> DistillationResult:
    """Train weights and scales until the rounded model reproduces the float model's forces.

    The loss is the squared difference to the float model's forces plus the weighted one of the energy per atom; no
    reference labels enter. Activations stay exact meanwhile: rounding at 16 bits is noise far below the fitted errors,
    and coarse activations would saturate, because their ranges were observed on weights that still change much. Weights
    whose rounding is ``negligible`` are not rounded either while they are trained.

    One structure in ten is held out, and the weights with the smallest error on these are kept.

    Args:
        adapter: adapter of the model's framework.
        model: a prepared model, not converted.
        structures: structures like those the model will be used on; a few hundred suffice.
        config: steps, batch size, learning rate.
        seed: seed of the order of structures.
        progress: whether to show a progress bar.
        teacher: copy of the model with the original float weights, if calibrated rounding has changed those of `model`.

    Returns:
        The RMS force difference to the float model before and after, with all weights rounded.
    """
    chosen = choose(structures, config.max_structures, seed)
    held_out = max(1, len(chosen) // 10) if len(chosen) > 1 else 0
    source = model if teacher is None else teacher
    training = label(adapter, source, chosen[held_out:], config.batch_size)
    validation = label(adapter, source, chosen[:held_out] or chosen, 16)
    quantizers = adapter.weight_quantizers(model)
    parameters = dict(model.named_parameters())
    for name, quantizer in quantizers.items():
        if not quantizer.scale_is_fixed:
            quantizer.fix_scale(parameters[name])
    with exact_features(adapter.feature_quantizers(model).values()):
        descent = _Descent(adapter, model, quantizers, config)
        before, after = descent.run(training, validation, seed, progress)
    return DistillationResult(before, after, config.steps, len(chosen) - held_out)


class _Descent:
    """Optimizes weights and scales in a distillation.

    Args:
        adapter: adapter of the model's framework.
        model: a prepared model with fixed scales.
        quantizers: quantizers of the weights, by parameter name.
        config: steps and learning rate.
    """

    def __init__(
        self,
        adapter: Adapter,
        model: torch.nn.Module,
        quantizers: Mapping[str, WeightQuantizer],
        config: DistillationConfig,
    ) -> None:
        self.adapter = adapter
        self.model = model
        self.config = config
        self.parameters = dict(model.named_parameters())
        self.weights = [self.parameters[name] for name in quantizers]
        # Weights whose rounding is negligible are not rounded while they are trained.
        self.negligible = {name: q for name, q in quantizers.items() if q.negligible and q.enabled}
        self.learned = {name: q for name, q in quantizers.items() if name not in self.negligible}
        # Each scale is learned relative to its start, ``start * factor / typical``: where channels differ by orders of
        # magnitude, an optimizer step that suits large scales would take small ones through zero.
        self.starts = [q.fixed_step.detach().clone() for q in self.learned.values()]
        self.typical = [float(start.mean()) for start in self.starts]
        self.factors = [
            torch.full_like(start, mean).requires_grad_(True)
            for start, mean in zip(self.starts, self.typical, strict=True)
        ]
        self.requires_grad = {name: p.requires_grad for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        self.optimizer = torch.optim.Adam(self._groups(quantizers), betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(config.steps, 1), eta_min=0.0)

    def _groups(self, quantizers: Mapping[str, WeightQuantizer]) -> list[Document]:
        """Parameter groups of weights and scales, with their learning rates."""
        groups: list[Document] = []
        rates = {}
        for (name, quantizer), weight in zip(quantizers.items(), self.weights, strict=True):
            size = float(weight.detach().pow(2).mean().sqrt()) or 1.0
            # A code changes once its weight has moved by about a step, and steps double with every bit less.
            rates[name] = self.config.learning_rate * 2.0 ** max(8 - quantizer.effective_bits, 0)
            groups.append({"params": [weight.requires_grad_(True)], "lr": rates[name] * size})
        for name, factor, mean in zip(self.learned, self.factors, self.typical, strict=True):
            groups.append({"params": [factor], "lr": 0.1 * rates[name] * mean})
        return groups

    def _apply_scales(self) -> None:
        for quantizer, start, factor, mean in zip(
            self.learned.values(), self.starts, self.factors, self.typical, strict=True
        ):
            quantizer.fixed_step = start * (factor / mean)

    def _snapshot(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in (*self.weights, *self.factors)]

    def _step(self, item: Labelled) -> None:
        self._apply_scales()
        energy, forces, counts = self.adapter.energy_and_forces(self.model, item.batch, create_graph=True)
        force_error = ((forces - item.forces) ** 2).mean()
        energy_error = (((energy - item.energy) / counts) ** 2).mean()
        loss = force_error + ENERGY_WEIGHT * energy_error
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*self.weights, *self.factors], 10.0)
        self.optimizer.step()
        self.schedule.step()

    def run(
        self, training: Sequence[Labelled], validation: Sequence[Labelled], seed: int, progress: bool
    ) -> tuple[float, float]:
        """Take the steps, keep the best weights, and return the RMS force difference before and after, meV/Å."""
        before = force_rms(self.adapter, self.model, validation)
        for quantizer in self.negligible.values():
            quantizer.enabled = False
        best = force_rms(self.adapter, self.model, validation) if self.negligible else before
        kept = self._snapshot()
        interval = max(20, self.config.steps // 10)
        items = _shuffled(training, seed)
        bar = tqdm(range(self.config.steps), desc="self-distillation", disable=not progress, unit="step")
        try:
            for step in bar:
                self._step(next(items))
                if (step + 1) % interval == 0 or step + 1 == self.config.steps:
                    self._apply_scales()
                    error = force_rms(self.adapter, self.model, validation)
                    bar.set_postfix_str(f"force difference {error:.2f} meV/Å (from {before:.2f})")
                    if error < best:
                        best, kept = error, self._snapshot()
        finally:
            self._finish(kept)
        return before, force_rms(self.adapter, self.model, validation) if self.negligible else best

    def _finish(self, kept: Sequence[Tensor]) -> None:
        """Restore the best weights and scales, and the flags of a prepared model."""
        with torch.no_grad():
            for tensor, value in zip((*self.weights, *self.factors), kept, strict=True):
                tensor.requires_grad_(False)
                tensor.copy_(value)
                tensor.grad = None
            self._apply_scales()
        for name, quantizer in self.negligible.items():
            quantizer.enabled = True
            quantizer.refresh_scale(self.parameters[name])
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(self.requires_grad[name])


def _shuffled(training: Sequence[Labelled], seed: int) -> Iterator[Labelled]:
    """Yield batches in random order without end; every batch comes once per pass."""
    generator = np.random.default_rng(seed)
    while True:
        yield from (training[index] for index in reversed(generator.permutation(len(training)).tolist()))
