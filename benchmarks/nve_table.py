"""What NVE runs have come to: drifts, temperatures, geometry, vibrations and distances beside those of FP32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, mean_of_runs, write_result
from numpy.typing import NDArray
from nve_run import BIN, Run

from gaq.checks.nve import fit_drift
from gaq.checks.spectrum import wave_numbers
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document

__all__ = ["difference", "row_of", "write_table"]

Floats = NDArray[np.float64]
FP32 = "fp32"
HIGHEST = 4000.0
"""Highest wave number of spectra, 1/cm."""


def picoseconds(run: Run) -> float:
    return 1e-3 * run.step * run.protocol.timestep_fs


def samples(run: Run) -> tuple[Floats, Floats]:
    """Times in ps of the samples so far, and the samples: `Run.trace`."""
    trace = run.trace[np.isfinite(run.trace[:, 0])]
    return 1e-3 * run.protocol.timestep_fs * run.protocol.sample_every * np.arange(len(trace)), trace


def density_of_states(run: Run) -> tuple[Floats, Floats]:
    """Wave numbers up to `HIGHEST`, 1/cm, and the density of all atoms, whose integral over them is 1."""
    power = run.spectrum.sum(axis=0)
    interval = run.protocol.timestep_fs * run.protocol.velocities_every
    waves = wave_numbers(run.protocol.block, interval)
    kept = waves <= HIGHEST
    return waves[kept], power[kept] / (power[kept].sum() * waves[1])


def distances(run: Run) -> Floats:
    """Share of the distances of each pair of elements in each bin, (pairs, bins); each row with pairs sums to 1."""
    totals = run.counts.sum(axis=1, keepdims=True)
    return run.counts / np.maximum(totals, 1)


def difference(one: Floats, other: Floats) -> float:
    """Half of the integral of the absolute difference of two densities: 0 where they agree, 1 where none overlaps."""
    return 0.5 * float(np.abs(one / one.sum() - other / other.sum()).sum())


def row_of(name: str, run: Run) -> Document:
    """What a run says by itself; None for what it has not sampled yet."""
    system, preset, seed = name.split(":")
    times, trace = samples(run)
    count = len(run.masses)
    slope, error = fit_drift(times, 1e3 * trace[:, 0] / count)
    line = np.polyval(np.polyfit(times, trace[:, 0], 1), times) if len(times) > 2 else trace[:, 0]
    temperature = run.sampling.temperature(trace[:, 1])
    bonds = run.bond_moments[0] / len(times)
    spread = 1e3 * trace[:, 1].std()
    torsions = np.abs(trace[:, 2])
    return {
        "system": system,
        "preset": preset,
        "seed": int(seed),
        "atoms": count,
        "ps": picoseconds(run),
        "of_ps": 1e-3 * run.protocol.steps * run.protocol.timestep_fs,
        "ended": run.reason or None,
        "drift_mev_per_atom_per_ps": _number(slope),
        "standard_error": _number(error),
        "drift_over_std_kinetic": _number(abs(slope) * times[-1] * count / spread if spread else np.nan),
        "fluctuation_mev_per_atom": float(1e3 * np.std(trace[:, 0] - line) / count),
        "temperature_k": float(temperature.mean()),
        "temperature_of_the_last_tenth_k": float(temperature[-max(1, len(times) // 10) :].mean()),
        "torsion_degrees": _number(torsions.mean()),
        "least_torsion_degrees": _number(torsions.min()),
        "mean_bond_lengths_angstrom": {
            f"{run.sampling.atoms.symbols[i]}{i}-{run.sampling.atoms.symbols[j]}{j}": float(length)
            for i, j, length in zip(run.sampling.first, run.sampling.second, bonds, strict=True)
        },
        "blocks_of_spectrum": run.blocks,
    }


def beside(run: Run, other: Run) -> Document:
    """How far the ensembles of two runs are apart."""
    bonds = [r.bond_moments[0] / len(samples(r)[0]) for r in (run, other)]
    differences: Document = {
        "largest_bond_difference_angstrom": float(np.abs(bonds[0] - bonds[1]).max()) if bonds[0].size else None,
        "distances": max(
            difference(a, b) for a, b in zip(distances(run), distances(other), strict=True) if a.any() and b.any()
        ),
    }
    if run.blocks and other.blocks:
        waves, one = density_of_states(run)
        spectra = one, density_of_states(other)[1]
        differences["vibrations"] = difference(*spectra)
        means = [float((waves * s).sum() / s.sum()) for s in spectra]
        differences["mean_wave_number_shift_per_cm"] = means[0] - means[1]
    return differences


def write_table(work: Path, runs: Mapping[str, Run]) -> None:
    """Write results/nanosecond.json and its figures, and print the table.

    Each run is compared with FP32's run of the same seed. What two seeds of FP32 differ by is the measure of these
    differences, which is the first comparison in `fp32_apart`.
    """
    rows = [row_of(name, run) for name, run in runs.items()]
    for row, name in zip(rows, runs, strict=True):
        of_fp32 = f"{row['system']}:{FP32}:{row['seed']}"
        row["beside_fp32"] = beside(runs[name], runs[of_fp32]) if of_fp32 in runs and name != of_fp32 else None
    seeds = {name: run for name, run in runs.items() if f":{FP32}:" in name}
    apart = [
        {"runs": [one, other], **beside(runs[one], runs[other])}
        for n, one in enumerate(seeds)
        for other in list(seeds)[n + 1 :]
        if one.split(":")[0] == other.split(":")[0]
    ]
    means = []
    for system, preset in dict.fromkeys((row["system"], row["preset"]) for row in rows):
        of_both = [row for row in rows if (row["system"], row["preset"]) == (system, preset)]
        judged = [row for row in of_both if row["standard_error"] is not None]
        if judged:
            means.append({"system": system, "preset": preset, "runs": len(judged), **mean_of_runs(judged)})
    write_result("nanosecond", rows, work, means=means, fp32_apart=apart)
    for system in dict.fromkeys(row["system"] for row in rows):
        draw(system, {name: run for name, run in runs.items() if name.startswith(f"{system}:")})
    shown = [
        {
            "run": f"{row['system']} {row['preset']} {row['seed']}",
            "ps": f"{row['ps']:.0f} of {row['of_ps']:.0f}" + (f": {row['ended']}" if row["ended"] else ""),
            "drift, meV/atom/ps": f"{row['drift_mev_per_atom_per_ps'] or 0:.5f} ± {row['standard_error'] or 0:.5f}",
            "T, K": f"{row['temperature_k']:.1f}",
            "bonds, mÅ": _thousandths(row, "largest_bond_difference_angstrom"),
            "vibrations, %": _hundredths(row, "vibrations"),
            "distances, %": _hundredths(row, "distances"),
        }
        for row in rows
    ]
    print(markdown_table(shown, list(shown[0])))


def draw(system: str, runs: Mapping[str, Run]) -> None:
    """Energy, vibrations and distances of one system, one line for each preset (the first seed), in one figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), dpi=120, layout="constrained")
    energy, waves, pairs = figure.subplots(3, 1)
    for name, run in runs.items():
        preset, seed = name.split(":")[1:]
        times, trace = samples(run)
        every = max(1, len(times) // 4000)
        change = 1e3 * (trace[:, 0] - trace[0, 0]) / len(run.masses)
        style: dict[str, Any] = {"linewidth": 0.8, "label": f"{preset}, {picoseconds(run):.0f} ps"}
        if seed == "0":
            energy.plot(times[::every], change[::every], **style)
            if run.blocks:
                waves.plot(*density_of_states(run), **style)
            share = run.counts.sum(axis=0) / max(1, run.counts.sum())
            pairs.plot(BIN * (np.arange(share.size) + 0.5), _radial(run, share), **style)
    energy.set(xlabel="time, ps", ylabel="total energy, meV/atom from the start", title=f"{system}, seed 0")
    # Where a preset drifts away, the others would be one line.
    energy.set_yscale("symlog", linthresh=1.0)
    waves.set(xlabel="wave number, 1/cm", ylabel="vibrational density of states", xlim=(0, HIGHEST))
    pairs.set(xlabel="distance, Å", ylabel=_radial_name(next(iter(runs.values()))))
    for axis in (energy, waves, pairs):
        axis.legend(frameon=False)
    path = RESULTS / f"nanosecond_{system}.png"
    FigureCanvasAgg(figure).print_png(path)
    print(path)


def _radial(run: Run, share: Floats) -> Floats:
    """The radial distribution function in a cell; the density of distances of a molecule, which has no volume."""
    if not run.sampling.atoms.pbc.all():
        return share / BIN
    edges = BIN * np.arange(len(share) + 1)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    count = len(run.masses)
    pairs = run.counts.sum(axis=0) / max(1, len(samples(run)[0]))
    return pairs / (0.5 * count * (count - 1) / run.sampling.atoms.get_volume() * shells)


def _radial_name(run: Run) -> str:
    return "g(r) of all atoms" if run.sampling.atoms.pbc.all() else "density of distances, 1/Å"


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _hundredths(row: Document, key: str) -> str:
    value = (row["beside_fp32"] or {}).get(key)
    return "-" if value is None else f"{100 * value:.2f}"


def _thousandths(row: Document, key: str) -> str:
    value = (row["beside_fp32"] or {}).get(key)
    return "-" if value is None else f"{1e3 * value:.2f}"
