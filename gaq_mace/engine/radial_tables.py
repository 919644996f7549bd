"""Radial functions of a MACE layer as tables: one table, or one for each pair of species where they depend on these.

With ``distance_transform`` (Agnesi, Soft) the radial network reads a distance that is scaled by the covalent radii of
both atoms. The table of a pair of species is made when the pair first occurs, so that a model of 89 elements has only
the tables that its structures need.
"""

from __future__ import annotations

import copy
import functools

import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

from gaq.caches import Cache
from gaq.kernels import radial
from gaq.quantizers.features import FeatureQuantizer
from gaq.untyped import AnyModule
from gaq_mace.layers import original_class

__all__ = ["JOINED", "PAIRS", "Knots", "RadialTables"]

PAIRS = 512
"""Pairs of species whose tables are kept, a few megabytes each. 31 species have 496 pairs."""
JOINED = 8
"""Sets of pairs whose tables are kept end to end, as the kernels read them."""

Pair = tuple[radial.RadialTable, "radial.RadialTable | None"]
"""Table of the weights, and table of the density where the layer has one."""
Knots = tuple[Tensor, "Tensor | None"]
"""Knots of a layer's radial tables, and of its density tables where it has a density."""


class RadialTables:
    """Tables of one layer's radial weights, and of its edge density where it has one.

    Args:
        model: MACE model.
        block: interaction block of the layer.
        paths: of its convolution.
        channels: of every path.
        tolerance: see `gaq.kernels.radial.tabulate`.

    Raises:
        ValueError: if the radial functions cannot be tabulated.
    """

    def __init__(self, model: AnyModule, block: AnyModule, paths: int, channels: int, tolerance: float) -> None:
        # Tables are made on the CPU for any device: that takes a few evaluations of the network in float64.
        self.embedding = copy.deepcopy(model.radial_embedding).cpu().double()
        self.network = self._network(block.conv_tp_weights)
        density = getattr(block, "density_fn", None)
        self.density = None if density is None else self._network(density)
        self.shape = (paths, channels)
        self.r_max = float(model.r_max)
        self.tolerance = tolerance
        self.numbers = model.atomic_numbers.detach().cpu()
        self.elements = len(self.numbers)
        self.by_species = hasattr(model.radial_embedding, "distance_transform")
        self.made: Cache[int, Pair] = Cache(PAIRS)
        self.joined: Cache[tuple[tuple[int, ...], torch.dtype, torch.device], Knots] = Cache(JOINED)
        self._probe()

    @staticmethod
    def _network(network: torch.nn.Module) -> AnyModule:
        """Copy a radial network in float64 to the CPU."""
        if original_class(network).__name__ != "FullyConnectedNet":
            raise ValueError(f"the radial network is a {original_class(network).__name__}")
        if any(isinstance(m, FeatureQuantizer) for m in network.modules()):
            raise ValueError("the hidden layers of the radial network are rounded")
        return copy.deepcopy(network).cpu().double()

    def _probe(self) -> None:
        """Make one table now, so that a model that cannot be served is refused when the engine is made."""
        first, last = 0, self.elements - 1
        if self.by_species:
            lengths = torch.linspace(0.5, 0.99 * self.r_max, 16, dtype=torch.float64)
            if not torch.equal(self._weights(lengths, first, last), self._weights(lengths, last, first)):
                raise ValueError("the radial functions tell sender from receiver")
        self._pair(self.code(first, last))

    def code(self, first: int, second: int) -> int:
        """Number of a pair of species, in either order; 0 if the functions do not depend on species."""
        return min(first, second) * self.elements + max(first, second) if self.by_species else 0

    def _features(self, lengths: Tensor, first: int, second: int) -> tuple[Tensor, Tensor | None]:
        """Inputs of the radial network, (edges, basis), and the cutoff where MACE applies it after the network."""
        attrs = lengths.new_zeros(2, self.elements)
        attrs[0, first] = attrs[1, second] = 1.0
        edges = torch.tensor([[0], [1]]).expand(2, lengths.shape[0])
        features: tuple[Tensor, Tensor | None] = self.embedding(lengths[:, None], attrs, edges, self.numbers)
        return features

    def _weights(self, lengths: Tensor, first: int, second: int) -> Tensor:
        """Radial weights of a pair of species, (edges, paths, channels)."""
        features, cutoff = self._features(lengths, first, second)
        weights: Tensor = self.network(features)
        if cutoff is not None:
            weights = weights * cutoff
        return weights.view(lengths.shape[0], *self.shape)

    def _densities(self, lengths: Tensor, first: int, second: int) -> Tensor:
        """Edge densities of a pair of species, (edges, 1, 1)."""
        assert self.density is not None
        features, cutoff = self._features(lengths, first, second)
        density = torch.tanh(self.density(features) ** 2)
        if cutoff is not None:
            density = density * cutoff
        return density.view(-1, 1, 1)

    def _pair(self, code: int) -> Pair:
        return self.made.get(code, lambda: self._make(code))

    def _make(self, code: int) -> Pair:
        first, second = divmod(code, self.elements)
        weights = radial.tabulate(lambda lengths: self._weights(lengths, first, second), self.r_max, self.tolerance)
        density = None
        if self.density is not None:
            density = radial.tabulate(
                lambda lengths: self._densities(lengths, first, second), self.r_max, self.tolerance
            )
        return weights, density

    def tables(self, codes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Knots:
        """Knots of the given pairs, end to end: of the weights, and of the density where there is one.

        Returns:
            (pairs * paths, knots, 3, channels) and (pairs, knots, 3, 1).

        Raises:
            ValueError: if the functions of a pair cannot be tabulated.
        """
        # Tensors made in inference mode could not be used by later calls outside of it.
        with torch.inference_mode(False):
            return self.joined.get((codes, dtype, device), functools.partial(self._join, codes, dtype, device))

    def _join(self, codes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Knots:
        pairs = {code: self._pair(code) for code in codes}
        # Tables that are joined have equal steps: those of the finest.
        finest = [max((t.knots.shape[1] for pair in pairs.values() if (t := pair[part])), default=0) for part in (0, 1)]
        for code, pair in pairs.items():
            finer = self._refined(code, pair, finest)
            if finer is not pair:
                pairs[code] = finer
                self.made.put(code, finer)
        weights = torch.cat([pair[0].knots for pair in pairs.values()]).to(device, dtype)
        densities = [density.knots for _, density in pairs.values() if density is not None]
        return weights, torch.cat(densities).to(device, dtype) if densities else None

    def _refined(self, code: int, pair: Pair, knots: list[int]) -> Pair:
        """The tables of a pair, remade where they have fewer than the given knots (of the weights, of the density)."""
        first, second = divmod(code, self.elements)
        weights, density = pair
        if weights.knots.shape[1] < knots[0]:
            weights = radial.tabulate(lambda r: self._weights(r, first, second), self.r_max, self.tolerance, knots[0])
        if density is not None and density.knots.shape[1] < knots[1]:
            density = radial.tabulate(lambda r: self._densities(r, first, second), self.r_max, self.tolerance, knots[1])
        return pair if weights is pair[0] and density is pair[1] else (weights, density)

    @property
    def error(self) -> float:
        """Largest error of the tables made so far, relative to the largest weight."""
        return max(table.error for pair in self.made.values() for table in pair if table is not None)
