"""Models made once and handed out as copies, and how they are evaluated, for every framework alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from small import diamond, few_bits, molecules

import gaq
from gaq.adapter import adapter_for

if TYPE_CHECKING:
    import torch
    from ase import Atoms


class Models:
    """Small models with random weights, float and quantized.

    Args:
        build: makes a float model of a variant and a dtype; further arguments are handed on.
        dtype: of the models where none is asked for.
    """

    def __init__(self, build: Callable[..., torch.nn.Module], dtype: Any = None) -> None:
        self.build, self.dtype = build, dtype
        self._made: dict[Any, torch.nn.Module] = {}

    def float_model(self, variant: str = "plain", dtype: Any = None, **options: Any) -> torch.nn.Module:
        """A fresh copy of a float model."""
        dtype = dtype or self.dtype
        return self._copy(("float", variant, dtype, *options.items()), lambda: self.build(variant, dtype, **options))

    def quantized(
        self,
        preset: str = "gaq",
        variant: str = "plain",
        dtype: Any = None,
        status: str = "converted",
        **options: Any,
    ) -> torch.nn.Module:
        """A fresh copy of a model that is calibrated, and converted unless ``status`` is ``training``."""

        layered = variant not in ("allegro", "spline")

        def calibrated() -> torch.nn.Module:
            model = gaq.prepare(self.float_model(variant, dtype, **options), few_bits(preset, layered))
            return gaq.calibrate(model, [*molecules(), diamond()], progress=False)

        model = self._copy((preset, variant, dtype or self.dtype, *options.items()), calibrated)
        return model if status == "training" else gaq.convert(model)

    def _copy(self, key: Any, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        if key not in self._made:
            self._made[key] = make()
        return copy.deepcopy(self._made[key])


def evaluate(model: torch.nn.Module, structures: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Energies (structures,) and the forces of all atoms (atoms, 3), in float64."""
    energies, forces = adapter_for(model).potential(model)(structures)
    return np.asarray(energies, dtype=np.float64), np.concatenate(forces).astype(np.float64)
