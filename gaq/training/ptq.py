"""Post-training quantization: activation ranges, calibrated rounding, label-free self-distillation.

Plain rounding at 8 bits costs a well-trained potential some 15 % of its force error, and ruins it at 4. What
repairs it needs no reference data: the float model itself labels the calibration structures with its own
forces, and the rounded one is adjusted until it reproduces them.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gaq.adapter import Adapter
from gaq.config.schema import DistillationConfig, QuantizationConfig
from gaq.model.state import exact_features
from gaq.quantizers.features import OBSERVER_DECAY
from gaq.quantizers.weights import WeightQuantizer, gptq_round

if TYPE_CHECKING:
    from ase import Atoms

__all__ = [
    "DistillationResult",
    "Sensitivity",
    "calibrate_weights",
    "distill",
    "gptq",
    "observe_ranges",
    "round_at_end",
    "sensitivity_scan",
]

logger = logging.getLogger(__name__)

ENERGY_WEIGHT = 0.1
"""Of the squared energy difference per atom (eV²) beside that of the forces (eV²/Å²): forces decide."""


def choose(structures: Sequence[Any], count: int, seed: int) -> list[Any]:
    """At most `count` of the structures, drawn without replacement."""
    order = np.random.default_rng(seed).permutation(len(structures))[:count]
    return [structures[int(i)] for i in order]


def observe_ranges(adapter: Adapter, model: torch.nn.Module, structures: Sequence[Atoms], batch_size: int = 8) -> None:
    """Set the activation ranges to the largest sizes met in the structures.

    Features are observed exact, weights as they are rounded.
    """
    quantizers = adapter.feature_quantizers(model).values()
    if not quantizers:
        return
    with exact_features(quantizers):
        for q in quantizers:
            q.start_observing()
        for batch in adapter.batches(model, structures, batch_size):
            adapter.energy_and_forces(model, batch)
    for q in quantizers:
        q.observing = False
        q.decay = OBSERVER_DECAY


def gptq(adapter: Adapter, model: torch.nn.Module, structures: Sequence[Atoms], batch_size: int = 8) -> int:
    """Replace nearest rounding by rounding that keeps each layer's outputs (`gptq_round`), in place.

    Layers whose inputs are not those of a matrix (symmetric contractions) keep nearest rounding.

    Returns:
        Number of weight blocks rounded this way.
    """
    moments = adapter.input_moments(model, adapter.batches(model, structures, batch_size))
    parameters = dict(model.named_parameters())
    done = 0
    for name, quantizer in adapter.weight_quantizers(model).items():
        weight = parameters[name]
        quantizer.fix_scale(weight)
        step = quantizer.spread(quantizer.current_scale(weight)).detach()
        flat = weight.data.reshape(-1)
        for block, moment in zip(quantizer.layout.blocks, moments.get(name, []), strict=False):
            if moment is None or block.input_axis != 0:
                continue
            span = slice(block.offset, block.offset + block.numel)
            rows = block.shape[0]
            columns = flat[span].view(rows, -1)
            steps = step[span].view(rows, -1)
            groups = moment.shape[0] if moment.dim() == 3 else 1
            # A block over (inputs, species, outputs) is one matrix a species.
            for g in range(groups):
                hessian = moment[g] if moment.dim() == 3 else moment
                pick = columns.view(rows, groups, -1)[:, g]
                sizes = steps.view(rows, groups, -1)[:, g]
                codes = gptq_round(pick, hessian, sizes, quantizer.bits)
                pick.copy_(codes.to(pick) * sizes)
                done += 1
    return done


@dataclass(frozen=True)
class DistillationResult:
    """How far self-distillation came.

    Attributes:
        before: RMS force difference to the float model, meV/Å, on the held-out structures.
        after: the same at the end.
        steps: optimiser steps taken.
        structures: structures that served as input, without the held-out ones.
    """

    before: float
    after: float
    steps: int
    structures: int


@dataclass
class _Labelled:
    batch: Any
    energy: Tensor
    forces: Tensor


def _label(adapter: Adapter, model: torch.nn.Module, structures: Sequence[Atoms], batch_size: int) -> list[_Labelled]:
    labelled = []
    with adapter.unquantized(model):
        for batch in adapter.batches(model, structures, batch_size):
            energy, forces, _ = adapter.energy_and_forces(model, batch)
            labelled.append(_Labelled(batch, energy.detach(), forces.detach()))
    return labelled


def _force_rms(adapter: Adapter, model: torch.nn.Module, labelled: Sequence[_Labelled]) -> float:
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
    """Adjust rounding and scales until the rounded model reproduces the float model's forces.

    The float weights stay underneath the rounding (straight-through estimator) and move; scales are
    learned with them (Esser et al. 2020, LSQ, arXiv 1902.08153). The loss is the squared difference to the
    float model's forces plus that of the energy per atom; no reference labels enter. Activations are left exact
    meanwhile: those of 16 bits are noise far below what is fitted, and the ranges of coarse ones, observed on weights
    that are still far off, would saturate. Weights whose rounding is ``negligible`` are left exact too while they move.

    The best weights, judged on one structure in ten that is held out, are kept.

    Args:
        adapter: of the model's framework.
        model: prepared and not yet converted.
        structures: what the model is to be used on, more or less; a few hundred serve well.
        config: steps, batch size, learning rate.
        seed: of the order of structures.
        progress: whether to show a bar.
        teacher: a copy of the model whose float weights are still the original ones, where those of
            `model` are not (after calibrated rounding).

    Returns:
        The RMS force difference to the float model before and after, all weights rounded.
    """
    chosen = choose(structures, config.max_structures, seed)
    held = max(1, len(chosen) // 10) if len(chosen) > 1 else 0
    source = model if teacher is None else teacher
    training = _label(adapter, source, chosen[held:], config.batch_size)
    validation = _label(adapter, source, chosen[:held] or chosen, 16)
    quantizers = adapter.weight_quantizers(model)
    parameters = dict(model.named_parameters())
    for name, quantizer in quantizers.items():
        if not quantizer.scale_is_fixed:
            quantizer.fix_scale(parameters[name])
    with exact_features(adapter.feature_quantizers(model).values()):
        before, after = _descend(adapter, model, quantizers, training, validation, config, seed, progress)
    return DistillationResult(before, after, config.steps, len(chosen) - held)


def _descend(
    adapter: Adapter,
    model: torch.nn.Module,
    quantizers: Mapping[str, WeightQuantizer],
    training: Sequence[_Labelled],
    validation: Sequence[_Labelled],
    config: DistillationConfig,
    seed: int,
    progress: bool,
) -> tuple[float, float]:
    """The steps of `distill`; returns the RMS force difference before and after them."""
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in quantizers]
    negligible = {name: q for name, q in quantizers.items() if q.negligible and q.enabled}
    learned = {name: q for name, q in quantizers.items() if name not in negligible}
    # Each scale is learned relative to where it starts, ``start * factor / typical``: where channels differ by
    # orders of magnitude, a step that suits the large ones would take the small ones through zero, for good.
    starts = [q.fixed_step.detach().clone() for q in learned.values()]
    typical = [float(start.mean()) for start in starts]
    factors = [torch.full_like(start, mean).requires_grad_(True) for start, mean in zip(starts, typical, strict=True)]
    requires = {name: p.requires_grad for name, p in parameters.items()}
    for p in parameters.values():
        p.requires_grad_(False)
    groups = []
    rates = {}
    for (name, quantizer), weight in zip(quantizers.items(), weights, strict=True):
        size = float(weight.detach().pow(2).mean().sqrt()) or 1.0
        # A code changes when its weight has moved by about a step, and steps double with every bit less.
        rates[name] = config.learning_rate * 2.0 ** max(8 - quantizer.effective_bits, 0)
        groups.append({"params": [weight.requires_grad_(True)], "lr": rates[name] * size})
    for name, factor, mean in zip(learned, factors, typical, strict=True):
        groups.append({"params": [factor], "lr": 0.1 * rates[name] * mean})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(config.steps, 1), eta_min=0.0)

    def apply_scales() -> None:
        for quantizer, start, factor, mean in zip(learned.values(), starts, factors, typical, strict=True):
            quantizer.fixed_step = start * (factor / mean)

    def snapshot() -> list[Tensor]:
        return [t.detach().clone() for t in (*weights, *factors)]

    before = _force_rms(adapter, model, validation)
    for quantizer in negligible.values():
        quantizer.enabled = False
    best = _force_rms(adapter, model, validation) if negligible else before
    kept = snapshot()
    generator = np.random.default_rng(seed)
    order: list[int] = []
    interval = max(20, config.steps // 10)
    bar = tqdm(range(config.steps), desc="self-distillation", disable=not progress, unit="step")
    try:
        for step in bar:
            if not order:
                order = generator.permutation(len(training)).tolist()
            item = training[order.pop()]
            apply_scales()
            energy, forces, counts = adapter.energy_and_forces(model, item.batch, create_graph=True)
            force_error = ((forces - item.forces) ** 2).mean()
            energy_error = (((energy - item.energy) / counts) ** 2).mean()
            loss = force_error + ENERGY_WEIGHT * energy_error
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*weights, *factors], 10.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % interval == 0 or step + 1 == config.steps:
                apply_scales()
                error = _force_rms(adapter, model, validation)
                bar.set_postfix_str(f"force difference {error:.2f} meV/Å (from {before:.2f})")
                if error < best:
                    best, kept = error, snapshot()
    finally:
        with torch.no_grad():
            for tensor, value in zip((*weights, *factors), kept, strict=True):
                tensor.requires_grad_(False)
                tensor.copy_(value)
                tensor.grad = None
            apply_scales()
        for name, quantizer in negligible.items():
            quantizer.enabled = True
            quantizer.refresh_scale(parameters[name])
        for name, p in parameters.items():
            p.requires_grad_(requires[name])
    return before, _force_rms(adapter, model, validation) if negligible else best


def calibrate_weights(
    adapter: Adapter, model: torch.nn.Module, structures: Sequence[Any], config: QuantizationConfig, progress: bool
) -> DistillationResult | None:
    """Calibrated rounding and self-distillation of the weights, as far as a configuration asks for them.

    Args:
        adapter: of the model's framework.
        model: prepared and not yet converted.
        structures: whatever the adapter makes batches of.
        config: of the model.
        progress: whether to show a bar.

    Returns:
        How far self-distillation came; None if there was none.
    """
    if config.weights.bits is None:
        return None
    calibrated = config.weights.rounding == "gptq"
    distilled = config.distillation.steps > 0
    # The labels have to come from the float weights, before any of them is moved.
    teacher = copy.deepcopy(model) if calibrated and distilled else None
    if calibrated:
        sample = choose(structures, config.calibration.frames, config.calibration.seed)
        blocks = gptq(adapter, model, sample)
        logger.info("calibrated rounding of %d weight blocks", blocks)
    if not distilled:
        return None
    return distill(adapter, model, structures, config.distillation, config.calibration.seed, progress, teacher=teacher)


def round_at_end(
    adapter: Adapter, model: torch.nn.Module, structures: Sequence[Any], config: QuantizationConfig
) -> list[str]:
    """`calibrate_weights` of weights that were trained in float; the scales they end with are held afterwards.

    Processes that train together all do the same, and end with the weights of the first.

    Returns:
        Lines for the log.
    """
    start = time.perf_counter()
    quantizers = adapter.weight_quantizers(model)
    for quantizer in quantizers.values():
        quantizer.scale_is_fixed = False
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not shared or torch.distributed.get_rank() == 0
    result = calibrate_weights(adapter, model, structures, config, progress=first)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, quantizer in quantizers.items():
            if quantizer.scale_is_fixed:
                quantizer.adopt_scale(parameters[name])
            if shared:
                torch.distributed.broadcast(parameters[name].data, src=0)
                torch.distributed.broadcast(quantizer.range_ratio, src=0)
        # Afterwards: the scale of one weight may depend on another, an embedding.
        for name, quantizer in quantizers.items():
            quantizer.refresh_scale(parameters[name])
    if result is None:
        return []
    return [
        f"Weights rounded: RMS force difference to the float model {result.before:.2f} meV/Å after calibrated "
        f"rounding, {result.after:.2f} after {result.steps} steps of self-distillation on {result.structures} training "
        f"structures ({time.perf_counter() - start:.0f} s, no labels; the float model: as trained)"
    ]


@dataclass(frozen=True)
class Sensitivity:
    """What rounding one tensor alone costs.

    Attributes:
        parameter: its name.
        bits: tried.
        numel: number of weights.
        force_difference: mean absolute force difference to the float model, meV/Å.
        deserves_16_bits: whether it is among the few that cause much for few bytes.
    """

    parameter: str
    bits: int
    numel: int
    force_difference: float
    deserves_16_bits: bool


@torch.no_grad()
def _set_enabled(quantizers: dict[str, Any], only: str | None) -> None:
    for name, quantizer in quantizers.items():
        quantizer.enabled = only is None or name == only


def sensitivity_scan(
    adapter: Adapter,
    model: torch.nn.Module,
    structures: Sequence[Atoms],
    share: float = 0.03,
    progress: bool = True,
) -> list[Sensitivity]:
    """Round one tensor at a time and measure the forces: which tensors deserve 16 bits.

    A tensor deserves them if it is among the costliest per byte and all such together make up at most
    `share` of the weights.

    Args:
        adapter: of the model's framework.
        model: prepared and not yet converted.
        structures: a handful.
        share: of all weights that may be given 16 bits.
        progress: whether to show a bar.

    Returns:
        One entry a tensor, the costliest first.
    """
    quantizers = adapter.weight_quantizers(model)
    parameters = dict(model.named_parameters())
    labelled = _label(adapter, model, structures, 16)
    costs = {}
    with exact_features(adapter.feature_quantizers(model).values()):
        for name in tqdm(quantizers, desc="sensitivity", disable=not progress, unit="tensor"):
            _set_enabled(quantizers, name)
            total, count = 0.0, 0
            for item in labelled:
                with torch.enable_grad():
                    _, forces, _ = adapter.energy_and_forces(model, item.batch)
                total += float((forces.detach() - item.forces).abs().sum())
                count += forces.numel()
            costs[name] = 1000.0 * total / count
    _set_enabled(quantizers, None)
    numel = {name: parameters[name].numel() for name in quantizers}
    allowance = share * sum(numel.values())
    deserving = set()
    for name in sorted(costs, key=lambda n: costs[n] ** 2 / numel[n], reverse=True):
        if numel[name] > allowance:
            break
        deserving.add(name)
        allowance -= numel[name]
    return [
        Sensitivity(name, quantizers[name].bits, numel[name], costs[name], name in deserving)
        for name in sorted(costs, key=lambda n: costs[n], reverse=True)
    ]
