"""Edges of a step, as the engine's layers read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gaq.kernels import convolution
from gaq_mace.engine.ghosts import Senders

__all__ = ["EdgeFeatures", "Edges", "Tables"]

Tables = tuple[Tensor, "Tensor | None"]
"""Tables of a layer's radial weights, (pairs * paths, intervals, COEFFICIENTS, channels), and of its edge density where
it has one, (pairs, intervals, COEFFICIENTS, 1); see `gaq.kernels.radial`."""


@dataclass(frozen=True)
class EdgeFeatures:
    """Inputs of radial networks that are evaluated for each edge.

    Attributes:
        radial: radial basis, (edges, basis).
        cutoff: cutoff function where MACE applies it after the network, (edges, 1); None where the basis contains it.
        inside: 1 within the cutoff and 0 beyond, (edges, 1).
        sender: species of the senders, (edges,).
        receiver: species of the receivers, (edges,).
        alike: whether all atoms of a species enter the first layer with the same features.
    """

    radial: Tensor
    cutoff: Tensor | None
    inside: Tensor
    sender: Tensor
    receiver: Tensor
    alike: bool


@dataclass(frozen=True)
class Edges:
    """Edges of a step.

    Attributes:
        graph: senders and receivers.
        vectors: (edges, 3) in Å; where radial tables are over the transformed distance (`RadialTables.transformed`),
            of that length.
        tables: radial tables of the layer; None where its radial network is evaluated for each edge.
        features: inputs of radial networks; None where no layer reads them.
        cutoff: cutoff function where the tables do not contain it, (edges, 1).
        senders: where the features of senders come from on a part of space; None where all atoms are local.
    """

    graph: convolution.Graph
    vectors: Tensor
    tables: Tables | None
    features: EdgeFeatures | None
    cutoff: Tensor | None = None
    senders: Senders | None = None
