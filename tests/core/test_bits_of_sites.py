"""Which weights count as those of the first interaction."""

from __future__ import annotations

import pytest
import torch

from gaq.model.sites import Site, WeightSite, settle_first
from gaq.quantizers.weights import WeightLayout


def _site(name: str, numel: int, first: bool, mixing: bool) -> Site:
    weights = (WeightSite("", "weight", WeightLayout.single((numel, 1), 0)),)
    return Site(name, torch.nn.Identity(), "linear", weights, None, "", False, False, "", first=first, mixing=mixing)


@pytest.mark.parametrize(("numel", "first"), [(1, True), (30, True), (31, False), (3000, False)])
def test_a_product_with_species_stays_while_it_is_the_smaller_part(numel: int, first: bool) -> None:
    given = [
        _site("linear", 10, True, False),
        _site("product", numel, True, True),
        _site("radial", 20, True, False),
        _site("later", 1000, False, True),
        _site("last", 1000, False, False),
    ]
    settled = {site.name: site for site in settle_first(given)}
    assert list(settled) == [site.name for site in given]
    assert (settled["product"].first, settled["product"].mixing) == (first, not first)
    for site in given:
        if site.name != "product":
            assert settled[site.name] is site
