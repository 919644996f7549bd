"""Finite-rotation equivariance error of the forces and energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from gaq.checks.potential import Potential

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True)
class EquivarianceError:
    """How far the forces of rotated structures are from the rotated forces.

    Attributes:
        mean_mev_per_angstrom: mean over atoms and rotations of ``‖F(R x) − R F(x)‖``, meV/Å. None where all forces are
            zero in every orientation, as for atoms that do not interact: nothing was measured.
        max_mev_per_angstrom: the largest such norm, meV/Å.
        energy_mean_mev: mean over structures and rotations of ``|E(R x) − E(x)|``, meV per structure.
        standard_error: standard error of ``mean_mev_per_angstrom``, meV/Å; NaN from a single structure
            and a single rotation.
        reference_mean_mev_per_angstrom: mean error of the reference potential under the same rotations, meV/Å: the
            floor set by floating-point rounding, or the baseline. None without a reference.
    """

    mean_mev_per_angstrom: float | None
    max_mev_per_angstrom: float
    energy_mean_mev: float
    standard_error: float
    reference_mean_mev_per_angstrom: float | None = None


Component = TypeVar("Component", float, np.ndarray)


def rotation_rows(w: Component, x: Component, y: Component, z: Component) -> list[list[Component]]:
    """Return the rows of the rotation matrix of a unit quaternion, or of many, given by their components."""
    return [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]


def random_rotations(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw proper rotations uniform on SO(3) (the Haar measure).

    Four independent normal variates, normalised, are a unit quaternion uniform on the 3-sphere, which covers
    SO(3) twice and uniformly (Shoemake, Graphics Gems III (1992), p. 124).

    Args:
        count: how many rotations.
        rng: source of random numbers.

    Returns:
        Rotation matrices of determinant +1, shape (count, 3, 3).
    """
    quaternions = rng.standard_normal((count, 4))
    w, x, y, z = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    return np.array(rotation_rows(w, x, y, z)).transpose(2, 0, 1)


def local_equivariance_error(
    potential: Potential,
    structures: Sequence[Atoms],
    rotations: int = 4,
    seed: int = 0,
    reference: Potential | None = None,
) -> EquivarianceError:
    """Measure the mean force error under random proper rotations, in meV/Å.

    For every atom i and rotation R the error is the 2-norm ``‖F_i(R x) − R F_i(x)‖``: a finite-rotation error
    (the LEE of arXiv:2603.05343), not the Lie derivative that Gruver et al. (arXiv:2210.02984) gave the same
    name. Each structure gets different rotations, and cells rotate with the positions. Structures of the same rotation
    index go to the potential in one list.

    The standard error takes structures as the independent samples (the errors of one structure share its
    unrotated forces), or the rotations if there is only one structure. Structures differ in size, so it is the error of
    a ratio estimator (Cochran, Sampling Techniques, 3rd ed., eq. 6.13).

    Args:
        potential: the potential under test.
        structures: structures of any size, periodic or not.
        rotations: random rotations per structure.
        seed: seed of the rotations; the same seed gives the same rotations.
        reference: a second potential, measured under the same rotations for comparison.

    Returns:
        The error, with its standard error.

    Raises:
        ValueError: if there are no structures or ``rotations`` is below 1.
    """
    if len(structures) == 0:
        raise ValueError("local_equivariance_error: no structures given; pass at least one")
    if rotations < 1:
        raise ValueError(f"local_equivariance_error: rotations is {rotations}; it must be at least 1")
    matrices = random_rotations(rotations * len(structures), np.random.default_rng(seed))
    matrices = matrices.reshape(rotations, len(structures), 3, 3)

    norms, energy_errors, act = _rotation_errors(potential, structures, matrices)
    sizes = np.array([len(structure) for structure in structures], dtype=float)
    sums = np.array([[errors.sum() for errors in row] for row in norms])  # (rotations, structures)
    samples = rotations * sizes.sum()
    mean = sums.sum() / samples
    if len(structures) > 1:
        residuals = sums.sum(axis=0) - mean * rotations * sizes
    else:
        residuals = sums[:, 0] - mean * sizes[0]
    clusters = len(residuals)
    standard_error = float("nan")
    if clusters > 1:
        standard_error = float(np.sqrt(clusters / (clusters - 1) * np.sum(residuals**2)) / samples)

    reference_mean = None
    if reference is not None:
        reference_norms, _, _ = _rotation_errors(reference, structures, matrices)
        reference_mean = 1e3 * float(np.mean(np.concatenate([e for row in reference_norms for e in row])))
    return EquivarianceError(
        mean_mev_per_angstrom=1e3 * float(mean) if act else None,
        max_mev_per_angstrom=1e3 * float(max(errors.max() for row in norms for errors in row)),
        energy_mean_mev=1e3 * float(np.mean(energy_errors)),
        standard_error=1e3 * standard_error,
        reference_mean_mev_per_angstrom=reference_mean,
    )


def _rotation_errors(
    potential: Potential, structures: Sequence[Atoms], matrices: np.ndarray
) -> tuple[list[list[np.ndarray]], np.ndarray, bool]:
    """Per rotation and structure: force error norms (n_atoms,) in eV/Å and |energy error| in eV; whether forces act."""
    # Copies without constraints: ASE would zero the forces of fixed atoms.
    energies, forces = potential([_rotated(structure, np.eye(3)) for structure in structures])
    norms, energy_errors = [], []
    act = any(np.any(force) for force in forces)  # NaN is not zero
    for row in matrices:
        rotated = [_rotated(structure, matrix) for structure, matrix in zip(structures, row, strict=True)]
        rotated_energies, rotated_forces = potential(rotated)
        norms.append(
            [
                np.linalg.norm(after - before @ matrix.T, axis=1)
                for after, before, matrix in zip(rotated_forces, forces, row, strict=True)
            ]
        )
        energy_errors.append(np.abs(np.asarray(rotated_energies) - np.asarray(energies)))
        act = act or any(np.any(force) for force in rotated_forces)
    return norms, np.array(energy_errors), act


def _rotated(structure: Atoms, matrix: np.ndarray) -> Atoms:
    """Copy a structure rotated about the origin with its cell, without constraints or calculator."""
    copy = structure.copy()
    copy.set_constraint()
    copy.positions = structure.positions @ matrix.T
    copy.set_cell(structure.cell.array @ matrix.T, scale_atoms=False)
    return copy
