"""Software and hardware of a measurement."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path

from gaq.untyped import Document

_PACKAGES = ("gaq", "torch", "numpy", "ase", "mace-torch", "nequip", "e3nn")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that matter here, by distribution name."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def hardware() -> Document:
    """Describe the machine: ``cpu``, ``instructions``, ``cores`` (usable by this process), ``torch_threads``, ``gpu``.

    ``instructions`` (as torch names them, ``AVX2`` or ``AVX512``) and ``torch_threads`` are None without torch; ``gpu``
    is None without a CUDA device.
    """
    threads, instructions, gpu = None, None, None
    try:
        import torch
    except ImportError:
        pass
    else:
        threads = torch.get_num_threads()
        instructions = torch.backends.cpu.get_cpu_capability()
        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_name()
    return {
        "cpu": _cpu_name(),
        "instructions": instructions,
        "cores": _usable_cores(),
        "torch_threads": threads,
        "gpu": gpu,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
