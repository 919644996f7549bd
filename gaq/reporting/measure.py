"""Measure a model and its reference on the same data. How each number is taken is decided here alone."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaq.checks.conservation import central_difference_error
from gaq.checks.errors import ForceDifference, LabelErrors, force_and_energy_mae, force_difference, spaced
from gaq.checks.labels import ENERGY_KEY, FORCES_KEY, check_keys, labels_of, left_out_labels
from gaq.checks.lee import local_equivariance_error
from gaq.checks.nve import NVEResult, nve_drift
from gaq.checks.potential import Potential
from gaq.checks.smoothness import NoBondError, SmoothnessResult, bond_stretch_scan
from gaq.checks.structures import away_from_rest, check_structures, rattled, without_single_atoms
from gaq.checks.uses import judged
from gaq.model.elements import SpeciesMap
from gaq.progress import explained
from gaq.reporting.cost import cost
from gaq.reporting.environment import hardware, versions
from gaq.reporting.gates import BOUNDS, CENTRAL_DIFFERENCE_STEP, FLOAT, evaluate_gates, float_error, quotient
from gaq.reporting.heads import joined, labelled_in
from gaq.reporting.subject import Subject, open_heads
from gaq.reporting.uses import MOST_ATOMS, of_minimum, of_runs, of_scan
from gaq.reporting.watched import watched
from gaq.untyped import Document

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Quality", "measure_file", "measure_subject", "quality"]

PLAIN_ATOMS = 128
"""Most atoms of the structures together on which the fused kernels are compared with the reference path, and the model
with naive rounding."""

MAX_REFERENCE_PATH_ATOMS = 500
"""Most atoms of a structure for the reference path, which holds the features of every edge in memory."""

LEAST_ROTATION_ERROR = 1e-9
"""Rotation error (meV/Å) below which an exactly equivariant model in float64 is at the level of its rounding."""


@dataclass(frozen=True)
class Quality:
    """Result of `quality`.

    Attributes:
        metrics: values under their names in ``report.json``; only those for which structures were given.
        labels: the errors with the forces they come from, for figures; None without labels.
    """

    metrics: Document
    labels: LabelErrors | None = None


def quality(
    subject: Subject,
    labelled: Sequence[Atoms] = (),
    rotated: Sequence[Atoms] = (),
    displaced: Sequence[Atoms] = (),
    rotations: int = 4,
    components: int = 6,
    steps: Sequence[float] = (0.1, 0.03, 0.01),
    seed: int = 0,
    energy_key: str = ENERGY_KEY,
    forces_key: str = FORCES_KEY,
    progress: bool = False,
    name: str = "model",
) -> Quality:
    """Measure errors against labels in the model's precision, and rotation error and central differences in float64.

    Args:
        subject: what to measure.
        labelled: structures for the errors; a metric is None if none of them has its labels.
        rotated: structures for the rotation error.
        displaced: structures for central differences.
        rotations: random rotations per structure.
        components: force components per structure.
        steps: displacements of central differences, Å.
        seed: seed of rotations and components.
        energy_key: key of the reference energy in ``info``.
        forces_key: key of the reference forces in ``arrays``.
        progress: whether to show progress bars.
        name: what they call the subject.
    """
    metrics: Document = {}
    labels = None
    if len(labelled):
        potential = watched(subject.potential, f"errors, {name}", progress)
        labels = _label_errors(potential, labelled, energy_key, forces_key)
        metrics["force_mae_mev_per_angstrom"] = labels.force_mae_mev_per_angstrom if labels else None
        metrics["force_rmse_mev_per_angstrom"] = labels.force_rmse_mev_per_angstrom if labels else None
        metrics["energy_mae_mev_per_atom"] = labels.energy_mae_mev_per_atom if labels else None
    if len(rotated):
        potential = watched(subject.exact, f"rotated structures, {name}", progress)
        error = local_equivariance_error(potential, rotated, rotations=rotations, seed=seed)
        metrics["lee_mev_per_angstrom"] = error.mean_mev_per_angstrom
    if len(displaced):
        potential = watched(subject.exact, f"central differences, {name}", progress)
        errors = central_difference_error(potential, displaced, steps, components, seed)
        metrics["central_difference_relative_error"] = {f"{h:g}": e.relative_error for h, e in errors.items()}
    return Quality(metrics, labels)


def measure_file(
    path: str | Path,
    structures: Sequence[Atoms],
    reference: str | Path | None = None,
    *,
    trained: bool = False,
    device: str = "cpu",
    species: SpeciesMap | None = None,
    head: str | None = None,
    **options: Any,
) -> Document:
    """Measure and judge a model file; of one with several heads, each of them.

    Args:
        path: the model.
        structures: structures, labelled or not.
        reference: the float model to compare with.
        trained: apply the bounds of models that were trained with their rounding.
        device: device to run on.
        species: see `gaq.api.load`.
        head: measure this head only. Without it, structures of a model with several heads are labelled for the head
            that their ``info["head"]`` names, and for no other.
        options: options of `measure_subject`.

    Returns:
        See `measure_subject`; for several heads, see `gaq.reporting.heads.joined`.

    Raises:
        ValueError: for a file that cannot be read, a head that it does not have, structures that the model does not
            know, a key of labels other than the default that no structure has, and as `measure_subject`.
    """
    keys = {name: options[name] for name in ("energy_key", "forces_key") if name in options}
    check_keys(structures, **{"energy_key": ENERGY_KEY, "forces_key": FORCES_KEY, **keys})
    subjects = open_heads(path, device, trained, structures, species, head)
    others = {} if reference is None else open_heads(reference, device, structures=structures, species=species)
    if len(others) == 1:  # of that head, whatever its name: a float model that was trained by itself
        others = dict.fromkeys(subjects, *others.values())
    if missing := [name for name in subjects if others and name not in others]:
        raise ValueError(f"{reference}: has no head {', '.join(map(str, missing))}, with which {path} is compared.")
    if len(subjects) == 1:
        ((name, subject),) = subjects.items()
        return {**measure_subject(subject, structures, others.get(name), **options), "head": head}
    of_heads, lines = labelled_in(structures, list(subjects), **keys)
    reports: dict[str, Document] = {}
    for name, measured in subjects.items():
        reports[name] = measure_subject(measured, of_heads[name], others.get(name), **options)
        if reports[name]["partial"]:
            break
    return joined(reports, lines)


def measure_subject(
    subject: Subject,
    structures: Sequence[Atoms],
    reference: Subject | None = None,
    *,
    nve_ps: float = 0.0,
    seed: int = 0,
    progress: bool = False,
    checked_structures: int = 8,
    gates_only: bool = False,
    keep_partial: bool = False,
    energy_key: str = ENERGY_KEY,
    forces_key: str = FORCES_KEY,
) -> Document:
    """Measure a model and its reference on the same data, and judge the model.

    Errors against labels use every structure that has them. All else leaves out structures of a single atom, on which
    forces are zero. Rotations and central differences, which cost dozens of evaluations per structure, use
    ``checked_structures`` of them, evenly spaced, with displaced atoms where they are at rest. The NVE run, the
    bond-stretch scan, the timing and the uses take the first structure. The force difference to the reference uses
    every structure with reference forces; where these are fewer, the spaced ones and a copy of each with displaced
    atoms, because forces on relaxed structures are zero.

    Args:
        subject: the model.
        structures: structures, labelled or not.
        reference: the unquantized model.
        nve_ps: length of the NVE runs, ps; 0 leaves them out.
        seed: seed of rotations, components, velocities.
        progress: show progress bars.
        checked_structures: number of structures for rotations and central differences.
        gates_only: measure what the gates judge and no more: not the time of a step, and of the reference only its
            errors and NVE run; no uses.
        keep_partial: on Ctrl-C, return what was measured, with the line ``partial``, instead of raising.
        energy_key: key of the reference energy in ``info``.
        forces_key: key of the reference forces in ``arrays``.

    Returns:
        ``model`` and ``reference`` (metrics; reference None if there is none), ``versions``, ``hardware``,
        ``command``, ``gates``, ``uses`` (`gaq.checks.uses.judged`; None for `gates_only`), ``partial`` (None, or a line
        that says where Ctrl-C stopped it), ``left_out`` (lines that say which labels and structures were not used, or
        not as they are), ``head`` (None; the one that `measure_file` was asked for), ``heads`` (None; see
        `gaq.reporting.heads.joined`), all of plain Python types; and ``figures``, arrays for
        `gaq.reporting.write_report`, which are not part of ``report.json``.

    Raises:
        ValueError: if there are no structures of several atoms, one is refused by
            `gaq.checks.structures.check_structures`, a file is missing, or the preset is unknown.
    """
    check_structures(structures)
    left_out = left_out_labels(structures, energy_key, forces_key)
    several_atoms, lines = without_single_atoms(structures)
    if subject.preset not in (*BOUNDS, FLOAT):
        raise ValueError(f"measure: no gates for preset {subject.preset!r}; nearest of: {', '.join(BOUNDS)}")
    keys = (energy_key, forces_key)
    subjects = {"model": subject, **({"reference": reference} if reference else {})}
    for measured in subjects.values():
        if measured.path is None or not Path(measured.path).is_file():
            raise ValueError(f"measure: model file {measured.path} does not exist; its size is part of the report")
    checked, at_rest = away_from_rest(
        subject.potential, spaced(several_atoms, max(1, checked_structures)), seed, energy_key, forces_key
    )
    results = _Results({name: _of_file(measured) for name, measured in subjects.items()})
    results.metrics["model"] |= {
        "preset": subject.preset,
        "training": subject.training,
        "rounds_features": subject.rounds_features,
        "not_applicable": [] if subject.engine_error is not None else ["engine"],
    }
    try:
        for name, measured in subjects.items():
            checks = () if gates_only and measured is reference else checked
            _by_itself(results, name, measured, structures, checks, seed, progress, gates_only, keys)
        _against_reference(results, subject, reference, checked, keys, seed, progress)
        if reference is not None and not gates_only:
            results.doing = "measuring uses"
            _uses(results, subject, reference, several_atoms[0], progress)
        if nve_ps > 0:  # last, because it takes longest
            _simulate(results, subjects, several_atoms[0], nve_ps, seed, progress)
    except KeyboardInterrupt:
        if not keep_partial:
            raise
        results.stopped = True
    metrics = results.metrics
    gates = evaluate_gates(metrics["model"], subject.preset, metrics.get("reference"))
    uses = None if gates_only else judged({**results.uses, **of_scan(results.scan), **of_runs(results.runs)})
    return {
        "model": metrics["model"],
        "reference": metrics.get("reference"),
        "versions": versions(),
        "hardware": hardware(),
        "command": shlex.join(sys.argv),
        "gates": {name: gate.to_dict() for name, gate in gates.items()},
        "uses": uses,
        "partial": f"stopped while {results.doing}; what follows was not measured" if results.stopped else None,
        "left_out": [*left_out, *lines, *at_rest],
        "head": None,
        "heads": None,
        "figures": {"labels": results.labels, "nve": results.runs, "scan": results.scan},
    }


@dataclass
class _Results:
    """What a measurement has come to.

    Attributes:
        metrics: of ``model`` and ``reference``, under their names in ``report.json``.
        doing: what is being measured.
        stopped: whether Ctrl-C ended it.
        labels: errors against labels, for figures.
        runs: NVE runs.
        scan: bond-stretch scan.
        uses: measures of uses.
    """

    metrics: dict[str, Document]
    doing: str = "beginning"
    stopped: bool = False
    labels: dict[str, LabelErrors] = field(default_factory=dict)
    runs: dict[str, NVEResult] = field(default_factory=dict)
    scan: SmoothnessResult | None = None
    uses: dict[str, float | None] = field(default_factory=dict)


def _by_itself(
    results: _Results,
    name: str,
    subject: Subject,
    structures: Sequence[Atoms],
    checked: Sequence[Atoms],
    seed: int,
    progress: bool,
    gates_only: bool,
    keys: tuple[str, str],
) -> None:
    """Measure the errors, symmetry and cost of one model; see `measure_subject`."""
    first = without_single_atoms(structures)[0][0]
    metrics = results.metrics[name]
    steps = (CENTRAL_DIFFERENCE_STEP,) if gates_only else (0.1, 0.03, CENTRAL_DIFFERENCE_STEP)
    options: dict[str, Any] = {"seed": seed, "progress": progress, "name": name}
    results.doing = f"measuring errors of the {name}"
    result = quality(subject, structures, energy_key=keys[0], forces_key=keys[1], **options)
    metrics |= result.metrics
    if result.labels is not None:
        results.labels[name] = result.labels
    results.doing = f"measuring rotations and central differences of the {name}"
    metrics |= quality(subject, rotated=checked, **options).metrics
    metrics |= quality(subject, displaced=checked, steps=steps, **options).metrics
    if not gates_only:
        results.doing = f"timing the {name}"
        metrics["seconds_per_step"], metrics["peak_bytes"] = cost(subject.calculator, first, seed, progress)


def _simulate(
    results: _Results, subjects: dict[str, Subject], atoms: Atoms, nve_ps: float, seed: int, progress: bool
) -> None:
    """Run the models without thermostat."""
    for name, subject in subjects.items():
        results.doing = f"simulating with the {name}"
        run = nve_drift(
            subject.calculator, atoms, duration_ps=nve_ps, seed=seed, progress=progress, description=f"NVE, {name}"
        )
        results.runs[name] = run
        results.metrics[name]["nve"] = {key: _unless_nan(getattr(run, key)) for key in _OF_RUNS}


def _uses(results: _Results, subject: Subject, reference: Subject, atoms: Atoms, progress: bool) -> None:
    """Take the measures of uses that are cheap: of a small first structure."""
    if len(atoms) <= MOST_ATOMS:
        results.uses |= of_minimum(subject, reference, atoms, progress)


def _label_errors(
    potential: Potential, structures: Sequence[Atoms], energy_key: str, forces_key: str
) -> LabelErrors | None:
    """Measure errors against labels; None if no structure is labelled."""
    if not any(labels_of(structure, energy_key, forces_key).any for structure in structures):
        return None
    return force_and_energy_mae(potential, structures, energy_key, forces_key)


_OF_RUNS = ("drift_mev_per_atom_per_ps", "standard_error", "drift_over_std_kinetic", "stable", "reason")
"""Fields of an NVE run that are metrics."""


def _of_file(subject: Subject) -> Document:
    """Kind and sizes of a file, and no NVE run so far."""
    return {
        "path": subject.path,
        "nve": None,
        "file_kind": subject.file_kind,
        "file_bytes": subject.file_bytes,
        "weight_bytes": subject.weight_bytes,
    }


def _unless_nan(value: object) -> object:
    """None for the NaN of an NVE run without a number: too few samples, or no forces. `stable` tells which it was."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _against_reference(
    results: _Results,
    subject: Subject,
    reference: Subject | None,
    checked: Sequence[Atoms],
    keys: tuple[str, str],
    seed: int,
    progress: bool,
) -> None:
    """Take the metrics of the model that need its reference or its plain operations, and the bond-stretch scan."""
    metrics = results.metrics["model"]
    metrics |= {"force_difference": None, "smoothness": None}
    if reference is not None:
        results.doing = "comparing forces with the reference"
        fp32 = results.metrics["reference"]
        metrics["force_difference"] = _difference(
            subject, reference, checked, results.labels, fp32, keys, seed, progress
        )
        results.doing = "stretching a bond"
        try:
            exact = [watched(one.exact, "bond stretched", progress) for one in (subject, reference)]
            scan = bond_stretch_scan(exact[0], checked[0], exact[1])
        except NoBondError:
            metrics["not_applicable"].append("bond_stretch")
        else:
            metrics["smoothness"] = {"largest_jump_mev": None, "allowed_mev": None}
            if not scan.nothing_measured:
                results.scan = scan
                metrics["smoothness"] = {"largest_jump_mev": scan.largest_jump_mev, "allowed_mev": scan.allowed_mev}
    results.doing = "comparing with plain operations"
    metrics |= _against_plain_operations(subject, reference, checked, seed, progress)


