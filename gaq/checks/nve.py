"""Energy drift of a constant-energy molecular-dynamics run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.spectrum import power, wave_numbers
from gaq.progress import Progress
from gaq.untyped import Calculator

if TYPE_CHECKING:
    from ase import Atoms
    from ase.md.md import MolecularDynamics

# H, B, C, N, O, F, Si, P, S, Cl, Se, Br, I: bonds between these are covalent and do not break at 300 K.
_NONMETALS = (1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 34, 35, 53)
_DETACHED_HYDROGEN = 2.5
EXPLOSION_K = 10_000.0
"""Temperature in K above that of the start from which on a run has exploded."""


@dataclass(frozen=True, eq=False)
class NVEResult:
    """Drift of the total energy in one NVE run.

    Attributes:
        drift_mev_per_atom_per_ps: slope of a linear fit to the total energy. NaN if too little was sampled, or if the
            kinetic and the total energy did not change at all: no force acts on the atoms, and nothing was measured.
        standard_error: standard error of the slope from block means, meV/atom/ps; NaN as the drift is.
        drift_over_std_kinetic: ``|slope x duration| / std(kinetic energy)``, dimensionless; below 1 the drift
            is hidden in the thermal exchange of potential and kinetic energy.
        std_kinetic_ev: standard deviation of the total kinetic energy, eV.
        mean_temperature_K: mean temperature of the samples, K.
        max_temperature_K: largest sampled temperature, equilibration included, K.
        stable: False if the energy was not finite, the temperature exploded, or a bond came apart.
        reason: why the run is not stable; empty if it is.
        duration_ps: length of the sampled part, ps.
        timestep_fs: integration step, fs.
        temperature_K: target temperature of the equilibration, K.
        n_atoms: number of atoms.
        seconds_per_step: median wall time of an integration step between two samples.
        times_ps: sampled times, shape (samples,), ps.
        total_energy_ev: total energy at those times, eV.
        kinetic_energy_ev: kinetic energy at those times, eV.
        wave_numbers_per_cm: of the vibrational spectrum, shape (frequencies,), 1/cm; empty if too little was sampled.
        vibrations: power spectrum of the mass-weighted velocities at those wave numbers, its sum being 1.
    """

    drift_mev_per_atom_per_ps: float
    standard_error: float
    drift_over_std_kinetic: float
    std_kinetic_ev: float
    mean_temperature_K: float
    max_temperature_K: float
    stable: bool
    reason: str
    duration_ps: float
    timestep_fs: float
    temperature_K: float
    n_atoms: int
    seconds_per_step: float
    times_ps: np.ndarray
    total_energy_ev: np.ndarray
    kinetic_energy_ev: np.ndarray
    wave_numbers_per_cm: np.ndarray
    vibrations: np.ndarray


def nve_drift(
    calculator: Calculator,
    atoms: Atoms,
    duration_ps: float = 50.0,
    timestep_fs: float = 1.0,
    temperature_K: float = 300.0,
    equilibrate_ps: float = 1.0,
    seed: int = 0,
    sample_fs: float = 10.0,
    check_bonds: bool = True,
    keep_velocities: bool = False,
    progress: bool | None = None,
    description: str = "NVE",
) -> NVEResult:
    """Run velocity Verlet without a thermostat and fit the drift of the total energy.

    Protocol (after the NVE benchmark of mlipaudit, MIT): Maxwell-Boltzmann velocities; a short Langevin
    equilibration (friction 0.02 / fs); total momentum removed, and the rotation of molecules; then NVE with
    the total energy sampled every ``sample_fs``. The run stops early once it is unstable: an energy that is
    not finite, a temperature above ``temperature_K + 10000``, or a covalent bond of the initial structure
    that comes apart (2.5 Å for a bond to hydrogen, twice the sum of covalent radii for others).

    Args:
        calculator: an ASE calculator with ``energy`` and ``forces``.
        atoms: starting structure; not changed. Constraints are dropped, because they would change the energy.
        duration_ps: length of the NVE part, ps.
        timestep_fs: integration step, fs.
        temperature_K: temperature, K.
        equilibrate_ps: length of the equilibration, ps; 0 for none.
        seed: seed of velocities and thermostat.
        sample_fs: time between samples, fs; rounded to whole steps.
        check_bonds: False for systems in which bonds break.
        keep_velocities: True to start the NVE part at once with the velocities of ``atoms``.
        progress: True for a progress bar.
        description: what the bar says.

    Returns:
        The drift with its standard error, and the sampled energies.

    Raises:
        ValueError: if a time is not positive, or the run is too short for three samples.
    """
    for name, value in (
        ("duration_ps", duration_ps),
        ("timestep_fs", timestep_fs),
        ("temperature_K", temperature_K),
        ("sample_fs", sample_fs),
    ):
        if not value > 0:
            raise ValueError(f"nve_drift: {name} is {value}; it must be positive")
    if equilibrate_ps < 0:
        raise ValueError(f"nve_drift: equilibrate_ps is {equilibrate_ps}; give 0 or a positive time")
    stride = max(1, round(sample_fs / timestep_fs))
    samples = round(duration_ps * 1e3 / timestep_fs) // stride
    if samples < 2:
        raise ValueError(
            f"nve_drift: {duration_ps} ps gives {samples + 1} samples {stride * timestep_fs} fs apart; "
            "run longer or sample more often"
        )

    atoms = atoms.copy()
    atoms.set_constraint()
    atoms.calc = calculator
    monitor = _Monitor(atoms, temperature_K, check_bonds)
    warm_up = 0 if keep_velocities else round(equilibrate_ps * 1e3 / timestep_fs) // stride
    bar = Progress(warm_up + samples, description, "sample", shown=bool(progress))
    if not keep_velocities:
        _equilibrate(atoms, monitor, bar, warm_up, stride, timestep_fs, temperature_K, seed)
    velocities = _Velocities(atoms, timestep_fs)
    indices, total_energy, kinetic_energy, seconds = _sample(
        atoms, monitor, bar, samples, stride, timestep_fs, velocities
    )
    bar.close()
    times = 1e-3 * indices * stride * timestep_fs
    spectrum = velocities.spectrum()
    return _result(atoms, monitor, times, total_energy, kinetic_energy, seconds, timestep_fs, temperature_K, spectrum)


def _equilibrate(
    atoms: Atoms,
    monitor: _Monitor,
    bar: Progress,
    samples: int,
    stride: int,
    timestep_fs: float,
    temperature_K: float,
    seed: int,
) -> None:
    """Draw velocities and run the thermostat for `samples` strides, in place; momentum and rotation end at zero."""
    from ase import units
    from ase.md.langevin import Langevin
    from ase.md.velocitydistribution import Stationary, ZeroRotation

    rng = np.random.RandomState(seed)  # ASE draws from the legacy interface

    def remove_drift_and_rotation() -> None:
        Stationary(atoms)
        if len(atoms) > 1 and not atoms.pbc.any():
            ZeroRotation(atoms)

    # Maxwell-Boltzmann: every momentum component is normal with variance m k T.
    widths = np.sqrt(atoms.get_masses() * units.kB * temperature_K)
    atoms.set_momenta(widths[:, None] * rng.standard_normal((len(atoms), 3)))
    if len(atoms) > 1:
        remove_drift_and_rotation()
    if not samples:
        return
    # fixcm=False samples the correct ensemble; the momentum it leaves is removed below.
    thermostat = Langevin(
        atoms,
        timestep_fs * units.fs,
        temperature_K=temperature_K,
        friction=0.02 / units.fs,
        fixcm=False,
        rng=rng,
    )
    for _ in range(samples):
        if not monitor.advance(thermostat, stride):
            break
        bar.advance()
    if monitor.stable and len(atoms) > 1:
        remove_drift_and_rotation()


def _sample(
    atoms: Atoms,
    monitor: _Monitor,
    bar: Progress,
    samples: int,
    stride: int,
    timestep_fs: float,
    velocities: _Velocities,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Run NVE while it is stable; return sample indices, total and kinetic energies (eV), and seconds per step."""
    from ase import units
    from ase.md.verlet import VelocityVerlet

    indices, totals, kinetics, seconds = [], [], [], []
    verlet = VelocityVerlet(atoms, timestep_fs * units.fs)
    verlet.attach(velocities.keep, interval=velocities.every)
    for sample in range(samples + 1):
        start = time.perf_counter()
        if not monitor.stable or (sample and not monitor.advance(verlet, stride)):
            break
        if sample:
            seconds.append((time.perf_counter() - start) / stride)
        kinetic = float(atoms.get_kinetic_energy())
        total = kinetic + float(atoms.get_potential_energy())
        if not np.isfinite(total):
            monitor.fail("the total energy is not finite")
            break
        indices.append(sample)
        totals.append(total)
        kinetics.append(kinetic)
        if sample:
            bar.advance()
    # The median, because other programs on the machine slow down some of the steps.
    median = float(np.median(seconds)) if seconds else float("nan")
    return np.array(indices), np.array(totals), np.array(kinetics), median


