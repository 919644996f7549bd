"""Vibrational density of states of a simulation: the power spectrum of its mass-weighted velocities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["power", "wave_numbers"]

SPEED_OF_LIGHT = 2.99792458e-5
"""In cm/fs: a frequency in 1/fs over it is a wave number in 1/cm."""


def power(velocities: NDArray[np.floating], masses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Power of each atom's mass-weighted velocity, (frequencies, atoms), with a Hann window.

    Args:
        velocities: equally spaced in time, (samples, atoms, 3), any unit.
        masses: of the atoms, (atoms,), any unit.
    """
    window = np.hanning(len(velocities))[:, None, None]
    waves = np.fft.rfft(window * np.sqrt(masses)[None, :, None] * velocities, axis=0)
    return np.asarray((waves.real**2 + waves.imag**2).sum(axis=2))


def wave_numbers(samples: int, interval_fs: float) -> NDArray[np.float64]:
    """Wave numbers of the spectrum of so many samples, 1/cm, (frequencies,)."""
    return np.asarray(np.fft.rfftfreq(samples, interval_fs) / SPEED_OF_LIGHT)
