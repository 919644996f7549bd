"""The measures of uses (`gaq.checks.uses`) that a report can take cheaply."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.equation_of_state import equation_of_state
from gaq.checks.nve import NVEResult
from gaq.checks.relaxation import FORCE, minimum_change, relaxed
from gaq.checks.smoothness import SmoothnessResult
from gaq.checks.vibrations import frequencies, frequency_shifts
from gaq.progress import explained
from gaq.reporting.subject import Subject
from gaq.reporting.watched import watched

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["MOST_ATOMS", "of_minimum", "of_runs", "of_scan", "profile_error"]

MOST_ATOMS = 64
"""Most atoms of a structure that is optimised and whose frequencies are taken: these take six evaluations an atom."""

MOST_STEPS = 200
"""Most steps of an optimisation."""

MOST_FURTHER_STEPS = 30
"""Most steps from its end to a tenth of its force, for frequencies."""

HIGHEST = 1.0
"""Energy above the lowest point of a path, eV, up to which its error counts: 40 kT at 300 K, which nothing crosses."""


def of_minimum(subject: Subject, reference: Subject, atoms: Atoms, progress: bool = False) -> dict[str, float | None]:
    """Optimise the structure with both models, and compare minima, frequencies and, in a cell, the equation of state.

    Energies in float64 where that exists; optimisations and frequencies in the precision of the file, through the
    fused kernels, float models as well: stock's forward pass would take most of a report's time.
    """
    with explained("geometry optimisation by model and reference", progress):
        minimum, ideal = (relaxed(one.potential, atoms, MOST_STEPS) for one in (subject, reference))
    measures: dict[str, float | None] = {
        "force_left_ev_per_angstrom": minimum.force,
        "optimisation_steps": minimum.steps,
        "reference_optimisation_steps": ideal.steps,
    }
    if minimum.force > 0 and ideal.force > 0:
        change, energy = minimum_change(minimum.atoms, ideal.atoms, reference.exact)
        measures |= {"bond_length_change_angstrom": change, "minimum_energy_mev": energy}
    shifts = []
    for one, start, name in ((subject, minimum, "model"), (reference, ideal, "reference")):
        # At `FORCE` a methyl group that turns almost freely is degrees from its minimum, and its frequency is off.
        nearer = relaxed(one.potential, start.atoms, MOST_FURTHER_STEPS, 0.1 * FORCE).atoms
        shifts.append(frequencies(watched(one.potential, f"vibrations, {name}", progress), nearer))
    if len(shifts[0]) and np.any(shifts[1]):
        mean, worst = frequency_shifts(*shifts)
        measures |= {"mean_frequency_shift_per_cm": mean, "worst_frequency_shift_per_cm": worst}
    if atoms.pbc.all():
        states = [equation_of_state(one.exact, ideal.atoms) for one in (subject, reference)]
        if states[1] is not None:
            state = states[0] or (math.inf, math.inf)
            for place, name in enumerate(("volume_shift", "bulk_modulus_shift")):
                measures[name] = abs(state[place] / states[1][place] - 1.0)
    return measures


def of_scan(scan: SmoothnessResult | None) -> dict[str, float | None]:
    """The error of the profile of a bond-stretch scan."""
    if scan is None:
        return {}
    return {"profile_error_mev": profile_error(scan.energy_ev, scan.reference_energy_ev)}


def profile_error(energies: np.ndarray, reference: np.ndarray) -> float:
    """Largest error in meV of a profile within `HIGHEST` of its lowest point, at which both are zero."""
    lowest = int(np.argmin(reference))
    kept = reference - reference[lowest] <= HIGHEST
    return 1e3 * float(np.abs((energies - energies[lowest]) - (reference - reference[lowest]))[kept].max())


def of_runs(runs: Mapping[str, NVEResult]) -> dict[str, float | None]:
    """The difference of the drifts of two NVE runs, in standard errors; infinite where the model's breaks down."""
    model, reference = runs.get("model"), runs.get("reference")
    if model is None or reference is None:
        return {}
    if not model.stable:
        return {"drift_in_standard_errors": math.inf}
    # As for the gate: the model's own error bar would excuse the noise that widens it.
    error = math.sqrt(2) * reference.standard_error
    difference = abs(model.drift_mev_per_atom_per_ps - reference.drift_mev_per_atom_per_ps)
    if not math.isfinite(difference) or not error > 0:
        return {}
    return {"drift_in_standard_errors": difference / error}
