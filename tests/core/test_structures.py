"""Structures to calibrate and to judge on, and those that are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from gaq.checks.labels import MissingLabelsError, check_keys, labels_of, left_out_labels
from gaq.checks.structures import (
    away_from_rest,
    check_structures,
    coincident_atoms,
    hold_out,
    rattled,
    without_single_atoms,
)


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


def test_structures_at_rest_are_displaced() -> None:
    """Those with forces stay, and so do those on which no atoms interact."""
    structures = [pair(1.0, labels=True), pair(1.2), pair(9.0)]

    def spring(given: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        stretched = [atoms.get_distance(0, 1) - 1.0 for atoms in given]
        sizes = [0.0 if x > 5.0 else x + 1e-6 for x in stretched]
        return np.zeros(len(given)), [np.array([[size, 0, 0], [-size, 0, 0]]) for size in sizes]

    moved, (line,) = away_from_rest(spring, structures)
    assert moved[1:] == structures[1:]
    assert "REF_forces" not in moved[0].arrays
    np.testing.assert_array_equal(moved[0].positions, rattled(structures)[0].positions)
    assert line == (
        "atoms displaced at random by 0.05 Å in 1 of 3 structures checked, because forces there are below 10 meV/Å: "
        "frame 0"
    )
    assert away_from_rest(spring, structures[1:]) == (structures[1:], [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_positions_that_are_not_finite_are_refused(value: float) -> None:
    moved, strained = pair(), pair()
    moved.positions[1, 0] = value
    strained.cell[2, 2] = value
    with pytest.raises(ValueError, match=r"frame 1 \(CO\): the positions hold NaN or infinity"):
        check_structures([pair(), moved])
    with pytest.raises(ValueError, match=r"frame 1 \(CO\): the cell hold NaN or infinity"):
        check_structures([pair(), strained])
    with pytest.raises(ValueError, match="no structures"):
        check_structures([])


@pytest.mark.parametrize(
    ("cell", "pbc", "vector", "expected"),
    [
        ([0, 0, 0], False, [0, 0, 0], True),
        ([0, 0, 0], False, [5e-4, 0, -5e-4], True),
        ([0, 0, 0], False, [0.01, 0, 0], False),
        ([9, 9, 9], True, [9, -9, 18], True),
        ([9, 9, 9], [True, False, True], [9, -9, 18], False),
        ([9, 9, 9], [True, False, True], [9, 0, 18], True),
        ([9, 0, 0], [True, False, False], [9.0004, 0, 0], True),
        ([9, 9, 9], False, [9, 0, 0], False),
        ([[0, 2, 2], [2, 0, 2], [2, 2, 0]], True, [4, 4, 8.0], True),
        ([[0, 2, 2], [2, 0, 2], [2, 2, 0]], True, [2, 0, 0], False),
        ([[9, 0, 0], [8.9, 0.5, 0], [0, 0, 9]], True, [0.1, -0.5 + 2e-4, 0], True),
    ],
)
def test_atoms_at_one_place_are_named(cell: object, pbc: object, vector: list[float], expected: bool) -> None:
    """Also across periods of a crystal, and where positions were written with few digits."""
    atoms = Atoms("HCO", positions=[[-1e-17, 0, 0], [0.7, 0.3, 0.2], vector], cell=cell, pbc=pbc)
    assert coincident_atoms(atoms) == ((0, 2) if expected else None)
    if expected:
        with pytest.raises(ValueError, match=r"frame 1 \(CHO\): atoms 0 \(H\) and 2 \(O\) are at one place"):
            check_structures([pair(), atoms])


def test_a_flat_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="linearly dependent"):
        coincident_atoms(
            Atoms("CO", positions=[[0, 0, 0], [0, 0, 1]], cell=[[1, 0, 0], [2, 0, 0], [0, 0, 3]], pbc=True)
        )


def test_single_atoms_are_left_out() -> None:
    crystal = Atoms("Al", cell=[[0, 2, 2], [2, 0, 2], [2, 2, 0]], pbc=True)
    good = [pair(), pair(1.1)]
    assert without_single_atoms(good) == (good, [])
    kept, lines = without_single_atoms([crystal, *good, crystal])
    assert kept == good
    assert lines == ["left out: 2 of 4 structures, a single atom has no forces: frames 0, 3"]
    with pytest.raises(ValueError, match=r"every structure has a single atom.*repeat the cell"):
        without_single_atoms([crystal])


def test_labels_that_cannot_be_used_are_said() -> None:
    """Those of other structures are used; where none has a label, there is nothing to say."""
    good = pair(labels=True)
    energy, forces, text, shape = (pair(labels=True) for _ in range(4))
    energy.info["REF_energy"] = math.nan
    forces.arrays["REF_forces"][1, 1] = math.inf
    text.info["REF_energy"] = "unknown"
    shape.arrays["REF_forces"] = np.zeros((2, 2))
    stored = pair()
    stored.calc = SinglePointCalculator(stored, energy=-1.0, forces=np.full((2, 3), math.nan))
    assert left_out_labels([good, good]) == left_out_labels([pair(), pair()]) == []
    assert left_out_labels([good, energy, forces, text, shape, stored, pair()]) == [
        "left out: energies 'REF_energy' of 2 of 7 structures, not one finite number: frames 1, 3",
        "left out: energies 'REF_energy' of 1 of 7 structures, missing: frame 6",
        "left out: forces 'REF_forces' of 2 of 7 structures, not finite: frames 2, 5",
        "left out: forces 'REF_forces' of 1 of 7 structures, not of shape (atoms, 3): frame 4",
        "left out: forces 'REF_forces' of 1 of 7 structures, missing: frame 6",
    ]
    assert labels_of(energy).forces is not None
    assert labels_of(stored).energy == -1.0
    assert not labels_of(pair()).any


def test_a_key_that_no_structure_has_is_refused() -> None:
    check_keys([pair()], "REF_energy", "REF_forces")
    with pytest.raises(MissingLabelsError, match=r"no structure has info\['dft'\]; present in info: .*charge"):
        check_keys([pair(labels=True)], "dft", "REF_forces")
    with pytest.raises(MissingLabelsError, match=r"arrays\['dft'\].*in arrays: REF_forces.*--forces-key"):
        check_keys([pair(labels=True)], "REF_energy", "dft")
