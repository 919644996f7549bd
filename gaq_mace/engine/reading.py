"""What the engine reads from the modules of a MACE model: their matrices, and which parts it refuses."""

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
    "identity_or",
    "inputs_of",
    "matrices_of",
    "multiplicity",
    "python_modules",
    "species_matrices_of",
]


class Unsupported(ValueError):
    """The engine cannot compute this model; the message says which part. The reference path can."""


def class_name(module: torch.nn.Module) -> str:
    return original_class(module).__name__


def multiplicity(irreps: o3.Irreps, what: str) -> int:
    counts = {mul for mul, _ in irreps}
    if len(counts) != 1:
        raise Unsupported(f"{what} have different multiplicities: {irreps}")
    return counts.pop()


def identity_or(module: torch.nn.Module) -> FeatureQuantizer | None:
    quantizer = getattr(module, "input_quantizer", None)
    return quantizer if isinstance(quantizer, FeatureQuantizer) else None


def matrices_of(linear: o3.Linear, weight: Tensor | None = None, scaled: bool = True) -> dict[int, Tensor]:
    """For each output block the matrix (sum of input multiplicities, output multiplicity) and, in order, its inputs.

    Args:
        linear: whose.
        weight: something else of the layout of its weight.
        scaled: whether the normalisation of paths is multiplied in.
    """
    if linear.bias.numel():
        raise Unsupported("a linear layer has a bias")
    found: dict[int, list[Tensor]] = {}
    offset = 0
    weight = (linear.weight if weight is None else weight).detach().double().flatten()
    for ins in linear.instructions:
        rows, columns = ins.path_shape
        block = weight[offset : offset + rows * columns].view(rows, columns)
        offset += rows * columns
        found.setdefault(ins.i_out, []).append(block * ins.path_weight if scaled else block)
    return {out: torch.cat(blocks) for out, blocks in found.items()}


def inputs_of(linear: o3.Linear) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for ins in linear.instructions:
        found.setdefault(ins.i_out, []).append(ins.i_in)
    return found


def species_matrices_of(
    product: o3.FullyConnectedTensorProduct, weight: Tensor | None = None, scaled: bool = True
) -> dict[int, tuple[int, Tensor]]:
    """For each output block its input block and the matrices (species, in, out) of a product with one-hot species."""
    found: dict[int, tuple[int, Tensor]] = {}
    offset = 0
    weight = (product.weight if weight is None else weight).detach().double().flatten()
    for ins in product.instructions:
        shape = tuple(ins.path_shape)
        l = product.irreps_out[ins.i_out].ir.l  # noqa: E741
        size = shape[0] * shape[1] * shape[2]
        factor = ins.path_weight / (2 * l + 1) ** 0.5 if scaled else 1.0
        block = weight[offset : offset + size].view(shape) * factor
        offset += size
        if ins.i_out in found:
            raise Unsupported("several input blocks of a species product share an output block")
        found[ins.i_out] = (ins.i_in1, block.permute(1, 0, 2).contiguous())
    return found


def python_modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """A module and those within, but the scripted ones: these are e3nn's code, and replaced as a whole if at all."""
    return [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
