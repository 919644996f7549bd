"""Reference energies and forces of structures: where they are looked up, which can be used, and what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gaq.untyped import Document

if TYPE_CHECKING:
    from ase import Atoms

__all__ = [
    "ENERGY_KEY",
    "FORCES_KEY",
    "Labels",
    "MissingLabelsError",
    "check_keys",
    "frames_text",
    "labels_of",
    "left_out_labels",
    "present_keys",
]

ENERGY_KEY, FORCES_KEY = "REF_energy", "REF_forces"
"""Where labels are looked up by default: the names that `mace_run_train` expects."""


class MissingLabelsError(ValueError):
    """No structure has a reference energy or forces under the expected key."""


@dataclass(frozen=True)
class Labels:
    """Labels of a structure that can be used.

    Attributes:
        energy: eV; None where there is none.
        forces: (atoms, 3) in eV/Å; None where there are none.
        problems: why a label that is there cannot be used, by ``energies`` or ``forces``.
    """

    energy: float | None
    forces: np.ndarray | None
    problems: dict[str, str]

    @property
    def any(self) -> bool:
        """Whether there is a label."""
        return self.energy is not None or self.forces is not None


def labels_of(structure: Atoms, energy_key: str = ENERGY_KEY, forces_key: str = FORCES_KEY) -> Labels:
    """Return the labels of a structure.

    They are looked up in ``structure.info[energy_key]`` and ``structure.arrays[forces_key]``, then among the stored
    results of an attached ``SinglePointCalculator`` (where ASE puts ``energy`` and ``forces`` columns). Labels that are
    not finite, or have the wrong shape, count as none.
    """
    stored = _stored_labels(structure)
    energy = _number(structure.info.get(energy_key, stored.get("energy")))
    forces = _number(structure.arrays.get(forces_key, stored.get("forces")))
    problems = {}
    if energy is not None and (energy.size != 1 or not np.isfinite(energy).all()):
        problems["energies"], energy = "not one finite number", None
    if forces is not None and forces.shape != (len(structure), 3):
        problems["forces"], forces = "not of shape (atoms, 3)", None
    elif forces is not None and not np.isfinite(forces).all():
        problems["forces"], forces = "not finite", None
    return Labels(None if energy is None else float(energy.ravel()[0]), forces, problems)


def _number(value: object) -> np.ndarray | None:
    """A label as numbers; NaN for what is none, such as a text."""
    if value is None:
        return None
    try:
        return np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return np.full(1, np.nan)


def _stored_labels(structure: Atoms) -> Document:
    from ase.calculators.singlepoint import SinglePointCalculator

    # Only stored results are labels: any other calculator would compute new values.
    return structure.calc.results if isinstance(structure.calc, SinglePointCalculator) else {}


def check_keys(structures: Sequence[Atoms], energy_key: str, forces_key: str) -> None:
    """Refuse a key that was named but is on no structure; without the default ones structures are unlabelled.

    Raises:
        MissingLabelsError: naming what is there.
    """
    for key, default, place in ((energy_key, ENERGY_KEY, "info"), (forces_key, FORCES_KEY, "arrays")):
        if key != default and not any(key in getattr(structure, place) for structure in structures):
            raise MissingLabelsError(f"no structure has {place}[{key!r}]; {present_keys(structures)}.")


def left_out_labels(
    structures: Sequence[Atoms], energy_key: str = ENERGY_KEY, forces_key: str = FORCES_KEY
) -> list[str]:
    """Say in a line each which labels cannot be used; nothing where all structures have all labels, or none has any."""
    labels = [labels_of(structure, energy_key, forces_key) for structure in structures]
    if not any(label.any or label.problems for label in labels):
        return []
    lines = []
    for kind, key, values in (
        ("energies", energy_key, [label.energy for label in labels]),
        ("forces", forces_key, [label.forces for label in labels]),
    ):
        missing = [n for n, value in enumerate(values) if value is None]
        for reason in dict.fromkeys(labels[n].problems.get(kind, "missing") for n in missing):
            frames = [n for n in missing if labels[n].problems.get(kind, "missing") == reason]
            count = "all" if len(frames) == len(labels) else f"{len(frames)} of {len(labels)}"
            lines.append(f"left out: {kind} {key!r} of {count} structures, {reason}: {frames_text(frames)}")
    return lines


def frames_text(frames: Sequence[int], most: int = 5) -> str:
    """``frame 3`` or ``frames 3, 7 and 12 more``."""
    named = ", ".join(map(str, frames[:most]))
    more = f" and {len(frames) - most} more" if len(frames) > most else ""
    return f"frame{'s' if len(frames) > 1 else ''} {named}{more}"


def present_keys(structures: Sequence[Atoms]) -> str:
    """Say which keys the structures have, and with which options to name them."""
    info = sorted({str(key) for structure in structures for key in structure.info})
    arrays = sorted({str(key) for structure in structures for key in structure.arrays} - {"numbers", "positions"})
    return (
        f"present in info: {', '.join(info) or 'nothing'}; in arrays: {', '.join(arrays) or 'nothing'}. Name the keys "
        "of your data with --energy-key and --forces-key (energy_key and forces_key in Python)"
    )
