"""The interface of a framework to the suite: what an adapter does not provide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Form:
    """One kind of file that `gaq.save` writes.

    Attributes:
        packed: whether it holds little besides integer codes, so that the size bound of its preset applies.
        checked: whether loading detects every flipped bit, not only missing bytes.
        tolerance: largest difference of a force (eV/Å) between the model and the one loaded from its file.
    """

    packed: bool = True
    checked: bool = True
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Outcome:
    """Result of a command: its exit code, its output, and the path of its model."""

    code: int
    text: str
    model: Path


class Case(Protocol):
    """A framework as the suite sees it.

    Attributes:
        name: name of its adapter.
        variants: architectures that `build` knows; the first is the smallest.
        forms: kinds of files, by suffix.
        force_mae: force error of the float model `trained` on the test frames, meV/Å.
    """

    name: str
    variants: tuple[str, ...]
    forms: Mapping[str, Form]
    force_mae: float

    def start(self) -> None:
        """Set the process-wide state that the framework needs."""
        ...

    def build(self, variant: str, dtype: torch.dtype) -> torch.nn.Module:
        """Build a small float model over H, C and O with random weights, the same at every call."""
        ...

    def trained(self, dtype: torch.dtype) -> torch.nn.Module:
        """Return the float model of ``tests/data``."""
        ...

    def write_trained(self, folder: Path) -> Path:
        """Write `trained` in float32 as the framework's training command does; return the file."""
        ...

    def codes(self, model: torch.nn.Module) -> Mapping[str, Any]:
        """Return codes and scales (`QuantizedTensor`) of each quantized parameter of a model, by name."""
        ...

    def train(self, folder: Path, quantization: Any) -> Outcome:
        """Run the framework's training command on tiny data in a folder, with the key ``quantization``."""
        ...


MODULES = {"mace": "mace_case", "nequip": "nequip_case"}
"""Frameworks with a case, and the module of its class ``Adapted``."""


def installed() -> list[str]:
    """Frameworks of `MODULES` that can be imported here."""
    return [name for name in MODULES if find_spec(name) is not None]


def case_of(name: str) -> Case:
    """Return the case of an installed framework."""
    case: Case = import_module(MODULES[name]).Adapted()
    return case
