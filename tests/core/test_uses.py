"""Measures of uses on potentials whose answers are known, and how they are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential
from reports import cluster, morse

from gaq.checks.equation_of_state import equation_of_state, strained
from gaq.checks.potential import CalculatorPotential
from gaq.checks.relaxation import minimum_change, relaxed
from gaq.checks.spectrum import power, wave_numbers
from gaq.checks.uses import USES, fitness_line, judged, use_rows, worst
from gaq.checks.vibrations import frequencies, frequency_shifts
from gaq.reporting.uses import profile_error


def test_frequency_of_two_atoms() -> None:
    """A Morse bond of depth D and steepness a has the force constant 2 D a²."""
    calculator = MorsePotential(epsilon=2.0, r0=1.1, rho0=4.0, rcut1=8.0, rcut2=9.0)
    atoms = Atoms("N2", [[0, 0, 0], [0, 0, 1.1]])
    constant = 2 * 2.0 * (4.0 / 1.1) ** 2
    expected = np.sqrt(constant / (0.5 * atoms.get_masses()[0])) / (2 * np.pi) * units.fs / 2.99792458e-5
    found = frequencies(CalculatorPotential(calculator), atoms, step=0.001)
    assert found.shape == (1,)
    assert found[0] == pytest.approx(expected, rel=1e-4)


def test_frequencies_as_ase(tmp_path: object) -> None:
    """Water in EMT, as ASE computes it from the same displacements; rigid motion is left out."""
    from ase.vibrations import Vibrations

    atoms = relaxed(CalculatorPotential(EMT()), molecule("H2O")).atoms
    ours = frequencies(CalculatorPotential(EMT()), atoms)
    assert len(ours) == 3
    atoms.calc = EMT()
    vibrations = Vibrations(atoms, name=f"{tmp_path}/vib")
    vibrations.run()
    theirs = np.sort(vibrations.get_frequencies().real)[-3:]
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)


def test_frequencies_of_a_cell() -> None:
    """Only translations are left out, and a stretched direction has imaginary frequencies."""
    found = frequencies(CalculatorPotential(EMT()), bulk("Cu", cubic=True))
    assert len(found) == 9
    assert found.min() > 50
    squeezed = bulk("Cu", cubic=True)
    squeezed.set_cell(squeezed.cell * 1.35, scale_atoms=True)
    assert frequencies(CalculatorPotential(EMT()), squeezed).min() < 0


def test_shifts() -> None:
    assert frequency_shifts(np.array([1.0, 4.0, -2.0]), np.array([2.0, 2.0, -2.0])) == (1.0, 2.0)


def test_relaxed() -> None:
    result = relaxed(CalculatorPotential(morse()), cluster())
    assert 0 < result.steps < 100
    assert result.force <= 1e-3
    assert result.atoms.get_all_distances()[np.triu_indices(4, 1)] == pytest.approx(2.21, abs=1e-3)
    assert relaxed(CalculatorPotential(morse()), cluster(), steps=1).force > 1e-3


def test_a_force_that_does_not_change_is_left() -> None:
    def constant(structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        return np.zeros(len(structures)), [np.full((len(one), 3), 0.1) for one in structures]

    assert relaxed(constant, cluster()).force == pytest.approx(0.1 * math.sqrt(3))


def test_minimum_change() -> None:
    """A cluster that is larger by 0.01 Å: the Morse energy of its six bonds."""
    potential = CalculatorPotential(morse())
    small = relaxed(CalculatorPotential(morse()), cluster()).atoms
    large = small.copy()
    large.positions *= 2.22 / 2.21
    change, energy = minimum_change(large, small, potential)
    assert change == pytest.approx(0.01, abs=1e-4)
    steepness = 4.0 / 2.21
    assert energy == pytest.approx(6e3 * 2.0 * (1 - math.exp(-0.01 * steepness)) ** 2, rel=0.02)
    assert minimum_change(small, small, potential) == (0.0, 0.0)


def test_equation_of_state() -> None:
    """Copper in EMT: the lattice constant and the bulk modulus of its parameters (Jacobsen et al. 1996)."""
    volume, modulus = equation_of_state(CalculatorPotential(EMT()), bulk("Cu", a=3.6)) or (0.0, 0.0)
    assert (4 * volume) ** (1 / 3) == pytest.approx(3.59, abs=0.01)
    assert modulus / units.GPa == pytest.approx(134, rel=0.03)
    assert equation_of_state(CalculatorPotential(EMT()), bulk("Cu", a=4.2)) is None
    cells = strained(bulk("Cu", a=3.6))
    assert cells[0].cell.lengths()[0] == pytest.approx(0.98 * bulk("Cu", a=3.6).cell.lengths()[0])


def test_spectrum_of_a_wave() -> None:
    """The power of each atom is its mass times the square of its speed, at its own wave number."""
    times = 2.0 * np.arange(2000)
    waves = np.array([500.0, 1500.0])
    velocities = np.zeros((2000, 2, 3))
    for atom, wave in enumerate(waves):
        velocities[:, atom, atom] = np.cos(2 * np.pi * 2.99792458e-5 * wave * times)
    density = power(velocities, np.array([1.0, 4.0]))
    numbers = wave_numbers(2000, 2.0)
    assert density.shape == (1001, 2)
    np.testing.assert_allclose(numbers[np.argmax(density, axis=0)], waves, atol=numbers[1])
    assert density[:, 1].sum() / density[:, 0].sum() == pytest.approx(4.0, rel=1e-3)


def test_profile_error() -> None:
    """Energies count from the lowest point, up to 1 eV."""
    reference = np.array([0.5, 0.0, 0.4, 0.9, 3.0])
    energies = reference + np.array([0.012, 0.010, 0.013, 0.008, 0.5])
    assert profile_error(energies, reference) == pytest.approx(3.0)


def bounds() -> dict[str, float | None]:
    return {criterion.measure: criterion.bound for criteria in USES.values() for criterion in criteria}


def test_judged() -> None:
    """A value at the bound holds; one above, infinite or NaN does not; one that is missing says nothing."""
    assert all(entry["fit"] is True for entry in judged(bounds()).values())
    values = bounds() | {"worst_frequency_shift_per_cm": 5.01, "volume_shift": None, "profile_error_mev": math.inf}
    values |= {"bulk_modulus_shift": 0.02, "drift_in_standard_errors": None, "distances_moved_beside_seeds": math.nan}
    uses = judged(values)
    assert {use: entry["fit"] for use, entry in uses.items()} == {
        "geometry optimisation": True,
        "vibrations": False,
        "energy profiles": False,
        "equation of state": False,
        "constant-energy dynamics": None,
        "structure at 300 K": False,
    }
    assert "--nve-ps" in uses["constant-energy dynamics"]["needs"]
    assert uses["vibrations"]["needs"] is None
    assert fitness_line(uses) == (
        "fit for: geometry optimisation; not fit for: vibrations, energy profiles, equation of state, "
        "structure at 300 K; not shown: constant-energy dynamics"
    )
    assert fitness_line(judged({})).startswith("fit for: nothing measured; not shown: geometry optimisation, ")
    assert len(use_rows(uses)) == len(bounds())
    assert use_rows(uses)[4][:5] == ("vibrations", "not fit", 5.01, 5.0, "1/cm")


def test_worst_of_heads() -> None:
    good, bad = judged(bounds()), judged(bounds() | {"profile_error_mev": 3.0, "volume_shift": None})
    joined = worst([good, bad])
    assert [use for use, entry in joined.items() if entry["fit"] is not True] == [
        "energy profiles",
        "equation of state",
    ]
    assert joined["energy profiles"]["criteria"]["profile_error_mev"]["value"] == 3.0


def test_reasons_are_stated() -> None:
    for criteria in USES.values():
        for criterion in criteria:
            assert criterion.bound > 0
            assert len(criterion.reason) > 20
