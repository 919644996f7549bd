"""Figures of a report, as HTML with embedded images."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.errors import LabelErrors
from gaq.checks.nve import NVEResult
from gaq.checks.smoothness import SmoothnessResult
from gaq.untyped import ReadOnlyDocument

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figures"]

# Colours of the model and of the reference, distinguishable without colour vision.
_COLOURS = {"model": "#0b5fa5", "reference": "#d98324"}

HIGHEST_WAVE_NUMBER = 4000.0
"""Highest wave number of spectra, 1/cm: above those of all bonds but that of H2."""


def figures(data: ReadOnlyDocument | None) -> str:
    """Draw the figures of a report as HTML; without figures, a line that says why."""
    if not data:
        return "<p class='muted'>No figure data.</p>"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "<p class='muted'>Figures need matplotlib: pip install gaq[report].</p>"
    parts = []
    if data["labels"]:
        parts.append(_force_figure(data["labels"]))
    if data["nve"]:
        parts.append(_nve_figure(data["nve"]))
    if data["scan"] is not None:
        parts.append(_scan_figure(data["scan"]))
    return "\n".join(parts) or "<p class='muted'>Nothing to plot: no labels, no NVE run, no scan.</p>"


def _embed(figure: Figure, caption: str) -> str:
    """Turn a matplotlib figure into an HTML figure with an embedded image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    alt = html.escape(caption, quote=True)
    image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{alt}</figcaption></figure>"


def _new_figure(width: float = 9.0, height: float = 3.6) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _force_figure(labels: Mapping[str, LabelErrors]) -> str:
    """Force parity of the model, and the distribution of force errors."""
    figure = _new_figure()
    parity, histogram = figure.subplots(1, 2)
    model = labels["model"]
    # A few thousand points show the distribution; more only make the file large.
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
    """Total energy per atom over time, and beside it the vibrational spectrum."""
    figure = _new_figure()
    energy, spectrum = figure.subplots(1, 2)
    for name, run in runs.items():
        style = {"linewidth": 0.8, "color": _COLOURS[name], "label": name}
        if len(run.times_ps):
            change = 1e3 * (run.total_energy_ev - run.total_energy_ev[0]) / run.n_atoms
            energy.plot(run.times_ps, change, **style)
        kept = run.wave_numbers_per_cm <= HIGHEST_WAVE_NUMBER
        if kept.any():
            spectrum.plot(run.wave_numbers_per_cm[kept], run.vibrations[kept], **style)
    energy.set(xlabel="time (ps)", ylabel="total energy change (meV/atom)")
    spectrum.set(xlabel="wave number (1/cm)", ylabel="vibrations", yticks=[])
    for axes in (energy, spectrum):
        if axes.lines:
            axes.legend(frameon=False)
    return _embed(figure, "Total energy of the NVE run, and the power spectrum of its velocities.")


def _scan_figure(scan: SmoothnessResult) -> str:
    """Draw bond-stretch energies, and the second differences that the gate judges."""
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
