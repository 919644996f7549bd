"""Frames that rotate with the features and make the rounding of directions exactly equivariant.

A direction code has axes. If these are the axes of the laboratory, rounding a rotated vector differs from rotating the
rounded vector, by as much as the step of the code. Here the axes come from the features of the same atom (or edge): a
few fixed mixtures of its channels, made orthonormal. They rotate with the features, so the components along them are
invariant, and any function of these components is equivariant (our derivation):

    ``v_q = Q^T code(Q v)``, ``Q -> Q D^T`` and ``v -> D v`` under a rotation D, so ``v_q -> D v_q``.

D may also be an inversion or a reflection: all axes change with the features. Where the mixtures do not span the full
space, directions orthogonal to them complete the axes. In most such cases the features span no more either (an atom on
an axis or in a plane of symmetry, or few channels), and have no component along the added axis. But a moving atom also
passes positions where one mixture becomes linearly dependent on the others and the features do not; without the added
axis every feature would lose a component there. The other axes determine a single missing axis up to its sign, and
codes are symmetric under a change of sign.

A frame is a few numbers per atom, independent of the number of channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["local_frame", "local_frame_at_once", "mixtures"]


def mixtures(dimension: int, channels: int) -> Tensor:
    """Fixed weights of the channels in each reference vector, shape (dimension, channels), float64.

    The phases are irrational, so that channels do not cancel in all reference vectors at once.
    """
    c = torch.arange(channels, dtype=torch.float64)
    k = torch.arange(dimension, dtype=torch.float64).unsqueeze(-1)
    return torch.cos(math.sqrt(2.0) * (k + 1.0) * (c + 0.5) + math.sqrt(3.0) * k)


def _unit(v: Tensor, floor: Tensor) -> Tensor:
    """Unit vectors, or zero where a vector is no longer than `floor`."""
    length = torch.sqrt((v * v).sum(-1, keepdim=True))
    return torch.where(length > floor, v / length.clamp_min(1e-30), torch.zeros_like(v))


def _last_completed(axes: list[Tensor], dimension: int, floor: Tensor) -> list[Tensor]:
    """The axes, with the last one replaced by a direction orthogonal to the others where it is zero.

    Only the last axis vanishes along a generic path of the atoms: one number has to become zero for it, two or more for
    the others. (Inductor, as of torch 2.13, miscompiles code that completes all of them.)
    """
    last = axes[-1]
    left = torch.ones_like(last)
    for axis in axes[:-1]:
        left = left - axis * axis
    # Start from the basis vector with the largest part outside the axes; the small term breaks ties.
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
        dimension: 2 l + 1 (an argument, because a traced tensor does not know its shape).

    Returns:
        Axes as rows, shape (batch, 2 l + 1, 2 l + 1). One missing axis is completed; where the reference vectors leave
        more than one direction out, the further ones are zero.
    """
    count = 2 if dimension == 3 else dimension
    references = torch.matmul(mixing[:count], vectors)
    size = torch.sqrt((references * references).sum(-1, keepdim=True)).amax(1)
    eps = 2.220446049250313e-16 if vectors.dtype == torch.float64 else 1.1920928955078125e-07
    floor = size * (32.0 * eps)
    axes: list[Tensor] = []
    for k in range(count):
        axis = references[:, k]
        # Two passes: the remainder of a nearly dependent reference vector is orthogonal only after the second.
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
        # A cross product does not change sign under inversion, unlike the other axes; a third reference gives the sign.
        third = torch.linalg.cross(axes[0], axes[1])
        side = (torch.matmul(mixing[2:3], vectors)[:, 0] * third).sum(-1, keepdim=True)
        axes.append(torch.where(side < 0, -third, third))
    return torch.stack(axes, 1)


def local_frame_at_once(vectors: Tensor, mixing: Tensor, dimension: int) -> Tensor:
    """Compute `local_frame` by a QR decomposition: the same axes in a tenth of the operations, for eager evaluation."""
    references = torch.matmul(mixing[:dimension], vectors)
    q, r = torch.linalg.qr(references.transpose(1, 2))
    # Gram-Schmidt gives the factor with a positive diagonal; QR leaves the signs open.
    diagonal = r.diagonal(dim1=1, dim2=2)
    return q.transpose(1, 2) * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-1)
