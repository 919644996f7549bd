"""Linear layers on the integer codes of their weights (``GAQ_LINEAR=int8``): which are taken so, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gaq import settings
from gaq.files.packing import PLANES_MAX
from gaq.kernels import linear
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import QuantizedTensor
from gaq_mace.engine.reading import identity_or, matrices_of, species_matrices_of

__all__ = ["Integers", "integer_linears", "through_integers"]


def integer_linears() -> bool:
    """Whether ``GAQ_LINEAR=int8`` asks for integer products of a model's linear layers on a GPU."""
    return settings.current().linear == "int8"


@dataclass(frozen=True)
class Integers:
    """A matrix as `gaq.kernels.linear.linear` takes it: codes (in, out), int8, and scales (groups, out)."""

    codes: Tensor
    scale: Tensor
    group_size: int

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, device: torch.device) -> Integers | None:
        """From codes and the scale of each of them, (in, out); None where the operation cannot take them."""
        if float(codes.abs().max()) > 127:
            return None
        for size in (0, 128, 64, 32):
            groups = scales.split(size or scales.shape[0])
            if all(bool((group == group[0]).all()) for group in groups):
                scale = torch.stack([group[0] for group in groups])
                return cls(codes.to(device, torch.int8), scale.to(device, torch.float32), size)
        return None

    def __call__(self, x: Tensor) -> Tensor:
        return linear.linear(x, self.codes, self.scale, None, True, self.group_size)


def rounds_all(quantizer: FeatureQuantizer | None) -> bool:
    """Whether all that enters a layer is rounded to 16 bits, so that doing so again changes little."""
    if quantizer is None or quantizer.scalar_top < PLANES_MAX or not quantizer.passes_through:
        return False
    return quantizer.round_scalars and (quantizer.round_vectors or all(d == 1 for d in quantizer.dimensions))


def through_integers(layers: torch.nn.ModuleList, model: Any) -> None:
    """Take the products of the engine's layers through integers where codes and roundings of the model allow it."""
    from gaq_mace.weights import quantized_weights

    codes = quantized_weights(model)
    before: FeatureQuantizer | None = None
    for number, own in enumerate(layers):
        layer: Any = own
        block, product = model.interactions[number], model.products[number]
        parts = (
            ("linear", f"interactions.{number}.linear", block.linear),
            ("up", f"interactions.{number}.linear_up", block.linear_up),
            ("skip", f"interactions.{number}.skip_tp", block.skip_tp),
            ("final", f"products.{number}.linear", product.linear),
        )
        for name, path, module in parts:
            reads = identity_or(module)
            if reads is None and (name == "up" or (name == "skip" and layer.residual)):
                # Node features are rounded once, where the layer before gives them out.
                reads = before
            weight = codes.get(f"{path}.weight")
            if weight is not None and rounds_all(reads):
                mean = name == "linear" and not hasattr(block, "density_fn")
                _give(layer, name, module, weight, float(block.avg_num_neighbors) if mean else 1.0)
        before = identity_or(product)


def _give(layer: Any, name: str, own: Any, found: QuantizedTensor, divisor: float) -> None:
    """Take the products of one of a layer's modules through integers where its codes allow it.

    Args:
        layer: of the engine.
        name: of its matrices here: ``linear``, ``up``, ``skip`` or ``final``.
        own: the module of the model.
        found: its codes.
        divisor: what the matrices are divided by.
    """
    index = found.layout.scale_index(found.granularity, found.group_size)
    scales = found.scale.double().cpu()[index] / divisor
    device = layer.contraction_coefficients.device
    if name == "skip":
        sizes = species_matrices_of(own, scales)
        for out, (_, every) in species_matrices_of(own, found.codes, scaled=False).items():
            for z, (matrix, size) in enumerate(zip(every, sizes[out][1], strict=True)):
                layer.take(f"skip_{out}.{z}", Integers.of(matrix, size, device))
        return
    steps = matrices_of(own, scales)
    for out, matrix in matrices_of(own, found.codes, scaled=False).items():
        layer.take(f"{name}_{out}", Integers.of(matrix, steps[out], device))
