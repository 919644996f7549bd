"""Post-training quantization: activation ranges, calibrated rounding, label-free self-distillation.

Plain rounding at 8 bits raises the force error of a well-trained potential by some 15 %; at 4 bits it makes the
potential useless. The repair needs no reference data: the float model labels the calibration structures with its
forces, and the rounded model is trained to reproduce them.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gaq.adapter import Adapter
from gaq.checks import structures as structure_checks
from gaq.checks.errors import spaced
from gaq.config.schema import QuantizationConfig
from gaq.model.state import exact_features
from gaq.progress import progress_over
from gaq.quantizers.features import OBSERVER_DECAY
from gaq.quantizers.weights import WeightQuantizer, gptq_round
from gaq.training.distillation import EVALUATION_ATOMS, DistillationResult, distill, label
from gaq.training.sampling import choose, first_atoms
from gaq.untyped import Structure

if TYPE_CHECKING:
    from ase import Atoms

__all__ = [
    "Sensitivity",
    "away_from_rest",
    "calibrate_weights",
    "check_interacting",
    "check_weights",
    "gptq",
    "observe_ranges",
    "round_at_end",
    "sensitivity_scan",
]

logger = logging.getLogger(__name__)


RANGE_ATOMS = 128
"""Atoms in a batch where ranges and moments are observed: it runs through the reference path, which holds the features
of every edge."""

MOMENT_ATOMS = 768
"""Most atoms whose inputs calibrated rounding sees: more make no difference."""


def check_interacting(adapter: Adapter, model: torch.nn.Module, structures: Sequence[Atoms]) -> None:
    """Refuse structures that have no atoms within the cutoff of each other: all forces on them are exactly zero.

    Evaluates one structure after the other until there is a force, so usually one.

    Raises:
        ValueError: if there is no force.
    """
    potential = adapter.potential(model)
    if not any(forces.any() for structure in structures for forces in potential([structure])[1]):
        raise ValueError(
            "the forces of the model are zero on all structures, because no two atoms are within its cutoff of each "
            "other: nothing can be calibrated or measured on them. Give structures like those that the model will be "
            "used on."
        )


def away_from_rest(adapter: Adapter, model: torch.nn.Module, structures: Sequence[Atoms], seed: int) -> Sequence[Atoms]:
    """Displace structures that are all at rest: at most four of them are looked at.

    Among others, some at rest do no harm.
    """
    few = spaced(structures, 4)
    displaced, _ = structure_checks.away_from_rest(adapter.potential(model), few, seed)
    if any(new is old for new, old in zip(displaced, few, strict=True)):
        return structures
    logger.warning(
        "the calibration structures are at rest, where nothing can be learned from forces: their atoms are displaced "
        f"at random by {structure_checks.RATTLE} Å"
    )
    return structure_checks.rattled(structures, seed)


def check_weights(parameters: Mapping[str, Tensor], structures: Iterable[Mapping[str, object]]) -> None:
    """Refuse weights that are not finite: they stay so, and no rounding of them means anything.

    Args:
        parameters: of a model in training.
        structures: training structures as mappings; they are looked through for the reason if weights are not finite.

    Raises:
        ValueError: naming a weight, and the first training structure with a value that is not finite.
    """
    broken = [name for name, parameter in parameters.items() if not bool(torch.isfinite(parameter).all())]
    if not broken:
        return
    values = ((n, key, value) for n, structure in enumerate(structures) for key, value in structure.items())
    reason = next(
        (
            f"training structure {n} has {key} that are NaN or infinite: leave it out, or its label"
            for n, key, value in values
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
        ),
        "the training structures are finite, so the learning rate may be too high",
    )
    others = f" and {len(broken) - 1} others" if len(broken) > 1 else ""
    raise ValueError(f"the weights {broken[0]}{others} have become NaN or infinite in training; {reason}.")


def observe_ranges(
    adapter: Adapter,
    model: torch.nn.Module,
    structures: Sequence[Atoms],
    atoms: int = RANGE_ATOMS,
    progress: bool = False,
) -> None:
    """Set the activation ranges to the largest sizes observed on the structures.

    Features are not rounded meanwhile; weights are. Where all ranges are those of the atom at hand, nothing is run.

    Args:
        adapter: adapter of the model's framework.
        model: a prepared model, not converted.
        structures: structures like those the model will be used on.
        atoms: most atoms of a batch.
        progress: whether to show a progress bar.
    """
    quantizers = adapter.feature_quantizers(model).values()
    if not any(q.needs_ranges for q in quantizers):
        return
    with exact_features(quantizers):
        for q in quantizers:
            q.start_observing()
        batches = adapter.batches(model, structures, atoms)
        for batch in progress_over(batches, len(batches), "ranges of features", "batch", progress):
            adapter.energy_and_forces(model, batch)
    for q in quantizers:
        q.observing = False
        q.decay = OBSERVER_DECAY


def gptq(
    adapter: Adapter,
    model: torch.nn.Module,
    structures: Sequence[Atoms],
    atoms: int = RANGE_ATOMS,
    progress: bool = False,
) -> int:
    """Round weights so that each layer's outputs change least (`gptq_round`), in place.

    Layers that are not a matrix product of their inputs (symmetric contractions) keep nearest rounding, and so do
    matrices of species that the structures lack.

    Returns:
        Number of weight blocks rounded this way.
    """
    batches = adapter.batches(model, structures, atoms)
    moments = adapter.input_moments(model, progress_over(batches, len(batches), "inputs of layers", "batch", progress))
    parameters = dict(model.named_parameters())
    rounded_blocks = 0
    quantizers = adapter.weight_quantizers(model)
    for name in progress_over(quantizers, len(quantizers), "calibrated rounding", "tensor", progress):
        quantizer = quantizers[name]
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
            # A block over (inputs, species, outputs) is one matrix per species.
            for g in range(groups):
                hessian = moment[g] if moment.dim() == 3 else moment
                if not bool(hessian.any()):
                    continue
                if not bool(torch.isfinite(hessian).all()):
                    raise ValueError(
                        f"the inputs of {name} are NaN or infinite on the calibration structures; leave out those with "
                        "positions that are NaN, two atoms at one place, or energies that the model gives as NaN."
                    )
                matrix = columns.view(rows, groups, -1)[:, g]
                matrix_steps = steps.view(rows, groups, -1)[:, g]
                codes = gptq_round(matrix, hessian, matrix_steps, quantizer.bits)
                matrix.copy_(codes.to(matrix) * matrix_steps)
                rounded_blocks += 1
    return rounded_blocks


def calibrate_weights(
    adapter: Adapter,
    model: torch.nn.Module,
    structures: Sequence[Structure],
    config: QuantizationConfig,
    progress: bool,
) -> DistillationResult | None:
    """Run calibrated rounding and self-distillation of the weights, as the configuration asks.

    Args:
        adapter: adapter of the model's framework.
        model: a prepared model, not converted.
        structures: structures in any form that the adapter makes batches of.
        config: configuration of the model.
        progress: whether to show a progress bar.

    Returns:
        The result of self-distillation; None if the configuration leaves it out.
    """
    if config.weights.bits is None:
        return None
    calibrated = config.weights.rounding == "gptq"
    distilled = config.distillation.steps > 0
    # Labels come from the float weights, so copy these before calibrated rounding changes them.
    teacher = copy.deepcopy(model) if calibrated and distilled else None
    if calibrated:
        sample = choose(structures, config.calibration.frames, config.calibration.seed)
        blocks = gptq(adapter, model, first_atoms(adapter, sample, MOMENT_ATOMS), progress=progress)
        logger.info("calibrated rounding of %d weight blocks", blocks)
    if not distilled:
        return None
    return distill(adapter, model, structures, config.distillation, config.calibration.seed, progress, teacher=teacher)


def round_at_end(
    adapter: Adapter, model: torch.nn.Module, structures: Sequence[Structure], config: QuantizationConfig
) -> list[str]:
    """Run `calibrate_weights` on weights that were trained in float, and hold the resulting scales.

    In distributed training every process runs the same steps and takes the weights of the first process.

    Returns:
        Lines for the log.
    """
    start = time.perf_counter()
    quantizers = adapter.weight_quantizers(model)
    for quantizer in quantizers.values():
        quantizer.scale_is_fixed = False
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    is_first = not distributed or torch.distributed.get_rank() == 0
    result = calibrate_weights(adapter, model, structures, config, progress=is_first)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, quantizer in quantizers.items():
            if quantizer.scale_is_fixed:
                quantizer.adopt_scale(parameters[name])
            if distributed:
                torch.distributed.broadcast(parameters[name].data, src=0)
                torch.distributed.broadcast(quantizer.range_ratio, src=0)
        # In a second loop, because the scale of a weight may depend on another weight, an embedding.
        for name, quantizer in quantizers.items():
            quantizer.refresh_scale(parameters[name])
    if result is None:
        return []
    return [f"Weights rounded: {result.describe()} ({time.perf_counter() - start:.0f} s, no labels)"]


@dataclass(frozen=True)
class Sensitivity:
    """Force error from rounding one tensor alone.

    Attributes:
        parameter: name of the tensor.
        bits: code width of the trial.
        numel: number of weights.
        force_difference: mean absolute force difference to the float model, meV/Å.
        deserves_16_bits: whether the tensor is among the few that cause much of the error with few bytes.
    """

    parameter: str
    bits: int
    numel: int
    force_difference: float
    deserves_16_bits: bool


def _set_enabled(quantizers: dict[str, WeightQuantizer], only: str | None) -> None:
    """Enable the quantizer named `only` and disable the others; None enables all."""
    for name, quantizer in quantizers.items():
        quantizer.enabled = only is None or name == only


def sensitivity_scan(
    adapter: Adapter,
    model: torch.nn.Module,
    structures: Sequence[Atoms],
    share: float = 0.03,
    progress: bool = True,
) -> list[Sensitivity]:
    """Round one tensor at a time and measure the force error, to find the tensors that deserve 16 bits.

    These are the tensors with the largest squared error per weight, as many as make up at most `share` of the weights.

    Args:
        adapter: adapter of the model's framework.
        model: a prepared model, not converted.
        structures: a few structures.
        share: largest fraction of all weights that may get 16 bits.
        progress: whether to show a progress bar.

    Returns:
        One entry per tensor, the largest error first.
    """
    quantizers = adapter.weight_quantizers(model)
    parameters = dict(model.named_parameters())
    labelled = label(adapter, model, structures, EVALUATION_ATOMS)
    costs = {}
    with exact_features(adapter.feature_quantizers(model).values()):
        for name in progress_over(quantizers, len(quantizers), "sensitivity", "tensor", progress):
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
