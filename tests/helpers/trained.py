"""The files of ``tests/data``: structures with labels, and the options and parameters of trained models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import torch
    from ase import Atoms

DATA = Path(__file__).parents[1] / "data"
TRAIN, TEST = DATA / "ethanol_train.xyz", DATA / "ethanol_test.xyz"
SPLIT = (108, 12)
"""Frames of the first for training and for validation."""


def ethanol(index: str = "::4", path: Path = TEST) -> list[Atoms]:
    """Labelled frames of ethanol at 500 K."""
    import ase.io

    return list(ase.io.read(path, index=index))


def options(name: str) -> dict[str, Any]:
    """What the architecture of a trained model is built with."""
    return dict(yaml.safe_load((DATA / f"{name}.yaml").read_text()))


def load_parameters(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """Give a model of that architecture its trained parameters: every one, and no other."""
    import torch
    from safetensors.torch import load_file

    stored = load_file(DATA / f"{name}.safetensors")
    parameters = dict(model.named_parameters())
    if stored.keys() != parameters.keys():
        raise ValueError(
            f"{name}.safetensors does not fit the model that its framework builds now: it differs in "
            f"{sorted(stored.keys() ^ parameters.keys())}. Make it again: python tests/data/make.py {name}"
        )
    with torch.no_grad():
        for key, value in stored.items():
            parameters[key].copy_(value)
    return model.eval()