def _difference(
    subject: Subject,
    reference: Subject,
    checked: Sequence[Atoms],
    labels: dict[str, LabelErrors],
    fp32: Document,
    keys: tuple[str, str],
    seed: int,
    progress: bool,
) -> Document:
    """Difference of the forces of model and reference, as a metric; see `measure_subject` for the structures."""
    if labels and labels["model"].structures >= len(checked):
        model, exact = labels["model"], labels["reference"]
        measured = ForceDifference.between(model.force_predictions, exact.force_predictions, model.structures)
        if float_error(asdict(measured), fp32) is not None:
            return asdict(measured)
    samples = [*checked, *rattled(checked, seed, *keys)]
    potentials = [watched(one.potential, "difference of forces", progress) for one in (subject, reference)]
    return asdict(force_difference(potentials[0], potentials[1], samples))


def _against_plain_operations(
    subject: Subject, reference: Subject | None, checked: Sequence[Atoms], seed: int, progress: bool
) -> dict[str, float | None]:
    """Compare the errors of fused kernels and reference path, and the rotation errors of naive rounding and model."""
    small = [atoms for atoms in checked if len(atoms) <= MAX_REFERENCE_PATH_ATOMS]
    # A difference of powers of ten shows on a few atoms, and the reference path is slow.
    few = [atoms for n, atoms in enumerate(small) if n == 0 or sum(map(len, small[: n + 1])) <= PLAIN_ATOMS][:4]
    ratios: dict[str, float | None] = {"engine_error_ratio": None, "lee_naive_ratio": None}
    if subject.preset == FLOAT or not few:
        return ratios
    if subject.engine_error is not None:
        with explained("fused kernels against plain operations in float64, which are slow", progress):
            ratios["engine_error_ratio"] = subject.engine_error(few)
    if reference is not None and reference.naive is not None:
        try:
            with explained("making a naively rounded twin of the float model, to compare with", progress):
                twin = reference.naive(few)
        except ValueError:  # a model that cannot be quantized: the gate reads "not measured"
            return ratios
        errors = [
            local_equivariance_error(
                watched(potential, "rotated structures, naive rounding", progress), few, seed=seed
            ).mean_mev_per_angstrom
            for potential in (twin, subject.exact)
        ]
        if errors[0] is not None:  # None where no force acts on any atom
            ratios["lee_naive_ratio"] = quotient(errors[0], max(errors[1] or 0.0, LEAST_ROTATION_ERROR))
    return ratios
