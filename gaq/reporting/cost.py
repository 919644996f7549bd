"""Wall time of a step, and peak memory."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gaq.progress import progress_over
from gaq.untyped import Calculator

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["cost", "peak_memory", "seconds_per_step"]


def seconds_per_step(
    calculator: Calculator,
    atoms: Atoms,
    repeats: int = 10,
    warmup: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> float:
    """Measure the median wall time of energy and forces, in seconds.

    The positions change by 1 mÅ before each evaluation: the calculator's cache does not apply, and the neighbour list
    is kept or rebuilt as in a typical step.

    Args:
        calculator: an ASE calculator with ``energy`` and ``forces``.
        atoms: the structure; not changed.
        repeats: timed evaluations.
        warmup: evaluations before them, not timed.
        seed: seed of the perturbations.
        progress: whether to show a progress bar.

    Returns:
        Seconds per evaluation.

    Raises:
        ValueError: if ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"seconds_per_step: repeats is {repeats}; it must be at least 1")
    copy = atoms.copy()
    copy.set_constraint()
    copy.calc = calculator
    rng = np.random.default_rng(seed)
    times = []
    total = warmup + repeats
    for repeat in progress_over(range(total), total, "time of a step", shown=progress):
        copy.positions = atoms.positions + 1e-3 * rng.standard_normal(atoms.positions.shape)
        start = time.perf_counter()
        copy.get_forces()
        copy.get_potential_energy()
        if repeat >= warmup:
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def peak_memory() -> int | None:
    """Return the peak memory in bytes: that of torch's CUDA allocator if CUDA was used, else the peak resident set.

    None where the system does not tell (Windows).
    """
    if _cuda_used():
        import torch

        return int(torch.cuda.max_memory_allocated())
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    # In kilobytes, except on macOS, where it is bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak_memory() -> None:
    """Start a new peak where the system allows it, so that each model of a process gets its own peak."""
    if _cuda_used():
        import torch

        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM to the current resident set


def _cuda_used() -> bool:
    # Asking torch for memory would initialise CUDA, so first see whether CUDA is in use.
    torch = sys.modules.get("torch")
    return bool(torch is not None and torch.cuda.is_initialized() and torch.cuda.max_memory_allocated() > 0)


def cost(calculator: Calculator, atoms: Atoms, seed: int = 0, progress: bool = False) -> tuple[float, int | None]:
    """Measure the seconds per step of a calculator, and the peak memory in bytes meanwhile."""
    _reset_peak_memory()
    seconds = seconds_per_step(calculator, atoms, seed=seed, progress=progress)
    return seconds, peak_memory()
