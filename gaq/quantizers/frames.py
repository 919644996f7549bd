"""Frames that turn with the features: what makes the rounding of directions exactly equivariant.

A code of directions has axes. Laid along the axes of the laboratory, it rounds a turned vector to something else than
the turned rounded one, and the error is the step of the code. Here the axes are taken from the features of the same
atom (or edge): a few fixed mixtures of its channels, made orthonormal. They turn with the features, so the components
along them do not change under rotation, and whatever is done to these is equivariant (our derivation):

    ``v_q = Q^T code(Q v)``, ``Q -> Q D^T`` and ``v -> D v`` under a rotation D, so ``v_q -> D v_q``.

Inversion and reflections are among the D: all axes change with the features. Where the mixtures span less than the
whole space, directions orthogonal to the others complete the axes. Mostly the features span no more either (an atom on
an axis or in a plane of symmetry, or few channels), and nothing lies along what was added. But on their way atoms also
pass places where a mixture becomes dependent on the others though the features do not: to leave an axis out there would
drop a component of every feature. One missing axis is given by the others but for its sign, to which codes are blind.

The axes themselves are a few numbers an atom, however many channels there are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["local_frame", "local_frame_at_once", "mixtures"]


def mixtures(dimension: int, channels: int) -> Tensor:
    """Fixed weights of the channels in each reference vector, shape (dimension, channels), float64.

    Irrational phases: no two channels that are likely to cancel do, in all references at once.
    """
    c = torch.arange(channels, dtype=torch.float64)
    k = torch.arange(dimension, dtype=torch.float64).unsqueeze(-1)
    return torch.cos(math.sqrt(2.0) * (k + 1.0) * (c + 0.5) + math.sqrt(3.0) * k)


def _unit(v: Tensor, floor: Tensor) -> Tensor:
    """Unit vectors, or zero where a vector is no longer than `floor`."""
    length = torch.sqrt((v * v).sum(-1, keepdim=True))
    return torch.where(length > floor, v / length.clamp_min(1e-30), torch.zeros_like(v))


def _last_completed(axes: list[Tensor], dimension: int, floor: Tensor) -> list[Tensor]:
    """Axes of which the last, where it is zero, is a direction orthogonal to the others.

    Of the axes that can be missing only the last goes missing along a path: one number has to vanish for it, two or
    more for others. (Completing all of them is more than Inductor compiles right, as of torch 2.13.)
    """
    last = axes[-1]
    left = torch.ones_like(last)
    for axis in axes[:-1]:
        left = left - axis * axis
    # The unit vector of which the axes leave most; of equal ones one has to be taken.
    score = left * (1.0 + 1e-3 * torch.arange(dimension, dtype=last.dtype, device=last.device))
    row = (score >= score.amax(-1, keepdim=True)).to(last.dtype)
    for axis in axes[:-1]:
        row = row - (row * axis).sum(-1, keepdim=True) * axis
    missing = (last * last).sum(-1, keepdim=True) < 0.5
    return axes[:-1] + [torch.where(missing, _unit(row, torch.zeros_like(floor)), last)]  # noqa: RUF005 (scripted)


def local_frame(vectors: Tensor, mixing: Tensor, dimension: int) -> Tensor:
    """Orthonormal axes that turn with the vectors.

    Args:
        vectors: features of one irrep, shape (batch, channels, 2 l + 1), detached.
        mixing: from `mixtures`, shape (at least 2 l + 1, channels), in the dtype of the vectors.
        dimension: 2 l + 1 (given, because a traced tensor does not know its shape).

    Returns:
        Axes as rows, shape (batch, 2 l + 1, 2 l + 1); where the references leave out more than one, the others of
        those are zero.
    """
    count = 2 if dimension == 3 else dimension
    references = torch.matmul(mixing[:count], vectors)
    size = torch.sqrt((references * references).sum(-1, keepdim=True)).amax(1)
    eps = 2.220446049250313e-16 if vectors.dtype == torch.float64 else 1.1920928955078125e-07
    floor = size * (32.0 * eps)
    axes: list[Tensor] = []
    for k in range(count):
        axis = references[:, k]
        # Twice: what is left of a nearly dependent reference is orthogonal only after a second pass.
        for other in axes:
            axis = axis - (axis * other).sum(-1, keepdim=True) * other
        axis = _unit(axis, floor)
        if k > 0:
            for other in axes:
                axis = axis - (axis * other).sum(-1, keepdim=True) * other
            axis = _unit(axis, torch.full_like(floor, 0.5))
        axes.append(axis)
    axes = _last_completed(axes, dimension, floor)
    if dimension == 3:
        # A cross product does not change sign under inversion as the others do, unless a third reference tells it to.
        third = torch.linalg.cross(axes[0], axes[1])
        side = (torch.matmul(mixing[2:3], vectors)[:, 0] * third).sum(-1, keepdim=True)
        axes.append(torch.where(side < 0, -third, third))
    return torch.stack(axes, 1)


def local_frame_at_once(vectors: Tensor, mixing: Tensor, dimension: int) -> Tensor:
    """`local_frame` by one QR decomposition: the same axes in a tenth of the operations, where these are dear."""
    references = torch.matmul(mixing[:dimension], vectors)
    q, r = torch.linalg.qr(references.transpose(1, 2))
    # The factor of Gram and Schmidt is the one whose diagonal is positive.
    diagonal = r.diagonal(dim1=1, dim2=2)
    return q.transpose(1, 2) * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-1)
