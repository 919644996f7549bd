"""Random proper rotations as torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["random_rotation"]


def random_rotation(
    dtype: torch.dtype = torch.float64, device: torch.device | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """A rotation matrix from the uniform (Haar) distribution on SO(3), shape (3, 3).

    The unit quaternion of four normal numbers is uniform on S³, which covers SO(3) twice evenly.
    """
    q = torch.randn(4, dtype=torch.float64, generator=generator)
    w, x, y, z = (q / q.norm()).tolist()
    matrix = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.tensor(matrix, dtype=dtype, device=device)
