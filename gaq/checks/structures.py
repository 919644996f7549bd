"""Which structures a quantized model is calibrated and judged on, and what no structure may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.labels import ENERGY_KEY, FORCES_KEY, frames_text
from gaq.checks.potential import Potential

if TYPE_CHECKING:
    from ase import Atoms

__all__ = [
    "away_from_rest",
    "check_structures",
    "coincident_atoms",
    "hold_out",
    "rattled",
    "without_single_atoms",
]

RATTLE = 0.05
"""Standard deviation of a displacement in `rattled`, Å: that of a light atom in a solid or molecule near 300 K."""

AT_REST = 0.01
"""Root mean square of a force component in eV/Å below which a structure is at rest."""

FEWEST_TO_SPLIT = 5
"""Fewest structures of which some are held out of calibration; fewer are all needed there."""

SAME_PLACE = 1e-3
"""Distance in Å below which two atoms are at one place. Files hold positions to a few digits, so an atom that is listed
twice, at both ends of a cell, may be a little off itself; no potential has a meaning there."""


def rattled(
    structures: Sequence[Atoms], seed: int = 0, energy_key: str = ENERGY_KEY, forces_key: str = FORCES_KEY
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


def away_from_rest(
    potential: Potential,
    structures: Sequence[Atoms],
    seed: int = 0,
    energy_key: str = ENERGY_KEY,
    forces_key: str = FORCES_KEY,
) -> tuple[list[Atoms], list[str]]:
    """Displace the structures on which a model's forces are next to zero, such as perfect crystals.

    Errors relative to their forces say nothing, and symmetry makes features zero there that matter everywhere else.

    Args:
        potential: the model.
        structures: structures in which atoms interact.
        seed: seed of the displacements.
        energy_key: key of the reference energy in ``info``.
        forces_key: key of the reference forces in ``arrays``.

    Returns:
        The structures, those at rest replaced by their `rattled` copies, and a line that says which; no line where none
        is. Forces that are exactly zero are left as they are: no atoms interact.
    """
    sizes = [float(np.sqrt(np.mean(forces**2))) for forces in potential(structures)[1]]
    still = [n for n, size in enumerate(sizes) if 0.0 < size < AT_REST]
    if not still:
        return list(structures), []
    copies = rattled(structures, seed, energy_key, forces_key)
    return [copies[n] if n in still else structure for n, structure in enumerate(structures)], [
        f"atoms displaced at random by {RATTLE} Å in {len(still)} of {len(structures)} structures checked, because "
        f"forces there are below {1000 * AT_REST:.0f} meV/Å: {frames_text(still)}"
    ]


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
        ValueError: if there are none, positions or a cell are not finite, or two atoms are at one place; the message
            names the frame and the atoms.
    """
    if len(structures) == 0:
        raise ValueError("no structures given; pass at least one")
    for frame, structure in enumerate(structures):
        for what, values in (("positions", structure.positions), ("cell", np.asarray(structure.cell))):
            if not np.isfinite(values).all():
                raise ValueError(f"{_name(structure, frame)}: the {what} hold NaN or infinity; leave the frame out")
        if (pair := coincident_atoms(structure)) is not None:
            symbols = [structure.symbols[atom] for atom in pair]
            raise ValueError(
                f"{_name(structure, frame)}: atoms {pair[0]} ({symbols[0]}) and {pair[1]} ({symbols[1]}) are at one "
                "place, where forces are not defined; remove one of them, or leave the frame out"
            )


def coincident_atoms(structure: Atoms) -> tuple[int, int] | None:
    """Return two atoms at one place, periodic images counted; None where there are none.

    Args:
        structure: with finite positions and a finite cell.

    Raises:
        ValueError: if the vectors of a cell are linearly dependent.
    """
    from scipy.spatial import cKDTree

    cell = structure.cell.complete().array
    if abs(np.linalg.det(cell)) < 1e-12 * np.linalg.norm(cell, axis=1).prod():
        raise ValueError(f"{structure.get_chemical_formula()}: the vectors of the cell are linearly dependent")
    inverse = np.linalg.inv(cell)
    scaled = structure.positions @ inverse
    wrapped = scaled[:, structure.pbc] % 1.0
    scaled[:, structure.pbc] = np.where(wrapped < 1.0, wrapped, 0.0)  # 1 is what is left of a tiny negative number
    tree = cKDTree(scaled, boxsize=np.where(structure.pbc, 1.0, 0.0))
    # A scaled distance is at most the distance times the largest stretch of the inverse.
    for first, second in sorted(tree.query_pairs(SAME_PLACE * float(np.linalg.norm(inverse, 2)))):
        if structure.get_distance(first, second, mic=True) < SAME_PLACE:
            return int(first), int(second)
    return None


def without_single_atoms(structures: Sequence[Atoms]) -> tuple[list[Atoms], list[str]]:
    """Leave out structures of a single atom: its force is zero in any model, and nothing can be learned from it.

    Returns:
        The others, and a line that says what was left out; no line where nothing was.

    Raises:
        ValueError: if no structure is left.
    """
    frames = [n for n, structure in enumerate(structures) if len(structure) < 2]
    kept = [structure for structure in structures if len(structure) > 1]
    if not kept:
        raise ValueError(
            "every structure has a single atom, on which the force of any model is zero: nothing can be calibrated or "
            "checked on it. Give structures of several atoms; repeat the cell of a crystal until it holds a few, and "
            "displace them"
        )
    if not frames:
        return kept, []
    return kept, [
        f"left out: {len(frames)} of {len(structures)} structures, a single atom has no forces: {frames_text(frames)}"
    ]


def _name(structure: Atoms, frame: int) -> str:
    return f"frame {frame} ({structure.get_chemical_formula()})"
