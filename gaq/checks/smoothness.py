"""Bond-stretch scan: looks for energy steps that the curvature of a smooth reference does not explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.potential import Potential, energies_of

if TYPE_CHECKING:
    from ase import Atoms


class NoBondError(ValueError):
    """A structure has no two atoms within bonding distance."""


@dataclass(frozen=True, eq=False)
class SmoothnessResult:
    """Outcome of a bond-stretch scan.

    Attributes:
        passed: ``largest_jump_mev <= allowed_mev``.
        largest_jump_mev: largest second difference of (energy − reference energy) along the scan, meV.
        allowed_mev: largest second difference of the reference energy, plus the rounding of the energies,
            meV.
        jump_at_angstrom: bond length of the largest jump, Å.
        bond: the two atom indices.
        lengths_angstrom: bond lengths scanned, shape (points,), Å.
        energy_ev: energy along the scan, shape (points,), eV.
        reference_energy_ev: reference energy along the scan, shape (points,), eV.
        nothing_measured: whether both energies are constant along the scan: the two atoms do not interact.
    """

    passed: bool
    largest_jump_mev: float
    allowed_mev: float
    jump_at_angstrom: float
    bond: tuple[int, int]
    lengths_angstrom: np.ndarray
    energy_ev: np.ndarray
    reference_energy_ev: np.ndarray

    @property
    def nothing_measured(self) -> bool:
        return bool(np.ptp(self.energy_ev) == np.ptp(self.reference_energy_ev) == 0.0)


def bond_stretch_scan(
    potential: Potential,
    atoms: Atoms,
    reference: Potential,
    bond: tuple[int, int] | None = None,
    span: tuple[float, float] = (-0.2, 0.5),
    points: int = 141,
) -> SmoothnessResult:
    """Stretch one bond and look for steps in the energy.

    **Criterion** (our derivation; the scan itself is that of arXiv:2602.04861). Let ``h`` be the spacing of
    the lengths, ``D = E − E_ref``, and ``δ²f_i = f_{i+1} − 2 f_i + f_{i−1}``.

    * An isolated step of height s between two grid points adds ``+s`` and ``−s`` to ``δ²D`` on its two sides,
      and a dense staircase of that height (roundings independent from point to point) adds up to ``2 s``: in
      either case ``max|δ²D|`` is of the order of the step, however fine the grid.
    * A smooth difference has ``δ²D = h² D''``, which vanishes with the grid. Quantization changes a good
      model little, so ``|D''|`` stays below the largest curvature of the reference, ``max|E_ref''|``,
      unless the surface is not smooth (or so wrong that its force constants are off by a hundred percent).

    So the scan passes when ``max|δ²D| ≤ max|δ²E_ref|``: no step is larger than what the reference's curvature causes
    between neighbouring points. Differences against the reference, rather than ``δ²E`` itself,
    remove the true curvature from the quantity under test. With the default spacing of 5 mÅ and a bond of
    30 eV/Å² the bound is 0.75 meV near the minimum; the compressed end of the scan is usually stiffer and
    sets it. Smaller steps need a finer grid: the bound falls as h², a step does not.

    Energies that are single-precision numbers are known to half a unit in the last place each; the second
    difference of D can then be off by four such units, which is added to the bound.

    Args:
        potential: the potential under test.
        atoms: the structure, not changed.
        reference: the smooth potential, usually the unquantized model.
        bond: two bonded atom indices; the second one moves, with everything attached to it. By default the
            first terminal bond, preferably to a hydrogen, else the shortest contact within covalent radii.
        span: shortest and longest change of the bond length, Å.
        points: number of points, at least 5.

    Returns:
        The verdict and the scanned energies.

    Raises:
        NoBondError: if no bond is given and the structure has none.
        ValueError: if the bond is invalid, ``points`` is below 5, or the span is empty or
            shortens the bond to nothing.
    """
    if points < 5:
        raise ValueError(f"bond_stretch_scan: points is {points}; at least 5 are needed for second differences")
    if not span[0] < span[1]:
        raise ValueError(f"bond_stretch_scan: span is {span}; the second length must exceed the first")
    neighbours = _neighbours(atoms)
    if bond is None:
        bond = _choose_bond(atoms, neighbours)
    fixed, moved = (int(index) for index in bond)
    if fixed == moved or not {fixed, moved} <= set(range(len(atoms))):
        raise ValueError(f"bond_stretch_scan: bond {bond} does not name two of the atoms 0 to {len(atoms) - 1}")

    vector = atoms.get_distance(fixed, moved, mic=True, vector=True)
    length = float(np.linalg.norm(vector))
    if length + span[0] <= 0:
        raise ValueError(f"bond_stretch_scan: span {span} shortens the bond of {length:.3f} Å to nothing")
    group = sorted(_attached(neighbours, fixed, moved))
    changes = np.linspace(span[0], span[1], points)
    scan = []
    for change in changes:
        copy = atoms.copy()
        copy.set_constraint()
        copy.positions[group] += change * vector / length
        scan.append(copy)
    energy = energies_of(potential, scan)
    reference_energy = energies_of(reference, scan)

    rounding = 4 * (_half_unit(energy) + _half_unit(reference_energy))
    energy, reference_energy = energy.astype(float), reference_energy.astype(float)
    jumps = np.abs(np.diff(energy - reference_energy, 2))
    allowed = float(np.max(np.abs(np.diff(reference_energy, 2)))) + rounding
    largest_index = int(np.argmax(jumps))  # argmax returns a NaN, if there is one
    largest = float(jumps[largest_index])
    return SmoothnessResult(
        passed=largest <= allowed,
        largest_jump_mev=1e3 * largest,
        allowed_mev=1e3 * allowed,
        jump_at_angstrom=float(length + changes[largest_index + 1]),
        bond=(fixed, moved),
        lengths_angstrom=length + changes,
        energy_ev=energy,
        reference_energy_ev=reference_energy,
    )


def _half_unit(energies: np.ndarray) -> float:
    """Return half a unit in the last place of single-precision energies, eV; 0 for double precision."""
    # Many calculators return single-precision results in a float64 array, so look at the values.
    if not np.isfinite(energies).all() or not np.array_equal(energies, energies.astype(np.float32)):
        return 0.0
    return 0.5 * float(np.spacing(np.float32(np.max(np.abs(energies)))))


def _neighbours(atoms: Atoms) -> list[list[int]]:
    """Atoms within 1.1 times the sum of covalent radii of each atom."""
    from ase.neighborlist import natural_cutoffs, neighbor_list

    neighbours: list[list[int]] = [[] for _ in range(len(atoms))]
    for i, j in zip(*neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.1)), strict=True):
        if i != j and int(j) not in neighbours[i]:
            neighbours[i].append(int(j))
    return neighbours


def _choose_bond(atoms: Atoms, neighbours: list[list[int]]) -> tuple[int, int]:
    """Choose the bond of the first terminal hydrogen, else of the first terminal atom, else the shortest contact."""
    terminal = [atom for atom, around in enumerate(neighbours) if len(around) == 1]
    hydrogens = [atom for atom in terminal if atoms.numbers[atom] == 1]
    for atom in (*hydrogens, *terminal):
        return neighbours[atom][0], atom
    contacts = [(i, j) for i, around in enumerate(neighbours) for j in around if i < j]
    if not contacts:
        raise NoBondError(
            f"bond_stretch_scan: no two atoms of {atoms.get_chemical_formula()} are within 1.1 times their "
            "covalent radii; name the pair to stretch with bond=(i, j)"
        )
    return min(contacts, key=lambda pair: atoms.get_distance(pair[0], pair[1], mic=True))


def _attached(neighbours: list[list[int]], fixed: int, moved: int) -> set[int]:
    """Return the atoms that move with ``moved``: its side of the bond, or ``moved`` alone if the bond is in a ring."""
    group, front = {moved}, [moved]
    while front:
        atom = front.pop()
        for other in neighbours[atom]:
            if {atom, other} == {fixed, moved}:
                continue
            if other == fixed:
                return {moved}
            if other not in group:
                group.add(other)
                front.append(other)
    return group
