"""Errors against reference labels and against another potential, and reading structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.labels import ENERGY_KEY, FORCES_KEY, MissingLabelsError, labels_of, present_keys
from gaq.checks.potential import Potential

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True)
class LabelErrors:
    """Errors against reference labels.

    Attributes:
        force_mae_mev_per_angstrom: mean absolute error over all labelled force components, meV/Å; None without labels.
        force_rmse_mev_per_angstrom: root mean square error over the same components, meV/Å.
        energy_mae_mev_per_atom: over labelled structures, of the energy difference per atom, meV/atom; None without.
        structures: number of structures with reference forces.
        energies: number of structures with a reference energy.
        force_components: number of force components.
        force_labels: reference forces, shape (force_components,), eV/Å, for plots.
        force_predictions: predicted forces in the same order, shape (force_components,), eV/Å.
    """

    force_mae_mev_per_angstrom: float | None
    force_rmse_mev_per_angstrom: float | None
    energy_mae_mev_per_atom: float | None
    structures: int
    energies: int
    force_components: int
    force_labels: np.ndarray
    force_predictions: np.ndarray


def force_and_energy_mae(
    potential: Potential,
    structures: Sequence[Atoms],
    energy_key: str = ENERGY_KEY,
    forces_key: str = FORCES_KEY,
) -> LabelErrors:
    """Measure mean absolute errors of energies and forces against the labels that the structures have.

    See `gaq.checks.labels.labels_of` for where labels are looked up. A structure without an energy, or without forces,
    counts for what it has.

    Args:
        potential: the potential under test.
        structures: structures, some of them labelled; those that are go to the potential in one list.
        energy_key: key of the total energy, eV.
        forces_key: key of the forces, shape (n_atoms, 3), eV/Å.

    Returns:
        The errors, and the forces for plotting.

    Raises:
        MissingLabelsError: if no structure has a label.
        ValueError: if there are no structures.
    """
    if len(structures) == 0:
        raise ValueError("force_and_energy_mae: no structures given; pass at least one")
    labelled = [
        (structure, label) for structure in structures if (label := labels_of(structure, energy_key, forces_key)).any
    ]
    if not labelled:
        raise MissingLabelsError(
            f"no structure has a reference energy {energy_key!r} or reference forces {forces_key!r}; "
            f"{present_keys(structures)}."
        )
    energies, forces = potential(_unconstrained([structure for structure, _ in labelled]))
    per_atom = [
        abs(float(energy) - label.energy) / len(structure)
        for energy, (structure, label) in zip(energies, labelled, strict=True)
        if label.energy is not None
    ]
    pairs = [
        (label.forces, force) for force, (_, label) in zip(forces, labelled, strict=True) if label.forces is not None
    ]
    expected, predicted = (_flat([pair[k] for pair in pairs]) for k in (0, 1))
    return LabelErrors(
        force_mae_mev_per_angstrom=1e3 * float(np.mean(np.abs(predicted - expected))) if pairs else None,
        force_rmse_mev_per_angstrom=_rms(predicted - expected) if pairs else None,
        energy_mae_mev_per_atom=1e3 * float(np.mean(per_atom)) if per_atom else None,
        structures=len(pairs),
        energies=len(per_atom),
        force_components=len(expected),
        force_labels=expected,
        force_predictions=predicted,
    )


@dataclass(frozen=True)
class ForceDifference:
    """How far the forces of two potentials are apart.

    Attributes:
        rms_mev_per_angstrom: root mean square of the difference over all force components, meV/Å.
        force_rms_mev_per_angstrom: root mean square of the reference's force components, meV/Å.
        structures: number of structures.
    """

    rms_mev_per_angstrom: float
    force_rms_mev_per_angstrom: float
    structures: int

    @classmethod
    def between(cls, forces: np.ndarray, reference: np.ndarray, structures: int) -> ForceDifference:
        """Compare forces of the same shape, eV/Å, on that many structures."""
        return cls(_rms(forces - reference), _rms(reference), structures)


def force_difference(potential: Potential, reference: Potential, structures: Sequence[Atoms]) -> ForceDifference:
    """Measure how far the forces of a potential are from those of a reference potential; no labels enter.

    Raises:
        ValueError: if there are no structures.
    """
    if len(structures) == 0:
        raise ValueError("force_difference: no structures given; pass at least one")
    bare = _unconstrained(structures)
    return ForceDifference.between(_flat(potential(bare)[1]), _flat(reference(bare)[1]), len(structures))


def _unconstrained(structures: Sequence[Atoms]) -> list[Atoms]:
    """Copies without constraints: ASE would zero the forces of fixed atoms."""
    bare = [structure.copy() for structure in structures]
    for structure in bare:
        structure.set_constraint()
    return bare


def _flat(forces: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0), *(np.asarray(force, dtype=float).ravel() for force in forces)])


def _rms(forces: np.ndarray) -> float:
    """Root mean square of forces in eV/Å, in meV/Å."""
    return 1e3 * float(np.sqrt(np.mean(forces**2)))


def read_structures(path: str | Path, index: str = ":") -> list[Atoms]:
    """Read structures from any file that ASE knows.

    Args:
        path: the file, for instance extended XYZ.
        index: which frames, in ASE's notation: ``":"`` all, ``":100"`` the first hundred, ``"0"`` the first.

    Returns:
        The structures, in file order; never empty.

    Raises:
        ValueError: if the file is missing, empty, unreadable, or has no frame at ``index``.
    """
    import ase.io

    path = Path(path)
    if not path.is_file():
        kind = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"cannot read structures: {path} {kind}; give a file that ASE reads, such as .xyz")
    if path.stat().st_size == 0:
        raise ValueError(f"cannot read structures: {path} is empty")
    try:
        frames = ase.io.read(path, index=index)
    except Exception as error:  # ASE's readers raise anything from KeyError to StopIteration
        raise ValueError(
            f"cannot read structures from {path} (frames {index!r}): {type(error).__name__}: {error}; "
            "check the format, or whether the file has so many frames"
        ) from error
    structures = frames if isinstance(frames, list) else [frames]
    if not structures:
        raise ValueError(f"cannot read structures: {path} has no frame in {index!r}")
    return structures


def spaced(structures: Sequence[Atoms], count: int) -> list[Atoms]:
    """Return at most `count` of the structures, evenly spaced, the first and the last among them."""
    count = min(count, len(structures))
    return [structures[int(n)] for n in np.linspace(0, len(structures) - 1, count)]
