"""Sites: the modules that carry weights or features to round, as the core sees them.

An adapter finds the sites of a model and describes the layouts of their weights and inputs; everything else about a
site is the same in every framework.
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
        owner: name of the module that holds the parameter, relative to the site; '' for the site itself.
        parameter: attribute path of the parameter within the owner, for example ``weights.0``.
        layout: layout of the parameter.
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
    """Gate or weight of neighbours that the key ``attention`` bounds and rounds at a site.

    Attributes:
        layout: layout of the invariants; l > 0 and pieces of negative multiplicity pass through.
        limit: largest size of the invariants, known by construction; None where it is calibrated.
        signed: whether the invariants can be negative.
        what: name of the invariants, for display.
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
        kind: how the adapter quantizes the module; see its `sites`.
        weights: weight tensors of the module.
        features: layout of the input, None where the input is not rounded.
        input_note: why the input is not rounded, or what it is.
        sensitive: whether the module is one of the few tensors that `sensitive_bits` protects.
        first: whether the module belongs to the first interaction, for `first_bits`; see `settle_first`.
        mixing: whether everything that passes through the interaction passes through the module, for `mixing_bits`.
        radial: whether the module acts on edges, before the tensor product.
        irreps: input and output irreps, for display.
        attention: what the key ``attention`` bounds and rounds here, in place of `features`; None where it does not
            apply.
        embedding: module with the embeddings of the species as ``weight``, shape (species, size). Set where the weights
            act on products of features with these embeddings, and the embedding is so much larger than the number of
            species that the codes can be chosen together; see `gaq.quantizers.species`.
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
    """Assign the first interaction's products with species to one group; adapters mark them as `first` and `mixing`.

    Their size grows with the number of species. While they are at most half of the weights of that interaction they
    belong to it (`first_bits`). With many species they would be most of the model, and join the weights that everything
    passes through (`mixing_bits`).
    """
    products = [site for site in sites if site.first and site.mixing]
    others = [site for site in sites if site.first and not site.mixing]
    small = _weights_in(products) <= _weights_in(others)
    return [replace(site, first=small, mixing=not small) if site.first and site.mixing else site for site in sites]


def _weights_in(sites: Sequence[Site]) -> int:
    """Number of weights of the sites."""
    return sum(math.prod(weight.layout.shape) for site in sites for weight in site.weights)


@dataclass(frozen=True)
class Bystander:
    """A module that is not quantized, and why."""

    name: str
    kind: str
    reason: str
    parameters: int = field(default=0)
