"""What users do with a potential, and how near to its float model a quantized one must be for each use.

The float model is the measure: whether that one is right is a matter of its training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gaq.checks.relaxation import FORCE
from gaq.untyped import Document, ReadOnlyDocument

__all__ = ["USES", "Criterion", "fitness_line", "judged", "use_rows", "worst"]


@dataclass(frozen=True)
class Criterion:
    """Largest value of a measure with which a model is fit for a use.

    Attributes:
        measure: name of the measure, with its unit.
        bound: the largest value.
        unit: of both, as it is printed; empty for ratios.
        what: what is measured.
        reason: why the bound is what it is.
    """

    measure: str
    bound: float
    unit: str
    what: str
    reason: str


USES: dict[str, tuple[Criterion, ...]] = {
    "geometry optimisation": (
        Criterion(
            "force_left_ev_per_angstrom",
            FORCE,
            "eV/Å",
            "largest force where the optimisation ends",
            "the usual bound of a tight optimisation; a staircase of energies would not let it end",
        ),
        Criterion(
            "bond_length_change_angstrom",
            1e-3,
            "Å",
            "largest change of a bond length",
            "bond lengths are quoted to 0.001 Å; density functionals differ by ten times that",
        ),
        Criterion(
            "minimum_energy_mev",
            1.0,
            "meV",
            "energy of the minimum found above the float model's own, in the float model",
            "kT/26 at 300 K: the populations of two minima change by 4 % at most",
        ),
    ),
    "vibrations": (
        Criterion(
            "mean_frequency_shift_per_cm",
            1.0,
            "1/cm",
            "mean shift of harmonic frequencies",
            "frequencies are quoted to 1/cm, and spectrometers resolve 1 to 4 of them",
        ),
        Criterion(
            "worst_frequency_shift_per_cm",
            5.0,
            "1/cm",
            "largest shift of a harmonic frequency",
            "a line that moves by more than a spectrometer resolves may be assigned to its neighbour",
        ),
    ),
    "energy profiles": (
        Criterion(
            "profile_error_mev",
            2.6,
            "meV",
            "largest change of the energy along a path, from its lowest point",
            "kT/10 at 300 K: a rate or a population changes by 10 %",
        ),
    ),
    "equation of state": (
        Criterion(
            "volume_shift",
            1e-3,
            "",
            "relative change of the equilibrium volume",
            "0.03 % of a lattice constant: well-converged DFT codes differ by as much",
        ),
        Criterion(
            "bulk_modulus_shift",
            0.01,
            "",
            "relative change of the bulk modulus",
            "well-converged DFT codes differ by 1 %, experiments by more",
        ),
    ),
    "constant-energy dynamics": (
        Criterion(
            "drift_in_standard_errors",
            3.0,
            "standard errors",
            "difference of the drift of the energy to the float model's, in standard errors of that difference",
            "three standard errors are exceeded by chance in 0.3 % of runs; infinite for a run that breaks down",
        ),
    ),
    "structure at 300 K": (
        Criterion(
            "distances_moved_beside_seeds",
            2.0,
            "",
            "share of distances that lie elsewhere than in the float model's simulation, over that of two of its runs",
            "the float model's own runs differ by what a finite run samples; twice that leaves room for its scatter",
        ),
    ),
}
"""Criteria of each use; a model is fit for it if all hold."""

NEEDS: dict[str, str] = {
    "geometry optimisation": "a reference model, and a first structure of at most 64 atoms",
    "vibrations": "a reference model, and a first structure of at most 64 atoms",
    "energy profiles": "a reference model, and a bond to stretch",
    "equation of state": "a reference model, and a periodic first structure near its equilibrium volume",
    "constant-energy dynamics": "an NVE run of model and reference (--nve-ps)",
    "structure at 300 K": "simulations of some hundred ps beside the float model's",
}
"""What a report needs to judge a use."""


def judged(measures: Mapping[str, float | None]) -> Document:
    """Judge a model for each use.

    Args:
        measures: values by the names of `Criterion.measure`; missing or None where nothing was measured.

    Returns:
        For each use ``fit`` (None unless all its measures were taken or one fails), ``criteria`` with ``value``,
        ``bound``, ``unit``, ``holds`` and ``what`` by measure, and ``needs``, what would be needed; None if judged.
    """
    uses: Document = {}
    for use, criteria in USES.items():
        judgements: Document = {}
        for criterion in criteria:
            value = measures.get(criterion.measure)
            judgements[criterion.measure] = {
                "value": value,
                "bound": criterion.bound,
                "unit": criterion.unit,
                "holds": None if value is None else math.isfinite(value) and value <= criterion.bound,
                "what": criterion.what,
            }
        held = [entry["holds"] for entry in judgements.values()]
        fit = False if False in held else None if None in held else True
        uses[use] = {"fit": fit, "criteria": judgements, "needs": NEEDS[use] if fit is None else None}
    return uses


def worst(models: Sequence[ReadOnlyDocument]) -> Document:
    """Join the verdicts of several heads: of each use that of a head that is not fit, or else was not judged."""
    order = (False, None, True)
    return {use: min((model[use] for model in models), key=lambda entry: order.index(entry["fit"])) for use in USES}


def fitness_line(uses: ReadOnlyDocument) -> str:
    """Say in one line for which uses a model is fit, for which not, and which were not shown, given `judged`."""
    names = {fit: [use for use, entry in uses.items() if entry["fit"] is fit] for fit in (True, False, None)}
    parts = [f"fit for: {', '.join(names[True]) or 'nothing measured'}"]
    if names[False]:
        parts.append(f"not fit for: {', '.join(names[False])}")
    if names[None]:
        parts.append(f"not shown: {', '.join(names[None])}")
    return "; ".join(parts)


def use_rows(uses: ReadOnlyDocument) -> list[tuple[str, str, float | None, float, str, str]]:
    """Use, verdict, value, bound, unit and what is measured, of each criterion, given `judged`."""
    words = {True: "fit", False: "not fit", None: "not shown"}
    return [
        (use, words[entry["fit"]], one["value"], one["bound"], one["unit"], one["what"])
        for use, entry in uses.items()
        for one in entry["criteria"].values()
    ]
