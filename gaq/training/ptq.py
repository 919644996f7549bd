"""Post-training quantization: activation ranges, calibrated rounding, label-free self-distillation.

Plain rounding at 8 bits costs a well-trained potential some 15 % of its force error, and ruins it at 4. What
repairs it needs no reference data: the float model itself labels the calibration structures with its own
forces, and the rounded one is adjusted until it reproduces them.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from gaq.adapter import Adapter
from gaq.config.schema import QuantizationConfig
from gaq.model.state import exact_features
from gaq.quantizers.features import OBSERVER_DECAY
from gaq.quantizers.weights import gptq_round
from gaq.training.distillation import DistillationResult, distill, label
from gaq.training.sampling import choose

if TYPE_CHECKING:
    from ase import Atoms

__all__ = [
    "Sensitivity",
    "calibrate_weights",
    "gptq",
    "observe_ranges",
    "round_at_end",
    "sensitivity_scan",
]

logger = logging.getLogger(__name__)


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
    labelled = label(adapter, model, structures, 16)
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
