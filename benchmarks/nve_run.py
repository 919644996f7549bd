"""NVE runs that are checkpointed, and resume bit for bit: velocity Verlet, and what is sampled on the way.

A checkpoint holds all that the next step depends on, the positions at which the neighbour list was made included: from
another list the same edges come in another order, and sums differ in their last bits. It is written whole or not at
all. A run that is killed loses the steps since its last checkpoint and takes the same ones again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from numpy.typing import NDArray

from gaq import settings
from gaq.checks import spectrum
from gaq.checks.nve import EXPLOSION_K, bond_lengths, covalent_bonds
from gaq.deployed.neighbours import NeighbourList
from gaq.deployed.potential import Potential
from gaq.files.whole import written_whole
from gaq.kernels import program
from gaq.progress import Progress

__all__ = ["CalculatorForces", "DeployedForces", "Forces", "Protocol", "Run"]

Floats = NDArray[np.float64]
BIN = 0.02
"""Width of a bin of distances, Å."""
FARTHEST = 14.0
"""Longest distance that is counted where there is no cell, Å."""


class Forces:
    """Energies and forces of one structure, at positions that change."""

    def __call__(self, positions: Floats) -> tuple[Floats, Floats]:
        """Energies to be summed, eV, and forces, (atoms, 3) in eV/Å."""
        raise NotImplementedError

    def history(self, positions: Floats) -> Floats:
        """Positions on which the result depends besides the present ones."""
        return positions

    def restore(self, history: Floats) -> None:
        """Come to the state of the object that gave this history."""


class DeployedForces(Forces):
    """A deployed file without an ASE calculator around it: half of a step's time on a small molecule.

    Args:
        path: file of `gaq deploy`.
        atoms: the structure; its positions do not matter.
    """

    def __init__(self, path: Path, atoms: Atoms) -> None:
        symbols = sorted(set(atoms.get_chemical_symbols()))
        self._potential = Potential(path, symbols)
        self._types = torch.tensor([symbols.index(symbol) for symbol in atoms.get_chemical_symbols()])
        self._structures = torch.zeros(len(atoms), dtype=torch.int64)
        self._atoms = atoms.copy()
        self.restore(atoms.positions)

    def __call__(self, positions: Floats) -> tuple[Floats, Floats]:
        edges = self._edges
        if not np.abs(positions - self._listed_at).max() <= self._still:  # NaN as well
            self._atoms.arrays["positions"] = positions
            edges.update(self._atoms)
            if edges.made != self._made:
                self._made, self._listed_at = edges.made, positions.copy()
        vectors = program.edge_vectors(torch.from_numpy(positions), edges.sender, edges.receiver, edges.shifts)
        energies, gradient = self._potential(self._types, edges.sender, edges.receiver, vectors)
        forces, _ = program.forces_and_strain(
            vectors, gradient, edges.sender, edges.receiver, self._structures, 1, strained=False
        )
        return energies.numpy(), forces.numpy()

    def history(self, positions: Floats) -> Floats:
        return self._listed_at

    def restore(self, history: Floats) -> None:
        skin = settings.current().skin
        self._edges = NeighbourList(self._potential.r_max, skin)
        # No atom has moved by half of the skin while no coordinate has changed by more than this: cheaper to see.
        self._still = 0.5 * skin / 3**0.5
        self._atoms.arrays["positions"] = self._listed_at = history.copy()
        self._edges.update(self._atoms)
        self._made = self._edges.made


class CalculatorForces(Forces):
    """An ASE calculator that keeps nothing between steps (``GAQ_SKIN=0`` where it keeps neighbour lists)."""

    def __init__(self, calculator: Any, atoms: Atoms) -> None:
        self._atoms = atoms.copy()
        self._atoms.calc = calculator

    def __call__(self, positions: Floats) -> tuple[Floats, Floats]:
        self._atoms.positions = positions
        forces = np.asarray(self._atoms.get_forces(), dtype=np.float64)
        return np.array([self._atoms.get_potential_energy()], dtype=np.float64), forces


@dataclass(frozen=True)
class Protocol:
    """How a run is integrated and sampled.

    Attributes:
        timestep_fs: integration step, fs.
        steps: steps of the whole run.
        velocities_every: steps between samples of velocities.
        sample_every: steps between samples of energies, distances and geometry; a multiple of `velocities_every`.
        block: samples of velocities of one block of the spectrum.
        save_every: samples between checkpoints.
        temperature_K: temperature that a run exploded from, K.
        torsion: four atoms whose dihedral angle is traced; None for none.
        bonds: whether covalent bonds are followed, and the run ends when one breaks.
    """

    timestep_fs: float = 0.5
    steps: int = 2_000_000
    velocities_every: int = 4
    sample_every: int = 20
    block: int = 8192
    save_every: int = 500
    temperature_K: float = 300.0
    torsion: tuple[int, int, int, int] | None = None
    bonds: bool = True

    def __post_init__(self) -> None:
        if self.steps % self.sample_every or self.sample_every % self.velocities_every:
            raise ValueError("Protocol: steps must be a multiple of sample_every, and that of velocities_every")


class Run:
    """One NVE run with its samples.

    Args:
        atoms: structure with velocities.
        forces: its energies and forces.
        protocol: how it is run.
        path: checkpoint, ``*.npz``; read if it is there.
        identity: what the run was made from; a checkpoint of another identity is refused.

    Attributes:
        step: steps taken.
        reason: why the run ended early; empty if it did not.
        trace: total energy in eV, kinetic energy in eV and torsion in degrees of each sample, (samples, 3).
        spectrum: power of the mass-weighted velocities of each element, summed over blocks, (elements, frequencies).
        blocks: number of blocks.
        counts: histogram of distances for each pair of elements, (pairs, bins).
        bond_moments: sum, sum of squares, least and largest length of each bond, (4, bonds) in Å.

    Raises:
        ValueError: for a checkpoint of another run.
    """

    def __init__(self, atoms: Atoms, forces: Forces, protocol: Protocol, path: Path, identity: dict[str, Any]) -> None:
        self.forces, self.protocol, self.path = forces, protocol, path
        self.identity = json.dumps(identity, sort_keys=True)
        self.masses = atoms.get_masses()[:, None]
        self.sampling = _Sampling(atoms.copy(), protocol)
        self.positions = np.array(atoms.positions, dtype=np.float64)
        self.velocities = np.array(atoms.get_velocities(), dtype=np.float64)
        self.step, self.reason = 0, ""
        samples = protocol.steps // protocol.sample_every + 1
        self.trace = np.full((samples, 3), np.nan)
        self.buffer = np.zeros((protocol.block, len(atoms), 3), dtype=np.float32)
        self.spectrum = np.zeros((len(self.sampling.elements), protocol.block // 2 + 1))
        self.blocks = 0
        self.counts = np.zeros((len(self.sampling.pairs), self.sampling.bins), dtype=np.int64)
        bonds = len(self.sampling.first)
        self.bond_moments = np.stack(
            [np.zeros(bonds), np.zeros(bonds), np.full(bonds, np.inf), np.full(bonds, -np.inf)]
        )
        if path.exists():
            self._read()
        self.energies, self.accelerations = self._evaluate()
        if self.step == 0:
            self._sample()

    @property
    def done(self) -> bool:
        return bool(self.reason) or self.step >= self.protocol.steps

    def advance(self, stop: Callable[[], bool] = lambda: False, description: str = "NVE") -> None:
        """Run to the end, or until `stop` says so between two samples; leaves a checkpoint either way."""
        protocol = self.protocol
        started_at = f", from {1e-3 * self.step * protocol.timestep_fs:.0f} ps" if self.step else ""
        with Progress(protocol.steps - self.step, description + started_at) as bar:
            while not self.done and not stop():
                self._stride()
                bar.advance(protocol.sample_every)
                if (self.step // protocol.sample_every) % protocol.save_every == 0:
                    self.save()
        self.save()

    def save(self) -> None:
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        history = self.forces.history(self.positions)
        with written_whole(self.path) as part:
            np.savez(part, identity=self.identity, reason=self.reason, history=history, **arrays)

    def _read(self) -> None:
        with np.load(self.path) as stored:
            if str(stored["identity"]) != self.identity:
                raise ValueError(
                    f"{self.path}: a checkpoint of another run, {stored['identity']} instead of {self.identity}"
                )
            for name in _ARRAYS:
                value = stored[name]
                setattr(self, name, int(value) if name in ("step", "blocks") else value)
            self.reason = str(stored["reason"])
            self.forces.restore(stored["history"])

    def _evaluate(self) -> tuple[Floats, Floats]:
        energies, forces = self.forces(self.positions)
        return energies, forces / self.masses

    def _stride(self) -> None:
        """Take the steps from one sample to the next."""
        step = self.protocol.timestep_fs * units.fs
        half = 0.5 * step
        for _ in range(self.protocol.sample_every // self.protocol.velocities_every):
            for _ in range(self.protocol.velocities_every):
                self.velocities += half * self.accelerations
                self.positions += step * self.velocities
                try:
                    self.energies, self.accelerations = self._evaluate()
                except ValueError as error:  # positions that are no finite numbers
                    self.reason = f"the potential failed: {error}"
                    return
                self.velocities += half * self.accelerations
                self.step += 1
            self._keep_velocities()
        self._sample()

    def _keep_velocities(self) -> None:
        place = (self.step // self.protocol.velocities_every - 1) % self.protocol.block
        self.buffer[place] = self.velocities
        if place == self.protocol.block - 1:
            self.spectrum += self.sampling.power(self.buffer)
            self.blocks += 1

    def _sample(self) -> None:
        kinetic = 0.5 * float(np.sum(self.masses * self.velocities**2))
        total = kinetic + float(np.sum(self.energies))
        temperature = self.sampling.temperature(kinetic)
        sample = self.step // self.protocol.sample_every
        if not np.isfinite(total) or temperature > self.protocol.temperature_K + EXPLOSION_K:
            self.reason = f"the temperature rose to {temperature:.0f} K" if np.isfinite(total) else "not finite"
            return
        self.trace[sample] = total, kinetic, self.sampling.torsion(self.positions)
        self.counts += self.sampling.histogram(self.positions)
        lengths = self.sampling.bonds(self.positions)
        sums, squares, least, most = self.bond_moments
        sums += lengths
        squares += lengths**2
        np.minimum(least, lengths, out=least)
        np.maximum(most, lengths, out=most)
        broken = np.flatnonzero(lengths > self.sampling.longest)
        if len(broken):
            first, second = self.sampling.first[broken[0]], self.sampling.second[broken[0]]
            self.reason = f"atoms {first} and {second} came apart ({lengths[broken[0]]:.2f} Å)"


_ARRAYS = (*("step", "blocks", "positions", "velocities", "trace", "buffer", "spectrum", "counts", "bond_moments"),)
"""Arrays and numbers of a checkpoint, by the names of `Run`."""


@dataclass
class _Sampling:
    """What of a structure is sampled; nothing here changes during a run."""

    atoms: Atoms
    protocol: Protocol
    elements: list[str] = field(init=False)
    pairs: list[tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        atoms = self.atoms
        symbols = atoms.get_chemical_symbols()
        self.elements = sorted(set(symbols))
        self.pairs = [(a, b) for n, a in enumerate(self.elements) for b in self.elements[n:]]
        self._one, self._other = np.triu_indices(len(atoms), 1)
        kinds = [
            self.pairs.index(self._kind(symbols[i], symbols[j])) for i, j in zip(self._one, self._other, strict=True)
        ]
        self._box = atoms.cell.lengths() if atoms.pbc.all() else None
        reach = FARTHEST if self._box is None else 0.5 * float(self._box.min())
        self.bins = int(reach / BIN)
        # A bin more for what lies beyond.
        self._offset = np.array(kinds, dtype=np.int64) * (self.bins + 1)
        self.first, self.second, self.longest = (
            covalent_bonds(atoms) if self.protocol.bonds else (np.zeros(0, int), np.zeros(0, int), np.zeros(0))
        )
        self._of_element = [np.array(symbols) == element for element in self.elements]
        # Momentum is zero, and the angular momentum of a molecule.
        self.freedom = max(1, 3 * len(atoms) - (3 if atoms.pbc.any() else 6))

    def _kind(self, a: str, b: str) -> tuple[str, str]:
        return (a, b) if (a, b) in self.pairs else (b, a)

    def temperature(self, kinetic: float | Floats) -> Any:
        """Temperature in K of a kinetic energy in eV."""
        return 2.0 * kinetic / (self.freedom * units.kB)

    def power(self, velocities: NDArray[np.float32]) -> Floats:
        """Power of the mass-weighted velocities of a block, (elements, frequencies)."""
        power = spectrum.power(velocities, self.atoms.get_masses())
        return np.stack([power[:, mask].sum(axis=1) for mask in self._of_element])

    def histogram(self, positions: Floats) -> NDArray[np.int64]:
        """Counts of distances, (pairs, bins)."""
        apart = positions[self._other] - positions[self._one]
        if self._box is not None:
            apart -= self._box * np.round(apart / self._box)
        bins = (np.sqrt(np.einsum("ij,ij->i", apart, apart)) / BIN).astype(np.int64)
        np.minimum(bins, self.bins, out=bins)
        bins += self._offset
        counts = np.bincount(bins, minlength=len(self.pairs) * (self.bins + 1))
        return counts.reshape(len(self.pairs), -1)[:, :-1]

    def bonds(self, positions: Floats) -> Floats:
        self.atoms.positions = positions
        return bond_lengths(self.atoms, self.first, self.second)

    def torsion(self, positions: Floats) -> float:
        if self.protocol.torsion is None:
            return float("nan")
        a, b, c, d = positions[list(self.protocol.torsion)]
        axis = (c - b) / np.linalg.norm(c - b)
        left, right = a - b, d - c
        left, right = left - (left @ axis) * axis, right - (right @ axis) * axis
        return float(np.degrees(np.arctan2(np.cross(axis, left) @ right, left @ right)))
