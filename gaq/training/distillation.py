"""Self-distillation without labels: a rounded model learns the forces of its float model.

The float weights beneath the rounding are trained (straight-through estimator). Scales stay: they are kept in bfloat16,
where the next value is 0.4 % away, and such a step moves the codes of the large weights by half a code at once.

It is a repair: it runs only where calibrated rounding leaves the forces further from the float model's than `TARGET`.
It ends where they are as near, and where they no longer come nearer.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gaq.adapter import Adapter
from gaq.checks.accuracy import ERROR_GROWTH, LOWEST_FLOAT_ERROR, difference_of_growth
from gaq.config.schema import DistillationConfig
from gaq.model.state import exact_features
from gaq.progress import Progress
from gaq.quantizers.weights import WeightQuantizer
from gaq.training.sampling import by_atoms, choose, first_atoms
from gaq.untyped import Batch, Document, Structure

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["TARGET", "DistillationResult", "Labelled", "distill", "force_rms", "label"]

logger = logging.getLogger(__name__)

TARGET = difference_of_growth(1.0 + (ERROR_GROWTH - 1.0) / 10.0) * LOWEST_FLOAT_ERROR
"""RMS force difference to the float model, relative to its RMS force, that is near enough: it makes the force error of
a very accurate model grow by a tenth of what the accuracy gate allows."""

VALIDATION_ATOMS = 768
"""Most atoms of the held-out structures together; the error of so many force components is known to 2 %."""

CHECK_INTERVAL = 10
"""Steps between two measurements on the held-out structures."""

LEAST_GAIN = 0.02
"""Gain, relative to the smallest error before, without which training returns to the best weights, at half the rate."""

HALVINGS = 8
"""Training ends where the learning rate would be halved once more."""

EVALUATION_ATOMS = 128
"""Atoms in a batch that is evaluated without second derivatives, through the reference path."""

ENERGY_WEIGHT = 0.1
"""Weight of the squared energy difference per atom (eV²) relative to that of the forces (eV²/Å²): forces dominate."""


@dataclass(frozen=True)
class DistillationResult:
    """Result of self-distillation.

    Attributes:
        before: RMS force difference to the float model, meV/Å, on the held-out structures.
        after: RMS force difference at the end, meV/Å, on the same structures; never larger.
        steps: optimiser steps taken; 0 where `before` met the target.
        structures: number of training structures that were labelled, without the held-out ones.
        target: RMS force difference that is near enough, meV/Å.
        slow: whether training ended before its last step because it had ceased to gain; see `HALVINGS`.
    """

    before: float
    after: float
    steps: int
    structures: int
    target: float
    slow: bool = False

    def describe(self) -> str:
        """What was done, in a line."""
        text = f"RMS force difference to the float model {_digits(self.before)} meV/Å after rounding"
        if self.steps == 0:
            relation = "within" if self.before <= self.target else "above"
            return f"{text}, {relation} the target of {_digits(self.target)}; no self-distillation"
        text = (
            f"{text}, {_digits(self.after)} after {self.steps} steps of self-distillation on {self.structures} "
            f"structures, target {_digits(self.target)}"
        )
        return f"{text}; ended, because more steps would gain too little" if self.slow else text


def _digits(value: float) -> str:
    """Three digits, without an exponent for large values."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


@dataclass
class Labelled:
    """A batch with the float model's energies (graphs,) in eV and forces (atoms, 3) in eV/Å."""

    batch: Batch
    energy: Tensor
    forces: Tensor


def label(adapter: Adapter, model: torch.nn.Module, structures: Sequence[Atoms], atoms: int) -> list[Labelled]:
    """Make batches of the structures, of at most so many atoms, with energies and forces of the unrounded model."""
    labelled = []
    with adapter.unquantized(model):
        for batch in adapter.batches(model, structures, atoms):
            energy, forces, _ = adapter.energy_and_forces(model, batch)
            labelled.append(Labelled(batch, energy.detach(), forces.detach()))
    return labelled


def force_rms(adapter: Adapter, model: torch.nn.Module, labelled: Sequence[Labelled]) -> float:
    """Return the RMS difference between a model's forces and the labels, meV/Å."""
    return _rms(adapter.energy_and_forces(model, item.batch)[1].detach() - item.forces for item in labelled)


