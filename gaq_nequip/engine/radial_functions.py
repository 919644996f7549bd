"""Radial networks of a NequIP model's layers as tables of their features, and their last layers.

The last layer is linear, so it is applied to the coefficients of the features' polynomials: a file can hold the
features alone, which are fewer than the weights of all paths. Where the cutoff differs by the types of both atoms,
there is a table for each cutoff. A function that ends at a cutoff is not smooth there, so every cutoff is the end of an
interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gaq.kernels import radial
from gaq.kernels.chunks import ChunkedConvolution
from gaq.untyped import AnyModule
from gaq_nequip.engine.edges import EdgePart, Embedding, Unsupported, before_last
from gaq_nequip.engine.reading import matrix_of

__all__ = ["Cutoffs", "RadialFunctions", "cutoffs_of", "radial_functions"]

FINEST = 256
"""Most intervals that are tried to make all cutoffs ends of one."""


@dataclass(frozen=True)
class Cutoffs:
    """Cutoffs of the pairs of types.

    Attributes:
        values: that occur, in Å.
        pairs: number of the cutoff of each pair, (senders, receivers), int64.
        unit: all cutoffs are ends of intervals if the number of intervals is a multiple of it.
    """

    values: tuple[float, ...]
    pairs: Tensor
    unit: int


def cutoffs_of(edge: EdgePart, types: int) -> Cutoffs:
    """Cutoffs of a model with a number of types.

    Raises:
        Unsupported: if no table with few intervals has ends at all cutoffs.
    """
    if edge.cutoffs is None:
        return Cutoffs((edge.r_max,), torch.zeros(types, types, dtype=torch.int64), 1)
    values, pairs = torch.unique(edge.cutoffs.T.contiguous(), return_inverse=True)
    for unit in range(1, FINEST + 1):
        ends = values * (unit / edge.r_max)
        if torch.allclose(ends, ends.round(), rtol=0, atol=1e-9):
            return Cutoffs(tuple(values.tolist()), pairs, unit)
    raise Unsupported(
        f"cutoffs by pair of types are no multiples of a part of {edge.r_max:g} Å: {values.tolist()} "
        "(per_edge_type_cutoff)"
    )


@dataclass(frozen=True)
class RadialFunctions:
    """Radial network of a layer.

    Attributes:
        tables: of the features before the last layer, for each cutoff, as polynomials of `gaq.kernels.radial`,
            (tables, intervals, COEFFICIENTS, features), float64.
        last: the last layer in the layout of the convolution, (paths, features, channels), float64.
        error: largest error of the radial weights, relative to the largest one.
    """

    tables: Tensor
    last: Tensor
    error: float

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Tables of the radial weights as a convolution reads them, (tables * paths, intervals, COEFFICIENTS,
        channels)."""
        weights = torch.einsum("tikf,pfc->tpikc", self.tables, self.last)
        return weights.flatten(0, 1).to(dtype).contiguous()


def radial_functions(
    network: AnyModule,
    chunked: ChunkedConvolution,
    edge: EdgePart,
    cutoffs: Cutoffs,
    dtype: torch.dtype,
    tolerance: float,
) -> RadialFunctions:
    """Tabulate the radial network of a layer.

    Args:
        network: layers of the network.
        chunked: convolution of the layer.
        edge: what gives the network its inputs.
        cutoffs: of the pairs of types.
        dtype: of the network.
        tolerance: bound of the error of the radial weights, relative to the largest one.

    Raises:
        Unsupported: for a network that cannot be tabulated.
    """
    embeddings = [Embedding(edge, cutoff) for cutoff in cutoffs.values]
    *_, layer = network.children()
    last = chunked.weights(matrix_of(layer), chunked.columns).transpose(0, 1).contiguous()

    def features(lengths: Tensor) -> Tensor:
        return torch.stack([before_last(network, of(lengths), dtype)[0] for of in embeddings])

    def multiple(intervals: int) -> int:
        return cutoffs.unit * math.ceil(intervals / cutoffs.unit)

    with torch.no_grad():
        intervals: int | None = multiple(radial.FEWEST)
        try:
            while intervals is not None:
                used = intervals
                table = radial.interpolate(features, edge.r_max, used, last)
                finer = radial.finer(table, tolerance)
                intervals = None if finer is None else multiple(finer)
        except ValueError as error:
            raise Unsupported(str(error)) from error
        tables = radial.interpolate(features, edge.r_max, used).coefficients
    return RadialFunctions(tables[:, 0], last, table.error)
