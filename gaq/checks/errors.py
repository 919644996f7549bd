"""Errors against reference labels and against another potential, and reading labelled structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.potential import Potential
from gaq.untyped import Document

if TYPE_CHECKING:
    from ase import Atoms


class MissingLabelsError(ValueError):
    """A structure has no reference energy or forces under the expected key."""


@dataclass(frozen=True)
class LabelErrors:
    """Errors against reference labels.

    Attributes:
        force_mae_mev_per_angstrom: mean absolute error over all force components of all structures, meV/Å.
        force_rmse_mev_per_angstrom: root mean square error over the same components, meV/Å.
        energy_mae_mev_per_atom: over structures, of the energy difference per atom, meV/atom.
        structures: number of structures.
        force_components: number of force components.
        force_labels: reference forces, shape (force_components,), eV/Å, for plots.
        force_predictions: predicted forces in the same order, shape (force_components,), eV/Å.
    """

    force_mae_mev_per_angstrom: float
    force_rmse_mev_per_angstrom: float
    energy_mae_mev_per_atom: float
    structures: int
    force_components: int
    force_labels: np.ndarray
    force_predictions: np.ndarray


def force_and_energy_mae(
    potential: Potential,
    structures: Sequence[Atoms],
    energy_key: str = "REF_energy",
    forces_key: str = "REF_forces",
) -> LabelErrors:
    """Measure mean absolute errors of energies and forces against the labels of the structures.

    Labels are looked up in ``structure.info[energy_key]`` and ``structure.arrays[forces_key]``, then among
    the stored results of an attached ``SinglePointCalculator`` (where ASE puts ``energy`` and ``forces``
    columns).

    Args:
        potential: the potential under test.
        structures: labelled structures; all go to the potential in one list.
        energy_key: key of the total energy, eV.
        forces_key: key of the forces, shape (n_atoms, 3), eV/Å.

    Returns:
        The errors, and the forces for plotting.

    Raises:
        MissingLabelsError: if a structure has no label; the message names the frame and the key.
        ValueError: if there are no structures, or a label has the wrong shape or is not finite.
    """
    if len(structures) == 0:
        raise ValueError("force_and_energy_mae: no structures given; pass at least one")
    labels = [labels_of(structure, n, energy_key, forces_key) for n, structure in enumerate(structures)]
    energies, forces = potential(_unconstrained(structures))
    label_energies = np.array([energy for energy, _ in labels])
    sizes = np.array([len(structure) for structure in structures])
    expected = np.concatenate([label.ravel() for _, label in labels])
    predicted = _flat(forces)
    energy_errors = np.abs(np.asarray(energies, dtype=float) - label_energies) / sizes
    return LabelErrors(
        force_mae_mev_per_angstrom=1e3 * float(np.mean(np.abs(predicted - expected))),
        force_rmse_mev_per_angstrom=_rms(predicted - expected),
        energy_mae_mev_per_atom=1e3 * float(np.mean(energy_errors)),
        structures=len(structures),
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
    return np.concatenate([np.asarray(force, dtype=float).ravel() for force in forces])


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


def _stored_labels(structure: Atoms) -> Document:
    from ase.calculators.singlepoint import SinglePointCalculator

    # Only stored results are labels: any other calculator would compute new values.
    return structure.calc.results if isinstance(structure.calc, SinglePointCalculator) else {}


def has_labels(structure: Atoms, energy_key: str, forces_key: str) -> bool:
    """Whether a structure has a reference energy or reference forces."""
    return energy_key in structure.info or forces_key in structure.arrays or "forces" in _stored_labels(structure)


def labels_of(structure: Atoms, frame: int, energy_key: str, forces_key: str) -> tuple[float, np.ndarray]:
    """Return energy (eV) and forces (n_atoms, 3) (eV/Å) of a labelled structure.

    Raises:
        MissingLabelsError: if one is missing.
        ValueError: if one is not finite or has the wrong shape.
    """
    stored = _stored_labels(structure)
    energy = structure.info.get(energy_key, stored.get("energy"))
    forces = structure.arrays.get(forces_key, stored.get("forces"))
    for value, key, place, stored_key in (
        (energy, energy_key, "info", "energy"),
        (forces, forces_key, "arrays", "forces"),
    ):
        if value is None:
            raise MissingLabelsError(
                f"frame {frame} ({structure.get_chemical_formula()}) has no reference {stored_key}: no "
                f"{place}[{key!r}] and no stored calculator result {stored_key!r}; present in {place}: "
                f"{sorted(getattr(structure, place))}. Name the key your data uses, or label the data."
            )
    energy_value = np.asarray(energy, dtype=float)
    force_values = np.asarray(forces, dtype=float)
    if energy_value.size != 1 or not np.isfinite(energy_value).all():
        raise ValueError(f"frame {frame}: reference energy {energy_key!r} is {energy!r}, not one finite number")
    if force_values.shape != (len(structure), 3) or not np.isfinite(force_values).all():
        raise ValueError(
            f"frame {frame}: reference forces {forces_key!r} have shape {force_values.shape} or values "
            f"that are not finite; expected finite values of shape ({len(structure)}, 3)"
        )
    return float(energy_value.ravel()[0]), force_values
