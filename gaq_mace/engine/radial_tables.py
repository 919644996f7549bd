"""Radial functions of a MACE layer as tables, for one pair of species or for several at once.

With ``distance_transform`` (Agnesi, Soft) the radial network reads a distance that is scaled by the covalent radii of
both atoms, so each pair of species has a table; otherwise one table serves all. With ``apply_cutoff: False`` the cutoff
function does not enter the network, which is then a function of the transformed distance alone, and one table over
that distance serves all pairs (`RadialTables.transformed`).

The networks of `RealAgnosticResidualNonLinearInteractionBlock` read the species of sender and receiver as well. For a
pair of species they are functions of the distance alone, but not the same ones for both of its directions.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence

import ase.data
import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

from gaq.kernels import gpu, radial
from gaq.quantizers.features import FeatureQuantizer
from gaq.untyped import AnyModule
from gaq_mace.engine.radial_networks import RadialNetwork
from gaq_mace.engine.reading import class_name, matrices_of

__all__ = ["Pair", "RadialTables"]

Pair = tuple[int, int]
"""Numbers of two species, the sender's first where tables are of ordered pairs."""
AT_ONCE = 2**21
"""Bytes of the values of a hidden layer that are computed at once: more would not stay in cache."""


def _end_of(embedding: AnyModule) -> float | None:
    """Upper bound of the transformed distances within the cutoff, where they are all that a radial network reads."""
    transform = getattr(embedding, "distance_transform", None)
    if transform is None or getattr(embedding, "apply_cutoff", True):
        return None
    if class_name(transform) == "AgnesiTransform" and float(transform.a) > 0:
        return 1.0  # that of distance 0
    if class_name(transform) == "SoftTransform":
        # Between the distance and 3/4 of the sum of the covalent radii.
        return max(float(embedding.cutoff_fn.r_max), 1.5 * float(transform.covalent_radii.max()))
    return None


def _species_of(block: AnyModule) -> tuple[Tensor, Tensor] | None:
    """What radial networks read of the species of sender and receiver, each (species, properties), float64."""
    if not hasattr(block, "source_embedding"):
        return None
    sender, receiver = (matrices_of(linear)[0].cpu() for linear in (block.source_embedding, block.target_embedding))
    return sender, receiver


