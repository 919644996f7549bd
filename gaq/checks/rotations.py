"""Random proper rotations as torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from gaq.checks.lee import rotation_rows

__all__ = ["random_rotation"]


def random_rotation(
    dtype: torch.dtype = torch.float64, device: torch.device | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a rotation matrix from the uniform (Haar) distribution on SO(3), shape (3, 3).

    A normalized vector of four normal numbers is a unit quaternion uniform on S³, which covers SO(3) twice evenly.
    """
    q = torch.randn(4, dtype=torch.float64, generator=generator)
    w, x, y, z = (q / q.norm()).tolist()
    return torch.tensor(rotation_rows(w, x, y, z), dtype=dtype, device=device)
