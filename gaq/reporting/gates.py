"""Gates: pass-or-fail bounds on the measured quality of a quantized potential."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from gaq.checks.accuracy import ERROR_GROWTH, LOWEST_FLOAT_ERROR, difference_of_growth
from gaq.untyped import Document, ReadOnlyDocument

Metrics = ReadOnlyDocument

NOTHING = (
    "no force acts on any atom of the structures, so there is nothing to measure; give structures whose atoms are "
    "within the model's cutoff of each other"
)
"""What a check needs that was made and found nothing: its metric is there, and is None."""


@dataclass(frozen=True)
class Gate:
    """One bound and whether it holds.

    Attributes:
        name: key of the gate.
        value: measured value; None if it was not measured; infinite if the check ran and broke down. A value that is
            NaN or infinite never passes.
        bound: the bound; None if it depends on something that was not measured.
        passed: whether ``value comparison bound``; None if not measured, or not comparable.
        unit: unit of value and bound; empty for ratios.
        note: what is compared, or what to do to measure it.
        comparison: ``"<="``, ``"<"`` or ``">="``.
        enforced: False for bounds that are printed but do not fail a model of this preset.
    """

    name: str
    value: float | None
    bound: float | None
    passed: bool | None
    unit: str
    note: str
    comparison: str = "<="
    enforced: bool = True

    def to_dict(self) -> Document:
        """Return the gate as it stands in ``report.json``, under its name."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


@dataclass(frozen=True)
class _Bounds:
    """Bounds of one preset. Central differences are those at h = 0.01 Å."""

    force_mae_ptq: float | None
    force_mae_qat: float
    file_size: float
    physics_enforced: bool
    accuracy_enforced: bool = True
    lee: float = 0.15
    lee_against_naive: float = 30.0
    central_difference: float = 0.01
    drift_over_std_kinetic: float = 1.0
    engine_error: float = 2.0


# Presets with no first bound need training: post-training quantization is compared with the second bound, and a
# failure is printed but not enforced; the bound on the force difference, which ruined models exceed, is.
BOUNDS: dict[str, _Bounds] = {
    "gaq": _Bounds(ERROR_GROWTH, 1.00, 4.0, physics_enforced=True),
    "w8a16": _Bounds(ERROR_GROWTH, 1.00, 4.0, physics_enforced=True),
    "w8": _Bounds(ERROR_GROWTH, 1.00, 4.0, physics_enforced=True),
    "w4a16": _Bounds(None, 1.00, 7.0, physics_enforced=True),
    "w4": _Bounds(None, 1.00, 7.0, physics_enforced=True),
    "w8a8": _Bounds(None, 1.05, 4.0, physics_enforced=False),
    "w4a8": _Bounds(None, 1.05, 7.0, physics_enforced=False),
    "naive_w8a8": _Bounds(None, 1.05, 4.0, physics_enforced=False, accuracy_enforced=False),
}
"""Bounds by preset: all that `evaluate_gates` applies."""

CENTRAL_DIFFERENCE_STEP = 0.01
"""Step (Å) at which the central-difference gate is judged."""

HIGHEST_FLOAT_ERROR = 0.1
"""RMS force error over RMS force that a float model in use may have: twice that of the least accurate one there."""

OWN_LABELS = 1e-4
"""RMS force error over RMS force below which labels are the float model's own output, written to a file."""

TITLES = {
    "finite": "Numbers are finite",
    "force_mae_ratio": "Force error beside the float model's",
    "force_difference": "Force difference to the float model",
    "lee": "Force error under rotations",
    "lee_against_naive": "Rotations, beside naive rounding",
    "central_difference": "Forces are the energy's gradient",
    "nve_drift": "Energy is conserved",
    "nve_drift_against_reference": "Energy drift beside the float model's",
    "bond_stretch": "Energy is smooth along a bond",
    "engine": "Fused kernels are exact",
    "file_size_ratio": "Times smaller",
}
"""Names of gates in words."""

COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda value, bound: value <= bound,
    "<": lambda value, bound: value < bound,
    ">=": lambda value, bound: value >= bound,
}
"""What the comparisons of gates mean."""


FLOAT = "float"
"""Stands for the preset of a model that is not quantized; no gates apply to it."""

NAIVE = "naive_w8a8"
"""Preset that ``lee_against_naive`` compares with."""


def evaluate_gates(results: Metrics, preset: str, reference: Metrics | None = None) -> dict[str, Gate]:
    """Judge the measured metrics of one model.

    Args:
        results: metrics under the names of ``report.json`` (`gaq.reporting.measure`), with ``training`` (``"ptq"``,
            the default, or ``"qat"``) and ``not_applicable``, names of gates that nothing can measure on this model.
        preset: a name in `BOUNDS`, or `FLOAT`.
        reference: the same metrics of the unquantized model on the same data.

    Returns:
        Every gate by name, without those that are not applicable. A gate whose inputs are missing, or cannot be
        compared, has ``passed`` None and says what to supply. A float model has no gates, unless a metric of it is NaN
        or infinite: then it fails the gate ``finite``.

    Raises:
        ValueError: if the preset or ``training`` is unknown.
    """
    finite = _finite_gate(results, reference)
    if preset == FLOAT:
        return {} if finite.passed else {finite.name: finite}
    if preset not in BOUNDS:
        raise ValueError(f"no gates for preset {preset!r}; use the nearest of {', '.join(BOUNDS)}")
    training = results.get("training") or "ptq"
    if training not in ("ptq", "qat"):
        raise ValueError(f"training is {training!r}; it must be 'ptq' or 'qat'")
    bounds = BOUNDS[preset]
    fp32: Metrics = reference or {}
    gates = (
        finite,
        _accuracy_gate(results, fp32, bounds, training),
        _difference_gate(results, fp32, bounds, training),
        *_symmetry_gates(results, bounds),
        *_energy_gates(results, fp32, bounds),
        _gate(
            "engine",
            results.get("engine_error_ratio"),
            bounds.engine_error,
            "error of the fused kernels over that of the reference path, both in float32 against float64",
            NOTHING
            if _no_force(results)
            else "needs a float32 model that runs through the fused kernels here; nequip-deploy checks compiled files",
            # A feature near a threshold may round to either side in both paths, which changes the ratio at random.
            enforced=not results.get("rounds_features"),
        ),
        _size_gate(results, fp32, bounds),
    )
    not_applicable = results.get("not_applicable") or ()
    return {gate.name: gate for gate in gates if gate.name not in not_applicable}


def failed_gates(gates: Mapping[str, Gate | ReadOnlyDocument]) -> list[str]:
    """Return the names of the enforced gates that failed, given gates or their form in ``report.json``."""
    plain = {name: gate.to_dict() if isinstance(gate, Gate) else gate for name, gate in gates.items()}
    return [name for name, gate in plain.items() if gate["enforced"] and gate["passed"] is False]


def unmeasured(gates: Mapping[str, ReadOnlyDocument]) -> dict[str, str]:
    """Return by name what each gate that was not measured needs, given gates as in ``report.json``."""
    return {name: gate["note"].partition(": ")[2] for name, gate in gates.items() if gate["passed"] is None}


def summary(gates: Mapping[str, ReadOnlyDocument]) -> str:
    """Say in one sentence how many gates were measured and which failed, given gates as in ``report.json``."""
    measured = [name for name, gate in gates.items() if gate["passed"] is not None]
    failed = failed_gates(gates)
    printed = [name for name in measured if gates[name]["passed"] is False and name not in failed]
    text = f"{len(measured)} of {len(gates)} gates measured"
    text += f"; failed: {', '.join(failed)}" if failed else ", none failed" if len(measured) > 0 else ""
    return text + (f"; missed, but not enforced for this preset: {', '.join(printed)}" if printed else "")


def passes_all(gates: Mapping[str, ReadOnlyDocument]) -> bool:
    """Whether every gate was measured and passed, the printed ones included."""
    return bool(gates) and all(gate["passed"] is True for gate in gates.values())


