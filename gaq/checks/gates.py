"""Pass-or-fail bounds on the measured quality of a quantized potential."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Gate:
    """One bound and whether it holds.

    Attributes:
        name: key of the gate.
        value: measured value; None if it was not measured; infinite if the check ran and broke down.
        bound: the bound; None if it depends on something that was not measured.
        passed: whether ``value comparison bound``; None if not measured.
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


# These presets need training: where the first bound is None, post-training quantization is held to the
# second, but only in print.
BOUNDS: dict[str, _Bounds] = {
    "gaq": _Bounds(1.02, 1.00, 4.0, physics_enforced=True),
    "w8a16": _Bounds(1.02, 1.00, 4.0, physics_enforced=True),
    "w8": _Bounds(1.02, 1.00, 4.0, physics_enforced=True),
    "w4a16": _Bounds(None, 1.00, 7.0, physics_enforced=True),
    "w4": _Bounds(None, 1.00, 7.0, physics_enforced=True),
    "w8a8": _Bounds(None, 1.05, 4.0, physics_enforced=False),
    "w4a8": _Bounds(None, 1.05, 7.0, physics_enforced=False),
    "naive_w8a8": _Bounds(None, 1.05, 4.0, physics_enforced=False, accuracy_enforced=False),
}
"""One row a preset; every bound that `evaluate_gates` applies stands here."""

CENTRAL_DIFFERENCE_STEP = 0.01
"""Step (Å) at which the central-difference gate is judged."""

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda value, bound: value <= bound,
    "<": lambda value, bound: value < bound,
    ">=": lambda value, bound: value >= bound,
}


