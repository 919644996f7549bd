"""Atoms at one place and positions that are no numbers: NaN on every path, never a plausible number."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from ase import Atoms
from mace.calculators import MACECalculator
from mace_models import diamond, molecules

import gaq
from gaq.adapter import adapter_for
from gaq_mace.engine import accelerate, disabled, serves


def unsound(kind: str) -> Atoms:
    atoms = molecules()[0]
    if kind == "one place":
        atoms.positions[3] = atoms.positions[0]
    elif kind == "a period apart":
        atoms = diamond().repeat((2, 2, 2))
        atoms.positions = np.round(atoms.positions, 2)  # so that the shift is exact
        atoms.cell = np.round(atoms.cell.array)
        atoms.positions[3] = atoms.positions[0] + atoms.cell[0]
    elif kind == "nothing else":
        atoms = Atoms("C2", positions=np.zeros((2, 3)))
    else:
        atoms.positions[3, 1] = float(kind)
    return atoms


UNSOUND = ("one place", "a period apart", "nothing else", "nan", "inf")


def results(model: Any, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()


@pytest.mark.parametrize("variant", ["plain", "agnesi"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # MACE's neighbour list
def test_every_path_gives_nan(float_model: Callable[..., Any], quantized: Callable[..., Any], variant: str) -> None:
    """Where stock MACE gives NaN, and for its energy too, which the distance transform keeps finite."""
    stock, model = float_model(variant, torch.float64), quantized("gaq", variant, torch.float64)
    accelerated = accelerate(float_model(variant, torch.float64))
    for atoms in map(unsound, UNSOUND):
        assert np.isnan(results(stock, atoms)[1]).all()
        for path, context in ((model, nullcontext()), (model, disabled()), (accelerated, nullcontext())):
            with context:
                assert all(np.isnan(values).all() for values in results(path, atoms))


@pytest.mark.parametrize("reference", [False, True])
def test_other_structures_of_a_batch_keep_their_numbers(quantized: Callable[..., Any], reference: bool) -> None:
    model = quantized("gaq", "plain", torch.float64)
    sound = molecules()
    with disabled() if reference else nullcontext():
        assert serves(model, {}) != reference
        potential = adapter_for(model).potential(model, 1000)
        energies, forces = potential([sound[0], unsound("one place"), sound[1], unsound("nan")])
        expected = potential(sound[:2])
    assert np.isnan(energies).tolist() == [False, True, False, True]
    assert [np.isnan(f).all() for f in forces] == [False, True, False, True]
    np.testing.assert_allclose(energies[[0, 2]], expected[0], rtol=1e-12)
    for ours, theirs in zip([forces[0], forces[2]], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_simulations_notice(float_model: Callable[..., Any]) -> None:
    """Through a neighbour list that is kept: two atoms meet, and part again."""
    model = accelerate(float_model("plain", torch.float64))
    atoms = molecules()[0]
    atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    apart = atoms.positions.copy()
    for _ in range(3):
        atoms.rattle(1e-3)
        assert np.isfinite(atoms.get_forces()).all()
    atoms.positions[3] = atoms.positions[0]
    assert np.isnan(atoms.get_forces()).all()
    atoms.positions = apart
    assert np.isfinite(atoms.get_forces()).all()
    assert np.isfinite(atoms.get_potential_energy())


def test_calibration_names_the_atoms(float_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"frame 1 \(C2H6O\): atoms 0 \(C\) and 3 \(H\) are at one place"):
        gaq.quantize(float_model(), [molecules()[0], unsound("one place")], progress=False)
