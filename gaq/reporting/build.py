"""Measure a potential, judge it, and write the result as JSON and as one self-contained page."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gaq.checks.conservation import central_difference_error
from gaq.checks.errors import LabelErrors, MissingLabelsError, force_and_energy_mae
from gaq.checks.gates import BOUNDS, evaluate_gates
from gaq.checks.lee import local_equivariance_error
from gaq.checks.nve import NVEResult, nve_drift
from gaq.checks.potential import Potential
from gaq.checks.smoothness import SmoothnessResult, bond_stretch_scan
from gaq.reporting.environment import hardware, versions
from gaq.reporting.tables import format_number

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True)
class ReferenceModel:
    """The unquantized model to compare with.

    Attributes:
        potential: batched energies and forces.
        calculator: its ASE calculator.
        path: its file, for the size.
    """

    potential: Potential
    calculator: Any
    path: str | Path


def build_report(
    potential: Potential,
    calculator: Any,
    structures: Sequence[Atoms],
    *,
    model_path: str | Path,
    preset: str,
    reference: ReferenceModel | None = None,
    nve_ps: float = 0.0,
    seed: int = 0,
    progress: bool = False,
    check_structures: int = 8,
    energy_key: str = "REF_energy",
    forces_key: str = "REF_forces",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure one model, and the reference on the same data, and evaluate the gates.

    Errors against labels use every structure. Rotations and central differences, which cost dozens of
    evaluations a structure, use ``check_structures`` of them, evenly spaced. The NVE run, the bond-stretch
    scan and the timing use the first.

    Args:
        potential: the model as a `Potential`; float64, or central differences measure rounding.
        calculator: the model as an ASE calculator, as it will be deployed.
        structures: structures, labelled or not.
        model_path: the model's file, for its size.
        preset: preset whose gates apply, a key of `gaq.checks.gates.BOUNDS`.
        reference: the unquantized model.
        nve_ps: length of the NVE runs, ps; 0 leaves them out.
        seed: seed of rotations, components, velocities.
        progress: show progress bars.
        check_structures: number of structures for rotations and central differences.
        energy_key: key of the reference energy in ``info``.
        forces_key: key of the reference forces in ``arrays``.
        extra: measurements taken elsewhere that gates need: ``training``, ``naive_lee_mev_per_angstrom``,
            ``engine_error_ratio`` (see `gaq.checks.gates.evaluate_gates`).

    Returns:
        ``model`` and ``reference`` (metrics; reference None if there is none), ``versions``, ``hardware``,
        ``command``, ``gates``, all of plain Python types; and ``figures``, arrays for `write_report`,
        which are not part of ``report.json``.

    Raises:
        ValueError: if there are no structures, a file is missing, the preset is unknown, only some structures
            are labelled, or ``extra`` has an unknown key.
    """
    if len(structures) == 0:
        raise ValueError("build_report: no structures given; pass at least one")
    if preset not in BOUNDS:
        raise ValueError(f"build_report: no gates for preset {preset!r}; nearest of: {', '.join(BOUNDS)}")
    allowed = ("training", "naive_lee_mev_per_angstrom", "engine_error_ratio")
    unknown = sorted(set(extra or {}) - set(allowed))
    if unknown:
        raise ValueError(f"build_report: unknown {unknown} in extra; allowed: {', '.join(allowed)}")
    file_sizes = [_file_bytes(path) for path in (model_path, *([reference.path] if reference else []))]

    count = min(max(1, check_structures), len(structures))
    checked = [structures[int(n)] for n in np.linspace(0, len(structures) - 1, count)]
    subjects = [("model", potential, calculator, str(model_path))]
    if reference is not None:
        subjects.append(("reference", reference.potential, reference.calculator, str(reference.path)))

    metrics: dict[str, dict[str, Any]] = {}
    labels: dict[str, LabelErrors] = {}
    runs: dict[str, NVEResult] = {}
    for (name, subject, subject_calculator, path), file_bytes in zip(subjects, file_sizes, strict=True):
        label_errors = _label_errors(subject, structures, energy_key, forces_key)
        if label_errors is not None:
            labels[name] = label_errors
        if nve_ps > 0:
            runs[name] = nve_drift(subject_calculator, structures[0], duration_ps=nve_ps, seed=seed, progress=progress)
        rotated = local_equivariance_error(subject, checked, seed=seed)
        differences = central_difference_error(subject, checked, seed=seed)
        seconds, peak = _cost(subject_calculator, structures[0], seed)
        metrics[name] = {
            "path": path,
            "force_mae_mev_per_angstrom": label_errors.force_mae_mev_per_angstrom if label_errors else None,
            "energy_mae_mev_per_atom": label_errors.energy_mae_mev_per_atom if label_errors else None,
            "lee_mev_per_angstrom": rotated.mean_mev_per_angstrom,
            "central_difference_relative_error": {
                f"{step:g}": error.relative_error for step, error in differences.items()
            },
            "nve": _nve_metrics(runs.get(name)),
            "file_bytes": file_bytes,
            "seconds_per_step": seconds,
            "peak_bytes": peak,
        }
    metrics["model"]["preset"] = preset

    scan = None
    if reference is not None:
        try:
            scan = bond_stretch_scan(potential, structures[0], reference.potential)
        except ValueError:  # no bond to stretch: the gate reads "not measured"
            scan = None

    judged = {**metrics["model"], **(extra or {})}
    if "model" in runs:
        judged["nve"] = {**judged["nve"], "reason": runs["model"].reason}
    if scan is not None:
        judged["smoothness"] = {"largest_jump_mev": scan.largest_jump_mev, "allowed_mev": scan.allowed_mev}
    gates = evaluate_gates(judged, preset, metrics.get("reference"))
    return {
        "model": metrics["model"],
        "reference": metrics.get("reference"),
        "versions": versions(),
        "hardware": hardware(),
        "command": shlex.join(sys.argv),
        "gates": {
            name: {
                "value": gate.value,
                "bound": gate.bound,
                "passed": gate.passed,
                "unit": gate.unit,
                "comparison": gate.comparison,
                "enforced": gate.enforced,
                "note": gate.note,
            }
            for name, gate in gates.items()
        },
        "figures": {"labels": labels, "nve": runs, "scan": scan},
    }


