"""Deployed files of NequIP models: against the model, on the whole and on parts of space; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import torch
from ase import Atoms
from ase.build import bulk, molecule
from nequip_models import build_model
from parts import on_parts

import gaq.ase
from gaq.cli import main
from gaq.deployed import form
from gaq.kernels.cpu import native
from gaq_nequip.adapter import NequIPAdapter
from gaq_nequip.calculator import model_calculator

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.why_not()}")

D = torch.float64


def crystal() -> Atoms:
    """A sheared cell, smaller than the cutoff, with atoms of three elements."""
    atoms = bulk("C", "diamond", a=3.6, cubic=True)
    atoms.set_cell(atoms.cell.array @ [[1, 0.1, 0], [0, 1, 0.05], [0, 0, 0.95]], scale_atoms=True)
    atoms.rattle(0.08, seed=3)
    atoms.symbols[0], atoms.symbols[3] = "O", "H"
    return atoms


def structures() -> list[Atoms]:
    return [crystal(), molecule("CH3CHO"), Atoms("O"), Atoms("CH", [[0, 0, 0], [0, 0, 30]])]


def deployed(model: Any, path: Path, dtype: torch.dtype = D) -> Path:
    form.write(path, NequIPAdapter().deployable(model, ["H", "C", "O"], dtype), {})
    return path


def results(atoms: Atoms, calculator: Any) -> tuple[float, Any, Any]:
    atoms = atoms.copy()
    atoms.calc = calculator
    stress = atoms.get_stress() if atoms.pbc.all() else np.zeros(6)
    return atoms.get_potential_energy(), atoms.get_forces(), stress


def agree(ours: tuple[float, Any, Any], theirs: tuple[float, Any, Any], tolerance: float) -> None:
    scale = max(0.1, float(np.abs(theirs[1]).max()))
    assert ours[0] == pytest.approx(theirs[0], abs=tolerance * max(1.0, abs(theirs[0])))
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=tolerance * scale)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("preset", [None, "w8", "gaq"])
@pytest.mark.parametrize("variant", ["plain", "parity", "unequal"])
def test_a_file_computes_what_its_model_computes(
    variant: str, preset: str | None, float_model: Callable[..., Any], quantized: Callable[..., Any], tmp_path: Path
) -> None:
    model = quantized(preset, variant, "float64") if preset else float_model(variant, "float64")
    ours, theirs = gaq.ase.Calculator(deployed(model, tmp_path / "model.gaq")), model_calculator(model, "cpu")
    for atoms in structures():
        agree(results(atoms, ours), results(atoms, theirs), 1e-9)


def test_a_float32_model_in_both_precisions(tmp_path: Path) -> None:
    model = build_model("parity")
    theirs = model_calculator(model, "cpu")
    for dtype in (torch.float32, D):
        ours = gaq.ase.Calculator(deployed(model, tmp_path / f"{dtype}.gaq", dtype))
        for atoms in structures():
            agree(results(atoms, ours), results(atoms, theirs), 1e-5)


@pytest.mark.parametrize("parts", [[[*range(8)]], [[5, 0, 1, 2], [3, 4, 6, 7]], [[0], [], [1, 2, 3, 4, 5, 6, 7]]])
def test_parts_of_space_are_the_whole(parts: list[list[int]], float_model: Callable[..., Any], tmp_path: Path) -> None:
    path, atoms = deployed(float_model("parity", "float64"), tmp_path / "model.gaq"), crystal()
    energy, forces, calls = on_parts(path, atoms, parts)
    theirs = results(atoms, gaq.ase.Calculator(path))
    agree((energy, forces, theirs[2]), theirs, 1e-11)
    assert calls == [4] * len(parts)  # two exchanges forward, two back: three layers


def test_the_command(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint as training leaves it."""
    out = tmp_path / "model.gaq"
    assert main(["deploy", str(trained.best), str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checks"]["default"]["forces"] <= result["allowed_force_difference"]
    assert main(["inspect", str(out)]) == 0
    assert "a deployed model, preset" in capsys.readouterr().out
    assert main(["deploy", str(trained.best), str(out), "--elements", "H"]) == 2
    assert "deployed with all of their elements" in capsys.readouterr().err


def test_what_has_no_operations_is_refused(quantized: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the model cannot be deployed: .* do not round"):
        deployed(quantized("w8a8", "plain", "float64"), tmp_path / "model.gaq")
    with pytest.raises(ValueError, match="deploy it with --dtype float64"):
        deployed(quantized("w8", "plain", "float64"), tmp_path / "model.gaq", torch.float32)
    assert not list(tmp_path.iterdir())