def title_of(name: str) -> str:
    """The name of a gate in words, given its name in a report, which may end in that of a head in parentheses."""
    gate, space, head = name.partition(" ")
    return TITLES.get(gate, gate) + space + head


def verdict(gate: ReadOnlyDocument) -> str:
    """Return ``pass``, ``fail``, ``not measured`` or ``not comparable`` for a gate as in ``report.json``."""
    if gate["passed"] is None:
        return str(gate["note"]).partition(":")[0]
    return "pass" if gate["passed"] else "fail"


def _gate(
    name: str,
    value: float | None,
    bound: float | None,
    note: str,
    missing: str,
    unit: str = "",
    comparison: str = "<=",
    enforced: bool = True,
) -> Gate:
    passed = None
    if value is not None and bound is not None:
        passed = math.isfinite(value) and bool(COMPARE[comparison](value, bound))  # False for a bound that is NaN
    text = f"not measured: {missing}" if passed is None else note
    return Gate(name, value, bound, passed, unit, text, comparison, enforced)


def _not_finite(value: object, name: str) -> list[str]:
    """Return the paths of all numbers in a value that are NaN or infinite."""
    if isinstance(value, Mapping):
        return [path for key, item in value.items() for path in _not_finite(item, f"{name}.{key}")]
    return [name] if isinstance(value, float) and not math.isfinite(value) else []


def _finite_gate(results: Metrics, reference: Metrics | None) -> Gate:
    broken = _not_finite(results, "model") + _not_finite(reference or {}, "reference")
    note = f"NaN or infinite: {', '.join(broken)}" if broken else "measured values that are NaN or infinite"
    return _gate("finite", len(broken), 0, note, "")


def _no_force(results: Metrics) -> bool:
    """Whether structures were rotated, and no force acted on any atom."""
    return results.get("lee_mev_per_angstrom", 0.0) is None


def _still(difference: Metrics) -> bool:
    """Whether both models are without forces on the structures of the metric ``force_difference``."""
    return bool(difference["force_rms_mev_per_angstrom"] == difference["rms_mev_per_angstrom"] == 0.0)


def float_error(difference: Metrics | None, fp32: Metrics) -> float | None:
    """Return the float model's own RMS force error in meV/Å; None without labels, or if the labels are its own output.

    Structures from a simulation that were written with energies and forces carry such labels.

    Args:
        difference: the metric ``force_difference``; without it labels cannot be told from the model's own output.
        fp32: metrics of the float model.
    """
    error = fp32.get("force_rmse_mev_per_angstrom")
    if error is None or difference is None or error <= OWN_LABELS * difference["force_rms_mev_per_angstrom"]:
        return None
    return float(error)


def _accuracy_gate(results: Metrics, fp32: Metrics, bounds: _Bounds, training: str) -> Gate:
    has_bound = training == "qat" or bounds.force_mae_ptq is not None
    ratio = quotient(results.get("force_mae_mev_per_angstrom"), fp32.get("force_mae_mev_per_angstrom"))
    difference = results.get("force_difference")
    still = difference is not None and _still(difference)
    if still or (difference is not None and float_error(difference, fp32) is None):
        ratio = None
    missing = "needs a reference model and labelled structures, with labels that are not that model's own output"
    return _gate(
        "force_mae_ratio",
        ratio,
        bounds.force_mae_qat if training == "qat" or bounds.force_mae_ptq is None else bounds.force_mae_ptq,
        f"force MAE over that of the reference model on the same data ({training})",
        NOTHING if still else missing,
        enforced=bounds.accuracy_enforced and has_bound,
    )


