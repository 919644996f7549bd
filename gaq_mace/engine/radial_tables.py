"""Radial functions of a MACE layer as tables, for one pair of species or for several at once.

With ``distance_transform`` (Agnesi, Soft) the radial network reads a distance that is scaled by the covalent radii of
both atoms, so each pair of species has a table; otherwise one table serves all.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import ase.data
import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

from gaq.kernels import radial
from gaq.quantizers.features import FeatureQuantizer
from gaq_mace.layers import original_class

__all__ = ["Pair", "RadialTables", "Tables"]

Pair = tuple[int, int]
"""Numbers of two species."""
Tables = tuple[Tensor, "Tensor | None"]
"""Tables of a layer's radial weights, (pairs * paths, intervals, COEFFICIENTS, channels), and of its edge density where
it has one, (pairs, intervals, COEFFICIENTS, 1); see `gaq.kernels.radial`."""

AT_ONCE = 2**25
"""Bytes of radial weights that are evaluated at once: so many pairs go into one matrix product."""


class RadialTables:
    """Makes tables of one layer's radial weights, and of its edge density where it has one.

    Args:
        model: MACE model.
        block: interaction block of the layer.
        paths: of its convolution.
        channels: of every path.
        dtype: of the tables.

    Attributes:
        by_species: whether the functions depend on the species of both atoms.
        elements: number of species.
        intervals: of the tables of the weights, and of the density. It grows when a pair needs more.
        error: largest error of the tables made so far, relative to the largest value of the same function.

    Raises:
        ValueError: if the radial functions cannot be tabulated.
    """

    def __init__(self, model: Any, block: Any, paths: int, channels: int, dtype: torch.dtype) -> None:
        # Tables are made in float64, on the CPU for any device: that takes a few evaluations of the network.
        self.embedding = copy.deepcopy(model.radial_embedding).cpu().double()
        self.network = self._network(block.conv_tp_weights)
        density = getattr(block, "density_fn", None)
        self.density = None if density is None else self._network(density)
        self.shape = (paths, channels)
        self.r_max = float(model.r_max)
        self.dtype = dtype
        self.tolerance = radial.TOLERANCE if dtype == torch.float32 else radial.DOUBLE_TOLERANCE
        self.numbers = model.atomic_numbers.detach().cpu()
        self.elements = len(self.numbers)
        self.by_species = hasattr(model.radial_embedding, "distance_transform")
        self.functions: list[Callable[[Sequence[Pair], Tensor], Tensor]] = [self._weights]
        if self.density is not None:
            self.functions.append(self._densities)
        self.intervals = [radial.FEWEST] * len(self.functions)
        self.error = 0.0
        self._probe()

    @staticmethod
    def _network(network: Any) -> Any:
        """Copy a radial network in float64 to the CPU."""
        if original_class(network).__name__ != "FullyConnectedNet":
            raise ValueError(f"the radial network is a {original_class(network).__name__}")
        if any(isinstance(m, FeatureQuantizer) for m in network.modules()):
            raise ValueError("the hidden layers of the radial network are rounded")
        return copy.deepcopy(network).cpu().double()

    def _probe(self) -> None:
        """Find the number of intervals, so that a model that cannot be served is refused when the engine is made.

        The smallest and the largest atoms need the most intervals.
        """
        pairs = [(0, 0)]
        if self.by_species:
            radii = ase.data.covalent_radii[self.numbers.numpy()]
            smallest, largest = int(radii.argmin()), int(radii.argmax())
            lengths = torch.linspace(0.5, 0.99 * self.r_max, 16, dtype=torch.float64)
            both_orders = self._weights([(0, self.elements - 1), (self.elements - 1, 0)], lengths)
            if not torch.equal(*both_orders):
                raise ValueError("the radial functions tell sender from receiver")
            pairs = sorted({(smallest, smallest), (smallest, largest), (largest, largest)})
        self.make(pairs)

    def bytes_of_pair(self) -> int:
        """Memory that the tables of one pair take."""
        columns = (self.shape[0] * self.shape[1], 1)
        numbers = sum(n * c for n, c in zip(self.intervals, columns, strict=False))
        return numbers * radial.COEFFICIENTS * torch.finfo(self.dtype).bits // 8

    def _features(self, pairs: Sequence[Pair], lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inputs of the radial network, (pairs * n, basis), and the cutoff where MACE applies it after the network."""
        edges = torch.tensor(pairs).T.repeat_interleave(lengths.numel(), dim=1)
        attributes = torch.eye(self.elements, dtype=torch.float64)
        features: tuple[Tensor, Tensor | None] = self.embedding(
            lengths.repeat(len(pairs))[:, None], attributes, edges, self.numbers
        )
        return features

    def _weights(self, pairs: Sequence[Pair], lengths: Tensor) -> Tensor:
        """Radial weights of pairs of species at lengths (n,), (pairs, n, paths, channels)."""
        features, cutoff = self._features(pairs, lengths)
        weights: Tensor = self.network(features)
        if cutoff is not None:
            weights = weights * cutoff
        return weights.view(len(pairs), lengths.numel(), *self.shape)

    def _densities(self, pairs: Sequence[Pair], lengths: Tensor) -> Tensor:
        """Edge densities of pairs of species at lengths (n,), (pairs, n, 1, 1)."""
        assert self.density is not None
        features, cutoff = self._features(pairs, lengths)
        density = torch.tanh(self.density(features) ** 2)
        if cutoff is not None:
            density = density * cutoff
        return density.view(len(pairs), lengths.numel(), 1, 1)

    def make(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Tables of pairs of species: of the weights, and of the density where there is one.

        Returns:
            Each (pairs, paths, intervals, COEFFICIENTS, channels) on the CPU, with the numbers of `intervals`, which
            may have grown.

        Raises:
            ValueError: if the functions of a pair cannot be tabulated.
        """
        with torch.no_grad():
            return [self._make(part, pairs) for part in range(len(self.functions))]

    def _make(self, part: int, pairs: Sequence[Pair]) -> Tensor:
        """Tables of one kind."""
        columns = self.shape[0] * self.shape[1] if part == 0 else 1
        while True:
            intervals, tables = self.intervals[part], []
            at_once = max(1, AT_ONCE // (8 * (radial.COEFFICIENTS + 1) * intervals * columns))
            for begin in range(0, len(pairs), at_once):
                function = functools.partial(self.functions[part], pairs[begin : begin + at_once])
                table = radial.interpolate(function, self.r_max, intervals)
                finer = radial.finer(table, self.tolerance)
                if finer is not None:
                    self.intervals[part] = finer
                    break
                self.error = max(self.error, table.error)
                tables.append(table.coefficients.to(self.dtype))
            else:
                return torch.cat(tables)