def evaluate_gates(results: Metrics, preset: str, reference: Metrics | None = None) -> dict[str, Gate]:
    """Judge the measured metrics of one model.

    Args:
        results: metrics under the names of ``report.json`` (`gaq.reporting.build_report`), and optionally
            ``training`` (``"ptq"``, the default, or ``"qat"``), ``naive_lee_mev_per_angstrom`` (of
            ``naive_w8a8`` on the same checkpoint), ``smoothness`` (``largest_jump_mev``, ``allowed_mev``)
            and ``engine_error_ratio`` (error of the fused kernels over the error of the unquantized model,
            both against float64).
        preset: a name in `BOUNDS`.
        reference: the same metrics of the unquantized model on the same data.

    Returns:
        Every gate by name. A gate whose inputs are missing has ``passed`` None and says what to supply.

    Raises:
        ValueError: if the preset or ``training`` is unknown.
    """
    if preset not in BOUNDS:
        raise ValueError(f"no gates for preset {preset!r}; use the nearest of {', '.join(BOUNDS)}")
    training = results.get("training") or "ptq"
    if training not in ("ptq", "qat"):
        raise ValueError(f"training is {training!r}; it must be 'ptq' or 'qat'")
    bounds = BOUNDS[preset]
    fp32: Metrics = reference or {}
    physics = bounds.physics_enforced
    gates: dict[str, Gate] = {}

    def add(
        name: str,
        value: float | None,
        bound: float | None,
        note: str,
        missing: str,
        unit: str = "",
        comparison: str = "<=",
        enforced: bool = physics,
    ) -> None:
        passed = None
        if value is not None and bound is not None:
            passed = bool(_COMPARE[comparison](value, bound))  # False for NaN
        text = f"not measured: {missing}" if passed is None else note
        gates[name] = Gate(name, value, bound, passed, unit, text, comparison, enforced)

    add(
        "force_mae_ratio",
        _quotient(results.get("force_mae_mev_per_angstrom"), fp32.get("force_mae_mev_per_angstrom")),
        bounds.force_mae_qat if training == "qat" or bounds.force_mae_ptq is None else bounds.force_mae_ptq,
        f"force MAE over that of the reference model on the same data ({training})",
        "needs labelled structures and a reference model",
        enforced=bounds.accuracy_enforced and (training == "qat" or bounds.force_mae_ptq is not None),
    )
    lee = results.get("lee_mev_per_angstrom")
    add(
        "lee",
        lee,
        bounds.lee,
        "force error under random rotations",
        "needs structures",
        unit="meV/Å",
    )
    add(
        "lee_against_naive",
        _quotient(results.get("naive_lee_mev_per_angstrom"), lee),
        bounds.lee_against_naive,
        "rotation error of naive_w8a8 on the same checkpoint over this model's",
        "needs the rotation error of naive_w8a8 on the same checkpoint",
        comparison=">=",
        enforced=physics,
    )
    add(
        "central_difference",
        _at_step(results.get("central_difference_relative_error"), CENTRAL_DIFFERENCE_STEP),
        bounds.central_difference,
        f"relative force error against central differences, h = {CENTRAL_DIFFERENCE_STEP} Å",
        f"needs central differences at h = {CENTRAL_DIFFERENCE_STEP} Å",
    )
    nve, nve_fp32 = results.get("nve") or {}, fp32.get("nve") or {}
    unstable = nve.get("stable") is False
    reason = nve.get("reason") or "NaN, explosion or a broken bond"
    note = "drift over the run against the spread of the kinetic energy"
    add(
        "nve_drift",
        math.inf if unstable else nve.get("drift_over_std_kinetic"),
        bounds.drift_over_std_kinetic,
        f"the run was not stable: {reason}" if unstable else note,
        "needs an NVE run (a length above 0 ps)",
        comparison="<",
    )
    difference, bar = None, _drift_bar(nve_fp32)
    if nve.get("drift_mev_per_atom_per_ps") is not None and bar is not None:
        difference = abs(nve["drift_mev_per_atom_per_ps"] - nve_fp32["drift_mev_per_atom_per_ps"])
    add(
        "nve_drift_against_reference",
        math.inf if unstable and bar is not None else difference,
        bar,
        "difference to the reference model's drift; bound: 2 √2 standard errors of the reference",
        "needs NVE runs of model and reference",
        unit="meV/atom/ps",
    )
    smoothness = results.get("smoothness") or {}
    add(
        "bond_stretch",
        smoothness.get("largest_jump_mev"),
        smoothness.get("allowed_mev"),
        "largest step of a bond-stretch scan against the reference's curvature",
        "needs a reference model and a bond to stretch",
        unit="meV",
    )
    add(
        "engine",
        results.get("engine_error_ratio"),
        bounds.engine_error,
        "error of the fused kernels over that of the unquantized model, both against float64",
        "needs the fused kernels compared with the float64 reference path",
        enforced=True,
    )
    add(
        "file_size_ratio",
        _quotient(fp32.get("file_bytes"), results.get("file_bytes")),
        bounds.file_size,
        "reference file size over this file's",
        "needs a reference model file",
        comparison=">=",
        enforced=True,
    )
    return gates


def all_passed(gates: Mapping[str, Gate]) -> bool:
    """True if no enforced gate failed; gates that were not measured do not count."""
    return not any(gate.enforced and gate.passed is False for gate in gates.values())


def _quotient(numerator: float | None, denominator: float | None) -> float | None:
    if numerator is None or denominator is None:
        return None
    if denominator == 0:
        return 1.0 if numerator == 0 else math.inf
    return float(numerator) / float(denominator)


def _at_step(errors: Mapping[Any, float | None] | None, step: float) -> float | None:
    """The entry whose key, a number or its text, is the step."""
    for key, value in (errors or {}).items():
        if math.isclose(float(key), step):
            return value
    return None


def _drift_bar(nve_fp32: Metrics) -> float | None:
    """Largest difference of drifts that two runs of the reference itself would show, meV/atom/ps.

    Two independent runs with standard error σ differ by √2 σ; twice that covers 95 %. The quantized model's
    own error bar is left out on purpose: rounding noise widens it, and would excuse the drift it causes.
    """
    error = nve_fp32.get("standard_error")
    if error is None or nve_fp32.get("drift_mev_per_atom_per_ps") is None or not math.isfinite(error):
        return None
    return 2 * math.sqrt(2) * float(error)