def _difference_gate(results: Metrics, fp32: Metrics, bounds: _Bounds, training: str) -> Gate:
    """Judge the force difference to the reference model, which needs no labels.

    Rounding errors are independent of the model's own error E, so both add in quadrature: the force error grows by a
    factor r when the difference is ``sqrt(r² - 1) E``, 0.2 E for r = 1.02. Without labels E is unknown, and
    `LOWEST_FLOAT_ERROR` of the RMS force stands for it.

    Two models that were trained apart differ by their own errors, at most ``E + r E``; `HIGHEST_FLOAT_ERROR` of the RMS
    force stands for E where that is larger, or where there are no labels. This is the bound of trained models, and of
    presets whose force error is only printed: it tells a ruined model from an inexact one.
    """
    difference = results.get("force_difference")
    missing = "needs a reference model"
    if difference is None:
        return _gate("force_difference", None, None, "", missing, unit="meV/Å")
    error, force = float_error(difference, fp32), difference["force_rms_mev_per_angstrom"]
    if _still(difference):
        return _gate("force_difference", None, None, "", NOTHING, unit="meV/Å")
    if bounds.force_mae_ptq is not None and training == "ptq":
        factor, share, only_ruin = difference_of_growth(bounds.force_mae_ptq), LOWEST_FLOAT_ERROR, False
    else:
        factor, share, only_ruin = 1.0 + bounds.force_mae_qat, HIGHEST_FLOAT_ERROR, True
    if error is None or (only_ruin and error < share * force):
        error, of_what = share * force, f"{100 * factor * share:.2g} % of the RMS force of {force:.4g} meV/Å"
    else:
        of_what = f"{factor:.2g} times the reference's own RMS force error"
    note = f"RMS force difference to the reference model on {difference['structures']} structures; bound: {of_what}"
    return _gate("force_difference", difference["rms_mev_per_angstrom"], factor * error, note, missing, unit="meV/Å")


def _symmetry_gates(results: Metrics, bounds: _Bounds) -> tuple[Gate, ...]:
    return (
        _gate(
            "lee",
            results.get("lee_mev_per_angstrom"),
            bounds.lee,
            "force error under random rotations",
            NOTHING if _no_force(results) else "needs structures",
            unit="meV/Å",
            enforced=bounds.physics_enforced,
        ),
        _gate(
            "lee_against_naive",
            results.get("lee_naive_ratio"),
            bounds.lee_against_naive,
            f"rotation error of {NAIVE} made of the reference model over this model's, on the same structures",
            NOTHING
            if _no_force(results)
            else f"needs a float reference model to make {NAIVE} of, and structures that its plain operations can hold",
            comparison=">=",
            enforced=bounds.physics_enforced,
        ),
    )


def _energy_gates(results: Metrics, fp32: Metrics, bounds: _Bounds) -> tuple[Gate, ...]:
    nve, nve_fp32 = results.get("nve") or {}, fp32.get("nve") or {}
    unstable = nve.get("stable") is False
    reason = nve.get("reason") or "NaN, explosion or a broken bond"
    note = "drift over the run against the spread of the kinetic energy"
    difference, drift_bound = None, _drift_bound(nve_fp32)
    if nve.get("drift_mev_per_atom_per_ps") is not None and drift_bound is not None:
        difference = abs(nve["drift_mev_per_atom_per_ps"] - nve_fp32["drift_mev_per_atom_per_ps"])
    errors, smoothness = results.get("central_difference_relative_error") or {}, results.get("smoothness") or {}
    still = bool(nve) and not unstable and nve.get("drift_over_std_kinetic") is None
    return (
        _gate(
            "central_difference",
            _at_step(errors, CENTRAL_DIFFERENCE_STEP),
            bounds.central_difference,
            f"relative force error against central differences, h = {CENTRAL_DIFFERENCE_STEP} Å",
            NOTHING if None in errors.values() else f"needs central differences at h = {CENTRAL_DIFFERENCE_STEP} Å",
            enforced=bounds.physics_enforced,
        ),
        _gate(
            "nve_drift",
            math.inf if unstable else nve.get("drift_over_std_kinetic"),
            bounds.drift_over_std_kinetic,
            f"the run was not stable: {reason}" if unstable else note,
            NOTHING if still else "needs an NVE run (a length above 0 ps)",
            comparison="<",
            enforced=bounds.physics_enforced,
        ),
        _gate(
            "nve_drift_against_reference",
            math.inf if unstable and drift_bound is not None else difference,
            drift_bound,
            "difference to the reference model's drift; bound: 2 √2 standard errors of the reference",
            NOTHING if still and nve_fp32 else "needs NVE runs of model and reference",
            unit="meV/atom/ps",
            enforced=bounds.physics_enforced,
        ),
        _gate(
            "bond_stretch",
            smoothness.get("largest_jump_mev"),
            smoothness.get("allowed_mev"),
            "largest step of a bond-stretch scan against the reference's curvature",
            NOTHING if smoothness else "needs a reference model and a bond to stretch",
            unit="meV",
            enforced=bounds.physics_enforced,
        ),
    )


