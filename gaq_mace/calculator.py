"""MACE's ASE calculator, with torch's default dtype left as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mace  # noqa: F401  (before e3nn)
import torch
from mace.calculators import MACECalculator

from gaq.process import alone, default_dtype, unchanged
from gaq.untyped import Batch

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Calculator"]


class Calculator(MACECalculator):
    """`MACECalculator` without its lasting effects on the process.

    The constructor of `MACECalculator` sets torch's default dtype, which its later calls rely on, and gives the root
    logger a handler where there is none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with unchanged(), alone():
            super().__init__(*args, **kwargs)

    def _atoms_to_batch(self, atoms: Atoms) -> Batch:
        with default_dtype(getattr(torch, self.default_dtype)):
            return super()._atoms_to_batch(atoms)

    def calculate(self, *args: object, **kwargs: object) -> None:
        with default_dtype(getattr(torch, self.default_dtype)):
            super().calculate(*args, **kwargs)