def _rms(forces: Iterable[Tensor]) -> float:
    """Root mean square of forces in eV/Å, in meV/Å."""
    total, count = 0.0, 0
    for force in forces:
        total += float((force.double() ** 2).sum())
        count += force.numel()
    return 1000.0 * math.sqrt(total / max(count, 1))


def distill(
    adapter: Adapter,
    model: torch.nn.Module,
    structures: Sequence[Atoms],
    config: DistillationConfig,
    seed: int = 0,
    progress: bool = True,
    teacher: torch.nn.Module | None = None,
) -> DistillationResult:
    """Train weights until the rounded model reproduces the float model's forces.

    The loss is the squared difference to the float model's forces plus the weighted one of the energy per atom; no
    reference labels enter. Activations stay exact meanwhile: rounding at 16 bits is noise far below the fitted errors,
    and coarse activations would saturate, because their ranges were observed on weights that still change much. Weights
    whose rounding is ``negligible`` are not rounded either while they are trained.

    One structure in ten is held out. Where the forces on these are within `TARGET` at once, nothing is trained; where
    they come within it, training ends. Where they come no nearer it returns to the weights of the smallest error, at
    half the rate, at most `HALVINGS` times. Those weights are kept, the start's if no others were better.

    Args:
        adapter: adapter of the model's framework.
        model: a prepared model, not converted.
        structures: structures like those the model will be used on; a few hundred suffice.
        config: most steps, atoms of a batch, learning rate.
        seed: seed of the order of structures.
        progress: whether to show a progress bar.
        teacher: copy of the model with the original float weights, if calibrated rounding has changed those of `model`.

    Returns:
        The RMS force difference to the float model before and after, with all weights rounded.
    """
    chosen = choose(structures, config.max_structures, seed)
    held_out = max(1, len(chosen) // 10) if len(chosen) > 1 else 0
    # A copy, because labels are made as they are needed, when the weights have changed.
    source = copy.deepcopy(model) if teacher is None else teacher
    held = first_atoms(adapter, chosen[:held_out] or chosen, VALIDATION_ATOMS)
    validation = label(adapter, source, held, EVALUATION_ATOMS)
    target = TARGET * _rms(item.forces for item in validation)
    quantizers = adapter.weight_quantizers(model)
    parameters = dict(model.named_parameters())
    for name, quantizer in quantizers.items():
        if not quantizer.scale_is_fixed:
            quantizer.fix_scale(parameters[name])
    with exact_features(adapter.feature_quantizers(model).values()):
        before = force_rms(adapter, model, validation)
        if config.steps == 0 or before <= target:
            return DistillationResult(before, before, 0, 0, target)
        training = _Training(adapter, source, chosen[held_out:], config.batch_atoms, seed)
        descent = _Descent(adapter, model, quantizers, config)
        after, steps, slow = descent.run(training, validation, before, target, progress)
    return DistillationResult(before, after, steps, training.structures, target, slow)


def _announce(seconds: float, steps: int) -> None:
    """Say how long self-distillation may take, by the seconds of a step."""
    minutes = seconds * steps / 60.0
    logger.info("self-distillation: at most %d steps of about %.2g s, %.2g min in all", steps, seconds, minutes)


class _Training:
    """Batches in random order without end, each labelled when it is first drawn; every batch comes once per pass.

    Args:
        adapter: adapter of the model's framework.
        source: the float model.
        structures: to train on.
        atoms: most atoms of a batch.
        seed: seed of the order.

    Attributes:
        structures: number of structures that were labelled.
    """

    def __init__(
        self, adapter: Adapter, source: torch.nn.Module, structures: Sequence[Structure], atoms: int, seed: int
    ) -> None:
        self.adapter = adapter
        self.source = source
        self.atoms = atoms
        self.seed = seed
        self.groups = [list(structures[span]) for span in by_atoms(adapter.sizes(structures), atoms)]
        self.labelled: dict[int, list[Labelled]] = {}
        self.structures = 0

    def __iter__(self) -> Iterator[Labelled]:
        generator = np.random.default_rng(self.seed)
        while True:
            for index in reversed(generator.permutation(len(self.groups)).tolist()):
                if index not in self.labelled:
                    self.labelled[index] = label(self.adapter, self.source, self.groups[index], self.atoms)
                    self.structures += len(self.groups[index])
                # A model with several heads has a batch for each.
                yield from self.labelled[index]


class _Descent:
    """Optimizes weights in a distillation.

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
        self.requires_grad = {name: p.requires_grad for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        self.optimizer = torch.optim.Adam(self._groups(quantizers), betas=(0.9, 0.99))

    def _groups(self, quantizers: Mapping[str, WeightQuantizer]) -> list[Document]:
        """Parameter groups of weights, with their learning rates."""
        groups: list[Document] = []
        for quantizer, weight in zip(quantizers.values(), self.weights, strict=True):
            size = float(weight.detach().pow(2).mean().sqrt()) or 1.0
            # A code changes once its weight has moved by about a step, and steps double with every bit less.
            rate = self.config.learning_rate * 2.0 ** max(8 - quantizer.effective_bits, 0)
            groups.append({"params": [weight.requires_grad_(True)], "lr": rate * size})
        return groups

    def _snapshot(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.weights]

    def _put(self, values: Sequence[Tensor]) -> None:
        """Set the weights to those of `_snapshot`."""
        with torch.no_grad():
            for weight, value in zip(self.weights, values, strict=True):
                weight.copy_(value)

    def _step(self, item: Labelled) -> None:
        energy, forces, counts = self.adapter.energy_and_forces(self.model, item.batch, create_graph=True)
        force_error = ((forces - item.forces) ** 2).mean()
        energy_error = (((energy - item.energy) / counts) ** 2).mean()
        loss = force_error + ENERGY_WEIGHT * energy_error
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 10.0)
        self.optimizer.step()

    def run(
        self,
        training: Iterable[Labelled],
        validation: Sequence[Labelled],
        before: float,
        target: float,
        progress: bool,
    ) -> tuple[float, int, bool]:
        """Take steps until the target is met, or progress is slow, and keep the best weights, or those of the start.

        Args:
            training: batches without end.
            validation: batches that decide.
            before: RMS force difference at the start, meV/Å.
            target: RMS force difference at which to stop, meV/Å.
            progress: whether to show a progress bar with the remaining time.

        Returns:
            The RMS force difference at the end, meV/Å, the number of steps, and whether progress was slow.
        """
        start, start_steps = self._snapshot(), {name: q.fixed_step.clone() for name, q in self.negligible.items()}
        for quantizer in self.negligible.values():
            quantizer.enabled = False
        best = force_rms(self.adapter, self.model, validation) if self.negligible else before
        kept, taken, slow = start, 0, False
        gained, halvings, began = best, 0, 0.0
        items = iter(training)
        bar = Progress(self.config.steps, "self-distillation (at most)", shown=progress)
        try:
            for step in range(self.config.steps):
                self._step(next(items))
                taken = step + 1
                bar.advance()
                if step == 1:  # in the first one much is set up
                    _announce(time.perf_counter() - began, self.config.steps)
                began = time.perf_counter()
                if taken % CHECK_INTERVAL == 0 or taken == self.config.steps:
                    error = force_rms(self.adapter, self.model, validation)
                    bar.note(f"{_digits(error)} meV/Å (from {_digits(before)}, target {_digits(target)})")
                    if error < best:
                        best, kept = error, self._snapshot()
                    if error <= (1.0 - LEAST_GAIN) * gained:
                        gained = error
                    else:
                        halvings += 1
                        self._put(kept)
                        for group in self.optimizer.param_groups:
                            group["lr"] *= 0.5
                    slow = error > target and halvings > HALVINGS and taken < self.config.steps
                    if error <= target or slow:
                        break
        finally:
            bar.close()
            self._finish(kept)
        after = force_rms(self.adapter, self.model, validation) if self.negligible else best
        if not after <= before:
            # Training went well without the negligible rounding, which then cost more than training had gained.
            self._finish(start)
            for name, quantizer in self.negligible.items():
                quantizer.fix_scale(self.parameters[name], start_steps[name])
            after = before
        return after, taken, slow

    def _finish(self, kept: Sequence[Tensor]) -> None:
        """Restore the best weights, and the flags of a prepared model."""
        self._put(kept)
        for weight in self.weights:
            weight.requires_grad_(False)
            weight.grad = None
        for name, quantizer in self.negligible.items():
            quantizer.enabled = True
            quantizer.refresh_scale(self.parameters[name])
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(self.requires_grad[name])
