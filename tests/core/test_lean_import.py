"""Importing the package imports no framework: training commands import it early, and users often."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gaq

HEAVY = ("mace", "nequip", "e3nn", "ase", "matplotlib")


def modules_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running the code."""
    code += "\nimport sys\nprint(*sorted({name.split('.')[0] for name in sys.modules}))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(process.stdout.split())


@pytest.mark.smoke
def test_the_package_alone_imports_nothing() -> None:
    loaded = modules_after("import gaq")
    assert "gaq" in loaded
    assert not loaded & {*HEAVY, "torch", "numpy", "yaml"}


def test_the_configuration_does_not_need_torch() -> None:
    assert not modules_after("import gaq; gaq.parse_config('gaq')") & {*HEAVY, "torch", "numpy"}


@pytest.mark.smoke
def test_the_core_needs_no_framework() -> None:
    core = [
        "quantizers.features",
        "training.ptq",
        "training.schedule",
        "files.packing",
        "codebooks",
        "model.summary_table",
        "adapter",
        "api",
        "config.parse",
    ]
    code = f"import torch, gaq; gaq.prepare, gaq.report\nimport {', '.join('gaq.' + name for name in core)}"
    loaded = modules_after(code)
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_every_public_name_can_be_imported() -> None:
    for name in gaq.__all__:
        assert getattr(gaq, name) is not None
    with pytest.raises(AttributeError, match="module 'gaq' has no attribute 'quantise'"):
        _ = gaq.quantise
