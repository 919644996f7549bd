"""The radial functions of a MACE layer as tables, one for each pair of species where they see these.

With ``distance_transform`` (Agnesi, Soft) the radial network reads a distance that is scaled by the covalent radii of
both atoms. A table is made for each pair of species when it is first met, so that a model of 89 elements has as many as
its structures need.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

from gaq.caches import Cache
from gaq.kernels import radial
from gaq.quantizers.features import FeatureQuantizer
from gaq_mace.layers import original_class

__all__ = ["JOINED", "PAIRS", "RadialTables"]

PAIRS = 512
"""Pairs of species whose tables are kept, a few megabytes each: those of 31 species together."""
JOINED = 8
"""Groups of pairs whose tables are kept end to end, as the kernels read them."""

Pair = tuple[radial.RadialTable, "radial.RadialTable | None"]


class RadialTables:
    """Radial weights of one layer, and its edge density where it has one.

    Args:
        model: MACE model.
        block: interaction block of the layer.
        paths: of its convolution.
        channels: of every path.
        tolerance: see `gaq.kernels.radial.tabulate`.

    Raises:
        ValueError: if they cannot be tabulated.
    """

    def __init__(self, model: Any, block: Any, paths: int, channels: int, tolerance: float) -> None:
        # Tables are made on the CPU, wherever the model lies: its network in float64, a few times in all.
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
        self.joined: Cache[Any, tuple[Tensor, Tensor | None]] = Cache(JOINED)
        self._probe()

    @staticmethod
    def _network(network: Any) -> Any:
        if original_class(network).__name__ != "FullyConnectedNet":
            raise ValueError(f"the radial network is a {original_class(network).__name__}")
        if any(isinstance(m, FeatureQuantizer) for m in network.modules()):
            raise ValueError("the hidden layers of the radial network are rounded")
        return copy.deepcopy(network).cpu().double()

    def _probe(self) -> None:
        """Make one table now, where a model that cannot be served is told apart; both orders of a pair are the same."""
        first, last = 0, self.elements - 1
        if self.by_species:
            lengths = torch.linspace(0.5, 0.99 * self.r_max, 16, dtype=torch.float64)
            if not torch.equal(self._weights(lengths, first, last), self._weights(lengths, last, first)):
                raise ValueError("the radial functions tell sender from receiver")
        self._pair(self.code(first, last))

    def code(self, first: int, second: int) -> int:
        """Number of a pair of species, whatever its order; 0 if species do not matter."""
        return min(first, second) * self.elements + max(first, second) if self.by_species else 0

    def _features(self, lengths: Tensor, first: int, second: int) -> tuple[Tensor, Tensor | None]:
        attrs = lengths.new_zeros(2, self.elements)
        attrs[0, first] = attrs[1, second] = 1.0
        edges = torch.tensor([[0], [1]]).expand(2, lengths.shape[0])
        return self.embedding(lengths[:, None], attrs, edges, self.numbers)  # type: ignore[no-any-return]

    def _weights(self, lengths: Tensor, first: int, second: int) -> Tensor:
        features, cutoff = self._features(lengths, first, second)
        weights = self.network(features)
        if cutoff is not None:
            weights = weights * cutoff
        return weights.view(lengths.shape[0], *self.shape)  # type: ignore[no-any-return]

    def _densities(self, lengths: Tensor, first: int, second: int) -> Tensor:
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

    def tables(self, codes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The knots of some pairs, one after the other: of the weights, and of the density where there is one.

        Returns:
            (pairs * paths, knots, 3, channels) and (pairs, knots, 3, 1).

        Raises:
            ValueError: if the functions of a pair cannot be tabulated.
        """
        # They serve later calls in other modes too.
        with torch.inference_mode(False):
            return self.joined.get((codes, dtype, device), functools.partial(self._join, codes, dtype, device))

    def _join(self, codes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
        pairs = {code: self._pair(code) for code in codes}
        # All with the steps of the finest.
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
        """A pair of tables with at least so many knots in that of the weights, and in that of the density."""
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