class RadialTables:
    """Make tables of one layer's radial weights, and of its edge density where it has one.

    Args:
        model: MACE model.
        block: interaction block of the layer.
        paths: of its convolution.
        channels: of every path.
        dtype: of the tables.

    Attributes:
        transformed: whether the tables are over the transformed distance, without the cutoff function.
        by_species: whether there is a table for each pair of species.
        ordered: whether the two directions of a pair have tables of their own, in this layer or in another one: edges
            have one number of a table for all layers.
        r_max: upper end of the tables, in Å or in the unit of the transformed distance.
        elements: number of species.
        intervals: of the tables of the weights, and of the density. It grows when a pair needs more.
        error: largest error of the tables made so far, relative to the largest value of the same function.

    Raises:
        ValueError: if the radial functions cannot be tabulated.
    """

    def __init__(self, model: AnyModule, block: AnyModule, paths: int, channels: int, dtype: torch.dtype) -> None:
        # Tables are made in float64, on the CPU for any device: that takes a few evaluations of the network.
        self.embedding = copy.deepcopy(model.radial_embedding).cpu().double()
        self.species = _species_of(block)
        on_gpu = gpu.chosen(next(model.parameters()).device)  # where such networks are evaluated for each edge
        self.ordered = not on_gpu and any(hasattr(of, "source_embedding") for of in model.interactions)
        self.network = self._exact(block.conv_tp_weights)
        self.last = self.network.last.view(-1, paths, channels).transpose(0, 1).contiguous()
        density = getattr(block, "density_fn", None)
        self.density = None if density is None else self._exact(density)
        end = None if self.ordered else _end_of(self.embedding)
        self.transformed = end is not None
        # A transformed distance that is rounded up must not lie beyond the table.
        self.r_max = float(model.r_max) if end is None else 1.001 * end
        self.dtype = dtype
        self.tolerance = radial.TOLERANCE if dtype == torch.float32 else radial.DOUBLE_TOLERANCE
        self.numbers = model.atomic_numbers.detach().cpu()
        self.elements = len(self.numbers)
        transforms = hasattr(model.radial_embedding, "distance_transform")
        self.by_species = self.ordered or (transforms and not self.transformed)
        self.intervals = [radial.FEWEST] * (1 if density is None else 2)
        self.error = 0.0
        self._probe()

    def _exact(self, network: AnyModule) -> RadialNetwork:
        """Copy a radial network in float64 to the CPU."""
        if any(isinstance(m, FeatureQuantizer) for m in network.modules()):
            raise ValueError("the hidden layers of the radial network are rounded")
        properties = 0 if self.species is None else self.species[0].shape[1]
        return RadialNetwork(network, torch.float64, properties).cpu().double()

    def _probe(self) -> None:
        """Make one table now, so that a model that cannot be served is refused when the engine is made."""
        first, last = 0, self.elements - 1
        if self.by_species and self.species is None:
            lengths = torch.linspace(0.5, 0.99 * self.r_max, 16, dtype=torch.float64)
            if not torch.equal(*self._hidden([(first, last), (last, first)], lengths)):
                raise ValueError("the radial functions tell sender from receiver")
        self.prepare([max(((z, z) for z in (first, last)), key=self._size)])

    def _size(self, pair: Pair) -> float:
        """Sum of the covalent radii of a pair in Å. Functions of smaller atoms need more intervals."""
        return float(ase.data.covalent_radii[self.numbers[list(pair)].numpy()].sum())

    def bytes_of_pair(self) -> int:
        """Memory that the tables of one pair take."""
        return sum(map(math.prod, self.shapes())) * self.dtype.itemsize

    def _basis(self, pairs: Sequence[Pair], lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inputs of the radial networks, (pairs * n, basis), and the cutoff where only tables contain it."""
        if self.transformed:
            return self.embedding.bessel_fn(lengths.repeat(len(pairs))[:, None]), None
        edges = torch.tensor(pairs).T.repeat_interleave(lengths.numel(), dim=1)
        attributes = torch.eye(self.elements, dtype=torch.float64)
        lengths = lengths.repeat(len(pairs))[:, None]
        basis: tuple[Tensor, Tensor | None] = self.embedding(lengths, attributes, edges, self.numbers)
        return basis

    def _hidden(self, pairs: Sequence[Pair], lengths: Tensor) -> Tensor:
        """Inputs of the last radial layer, times the cutoff, for pairs at lengths (n,), (pairs, n, features)."""
        basis, cutoff = self._basis(pairs, lengths)
        hidden = self.network.before_last(basis, cutoff, self._ends(self.network, pairs, lengths.numel()))
        return hidden.view(len(pairs), lengths.numel(), -1)

    def _ends(self, network: RadialNetwork, pairs: Sequence[Pair], count: int) -> tuple[Tensor, Tensor] | None:
        """What a network reads of the species of each pair at so many lengths; None where it reads none."""
        if self.species is None:
            return None
        sender, receiver = torch.tensor(pairs).T.repeat_interleave(count, dim=1)
        properties = network.properties_of(*self.species)
        return properties[0][sender], properties[1][receiver]

    def _densities(self, pairs: Sequence[Pair], lengths: Tensor) -> Tensor:
        """Edge densities of pairs at lengths (n,), (pairs, n, 1)."""
        assert self.density is not None
        basis, cutoff = self._basis(pairs, lengths)
        ends = self._ends(self.density, pairs, lengths.numel())
        density = torch.tanh(self.density(basis, None, ends) ** 2)
        if cutoff is not None:
            density = density * cutoff
        return density.view(len(pairs), lengths.numel(), 1)

    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of a pair's tables, of the weights and of the density, (paths, intervals, COEFFICIENTS, channels)."""
        sizes = ((self.last.shape[0], self.last.shape[2]), (1, 1))
        return [(p, n, radial.COEFFICIENTS, c) for n, (p, c) in zip(self.intervals, sizes, strict=False)]

    def prepare(self, pairs: Sequence[Pair]) -> None:
        """Find the number of intervals that pairs of species need, as far as the most demanding of them tells.

        Raises:
            ValueError: if the functions of a pair cannot be tabulated.
        """
        demanding = [min(pairs, key=self._size)]
        with torch.no_grad():
            for part in range(len(self.intervals)):
                while not self._fill(part, demanding, None):
                    pass

    def make(self, pairs: Sequence[Pair], out: Sequence[Tensor]) -> bool:
        """Make tables of pairs of species: of the weights, and of the density where there is one.

        Args:
            pairs: at least one.
            out: memory for the tables on the CPU, each (pairs, paths, intervals, COEFFICIENTS, channels); see `shapes`.

        Returns:
            False if a pair needs more intervals than the memory has; `intervals` have then grown.

        Raises:
            ValueError: if the functions of a pair cannot be tabulated.
        """
        with torch.no_grad():
            return all(self._fill(part, pairs, memory) for part, memory in enumerate(out))

    def bytes_before_last(self) -> int:
        """Memory of what `before_last` makes for a pair of species, as far as the number of intervals is known."""
        return 8 * radial.COEFFICIENTS * self.intervals[0] * self.last.shape[1]

    def before_last(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor | None]:
        """Make tables of the features before the last layer, which take a fraction of the memory.

        Args:
            pairs: of species, at least one.

        Returns:
            Polynomials of these features, (pairs, intervals, COEFFICIENTS, features), and of the edge density where
            there is one, (pairs, intervals, COEFFICIENTS); float64.

        Raises:
            ValueError: if the functions of a pair cannot be tabulated.
        """
        with torch.no_grad():
            for part in range(len(self.intervals)):
                while not self._fill(part, pairs, None):
                    pass
            functions = (self._hidden, self._densities)[: len(self.intervals)]
            tables = [
                radial.interpolate(functools.partial(function, pairs), self.r_max, intervals).coefficients[:, 0]
                for function, intervals in zip(functions, self.intervals, strict=True)
            ]
        return tables[0], tables[1][..., 0] if len(tables) > 1 else None

    def _fill(self, part: int, pairs: Sequence[Pair], out: Tensor | None) -> bool:
        """Make the tables of one kind; if a pair needs more intervals, say no, and count them."""
        function, last = ((self._hidden, self.last), (self._densities, None))[part]
        intervals = self.intervals[part]
        features = 1 if last is None else last.shape[1]
        at_once = max(1, AT_ONCE // (8 * radial.COEFFICIENTS * intervals * features))
        for begin in range(0, len(pairs), at_once):
            some = pairs[begin : begin + at_once]
            memory = None if out is None else out[begin : begin + at_once]
            # The transformed distance may be the smaller, the further away the atoms are.
            nearest = 0.0 if self.transformed else radial.NEAREST
            table = radial.interpolate(functools.partial(function, some), self.r_max, intervals, last, memory, nearest)
            finer = radial.finer(table, self.tolerance)
            if finer is not None:
                self.intervals[part] = finer
                return False
            self.error = max(self.error, table.error)
        return True
