"""Structures to calibrate and to judge on, and those that are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from gaq.checks.errors import MissingLabelsError
from gaq.checks.structures import check_calibration_structures, check_labels, check_structures, hold_out, rattled


def pair(length: float = 1.0, **labels: object) -> Atoms:
    atoms = Atoms("CO", positions=[[0, 0, 0], [0, 0, length]], cell=[9, 9, 9], pbc=True)
    if labels:
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = -1.0, np.zeros((2, 3))
        atoms.info["charge"] = 1
    return atoms


def test_calibration_does_not_see_what_is_judged() -> None:
    for count in (5, 6, 20, 101):
        structures = [pair(1.0 + 0.01 * n) for n in range(count)]
        calibration, judged = hold_out(structures)
        assert len(judged) == pytest.approx(count / 5, abs=1)
        assert len(calibration) + len(judged) == count
        assert {id(atoms) for atoms in calibration} | {id(atoms) for atoms in judged} == {id(a) for a in structures}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_structures_are_judged_on_displaced_copies(count: int) -> None:
    structures = [pair(1.0 + 0.1 * n, labels=True) for n in range(count)]
    structures[0].set_constraint(FixAtoms([0]))
    before = [atoms.positions.copy() for atoms in structures]
    calibration, judged = hold_out(structures)
    assert calibration == structures
    assert len(judged) == 8
    moved = np.array([atoms.positions - before[n % count] for n, atoms in enumerate(judged)])
    assert 0.03 < moved.std() < 0.07
    assert np.abs(moved).min() > 0
    assert len(np.unique(moved)) == moved.size
    assert all("REF_energy" not in atoms.info and "REF_forces" not in atoms.arrays for atoms in judged)
    assert judged[0].info["charge"] == 1
    for atoms, positions in zip(structures, before, strict=True):
        np.testing.assert_array_equal(atoms.positions, positions)
        assert "REF_forces" in atoms.arrays


def test_displacements_repeat() -> None:
    first, again, other = (rattled([pair()], seed)[0].positions for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    moved, strained, energy, forces, stored = (pair(labels=True) for _ in range(5))
    moved.positions[1, 0] = value
    strained.cell[2, 2] = value
    energy.info["REF_energy"] = value
    forces.arrays["REF_forces"][1, 1] = value
    stored = pair()
    stored.calc = SinglePointCalculator(stored, energy=-1.0, forces=np.full((2, 3), value))
    good = pair(labels=True)
    with pytest.raises(ValueError, match=r"frame 1 \(CO\): the positions hold NaN or infinity"):
        check_structures([good, moved])
    with pytest.raises(ValueError, match=r"frame 1 \(CO\): the cell hold NaN or infinity"):
        check_structures([good, strained])
    with pytest.raises(ValueError, match="frame 1: reference energy 'REF_energy'"):
        check_labels([good, energy])
    with pytest.raises(ValueError, match="frame 2: reference forces 'REF_forces'"):
        check_labels([good, good, forces])
    with pytest.raises(ValueError, match="frame 0: reference forces"):
        check_labels([stored])
    check_labels([good, good])
    check_labels([pair(), pair()])


def test_labels_on_some_structures_only_are_refused() -> None:
    with pytest.raises(MissingLabelsError, match="frame 1"):
        check_labels([pair(labels=True), pair()])


def test_a_single_atom_is_no_calibration() -> None:
    crystal = Atoms("Al", cell=[[0, 2, 2], [2, 0, 2], [2, 2, 0]], pbc=True)
    with pytest.raises(ValueError, match=r"frame 1 \(Al\) has a single atom.*repeat the cell"):
        check_calibration_structures([pair(), crystal])
    check_calibration_structures([pair(), crystal.repeat((2, 1, 1))])
    check_structures([crystal])
    with pytest.raises(ValueError, match="no structures"):
        check_structures([])
