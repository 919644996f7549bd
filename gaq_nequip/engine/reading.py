"""Matrices, layouts and quantizers of a NequIP model's modules, as its program needs them.

In a program the features of an atom lie block after block, and within a block component after component, with the
channels side by side. A block begins where it begins in e3nn's layout, in which the components of a channel lie side by
side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from nequip.data import AtomicDataDict
from torch import Tensor

from gaq.kernels.recording import View
from gaq.model.state import is_kind
from gaq.quantizers.features import FeatureQuantizer
from gaq.untyped import AnyModule, Irreps
from gaq_nequip.engine.edges import Unsupported
from gaq_nequip.sites import class_name

__all__ = [
    "Block",
    "blocks_of",
    "by_component",
    "input_quantizer_of",
    "linear_matrices",
    "matrix_of",
    "self_connection_matrices",
    "type_features",
]


class Block(NamedTuple):
    """Features of one irrep.

    Attributes:
        start: offset within the row of an atom.
        channels: multiplicity.
        components: 2l + 1.
    """

    start: int
    channels: int
    components: int

    def view(self, width: int) -> View:
        """The block in features of a width."""
        return View(self.components, width, self.channels, self.start)


def blocks_of(irreps: Irreps) -> list[Block]:
    """Blocks of features.

    Raises:
        Unsupported: where an irrep has several blocks side by side, or none, so that other modules may divide the
            features otherwise.
    """
    if irreps != irreps.simplify():
        raise Unsupported(f"features {irreps} are not simplified")
    blocks, start = [], 0
    for channels, ir in irreps:
        blocks.append(Block(start, channels, ir.dim))
        start += channels * ir.dim
    return blocks


def by_component(features: Tensor, irreps: Irreps) -> Tensor:
    """Bring features (atoms, irreps.dim) from e3nn's layout into that of a program."""
    pieces = [
        features[:, b.start : b.start + b.channels * b.components]
        .reshape(-1, b.channels, b.components)
        .transpose(1, 2)
        .flatten(1)
        for b in blocks_of(irreps)
    ]
    return torch.cat(pieces, dim=1)


def _weight(module: AnyModule) -> Tensor:
    """Weight of a module as it multiplies by it, in float64: quantized where the module quantizes it."""
    quantizer = getattr(module, "weight_quantizer", None)
    weight: Tensor = module.weight if quantizer is None else quantizer(module.weight)
    return weight.detach().double().flatten()


Matrices = list[tuple[int, int, Tensor]]
"""Start of a block that is read, start of one that is written, and the matrix (..., in, out) in float64."""


def linear_matrices(linear: AnyModule) -> Matrices:
    """Matrices of an `e3nn.o3.Linear`.

    Raises:
        Unsupported: if it has a bias.
    """
    if linear.bias.numel():
        raise Unsupported("a linear layer has a bias")
    weight, offset = _weight(linear), 0
    read, written = blocks_of(linear.irreps_in), blocks_of(linear.irreps_out)
    matrices: Matrices = []
    for ins in linear.instructions:
        rows, columns = ins.path_shape
        matrix = weight[offset : offset + rows * columns].view(rows, columns) * ins.path_weight
        offset += rows * columns
        matrices.append((read[ins.i_in].start, written[ins.i_out].start, matrix))
    return matrices


def self_connection_matrices(product: AnyModule, attributes: Tensor) -> Matrices:
    """Matrices of a self-connection, one for each type, (types, in, out).

    Args:
        product: a `FullyConnectedTensorProduct` with the attributes of types, or what `gaq_nequip.freeze` made of it.
        attributes: of each type, (types, attributes).

    Raises:
        Unsupported: for another module.
    """
    attributes = attributes.double()
    if hasattr(product, "gaq_folded"):
        weight = product.weight_quantizer(product.placeholder).double()
        folded = ((first, w, u, begin, start, size) for first, u, _, begin, w, start, size in product.paths)
        # The attributes are one-hot.
        return [
            (first, start, weight[begin : begin + size].view(u, product.types, w).transpose(0, 1))
            for first, w, u, begin, start, size in folded
        ]
    modes = {ins.connection_mode for ins in getattr(product, "instructions", ())}
    if class_name(product) != "FullyConnectedTensorProduct" or modes != {"uvw"}:
        raise Unsupported(f"the self-connection is a {class_name(product)}")
    if any(ir.l != 0 for _, ir in product.irreps_in2):
        raise Unsupported(f"types have attributes {product.irreps_in2}")
    weight, offset = _weight(product), 0
    read, written = blocks_of(product.irreps_in1), blocks_of(product.irreps_out)
    slices = product.irreps_in2.slices()
    matrices: Matrices = []
    for ins in product.instructions:
        u, v, w = ins.path_shape
        block = weight[offset : offset + u * v * w].view(u, v, w)
        offset += u * v * w
        to = written[ins.i_out]
        # The coupling of l with 0 to l is the identity over sqrt(2 l + 1).
        factor = float(ins.path_weight) / to.components**0.5
        matrix = torch.einsum("uvw,tv->tuw", block, attributes[:, slices[ins.i_in2]]) * factor
        matrices.append((read[ins.i_in1].start, to.start, matrix))
    return matrices


def matrix_of(layer: AnyModule) -> Tensor:
    """Matrix of a scalar layer, (in, out) in float64.

    Raises:
        Unsupported: for another module than NequIP's scalar layers without bias.
    """
    if class_name(layer) == "DeepLinearMLP":
        quantizers = getattr(layer, "weights_quantizers", None)
        weights: list[Tensor] = list(layer.weights)
        if quantizers is not None:
            # A frozen layer has no weights left; its packed weights need a tensor of the right dtype only.
            several = weights or [layer.alpha] * len(quantizers)
            weights = [q(w) for q, w in zip(quantizers, several, strict=True)]
        product = torch.linalg.multi_dot([w.detach().double() for w in weights])
        return product * layer.alpha.double()
    if class_name(layer) != "ScalarLinearLayer":
        raise Unsupported(f"there is a {class_name(layer)} among scalar layers")
    if layer.bias is not None:
        raise Unsupported("a scalar layer has a bias")
    return _weight(layer).view(layer.in_features, layer.out_features) * layer.alpha.double()


def type_features(embed: AnyModule) -> tuple[Tensor, Tensor]:
    """Features and attributes of each type before the first layer, (types, channels) each, in the model's dtype.

    Raises:
        Unsupported: if they depend on more than the type.
    """
    if class_name(embed) != "NodeTypeEmbed":
        raise Unsupported(f"types are embedded by a {class_name(embed)}")
    if embed.do_categorical_graph_field_embed:
        raise Unsupported("NodeTypeEmbed embeds properties of structures (categorical_graph_field_embed)")
    if not embed.set_features:
        raise Unsupported("NodeTypeEmbed gives attributes but no features")
    with torch.no_grad():
        data = embed({AtomicDataDict.ATOM_TYPE_KEY: torch.arange(embed.num_types)})
    return data[AtomicDataDict.NODE_FEATURES_KEY], data[AtomicDataDict.NODE_ATTRS_KEY]


def input_quantizer_of(module: AnyModule) -> FeatureQuantizer | None:
    """Quantizer of a module's inputs; None where they are not rounded.

    Raises:
        Unsupported: for a quantizer of another kind.
    """
    quantizer = getattr(module, "input_quantizer", None)
    if quantizer is None or isinstance(quantizer, torch.nn.Identity):
        return None
    if not is_kind(quantizer, FeatureQuantizer):
        raise Unsupported(f"features are rounded by a {class_name(quantizer)}")
    return quantizer
