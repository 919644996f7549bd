"""The radial functions of a MACE layer as tables, one for each pair of species where they see these.

With ``distance_transform`` (Agnesi, Soft) the radial network reads a distance that is scaled by the covalent radii of
both atoms. A table is made for each pair of species when it is first met, so that a model of 89 elements has as many as
its structures need.
"""

from __future__ import annotations

import copy
from typing import Any

import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

from gaq.kernels import radial
from gaq.quantizers.features import FeatureQuantizer
from gaq_mace.layers import original_class

__all__ = ["RadialTables"]


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
        self.made: dict[int, tuple[radial.RadialTable, radial.RadialTable | None]] = {}
        self.joined: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor, Tensor | None]] = {}
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
        self._make(self.code(first, last))

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

    def _make(self, code: int) -> None:
        first, second = divmod(code, self.elements)
        weights = radial.tabulate(lambda lengths: self._weights(lengths, first, second), self.r_max, self.tolerance)
        density = None
        if self.density is not None:
            density = radial.tabulate(
                lambda lengths: self._densities(lengths, first, second), self.r_max, self.tolerance
            )
        self.made[code] = weights, density

    def tables(self, codes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The knots of some pairs, one after the other: of the weights, and of the density where there is one.

        Returns:
            (pairs * paths, knots, 3, channels) and (pairs, knots, 3, 1).

        Raises:
            ValueError: if the functions of a pair cannot be tabulated.
        """
        key = codes, device
        if key not in self.joined:
            for code in codes:
                if code not in self.made:
                    self._make(code)
            for part in range(2):
                # All with the steps of the finest.
                tables = [self.made[code][part] for code in codes]
                finest = max(t.knots.shape[1] for t in tables if t is not None) if tables[0] is not None else 0
                for code in codes:
                    table = self.made[code][part]
                    if table is not None and table.knots.shape[1] < finest:
                        self._refine(code, part, finest)
            weights = torch.cat([self.made[code][0].knots for code in codes]).to(device, dtype)
            densities = [table.knots for code in codes if (table := self.made[code][1]) is not None]
            # A structure that changes its species keeps what it had; the rest can be put together again.
            if len(self.joined) > 8:
                self.joined.clear()
            self.joined[key] = weights, torch.cat(densities).to(device, dtype) if densities else None
        return self.joined[key]

    def _refine(self, code: int, part: int, fewest: int) -> None:
        first, second = divmod(code, self.elements)
        function = (self._weights, self._densities)[part]
        finer = radial.tabulate(lambda lengths: function(lengths, first, second), self.r_max, self.tolerance, fewest)
        before = self.made[code]
        self.made[code] = (finer, before[1]) if part == 0 else (before[0], finer)

    @property
    def error(self) -> float:
        """Largest error of the tables made so far, relative to the largest weight."""
        return max(table.error for pair in self.made.values() for table in pair if table is not None)