FILE_KINDS = {
    "model": "a model file of MACE",
    "package": "a package of NequIP with the weights as they are used: codes, or those of a float model",
    "compiled": "a compiled file of NequIP; most of it is code",
    "checkpoint": "a checkpoint of NequIP: float weights, whatever the model, and the state of its training",
    "package of float weights": "a package that the stock command made of a checkpoint of a quantized model",
}
"""Kinds of files that adapters know. Files of the same kind are compared by size, unless they hold float weights."""

_FLOAT_WEIGHTS = ("checkpoint", "package of float weights")


def _size_gate(results: Metrics, fp32: Metrics, bounds: _Bounds) -> Gate:
    """Compare what two compiled files hold, the sizes of other files of one kind, bytes of weights, or nothing."""
    kind, reference_kind = results.get("file_kind"), fp32.get("file_kind")

    def gate(key: str, note: str) -> Gate:
        ratio = quotient(fp32.get(key), results.get(key))
        missing = "needs a reference model file"
        return _gate("file_size_ratio", ratio, bounds.file_size, note, missing, comparison=">=")

    if kind == reference_kind == "compiled" and results.get("weight_bytes") and fp32.get("weight_bytes"):
        # Code, sources and symbols are most of such a file, and depend on the version of torch.
        return gate("weight_bytes", "constants in the reference's compiled file over those in this one")
    if not fp32 or (kind == reference_kind and kind not in _FLOAT_WEIGHTS):
        return gate("file_bytes", "reference file size over this file's")
    if "compiled" not in (kind, reference_kind) and results.get("weight_bytes") and fp32.get("weight_bytes"):
        note = f"float weights of the reference ({reference_kind}) over codes and scales of this {kind}"
        return gate("weight_bytes", note)
    note = (
        f"not comparable: the size of a {kind} with that of a {reference_kind}; give as reference the FP32 model "
        "compiled by nequip-compile or, for a package, packaged by nequip-package"
    )
    return Gate("file_size_ratio", None, bounds.file_size, None, "", note, ">=", enforced=False)


def quotient(numerator: float | None, denominator: float | None) -> float | None:
    """Return the ratio; None if a number was not measured, 1 for two zeros."""
    if numerator is None or denominator is None:
        return None
    if denominator == 0:
        return 1.0 if numerator == 0 else math.inf
    return float(numerator) / float(denominator)


def _at_step(errors: Mapping[str, float | None] | Mapping[float, float | None], step: float) -> float | None:
    """Return the entry whose key, a number or its text, equals the step."""
    for key, value in errors.items():
        if math.isclose(float(key), step):
            return value
    return None


def _drift_bound(nve_fp32: Metrics) -> float | None:
    """Return the largest difference of drifts that two runs of the reference would show, meV/atom/ps.

    Two independent runs with standard error σ differ by √2 σ; twice that covers 95 %. The quantized model's error bar
    is left out on purpose: rounding noise would widen it and so excuse the drift that the noise causes.
    """
    error = nve_fp32.get("standard_error")
    if error is None or nve_fp32.get("drift_mev_per_atom_per_ps") is None or not math.isfinite(error):
        return None
    return 2 * math.sqrt(2) * float(error)
