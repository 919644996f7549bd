"""Models with several heads, none of them called "default": calibrated and judged in all of them, or in one."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import ase.io
import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from mace.calculators import MACECalculator
from mace_models import build_model, few_bits, molecules

import gaq
from gaq.adapter import adapter_for
from gaq.cli import main
from gaq.model.state import require_state
from gaq.reporting.tables import format_number
from gaq_mace.elements import head_names

HEADS = ("pbe", "scan")
CONFIG = "{preset: gaq, weights: {compression: null}, distillation: {steps: 0}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model with two heads, and structures with its own labels in the head that they name, 0.02 eV/Å off."""
    path = tmp_path_factory.mktemp("heads")
    model = build_model("heads", heads=list(HEADS))
    torch.save(model, path / "float.model")
    gaq.save(gaq.quantize(model, molecules(), few_bits("gaq"), progress=False), path / "gaq.model")
    frames = molecules(1)
    for number, atoms in enumerate(frames):
        head = HEADS[number % 2]
        energies, (forces,) = adapter_for(model).potential(model, head=head)([atoms])
        atoms.info.update(head=head, REF_energy=float(energies[0]))
        atoms.arrays["REF_forces"] = forces + np.random.default_rng(number).normal(scale=0.02, size=forces.shape)
    ase.io.write(path / "data.xyz", frames, format="extxyz")
    for atoms in frames:
        del atoms.info["head"]
    ase.io.write(path / "nameless.xyz", frames, format="extxyz")
    return path


def report(folder: Path, output: Path, *options: str, data: str = "data", code: int | None = None) -> dict[str, Any]:
    arguments = ["report", f"{folder}/gaq.model", "--reference", f"{folder}/float.model", "--nve-ps", "0"]
    done = main([*arguments, "--data", f"{folder}/{data}.xyz", "-o", str(output), *options])
    assert done in (0, 1) if code is None else done == code
    return dict(json.loads((output / "report.json").read_text())) if done < 2 else {}


def test_all_heads_are_judged(folder: Path, tmp_path: Path) -> None:
    """Each on the labels of its own structures, and on all structures where no labels are needed."""
    measured = report(folder, tmp_path / "report")
    assert set(measured["heads"]) == set(HEADS)
    for head in HEADS:
        assert measured["gates"][f"lee ({head})"]["passed"]
        assert measured["gates"][f"force_difference ({head})"]["value"] > 0
        metrics = measured["heads"][head]["reference"]
        assert metrics["force_rmse_mev_per_angstrom"] == pytest.approx(20.0, rel=0.35)
        assert metrics["seconds_per_step"] > 0  # by the stock calculator, in this head
    assert "file_size_ratio" in measured["gates"]
    assert measured["left_out"] == []
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("Force MAE") == page.count("<img") // 2 == len(HEADS)  # forces and bond stretch of each
    for head in HEADS:
        section = page.split(f"<h2>Head {head}</h2>")[1].split("<h2>")[0]
        value = measured["heads"][head]["reference"]["force_rmse_mev_per_angstrom"]
        assert f"<td class='n'>{format_number(value)}</td>" in section


@pytest.mark.slow
def test_one_head(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is measured as the stock calculator computes it, with all labels of the data."""
    frames = ase.io.read(folder / "data.xyz", ":")
    model = torch.load(folder / "float.model", weights_only=False)
    calculator = MACECalculator(models=[model], device="cpu", default_dtype="float32", head="pbe")
    errors = []
    for atoms in frames:
        label = atoms.arrays["REF_forces"]
        atoms.calc = calculator
        errors.append(np.abs(atoms.get_forces() - label).ravel())
    measured = report(folder, tmp_path / "pbe", "--head", "pbe")
    assert (measured["head"], measured["heads"]) == ("pbe", None)
    page = (tmp_path / "pbe" / "report.html").read_text()
    assert "head <strong>pbe</strong>" in page
    assert page.count("Force MAE") == 1
    expected = 1e3 * np.concatenate(errors).mean()
    assert measured["reference"]["force_mae_mev_per_angstrom"] == pytest.approx(expected, rel=1e-4)
    capsys.readouterr()
    report(folder, tmp_path / "none", "--head", "pbesol", code=2)
    assert "no head 'pbesol'; it has pbe, scan" in capsys.readouterr().err


@pytest.mark.slow
def test_labels_of_no_head_are_left_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = report(folder, tmp_path / "report", data="nameless")
    (line,) = measured["left_out"]
    assert line in capsys.readouterr().out
    assert html.escape(line) in (tmp_path / "report" / "report.html").read_text()
    for words in ("the labels of 4 of 4 structures", "the heads pbe, scan", "--head"):
        assert words in line
    assert measured["heads"]["pbe"]["model"]["force_mae_mev_per_angstrom"] is None
    assert measured["gates"]["force_difference (scan)"]["passed"] is not None


def test_a_float_model_shows_the_metrics_of_all_heads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["report", f"{folder}/float.model", "--data", f"{folder}/data.xyz", "--nve-ps", "0"]
    assert main([*arguments, "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert [printed.count(f"head {head}\n") for head in HEADS] == [1, 1]
    assert printed.count("Force MAE") == 2


def test_quantize_calibrates_and_judges_all_heads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.model"
    arguments = ["quantize", f"{folder}/float.model", "-o", str(output), "--config", CONFIG]
    assert main([*arguments, "--calibration", f"{folder}/data.xyz", "--force"]) in (0, 1)
    printed = capsys.readouterr().out
    model = gaq.load(output)
    assert head_names(model) == list(HEADS)
    gates = require_state(model).notes["gates"]
    for head in HEADS:
        assert gates[f"lee ({head})"]["passed"]
        assert f"force_difference ({head})" in printed


@pytest.mark.slow
def test_a_file_of_one_head_against_the_model_of_several(folder: Path, tmp_path: Path) -> None:
    """The reference is taken in the head that the file has."""
    model = torch.load(folder / "float.model", weights_only=False)
    part = gaq.quantize(model, molecules(), few_bits("gaq"), progress=False, head="scan")
    gaq.save(part, tmp_path / "scan.model")
    frames = molecules(4)
    measured = gaq.report(tmp_path / "scan.model", frames, folder / "float.model", gates_only=True, progress=False)
    difference = measured["model"]["force_difference"]
    assert difference["rms_mev_per_angstrom"] < 0.05 * difference["force_rms_mev_per_angstrom"]
