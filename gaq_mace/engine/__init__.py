"""MACE through the fused kernels: what a converted model runs by default at inference, on the CPU and on NVIDIA GPUs.

`accelerate` gives float models the same kernels, and `decelerate` takes them away from any model.

An `Engine` is built from a model (quantized and converted, or float) and computes the same function: the same weights,
the same rounding of features, float32 or float64 arithmetic as the model has it. Per-edge features are never written
to memory (`gaq.kernels.convolution`), the symmetric contraction is a folded polynomial (`gaq.kernels.contraction`), and
the radial network is a table (`gaq_mace.engine.radial_tables`). What surrounds the interactions is MACE's own code.

Atoms are sorted by species within a call, so that weights of a species act on a slice.

On a card nothing in a step waits for it but the look at the species, and that only where they are not given in the same
tensor as before. Small steps are replayed as CUDA graphs (`gaq.kernels.gpu.graphs`), with the edges padded by some
that lie beyond the cutoff.
"""

from __future__ import annotations

from gaq_mace.engine.acceleration import accelerate, decelerate
from gaq_mace.engine.reading import Unsupported
from gaq_mace.engine.serving import Served, disabled, engine_for, engine_of, give_up, is_accelerated, serves
from gaq_mace.engine.step import Engine

__all__ = [
    "Engine",
    "Served",
    "Unsupported",
    "accelerate",
    "decelerate",
    "disabled",
    "engine_for",
    "engine_of",
    "give_up",
    "is_accelerated",
    "serves",
]
