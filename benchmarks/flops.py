"""Least number of additions and multiplications over channels in the fused kernels, forward and backward."""

from __future__ import annotations

from typing import Any


def of_convolution(problem: Any, edges: int) -> tuple[float, float]:
    """Operations of a convolution, a `gaq.kernels.convolution.ConvolutionProblem`."""
    forward = backward = 0.0
    for path in problem.paths:
        d1, d3 = 2 * problem.blocks[path.block] + 1, 2 * problem.groups[path.group] + 1
        # The radial weight takes 6 fused multiply-adds, its slope as many again.
        forward += 2 * (6 + d1 / 2 + d1 * d3)
        backward += 2 * (12 + d1 / 2 + 2 * d1 * d3 + 2 * d1)
    scale = float(edges * problem.channels)
    return forward * scale, backward * scale


def of_contraction(polynomial: Any, atoms: int, channels: int) -> tuple[float, float]:
    """Operations of a symmetric contraction, folded by `gaq.kernels.contraction.fold`."""
    nodes, terms = len(polynomial.monomials), len(polynomial.terms)
    scale = float(atoms * channels)
    return scale * (nodes + 2 * terms), scale * (5 * nodes + 2 * terms)
