"""A site: one module that carries weights or features to round, as the core sees it.

An adapter finds the sites of a model and says how their weights and inputs lie; everything else about them is the
same in every framework.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from gaq.quantizers.features import FeatureLayout
from gaq.quantizers.weights import WeightLayout

__all__ = ["POSITION_FREE", "RADIAL", "ROUNDED", "AttentionSite", "Bystander", "Site", "WeightSite", "settle_first"]

POSITION_FREE = "does not depend on positions"
ROUNDED = "rounded where the preset says so"
RADIAL = "radial network: a function of distance alone, kept smooth"


@dataclass(frozen=True)
class WeightSite:
    """One weight tensor of a site.

    Attributes:
        owner: name, relative to the site, of the module that holds the parameter ('' for itself).
        parameter: attribute path of the parameter within the owner, for example ``weights.0``.
        layout: of the parameter.
    """

    owner: str
    parameter: str
    layout: WeightLayout

    @property
    def path(self) -> str:
        """Name of the parameter relative to the site."""
        return f"{self.owner}.{self.parameter}" if self.owner else self.parameter


@dataclass(frozen=True)
class AttentionSite:
    """What the key ``attention`` bounds and rounds at a site: a gate, or a weight of neighbours.

    Attributes:
        layout: of the invariants; l > 0 and pieces of negative multiplicity pass through.
        limit: their largest size, where it is known by construction; None where it is calibrated.
        signed: whether they can be negative.
        what: they are, for display.
    """

    layout: FeatureLayout
    limit: float | None = None
    signed: bool = True
    what: str = ""


@dataclass(frozen=True)
class Site:
    """A module that carries weights, or features to round.

    Attributes:
        name: full module name.
        module: the module.
        kind: what the adapter does with it; see there.
        weights: its weight tensors.
        features: layout of its input, None where the input is not rounded.
        input_note: why the input is not rounded, or what it is.
        sensitive: whether it belongs to the few tensors that `sensitive_bits` protects.
        first: whether it belongs to the first interaction, for `first_bits`; see `settle_first`.
        mixing: whether all that passes through its interaction passes through it, for `mixing_bits`.
        radial: whether it acts on edges, before the tensor product.
        irreps: input and output, for display.
        attention: what the key ``attention`` bounds and rounds there, in place of `features`; None where it does not
            apply.
        embedding: module with the embeddings of the species as ``weight``, shape (species, size), where its weights act
            on products of features with these and have so many more numbers than species that their codes can be chosen
            together; see `gaq.quantizers.species`.
    """

    name: str
    module: torch.nn.Module
    kind: str
    weights: tuple[WeightSite, ...]
    features: FeatureLayout | None
    input_note: str
    sensitive: bool
    radial: bool
    irreps: str
    attention: AttentionSite | None = None
    first: bool = False
    mixing: bool = False
    embedding: torch.nn.Module | None = None


def settle_first(sites: Sequence[Site]) -> list[Site]:
    """Decide where the products with species of the first interaction belong, which adapters mark as both.

    Their size grows with the number of species. While they are the smaller part of the weights of that interaction they
    are of it (`first_bits`); where species are many they would be most of the model, and are with what all passes
    through (`mixing_bits`).
    """
    products = [site for site in sites if site.first and site.mixing]
    others = [site for site in sites if site.first and not site.mixing]
    small = _weights_in(products) <= _weights_in(others)
    return [replace(site, first=small, mixing=not small) if site.first and site.mixing else site for site in sites]


def _weights_in(sites: Sequence[Site]) -> int:
    return sum(math.prod(weight.layout.shape) for site in sites for weight in site.weights)


@dataclass(frozen=True)
class Bystander:
    """A module that is not quantized, and why."""

    name: str
    kind: str
    reason: str
    parameters: int = field(default=0)
