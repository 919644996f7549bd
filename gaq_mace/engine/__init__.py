"""MACE through the fused kernels: the default path of a converted model at inference, on the CPU and on NVIDIA GPUs.

`accelerate` gives float models the same kernels, and `decelerate` takes them away from any model.

An `Engine` is built from a model (converted or float) and computes the same function: with the same weights, the same
rounding of features, and the model's float32 or float64 arithmetic. Features of edges are never written to memory
(`gaq.kernels.convolution`), the symmetric contraction is a folded polynomial (`gaq.kernels.contraction`), and the
radial network is a table (`gaq_mace.engine.radial_tables`). All else in a step is MACE's own code.

Atoms are sorted by species within a call, so that the weights of a species act on a slice.

On a GPU the host waits once a step, to read the species, and not at all if they come in the same tensor as in the step
before. Small steps are replayed as CUDA graphs (`gaq.kernels.gpu.graphs`), padded with edges beyond the cutoff.
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
