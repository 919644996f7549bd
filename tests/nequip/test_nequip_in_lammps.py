"""Deployed NequIP models in LAMMPS against the ASE calculator of the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import torch

from gaq.deployed import form
from gaq.lammps import build
from gaq.lammps.check import check
from gaq.lammps.installation import Installation, LammpsError, find
from gaq_nequip.adapter import NequIPAdapter


@pytest.fixture(scope="module")
def lammps() -> Installation:
    """The LAMMPS of this environment."""
    try:
        return find()
    except LammpsError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("variant", ["plain", "parity", "unequal"])
def test_models_agree_with_ase(
    lammps: Installation, float_model: Callable[..., Any], tmp_path: Path, variant: str
) -> None:
    """A crystal and a molecule, on one rank and on three, with features exchanged between the layers."""
    file, elements = tmp_path / "model.gaq", ["H", "C", "O"]
    deployable = NequIPAdapter().deployable(float_model(variant, "float64"), elements, torch.float64)
    metadata = {"configuration": None, "elements": elements, "heads": ["default"], "r_max": deployable.r_max}
    form.write(file, deployable, metadata)
    rows = list(check(file, lammps, build.obtain(lammps), [1, 3]))
    assert {row.ranks for row in rows} == {1, 3}
    assert max(row.check.forces / max(row.check.force_scale, 1.0) for row in rows) < 1e-9
    assert all(row.agrees for row in rows)
