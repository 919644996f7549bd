"""NequIP's fused convolution through the kernels for cards: NequIP's own energies and forces."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("nequip") is None:
    pytest.skip("NequIP is not installed", allow_module_level=True)

import numpy as np
from ase import Atoms
from ase.build import molecule
from nequip.model import NequIPGNNModel
from nequip.utils.global_state import set_global_state

import gaq
from gaq_nequip.evaluate import NequIPPotential
from gaq_nequip.freeze import freeze
from gaq_nequip.fused import FusedInteractionBlock, fuse

STRUCTURES = [molecule("H2O"), molecule("CH4"), Atoms("CH", positions=[[0, 0, 0], [0, 0, 30.0]])]


def make(parity: bool, lmax: int) -> Any:
    set_global_state()
    model = NequIPGNNModel(
        seed=0,
        model_dtype="float64",
        r_max=3.0,
        type_names=["H", "C", "O"],
        avg_num_neighbors=4.0,
        l_max=lmax,
        parity=parity,
        num_layers=2,
        num_features=4,
        radial_mlp_width=8,
    )
    prepared = gaq.prepare(model, {"preset": "w8", "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}})
    return freeze(gaq.convert(gaq.calibrate(prepared, STRUCTURES[:2], progress=False)))


@pytest.mark.parametrize(("parity", "lmax"), [(False, 1), (True, 1), (False, 2)])
def test_fused_is_the_same_function(parity: bool, lmax: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from gaq.kernels.gpu import convolution as device

    model = make(parity, lmax)
    expected = NequIPPotential(copy.deepcopy(model))(STRUCTURES)
    assert fuse(model, "cuda") == {}
    assert sum(isinstance(m, FusedInteractionBlock) for m in model.modules()) == 2
    calls = []
    own = device.convolution
    monkeypatch.setattr(device, "convolution", lambda *args: calls.append(1) or own(*args))
    found = NequIPPotential(model)(STRUCTURES)
    assert calls
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    scale = float(np.abs(np.concatenate(expected[1])).max())
    np.testing.assert_allclose(np.concatenate(found[1]), np.concatenate(expected[1]), atol=3e-6 * scale)
