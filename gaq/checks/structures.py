"""Which structures a quantized model is calibrated and judged on, and what no structure may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.errors import has_labels, labels_of

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["check_calibration_structures", "check_labels", "check_structures", "hold_out", "rattled"]

RATTLE = 0.05
"""Standard deviation of a displacement in `rattled`, Å: that of a light atom in a solid or molecule near 300 K."""

FEWEST_TO_SPLIT = 5
"""Fewest structures of which some are held out of calibration; fewer are all needed there."""


def rattled(
    structures: Sequence[Atoms], seed: int = 0, energy_key: str = "REF_energy", forces_key: str = "REF_forces"
) -> list[Atoms]:
    """Return a copy of each structure with every atom displaced at random by `RATTLE`; it has no labels."""
    rng = np.random.default_rng(seed)
    copies = [structure.copy() for structure in structures]
    for copy in copies:
        copy.set_constraint()
        copy.positions += RATTLE * rng.standard_normal(copy.positions.shape)
        copy.info.pop(energy_key, None)
        copy.arrays.pop(forces_key, None)
    return copies


def hold_out(structures: Sequence[Atoms], seed: int = 0) -> tuple[list[Atoms], list[Atoms]]:
    """Split structures into those to calibrate on and those to judge on, which calibration must not see.

    Every fifth structure is held out. Of fewer than `FEWEST_TO_SPLIT` none is: calibration gets all of them, and they
    are judged on `rattled` copies, eight in all.

    Args:
        structures: at least one.
        seed: seed of the displacements.

    Returns:
        Both lists; neither is empty.
    """
    if len(structures) >= FEWEST_TO_SPLIT:
        held = set(range(FEWEST_TO_SPLIT // 2, len(structures), FEWEST_TO_SPLIT))
        calibration = [structure for n, structure in enumerate(structures) if n not in held]
        return calibration, [structures[n] for n in sorted(held)]
    repeats = -(-8 // len(structures))
    return list(structures), rattled([*structures] * repeats, seed)[:8]


def check_structures(structures: Sequence[Atoms]) -> None:
    """Refuse structures on which every number would be wrong.

    Raises:
        ValueError: if there are none, or positions or a cell are not finite; the message names the frame.
    """
    if len(structures) == 0:
        raise ValueError("no structures given; pass at least one")
    for frame, structure in enumerate(structures):
        for what, values in (("positions", structure.positions), ("cell", np.asarray(structure.cell))):
            if not np.isfinite(values).all():
                raise ValueError(f"{_name(structure, frame)}: the {what} hold NaN or infinity; leave the frame out")


def check_labels(structures: Sequence[Atoms], energy_key: str = "REF_energy", forces_key: str = "REF_forces") -> None:
    """Refuse labels that are not finite, and those on some structures only. No labels at all are no error.

    Raises:
        gaq.checks.errors.MissingLabelsError: if some structures have labels and others have not.
        ValueError: if a label is not finite or has the wrong shape; the message names the frame.
    """
    if any(has_labels(structure, energy_key, forces_key) for structure in structures):
        for frame, structure in enumerate(structures):
            labels_of(structure, frame, energy_key, forces_key)


def check_calibration_structures(structures: Sequence[Atoms]) -> None:
    """Refuse structures that cannot be calibrated on: as `check_structures`, and those of a single atom.

    Raises:
        ValueError: naming the frame.
    """
    check_structures(structures)
    for frame, structure in enumerate(structures):
        if len(structure) < 2:
            raise ValueError(
                f"{_name(structure, frame)} has a single atom, on which the force of any model is zero: nothing can be "
                "calibrated or checked on it. Leave isolated atoms out; repeat the cell of a crystal until it holds a "
                "few atoms, and displace them"
            )


def _name(structure: Atoms, frame: int) -> str:
    return f"frame {frame} ({structure.get_chemical_formula()})"
