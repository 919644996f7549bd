"""Linear layers computed from the integer codes of their weights (``GAQ_LINEAR=int8``): which layers, and how."""

from __future__ import annotations

from dataclasses import dataclass

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from torch import Tensor

from gaq import settings
from gaq.files.packing import PLANES_MAX
from gaq.kernels import linear
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import QuantizedTensor
from gaq.untyped import AnyModule
from gaq_mace.engine.linears import LinearLayer
from gaq_mace.engine.reading import input_quantizer_of, matrices_of, species_matrices_of

__all__ = ["Integers", "integer_linears", "through_integers"]


def integer_linears() -> bool:
    """Whether ``GAQ_LINEAR=int8`` asks for integer products in linear layers on a GPU."""
    return settings.current().linear == "int8"


@dataclass(frozen=True)
class Integers:
    """A matrix as `gaq.kernels.linear.linear` takes it.

    Attributes:
        codes: (in, out), int8.
        scale: (groups, out), float32.
        group_size: inputs that share a row of scales; 0 for all of them.
        top: largest code of the features that it is multiplied with.
    """

    codes: Tensor
    scale: Tensor
    group_size: int
    top: int

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, top: int, device: torch.device) -> Integers | None:
        """Make one from codes and the scale of each code, both (in, out); None where the operation cannot take them."""
        if float(codes.abs().max()) > 127:
            return None
        for size in (0, 128, 64, 32):
            groups = scales.split(size or scales.shape[0])
            if all(bool((group == group[0]).all()) for group in groups):
                scale = torch.stack([group[0] for group in groups])
                return cls(codes.to(device, torch.int8), scale.to(device, torch.float32), size, top)
        return None

    def __call__(self, x: Tensor) -> Tensor:
        return linear.linear(x, self.codes, self.scale, None, self.top, self.group_size)


def rounds_all(quantizer: FeatureQuantizer) -> bool:
    """Whether all inputs of a layer are rounded to 16 bits or more, so that rounding them again changes little."""
    if quantizer.scalar_top < PLANES_MAX or not quantizer.passes_through:
        return False
    return quantizer.round_scalars and (quantizer.round_vectors or all(d == 1 for d in quantizer.dimensions))


def through_integers(layers: torch.nn.ModuleList, model: AnyModule) -> None:
    """Let the engine's layers compute from integer codes where the model's codes and rounding allow it, in place."""
    from gaq_mace.weights import quantized_weights

    codes = quantized_weights(model)
    before: FeatureQuantizer | None = None
    layer: AnyModule  # a `Layer`; a ModuleList knows modules only
    for layer, product in zip(layers, model.products, strict=True):
        for part in layer.linears:
            quantizer = input_quantizer_of(part.module)
            if quantizer is None and part.reads_features:
                # Node features are rounded once, at the output of the previous layer.
                quantizer = before
            weight = codes.get(f"{part.path}.weight")
            if weight is not None and quantizer is not None and rounds_all(quantizer):
                _take_codes(layer, part, weight, int(quantizer.scalar_top))
        before = input_quantizer_of(product)


def _take_codes(layer: AnyModule, part: LinearLayer, weight: QuantizedTensor, top: int) -> None:
    """Let a layer compute the products of one module from integer codes, where the codes allow it.

    Args:
        layer: of the engine.
        part: the module, and how the layer holds its matrices.
        weight: codes and scales of the module's weight.
        top: largest code of its scalar inputs. Components of vectors take two planes: magnitudes have 16 bits at most.
    """
    index = weight.layout.scale_index(weight.granularity, weight.group_size)
    scales = weight.scale.double().cpu()[index] / part.divisor
    device = layer.contraction_coefficients.device
    tops = [top if ir.l == 0 else PLANES_MAX for _, ir in part.module.irreps_out]
    if isinstance(part.module, o3.TensorProduct):
        species_steps = species_matrices_of(part.module, scales)
        for out, (_, matrices) in species_matrices_of(part.module, weight.codes, scaled=False).items():
            for z, (matrix, step) in enumerate(zip(matrices, species_steps[out][1], strict=True)):
                layer.take(f"{part.name}_{out}.{z}", Integers.of(matrix, step, tops[out], device))
        return
    steps = matrices_of(part.module, scales)
    for out, matrix in matrices_of(part.module, weight.codes, scaled=False).items():
        layer.take(f"{part.name}_{out}", Integers.of(matrix, steps[out], tops[out], device))
