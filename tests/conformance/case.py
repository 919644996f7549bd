"""What the suite asks of a framework: the few things that an adapter alone cannot tell."""

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
        packed: it holds integer codes and little else, so that it is held to the size of its preset.
        checked: every flipped bit is noticed, not only missing bytes.
        tolerance: largest difference of a force (eV/Å) between the model and what is loaded from its file.
    """

    packed: bool = True
    checked: bool = True
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Outcome:
    """What a command left behind: its exit code, all it printed, and where its model would be."""

    code: int
    text: str
    model: Path


class Case(Protocol):
    """One framework, as the suite sees it.

    Attributes:
        name: of its adapter.
        variants: architectures that `build` knows; the first is the smallest.
        forms: kinds of files, by suffix.
        force_mae: of the float model `trained` on the test frames, in meV/Å.
    """

    name: str
    variants: tuple[str, ...]
    forms: Mapping[str, Form]
    force_mae: float

    def start(self) -> None:
        """Put the process into the state that the framework works in."""
        ...

    def build(self, variant: str, dtype: torch.dtype) -> torch.nn.Module:
        """A small float model over H, C and O with random weights, the same at every call."""
        ...

    def trained(self, dtype: torch.dtype) -> torch.nn.Module:
        """The float model of ``tests/data``."""
        ...

    def write_trained(self, folder: Path) -> Path:
        """Write `trained` in float32 as the framework's own training command writes models; returns the file."""
        ...

    def codes(self, model: torch.nn.Module) -> Mapping[str, Any]:
        """Integer codes and scales (`QuantizedTensor`) of each quantized parameter of a model, by name."""
        ...

    def train(self, folder: Path, quantization: Any) -> Outcome:
        """Run the framework's own training command on tiny data in a folder, with the key ``quantization``."""
        ...


MODULES = {"mace": "mace_case", "nequip": "nequip_case"}
"""Frameworks with a case, and the module of its class ``Adapted``."""


def installed() -> list[str]:
    """Frameworks of `MODULES` that can be imported here."""
    return [name for name in MODULES if find_spec(name) is not None]


def case_of(name: str) -> Case:
    """The case of an installed framework."""
    made: Case = import_module(MODULES[name]).Adapted()
    return made
