"""What an energy model owes to physics whatever is in it: symmetries, forces that are its slope, smoothness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from small import molecules

if TYPE_CHECKING:
    from ase import Atoms

Evaluate = Callable[..., tuple[np.ndarray, np.ndarray]]


def check_symmetries(evaluate: Evaluate, model: Any, reflect: bool) -> None:
    """A float64 model follows rotations (reflections too, if asked), translations and permutations."""
    from scipy.spatial.transform import Rotation

    atoms = molecules()[0]
    energy, forces = evaluate(model, [atoms])
    assert np.abs(forces).max() > 0.01
    turn = Rotation.random(random_state=1).as_matrix() * (-1.0 if reflect else 1.0)
    moved = atoms.copy()
    moved.positions = moved.positions @ turn.T + [1.0, -2.0, 3.0]
    turned = evaluate(model, [moved])
    np.testing.assert_allclose(turned[0], energy, atol=1e-10)
    np.testing.assert_allclose(turned[1], forces @ turn.T, atol=1e-9)
    order = np.random.default_rng(0).permutation(len(atoms))
    mixed = evaluate(model, [atoms[order]])
    np.testing.assert_allclose(mixed[0], energy, atol=1e-10)
    np.testing.assert_allclose(mixed[1], forces[order], atol=1e-9)


def check_forces_are_the_gradient(evaluate: Evaluate, model: Any, tolerance: float = 1e-7) -> None:
    """Forces of a float64 model against central differences of its energy, to a millionth and a tolerance (eV/Å)."""
    atoms, step = molecules()[0], 1e-4
    _, forces = evaluate(model, [atoms])
    picks = [(0, 0), (1, 1), (4, 2), (8, 0)]
    shifted = []
    for atom, axis in picks:
        for sign in (1, -1):
            frame = atoms.copy()
            frame.positions[atom, axis] += sign * step
            shifted.append(frame)
    energies = evaluate(model, shifted)[0].reshape(-1, 2)
    slopes = (energies[:, 1] - energies[:, 0]) / (2 * step)
    np.testing.assert_allclose(slopes, [forces[a, x] for a, x in picks], rtol=1e-6, atol=tolerance)


def check_smooth_at_the_cutoff(
    evaluate: Evaluate, model: Any, pair: Callable[[float], Atoms], gaps_at: tuple[float, float]
) -> None:
    """Energy and force on both sides of r_max = 4 Å, and along the whole way of a neighbour that leaves.

    Args:
        evaluate: energies and forces of a model.
        model: in float64.
        pair: the structure whose second atom is that far along x.
        gaps_at: two distances from the cutoff, ten to one, at which the gaps are compared.
    """
    gaps = []
    for h in gaps_at:
        energies, forces = evaluate(model, [pair(4.0 - h), pair(4.0 + h)])
        forces = forces.reshape(2, -1, 3)
        gaps.append((abs(energies[0] - energies[1]), np.abs(forces[0] - forces[1]).max()))
    # Two derivatives of the cutoff vanish: the energy's gap falls as h^3 or faster, the force's as h^2.
    assert gaps[1][0] < 2e-3 * gaps[0][0] + 1e-12
    assert gaps[1][1] < 3e-2 * gaps[0][1] + 1e-12
    assert gaps[1][1] < 1e-4
    scan = np.linspace(3.0, 4.4, 141)
    energies, forces = evaluate(model, [pair(r) for r in scan])
    along = forces.reshape(len(scan), -1, 3)[:, 1, 0]
    spacing = scan[1] - scan[0]
    # Differences of fourth order; a step in the energy or a kink in the force would stand out of it anywhere.
    slope = (8 * (energies[3:-1] - energies[1:-3]) - (energies[4:] - energies[:-4])) / (12 * spacing)
    np.testing.assert_allclose(along[2:-2], -slope, atol=2e-4 * np.abs(along).max() + 1e-9)


def check_second_derivatives(loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
    """The gradient of a loss on forces against differences, in the largest component for each parameter (float64)."""
    gradients = torch.autograd.grad(loss(), list(parameters))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        index = int(gradient.abs().argmax())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[index] += sign * 1e-5
            values.append(float(loss().detach()))
            with torch.no_grad():
                parameter.view(-1)[index] -= sign * 1e-5
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(float(gradient.reshape(-1)[index]), rel=1e-5)
        assert slope != 0.0