def write_report(report: Mapping[str, Any], directory: str | Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html``.

    The page needs nothing but itself: figures are embedded, there is no script and no external address.
    Without matplotlib it is written without figures and says so. NaN and infinity, which JSON lacks, become
    null.

    Args:
        report: from `build_report`, or read back from a ``report.json`` (then there are no figures).
        directory: where to write; created if missing.

    Returns:
        The paths of the JSON file and of the page.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = {key: value for key, value in report.items() if key != "figures"}
    json_path, html_path = directory / "report.json", directory / "report.html"
    json_path.write_text(json.dumps(_plain(data), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    html_path.write_text(_page(report), encoding="utf-8")
    return json_path, html_path


def seconds_per_step(calculator: Any, atoms: Atoms, repeats: int = 10, warmup: int = 2, seed: int = 0) -> float:
    """Median wall time of energy and forces, in seconds.

    The positions change by 1 mÅ before each evaluation, so that the calculator's cache is of no use, while
    the neighbour list stays that of a typical step.

    Args:
        calculator: an ASE calculator with ``energy`` and ``forces``.
        atoms: the structure; not changed.
        repeats: timed evaluations.
        warmup: evaluations before them, not timed.
        seed: seed of the perturbations.

    Returns:
        Seconds per evaluation.

    Raises:
        ValueError: if ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"seconds_per_step: repeats is {repeats}; it must be at least 1")
    copy = atoms.copy()
    copy.set_constraint()
    copy.calc = calculator
    rng = np.random.default_rng(seed)
    times = []
    for repeat in range(warmup + repeats):
        copy.positions = atoms.positions + 1e-3 * rng.standard_normal(atoms.positions.shape)
        start = time.perf_counter()
        copy.get_forces()
        copy.get_potential_energy()
        if repeat >= warmup:
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def peak_memory() -> int | None:
    """Peak memory in bytes: of torch's CUDA allocator if CUDA was used, else the process's resident set.

    None where the system does not tell (Windows).
    """
    if _cuda_used():
        import torch

        return int(torch.cuda.max_memory_allocated())
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    # The unit is the kilobyte, but the byte on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak_memory() -> None:
    """Start a new peak where the system allows it, so that two models in one process can be told apart."""
    if _cuda_used():
        import torch

        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM to the current resident set


def _cuda_used() -> bool:
    # Asking torch itself would initialise CUDA, so look whether anything has.
    torch = sys.modules.get("torch")
    return bool(torch is not None and torch.cuda.is_initialized() and torch.cuda.max_memory_allocated() > 0)


def _cost(calculator: Any, atoms: Atoms, seed: int) -> tuple[float, int | None]:
    """Seconds per step, and peak bytes while taking them."""
    _reset_peak_memory()
    seconds = seconds_per_step(calculator, atoms, seed=seed)
    return seconds, peak_memory()


def _label_errors(
    potential: Potential, structures: Sequence[Atoms], energy_key: str, forces_key: str
) -> LabelErrors | None:
    """Errors against labels, or None if no structure is labelled. Some without labels is an error."""
    try:
        return force_and_energy_mae(potential, structures, energy_key, forces_key)
    except MissingLabelsError:
        for structure in structures:
            stored = getattr(structure.calc, "results", {})
            if energy_key in structure.info or forces_key in structure.arrays or "forces" in stored:
                raise
        return None


def _nve_metrics(run: NVEResult | None) -> dict[str, Any] | None:
    if run is None:
        return None
    return {
        "drift_mev_per_atom_per_ps": run.drift_mev_per_atom_per_ps,
        "standard_error": run.standard_error,
        "drift_over_std_kinetic": run.drift_over_std_kinetic,
        "stable": run.stable,
    }


def _file_bytes(path: str | Path) -> int:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"build_report: model file {path} does not exist; its size is part of the report")
    return path.stat().st_size


def _plain(value: Any) -> Any:
    """The same value in JSON's types; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# Colours of the model and of the reference, distinguishable without colour vision.
_COLOURS = {"model": "#0b5fa5", "reference": "#d98324"}

_METRICS = (
    ("force_mae_mev_per_angstrom", "Force MAE", "meV/Å"),
    ("energy_mae_mev_per_atom", "Energy MAE", "meV/atom"),
    ("lee_mev_per_angstrom", "Force error under rotations (LEE)", "meV/Å"),
)
_NVE_METRICS = (
    ("drift_mev_per_atom_per_ps", "NVE drift", "meV/atom/ps"),
    ("standard_error", "NVE drift, standard error", "meV/atom/ps"),
    ("drift_over_std_kinetic", "NVE |drift x time| / std(kinetic energy)", ""),
    ("stable", "NVE run stable", ""),
)
_COST_METRICS = (
    ("file_bytes", "File size", "bytes"),
    ("seconds_per_step", "Energy and forces, median", "s/step"),
    ("peak_bytes", "Peak memory", "bytes"),
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .75rem; border-bottom: 1px solid #d6dbe1; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #8a94a0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pass { color: #14622f; font-weight: 600; } .fail { color: #a8201a; font-weight: 600; }
.muted { color: #5b6570; } code { overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption { color: #5b6570; font-size: .9rem; }
"""


def _page(report: Mapping[str, Any]) -> str:
    """The HTML page."""
    model, reference = report["model"], report.get("reference")
    gates = report["gates"]
    failed = [name for name, gate in gates.items() if gate["enforced"] and gate["passed"] is False]
    if failed:
        verdict = f'<p class="fail">Failed: {_text(", ".join(failed))}.</p>'
    else:
        verdict = '<p class="pass">No enforced gate failed.</p>'
    compared = f", compared with <code>{_text(reference['path'])}</code>" if reference else ""
    gpu = report["hardware"].get("gpu") or "none"
    software = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quantization report: {_text(Path(model["path"]).name)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Quantization report</h1>
<p><code>{_text(model["path"])}</code>, preset <strong>{_text(model["preset"])}</strong>{compared}.</p>
{verdict}
<h2>Gates</h2>
{_gate_table(gates)}
<h2>Metrics</h2>
{_metric_table(model, reference)}
<h2>Figures</h2>
{_figures(report.get("figures"))}
<h2>How it was measured</h2>
<p>Command: <code>{_text(report["command"])}</code></p>
<p>Hardware: {_text(report["hardware"].get("cpu"))}, {_text(report["hardware"].get("cores"))} cores,
{_text(report["hardware"].get("torch_threads"))} torch threads; GPU: {_text(gpu)}.</p>
<p>Software: {_text(software)}.</p>
</body>
</html>
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _gate_table(gates: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, gate in gates.items():
        if gate["passed"] is None:
            verdict = '<span class="muted">not measured</span>'
        elif gate["passed"]:
            verdict = '<span class="pass">pass</span>'
        else:
            verdict = '<span class="fail">fail</span>'
        if not gate["enforced"] and gate["passed"] is not None:
            verdict += ' <span class="muted">(not enforced for this preset)</span>'
        sign = {"<=": "≤", ">=": "≥"}.get(gate["comparison"], gate["comparison"])
        bound = "-" if gate["bound"] is None else f"{sign} {format_number(gate['bound'])} {gate['unit']}"
        rows.append(
            f"<tr><td>{_text(name)}</td><td class='n'>{_text(_value(gate['value'], digits=4))}</td>"
            f"<td class='n'>{_text(bound)}</td><td>{verdict}</td>"
            f"<td class='muted'>{_text(gate['note'])}</td></tr>"
        )
    head = "<tr><th>Gate</th><th class='n'>Value</th><th class='n'>Bound</th><th>Result</th><th>Meaning</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _metric_table(model: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    rows: list[tuple[str, str, Any, Any]] = []

    def add(entries: Sequence[tuple[str, str, str]], left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
        rows.extend((label, unit, left.get(key), right.get(key)) for key, label, unit in entries)

    other = reference or {}
    add(_METRICS, model, other)
    ours = model.get("central_difference_relative_error") or {}
    theirs = other.get("central_difference_relative_error") or {}
    rows.extend(
        (f"Force against central differences, h = {step} Å", "relative", ours[step], theirs.get(step)) for step in ours
    )
    if model.get("nve"):
        add(_NVE_METRICS, model["nve"], other.get("nve") or {})
    add(_COST_METRICS, model, other)
    body = "".join(
        f"<tr><td>{_text(label)}</td><td class='n'>{_text(_value(ours))}</td>"
        f"<td class='n'>{_text(_value(theirs))}</td><td class='muted'>{_text(unit)}</td></tr>"
        for label, unit, ours, theirs in rows
    )
    head = "<tr><th>Metric</th><th class='n'>Model</th><th class='n'>Reference</th><th>Unit</th></tr>"
    return f"<table>{head}{body}</table>"


def _value(value: Any, digits: int = 3) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "∞"
    return format_number(value, digits)


def _figures(figures: Mapping[str, Any] | None) -> str:
    if not figures:
        return "<p class='muted'>No figure data.</p>"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "<p class='muted'>Figures need matplotlib: pip install gaq[report].</p>"
    parts = []
    if figures["labels"]:
        parts.append(_force_figure(figures["labels"]))
    if figures["nve"]:
        parts.append(_nve_figure(figures["nve"]))
    if figures["scan"] is not None:
        parts.append(_scan_figure(figures["scan"]))
    return "\n".join(parts) or "<p class='muted'>Nothing to plot: no labels, no NVE run, no scan.</p>"


def _embed(figure: Any, caption: str) -> str:
    """A matplotlib figure as an HTML figure with its bytes inside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    alt = html.escape(caption, quote=True)
    image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{alt}</figcaption></figure>"


def _new_figure(width: float = 9.0, height: float = 3.6) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _force_figure(labels: Mapping[str, LabelErrors]) -> str:
    """Force parity of the model, and the distribution of force errors."""
    figure = _new_figure()
    parity, histogram = figure.subplots(1, 2)
    model = labels["model"]
    # A few thousand points show the cloud; more only make the file large.
    stride = max(1, model.force_components // 5000)
    expected, predicted = model.force_labels[::stride], model.force_predictions[::stride]
    ends = [float(expected.min()), float(expected.max())]
    parity.plot(ends, ends, color="#8a94a0", linewidth=0.8)
    parity.plot(expected, predicted, ".", markersize=2, color=_COLOURS["model"])
    parity.set(xlabel="reference force (eV/Å)", ylabel="model force (eV/Å)")
    errors = {name: 1e3 * np.abs(error.force_predictions - error.force_labels) for name, error in labels.items()}
    pooled = np.concatenate(list(errors.values()))
    positive = pooled[np.isfinite(pooled) & (pooled > 0)]
    if len(positive):
        lowest, highest = np.percentile(positive, 0.1), positive.max()
        bins = np.geomspace(lowest, max(highest, 1.001 * lowest), 60)
        for name, values in errors.items():
            histogram.hist(values, bins=bins, histtype="step", label=name, color=_COLOURS[name])
        histogram.set_xscale("log")
        histogram.legend(frameon=False)
    histogram.set(xlabel="force error per component (meV/Å)", ylabel="components")
    return _embed(figure, "Left: forces of the model against the labels. Right: absolute force errors.")


def _nve_figure(runs: Mapping[str, NVEResult]) -> str:
    """Total energy per atom over time."""
    figure = _new_figure()
    axes = figure.subplots()
    for name, run in runs.items():
        for times, energies in zip(run.times_ps, run.total_energy_ev, strict=True):
            if len(times):
                change = 1e3 * (energies - energies[0]) / run.n_atoms
                axes.plot(times, change, linewidth=0.8, color=_COLOURS[name], label=name)
    axes.set(xlabel="time (ps)", ylabel="total energy change (meV/atom)")
    axes.legend(frameon=False)
    return _embed(figure, "Total energy of the NVE run.")


def _scan_figure(scan: SmoothnessResult) -> str:
    """Bond-stretch energies, and the second differences that decide."""
    figure = _new_figure()
    energy, jumps = figure.subplots(1, 2)
    lowest = scan.reference_energy_ev.min()
    energy.plot(
        scan.lengths_angstrom,
        scan.reference_energy_ev - lowest,
        color=_COLOURS["reference"],
        linewidth=3,
        alpha=0.6,
        label="reference",
    )
    energy.plot(scan.lengths_angstrom, scan.energy_ev - lowest, color=_COLOURS["model"], label="model")
    i, j = scan.bond
    energy.set(xlabel=f"distance of atoms {i} and {j} (Å)", ylabel="energy (eV)")
    energy.legend(frameon=False)
    second = 1e3 * np.abs(np.diff(scan.energy_ev - scan.reference_energy_ev, 2))
    jumps.plot(scan.lengths_angstrom[1:-1], second, ".-", markersize=3, linewidth=0.6, color=_COLOURS["model"])
    jumps.axhline(scan.allowed_mev, color="#a8201a", linestyle="--", linewidth=1, label="allowed")
    jumps.set(xlabel=f"distance of atoms {i} and {j} (Å)", ylabel="second difference of E - E_ref (meV)")
    if np.any(second > 0):
        jumps.set_yscale("log")
    jumps.legend(frameon=False)
    return _embed(figure, "Bond-stretch scan: energies, and steps against the reference's curvature.")
