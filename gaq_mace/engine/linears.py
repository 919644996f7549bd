"""Linear layers of a model, as the engine's layers hold them."""

from __future__ import annotations

from typing import NamedTuple

from gaq.untyped import AnyModule
from gaq_mace.engine.layouts import Rounder

__all__ = ["LinearLayer", "Mixing"]


class LinearLayer(NamedTuple):
    """A linear layer or product with species of the model, whose matrices a `Layer` holds.

    Attributes:
        name: of the matrices in the layer; each output block's is ``{name}_{block}``.
        path: of the module in the model.
        module: of the model.
        divisor: number by which the layer divides the matrices.
        reads_features: whether the module reads the node features of the layer before as they are, which are rounded
            at the output of that layer.
    """

    name: str
    path: str
    module: AnyModule
    divisor: float = 1.0
    reads_features: bool = False


class Mixing(NamedTuple):
    """A linear layer whose output blocks have at most one input block each.

    Attributes:
        name: of its matrices; see `LinearLayer`.
        inputs: input block of each output block that has one.
        rows_in: rows of the input blocks.
        rows_out: rows of the output blocks.
        channels: multiplicities of the output blocks.
        round: rounding of its inputs.
    """

    name: str
    inputs: dict[int, int]
    rows_in: list[slice]
    rows_out: list[slice]
    channels: list[int]
    round: Rounder
