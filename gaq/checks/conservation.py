"""Forces against central differences of the energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gaq.checks.potential import Potential, energies_of

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True)
class CentralDifferenceError:
    """Disagreement of forces and energy differences at one step.

    Attributes:
        step: displacement h, Å.
        relative_error: rms of (difference quotient − force) over rms of the force, dimensionless. None where all
            sampled forces are zero and so are the differences, as for atoms that do not interact: nothing was measured.
        reference_relative_error: the same error of the smooth reference potential at the same pairs: the truncation
            error of h. None without a reference.
        samples: number of (atom, component) pairs.
    """

    step: float
    relative_error: float | None
    reference_relative_error: float | None
    samples: int


def central_difference_error(
    potential: Potential,
    structures: Sequence[Atoms],
    steps: Sequence[float] = (0.1, 0.03, 0.01),
    components_per_structure: int = 6,
    seed: int = 0,
    reference: Potential | None = None,
) -> dict[float, CentralDifferenceError]:
    """Measure the relative error of the forces against ``−(E(x+h) − E(x−h)) / 2h``.

    For a smooth conservative potential the error is truncation, ``h²/6 · |∂³E|``, and falls by a factor of 100 when h
    falls by 10. For an energy with steps of height s it is of order ``s / h`` and grows as h falls; for a force that is
    not a gradient it tends to a constant. Rounding of the energy adds ``ε|E| / h``: use a float64 potential at
    h = 0.01 Å.

    The same randomly chosen (atom, component) pairs serve every step. All displaced structures, ``structures x 2 x
    steps x components_per_structure``, go to the potential in a single list, and only their energies are computed.

    Args:
        potential: the potential under test.
        structures: structures of any size, away from equilibrium (the error is relative to their forces).
        steps: displacements h, Å.
        components_per_structure: pairs drawn without replacement from each structure, at most 3 n_atoms.
        seed: seed of the draw.
        reference: a smooth potential, usually the unquantized model, measured at the same pairs.

    Returns:
        One `CentralDifferenceError` per step, keyed by the step in Å. A relative error is infinite where
        all the sampled forces are zero and the differences are not.

    Raises:
        ValueError: if there are no structures, no steps, a step that is not positive, or no components.
    """
    if len(structures) == 0:
        raise ValueError("central_difference_error: no structures given; pass at least one")
    if len(steps) == 0 or not all(step > 0 for step in steps):
        raise ValueError(f"central_difference_error: steps are {tuple(steps)}; give positive lengths in Å")
    if components_per_structure < 1:
        raise ValueError(
            f"central_difference_error: components_per_structure is {components_per_structure}; at least 1"
        )
    rng = np.random.default_rng(seed)
    pairs = []
    for structure in structures:
        count = min(components_per_structure, 3 * len(structure))
        chosen = rng.choice(3 * len(structure), size=count, replace=False)
        pairs.append([(int(flat) // 3, int(flat) % 3) for flat in chosen])

    errors = _relative_errors(potential, structures, pairs, steps)
    floors: list[float | None] = [None] * len(steps)
    if reference is not None:
        floors = _relative_errors(reference, structures, pairs, steps)
    samples = sum(map(len, pairs))
    return {
        float(step): CentralDifferenceError(float(step), error, floor, samples)
        for step, error, floor in zip(steps, errors, floors, strict=True)
    }


def _relative_errors(
    potential: Potential,
    structures: Sequence[Atoms],
    pairs: list[list[tuple[int, int]]],
    steps: Sequence[float],
) -> list[float | None]:
    """Return one relative error per step; None where there is nothing to compare."""
    bases = [structure.copy() for structure in structures]
    pool = []
    for base in bases:
        base.set_constraint()  # ASE would zero the forces of fixed atoms
    for step in steps:
        for base, chosen in zip(bases, pairs, strict=True):
            for atom, component in chosen:
                for sign in (1.0, -1.0):
                    displaced = base.copy()
                    displaced.positions[atom, component] += sign * step
                    pool.append(displaced)
    forces = potential(bases)[1]
    analytic = np.array([forces[s][i, k] for s, chosen in enumerate(pairs) for i, k in chosen], dtype=float)
    displaced_energies = energies_of(potential, pool).astype(float).reshape(len(steps), -1, 2)
    size = float(np.sqrt(np.mean(analytic**2)))
    errors: list[float | None] = []
    for step, (plus, minus) in zip(steps, displaced_energies.transpose(0, 2, 1), strict=True):
        difference = -(plus - minus) / (2 * step) - analytic
        error = float(np.sqrt(np.mean(difference**2)))
        # NaN must stay NaN: only an exact zero means that nothing acts on the atoms.
        errors.append(error / size if size != 0.0 else (None if error == 0.0 else float("inf")))
    return errors