def _result(
    atoms: Atoms,
    monitor: _Monitor,
    times: np.ndarray,
    total_energy: np.ndarray,
    kinetic_energy: np.ndarray,
    seconds: float,
    timestep_fs: float,
    temperature_K: float,
    spectrum: tuple[np.ndarray, np.ndarray],
) -> NVEResult:
    from ase import units

    slope, error = fit_drift(times, total_energy)
    if len(times) > 1 and np.ptp(kinetic_energy) == np.ptp(total_energy) == 0.0:
        slope = error = float("nan")
    spread = float(kinetic_energy.std()) if len(kinetic_energy) > 1 else float("nan")
    covered = float(times[-1]) if len(times) else 0.0
    temperatures = kinetic_energy / (1.5 * len(atoms) * units.kB)
    return NVEResult(
        drift_mev_per_atom_per_ps=1e3 * slope / len(atoms),
        standard_error=1e3 * error / len(atoms),
        drift_over_std_kinetic=_ratio(abs(slope) * covered, spread),
        std_kinetic_ev=spread,
        mean_temperature_K=float(temperatures.mean()) if len(times) else float("nan"),
        max_temperature_K=max([monitor.max_temperature, *temperatures.tolist()]),
        stable=monitor.stable,
        reason=monitor.reason,
        duration_ps=covered,
        timestep_fs=timestep_fs,
        temperature_K=temperature_K,
        n_atoms=len(atoms),
        seconds_per_step=seconds,
        times_ps=times,
        total_energy_ev=total_energy,
        kinetic_energy_ev=kinetic_energy,
        wave_numbers_per_cm=spectrum[0],
        vibrations=spectrum[1],
    )


