"""What a NequIP model computes on edges before its convolutions, as functions of their lengths and directions.

The fused convolution (`gaq_nequip.engine.fused`) needs the inputs of the radial networks at given lengths, these
networks without their last layer, and the spherical harmonics as polynomials. All of them come from the model's own
modules, in float64.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from nequip.data import AtomicDataDict
from torch import Tensor

from gaq.kernels import harmonics
from gaq.untyped import AnyModule
from gaq_nequip.sites import class_name

__all__ = ["EdgePart", "Embedding", "Unsupported", "before_last", "edge_part", "fit_harmonics", "layer_sequence"]


class Unsupported(ValueError):
    """The kernels cannot compute this block; the message says why. NequIP's own operations can."""


def _synthetic(vectors: Tensor) -> AtomicDataDict.Type:
    """Data of two atoms, joined by edges with the given vectors."""
    edges = vectors.shape[0]
    return {
        AtomicDataDict.POSITIONS_KEY: vectors.new_zeros(2, 3),
        AtomicDataDict.ATOM_TYPE_KEY: torch.tensor([0, 0]),
        AtomicDataDict.EDGE_INDEX_KEY: torch.tensor([[0], [1]]).expand(2, edges),
        AtomicDataDict.EDGE_VECTORS_KEY: vectors,
        AtomicDataDict.EDGE_LENGTH_KEY: vectors.norm(dim=-1),
    }


@dataclass(frozen=True)
class EdgePart:
    """Modules of a model that run on edges before the first convolution, in float64.

    Attributes:
        modules: in the order in which they run.
        harmonics: the module that makes the spherical harmonics.
        r_max: cutoff in Å.
        cutoffs: of pairs of types, (receivers, senders) in Å, where they differ; None otherwise.
    """

    modules: tuple[AnyModule, ...]
    harmonics: AnyModule
    r_max: float
    cutoffs: Tensor | None = None

    def run(self, vectors: Tensor) -> AtomicDataDict.Type:
        """Run the modules on edges with the given vectors."""
        data = _synthetic(vectors)
        for module in self.modules:
            data = module(data)
        return data


def layer_sequence(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose children are the convolution layers and what runs before and after them.

    Raises:
        Unsupported: if there is not one.
    """
    sequences = [m for m in model.modules() if any(class_name(c) == "ConvNetLayer" for c in m.children())]
    if len(sequences) != 1:
        raise Unsupported("there is not one sequence of convolution layers")
    return sequences[0]


def edge_part(model: torch.nn.Module, by_pair: bool = False) -> EdgePart:
    """Copy the modules that run on edges.

    Args:
        model: with convolution layers.
        by_pair: whether cutoffs may differ by pair of types. The copied modules then have the same one for all pairs.

    Raises:
        Unsupported: for modules that are not known, and cutoffs by pair of types unless they may differ.
    """
    modules: list[AnyModule] = []
    for child in layer_sequence(model).children():
        if class_name(child) == "ConvNetLayer":
            break
        if class_name(child) != "NodeTypeEmbed":
            modules.append(copy.deepcopy(child).double())
    known = ("SphericalHarmonicEdgeAttrs", "EdgeLengthNormalizer", "BesselEdgeLengthEncoding", "ApplyFactor")
    by_name: dict[str, AnyModule] = {}
    for module in modules:
        name = class_name(module)
        if name not in known or name in by_name:
            raise Unsupported(f"edges go through a {name}")
        by_name[name] = module
        if hasattr(module, "_output_dtype"):
            module._output_dtype = torch.float64
    missing = [name for name in known[:3] if name not in by_name]
    if missing:
        raise Unsupported(f"the model has no {missing[0]}")
    normalizer = by_name["EdgeLengthNormalizer"]
    r_max, cutoffs = float(normalizer.r_max), None
    if normalizer._per_edge_type:
        if not by_pair:
            raise Unsupported("cutoffs differ by the types of both atoms (per_edge_type_cutoff)")
        cutoffs = 1 / normalizer._rmax_recip.view(normalizer.num_types, -1)
        normalizer._per_edge_type, normalizer._rmax_recip = False, torch.tensor(1 / r_max, dtype=torch.float64)
    return EdgePart(tuple(modules), by_name["SphericalHarmonicEdgeAttrs"], r_max, cutoffs)


class Embedding(torch.nn.Module):
    """Inputs of the radial networks as a function of the edge length, in float64.

    Its numbers are buffers, because a frozen model has no parameters besides those that its file counts as weights.

    Args:
        edge: modules of the model.
        cutoff: of a pair of types in Å; None for that of the model.
    """

    def __init__(self, edge: EdgePart, cutoff: float | None = None) -> None:
        super().__init__()
        self.steps = torch.nn.ModuleList(copy.deepcopy(m) for m in edge.modules if m is not edge.harmonics)
        for module in self.steps:
            if class_name(module) == "EdgeLengthNormalizer" and cutoff is not None:
                module._rmax_recip = torch.tensor(1 / cutoff, dtype=torch.float64)
        for module in list(self.steps.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)

    def forward(self, lengths: Tensor) -> Tensor:
        """(edges,) in Å to (edges, basis)."""
        data = _synthetic(torch.stack([lengths, torch.zeros_like(lengths), torch.zeros_like(lengths)], dim=-1))
        # Not the norm of the vector, so that the lengths are what was asked for to the last bit.
        data[AtomicDataDict.EDGE_LENGTH_KEY] = lengths
        for module in self.steps:
            data = module(data)
        return data[AtomicDataDict.EDGE_EMBEDDING_KEY]


def fit_harmonics(attributes: AnyModule) -> list[Tensor]:
    """Coefficients of the spherical harmonics of a `SphericalHarmonicEdgeAttrs`.

    Raises:
        ValueError: if there is not one harmonic of each degree.
    """

    def function(directions: Tensor) -> Tensor:
        values: Tensor = attributes(_synthetic(directions))[attributes.out_field]
        return values

    degrees = [ir.l for _, ir in attributes.irreps_edge_sh]
    if degrees != list(range(len(degrees))):
        raise Unsupported(f"edge attributes {attributes.irreps_edge_sh}")
    return harmonics.fit(function, degrees[-1])


def before_last(network: torch.nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, AnyModule]:
    """Propagate the inputs of a radial network, (n, features) in float64, to its last layer.

    Args:
        network: in any dtype.
        x: its inputs.
        dtype: of the network.

    Returns:
        The inputs of the last layer, in float64, and that layer.

    Raises:
        Unsupported: for layers other than SiLU and unbiased linear ones, and where hidden layers are rounded.
    """
    *hidden, last = network.children()
    for layer in (*hidden, last):
        if class_name(layer) == "ScalarLinearLayer":
            if layer.bias is not None:
                raise Unsupported("the radial network has biases")
            if not isinstance(getattr(layer, "input_quantizer", torch.nn.Identity()), torch.nn.Identity):
                raise Unsupported("the hidden layers of the radial network are rounded")
        elif class_name(layer) != "SiLU" or layer is last:
            raise Unsupported(f"the radial network has a {class_name(layer)}")
    for layer in hidden:
        if class_name(layer) == "SiLU":
            x = torch.nn.functional.silu(x)
        else:
            # The layer knows how its weight is stored: on the identity it gives that weight.
            identity = torch.eye(x.shape[1], dtype=dtype, device=x.device)
            x = x @ layer(identity).double()
    return x, last
