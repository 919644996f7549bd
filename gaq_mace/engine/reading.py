"""Matrices and quantizers of a MACE model's modules, as the engine reads them."""

from __future__ import annotations

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from torch import Tensor

from gaq.quantizers.features import FeatureQuantizer
from gaq_mace.layers import original_class

__all__ = [
    "Unsupported",
    "class_name",
    "input_quantizer_of",
    "inputs_of",
    "matrices_of",
    "multiplicity",
    "python_modules",
    "species_matrices_of",
]


class Unsupported(ValueError):
    """The engine cannot compute this model; the message names the part. The reference path can."""


def class_name(module: torch.nn.Module) -> str:
    """Name of the framework's class of a module, quantized or not."""
    return original_class(module).__name__


def multiplicity(irreps: o3.Irreps, what: str) -> int:
    """The one multiplicity of all irreps.

    Args:
        irreps: of a tensor.
        what: the tensor is, in the plural, for the error.

    Raises:
        Unsupported: if multiplicities differ.
    """
    counts = {mul for mul, _ in irreps}
    if len(counts) != 1:
        raise Unsupported(f"{what} have different multiplicities: {irreps}")
    return counts.pop()


def input_quantizer_of(module: torch.nn.Module) -> FeatureQuantizer | None:
    """Quantizer of a module's inputs; None where they are not rounded."""
    quantizer = getattr(module, "input_quantizer", None)
    return quantizer if isinstance(quantizer, FeatureQuantizer) else None


def matrices_of(
    linear: o3.Linear, weight: Tensor | None = None, scaled: bool = True, biased: bool = False
) -> dict[int, Tensor]:
    """Matrix of each output block of a linear layer, (sum of input multiplicities, output multiplicity), float64.

    Args:
        linear: the layer.
        weight: a tensor in the layout of the layer's weight, to read in its place.
        scaled: whether the normalisation of paths is multiplied in.
        biased: whether the caller reads the bias.

    Raises:
        Unsupported: if the layer has a bias that the caller does not read.
    """
    if linear.bias.numel() and not biased:
        raise Unsupported("a linear layer has a bias")
    blocks_of: dict[int, list[Tensor]] = {}
    offset = 0
    weight = (linear.weight if weight is None else weight).detach().double().flatten()
    for ins in linear.instructions:
        if ins.i_in < 0:  # the bias
            continue
        rows, columns = ins.path_shape
        block = weight[offset : offset + rows * columns].view(rows, columns)
        offset += rows * columns
        blocks_of.setdefault(ins.i_out, []).append(block * ins.path_weight if scaled else block)
    return {out: torch.cat(blocks) for out, blocks in blocks_of.items()}


def inputs_of(linear: o3.Linear) -> dict[int, list[int]]:
    """Input blocks of each output block of a linear layer, in the order of `matrices_of`."""
    inputs: dict[int, list[int]] = {}
    for ins in linear.instructions:
        if ins.i_in >= 0:  # not the bias
            inputs.setdefault(ins.i_out, []).append(ins.i_in)
    return inputs


def species_matrices_of(
    product: o3.FullyConnectedTensorProduct, weight: Tensor | None = None, scaled: bool = True
) -> dict[int, tuple[int, Tensor]]:
    """Matrices of a product with one-hot species, by output block.

    Returns:
        For each output block its input block, and the matrices (species, in, out), float64.

    Raises:
        Unsupported: if an output block has several input blocks.
    """
    matrices: dict[int, tuple[int, Tensor]] = {}
    offset = 0
    weight = (product.weight if weight is None else weight).detach().double().flatten()
    for ins in product.instructions:
        shape = tuple(ins.path_shape)
        l = product.irreps_out[ins.i_out].ir.l  # noqa: E741
        size = shape[0] * shape[1] * shape[2]
        factor = ins.path_weight / (2 * l + 1) ** 0.5 if scaled else 1.0
        block = weight[offset : offset + size].view(shape) * factor
        offset += size
        if ins.i_out in matrices:
            raise Unsupported("several input blocks of a species product share an output block")
        matrices[ins.i_out] = (ins.i_in1, block.permute(1, 0, 2).contiguous())
    return matrices


def python_modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """A module and its submodules, except scripted ones: those are e3nn's own, and nobody replaces parts of them."""
    return [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