def fit_drift(times: np.ndarray, energies: np.ndarray, blocks: int = 10) -> tuple[float, float]:
    """Return the slope of a linear fit, and its standard error for correlated residuals.

    The slope is that of ordinary least squares on all samples. Its error comes from a second regression, on the means
    of ``blocks`` consecutive blocks: unlike the samples, means of blocks longer than the correlation time are nearly
    independent (Flyvbjerg and Petersen, J. Chem. Phys. 91, 461 (1989), applied to a slope). The error is too small if
    the residuals are correlated over more than a block, as in a random walk; use the scatter of several seeds then.

    Args:
        times: shape (n,), any unit.
        energies: shape (n,).
        blocks: number of blocks; fewer where a block would have less than two samples.

    Returns:
        Slope and standard error, energy per time. NaN with fewer than 2 samples for the slope, or with fewer
        than 3 blocks for the error.
    """
    if len(times) < 2:
        return float("nan"), float("nan")
    centred = times - times.mean()
    slope = float(centred @ energies / (centred @ centred))
    blocks = min(blocks, len(times) // 2)
    if blocks < 3:
        return slope, float("nan")
    block_times = np.array([block.mean() for block in np.array_split(centred, blocks)])
    block_energies = np.array([block.mean() for block in np.array_split(energies, blocks)])
    block_times = block_times - block_times.mean()
    spread = block_times @ block_times
    block_slope = block_times @ block_energies / spread
    residuals = block_energies - block_energies.mean() - block_slope * block_times
    return slope, float(np.sqrt(residuals @ residuals / (blocks - 2) / spread))


class _Velocities:
    """Velocities of a run, for its vibrational spectrum: every 2 fs, and the first ones only where they are many."""

    INTERVAL = 2.0
    """Least time between samples, fs: bonds to hydrogen vibrate with a period of 9 fs or more."""
    MOST = 2**24
    """Most numbers that are kept."""
    BLOCK = 4096
    """Samples of a block, whose spectra are averaged."""

    def __init__(self, atoms: Atoms, timestep_fs: float) -> None:
        self.atoms = atoms
        self.every = max(1, round(self.INTERVAL / timestep_fs))
        self.interval_fs = self.every * timestep_fs
        self.most = self.MOST // (3 * len(atoms))
        self.samples: list[np.ndarray] = []

    def keep(self) -> None:
        if len(self.samples) < self.most:
            self.samples.append(self.atoms.get_velocities().astype(np.float32))

    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Wave numbers, 1/cm, and the power spectrum, whose sum is 1; both empty if too little was sampled."""
        length = min(len(self.samples), self.BLOCK)
        if length < 32 or not np.isfinite(self.samples[-1]).all():
            return np.zeros(0), np.zeros(0)
        masses = self.atoms.get_masses()
        blocks = [self.samples[n : n + length] for n in range(0, len(self.samples) - length + 1, length)]
        total = np.sum([power(np.array(block), masses).sum(axis=1) for block in blocks], axis=0)
        return wave_numbers(length, self.interval_fs), total / total.sum() if total.any() else total


class _Monitor:
    """Advances a run and watches for explosions and broken bonds."""

    def __init__(self, atoms: Atoms, temperature_K: float, check_bonds: bool) -> None:
        self.atoms = atoms
        self.limit = temperature_K + EXPLOSION_K
        self.max_temperature = 0.0
        self.reason = ""
        self.first = self.second = np.zeros(0, dtype=int)
        self.longest = np.zeros(0)
        if check_bonds:
            self.first, self.second, self.longest = covalent_bonds(atoms)

    @property
    def stable(self) -> bool:
        return not self.reason

    def fail(self, reason: str) -> None:
        self.reason = self.reason or reason

    def advance(self, dynamics: MolecularDynamics, steps: int) -> bool:
        """Take some steps; return False if the run is unstable after them."""
        try:
            dynamics.run(steps)
        except Exception as error:
            # The calculator may raise any error on exploded positions; on normal positions the error is real.
            if np.isfinite(self.atoms.positions).all() and self.atoms.get_temperature() <= self.limit:
                raise
            self.fail(f"the calculator failed on exploded positions: {type(error).__name__}")
            return False
        temperature = float(self.atoms.get_temperature())
        if not np.isfinite(temperature) or not np.isfinite(self.atoms.positions).all():
            self.fail("positions or velocities are not finite")
            return False
        self.max_temperature = max(self.max_temperature, temperature)
        if temperature > self.limit:
            self.fail(f"the temperature rose to {temperature:.0f} K")
        elif len(self.first):
            lengths = bond_lengths(self.atoms, self.first, self.second)
            broken = np.flatnonzero(lengths > self.longest)
            if len(broken):
                n = broken[0]
                self.fail(f"atoms {self.first[n]} and {self.second[n]} came apart ({lengths[n]:.2f} Å)")
        return self.stable


def covalent_bonds(atoms: Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find bonds between non-metals: first atoms, second atoms, and the length (Å) beyond which each is broken."""
    from ase.data import covalent_radii
    from ase.neighborlist import natural_cutoffs, neighbor_list

    first, second = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.1))
    numbers = atoms.numbers
    keep = (first < second) & np.isin(numbers[first], _NONMETALS) & np.isin(numbers[second], _NONMETALS)
    first, second = first[keep], second[keep]
    longest = 2 * (covalent_radii[numbers[first]] + covalent_radii[numbers[second]])
    longest[(numbers[first] == 1) | (numbers[second] == 1)] = _DETACHED_HYDROGEN
    return first, second, longest


def bond_lengths(atoms: Atoms, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return minimum-image bond lengths, shape (bonds,), Å."""
    from ase.geometry import find_mic

    return find_mic(atoms.positions[second] - atoms.positions[first], atoms.cell, atoms.pbc)[1]


def _ratio(change: float, spread: float) -> float:
    """Divide an energy change by the spread of the kinetic energy; infinite if only the spread is zero."""
    if np.isnan(change):
        return change
    if spread == 0.0:
        return 0.0 if change == 0.0 else float("inf")
    return float(change / spread)
