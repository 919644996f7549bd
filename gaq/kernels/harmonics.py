"""Spherical harmonics as homogeneous polynomials of the direction.

On the unit sphere the 2l+1 harmonics of degree l are combinations of the monomials x^a y^b z^c with a + b + c = l. The
coefficients are fitted to the framework's own function, so that any convention (order, sign, norm) is served.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["evaluate", "exponents", "fit"]


def exponents(l: int) -> list[tuple[int, int, int]]:  # noqa: E741
    """Exponents (a, b, c) of the monomials of degree l, in the order of the coefficients."""
    return [(a, b, l - a - b) for a in range(l, -1, -1) for b in range(l - a, -1, -1)]


def monomials(l: int, directions: Tensor) -> Tensor:  # noqa: E741
    """Evaluate all monomials of degree l, shape (..., number of monomials)."""
    x, y, z = directions.unbind(-1)
    return torch.stack([x**a * y**b * z**c for a, b, c in exponents(l)], dim=-1)


def fit(function: Callable[[Tensor], Tensor], lmax: int) -> list[Tensor]:
    """Fit the coefficients of each degree, shapes (2l+1, monomials), float64.

    Args:
        function: directions (n, 3), float64, to harmonics (n, (lmax+1)^2).
        lmax: largest degree.

    Raises:
        ValueError: if the function does not consist of such polynomials.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40 * (lmax + 1), 3, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    values = function(directions).detach()
    if values.shape[-1] != (lmax + 1) ** 2:
        raise ValueError(f"expected {(lmax + 1) ** 2} harmonics up to l = {lmax}, got {values.shape[-1]}")
    coefficients = []
    for l in range(lmax + 1):  # noqa: E741
        basis = monomials(l, directions)
        target = values[:, l * l : (l + 1) ** 2]
        solution = torch.linalg.lstsq(basis, target).solution
        solution = torch.where(solution.abs() < 1e-11 * solution.abs().max(), 0.0, solution)
        if not torch.allclose(basis @ solution, target, rtol=0, atol=1e-10 * float(target.abs().max())):
            raise ValueError(f"the edge attributes of l = {l} are not spherical harmonics of the direction")
        coefficients.append(solution.T.contiguous())
    return coefficients


def evaluate(coefficients: list[Tensor], directions: Tensor) -> Tensor:
    """Evaluate the harmonics of unit vectors (n, 3), shape (n, (lmax+1)^2)."""
    parts = [monomials(degree, directions) @ c.to(directions).T for degree, c in enumerate(coefficients)]
    return torch.cat(parts, dim=-1)
