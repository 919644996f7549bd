"""MACE's own commands on quantized files."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import ase.io
import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from mace.calculators import MACECalculator
from mace.cli import convert_device, create_lammps_model, eval_configs, select_head

import gaq
from gaq.model.state import state_of
from gaq_mace.evaluate import make_batches
from gaq_mace.weights import quantized_weights

GAQ_FIRST = ("gaq", pytest.param("w4", marks=pytest.mark.slow))


def run(command: Any, *arguments: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The text a command of MACE prints."""
    monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, arguments)])
    with redirect_stdout(io.StringIO()) as text:
        command.main()
    return text.getvalue()


def energies(path: Any, structures: list[Any], dtype: str = "", **options: Any) -> np.ndarray:
    calculator = MACECalculator(model_paths=str(path), device="cpu", default_dtype=dtype, **options)
    result = []
    for atoms in structures:
        frame = atoms.copy()
        frame.calc = calculator
        result.append(frame.get_potential_energy())
    return np.array(result)


@pytest.mark.parametrize("preset", GAQ_FIRST)
def test_select_head(
    quantized: Callable[..., Any],
    structures: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
) -> None:
    path = tmp_path / "two.model"
    model = quantized(preset, "heads")
    gaq.save(model, path)
    listed = run(select_head, "--list_heads", path, monkeypatch=monkeypatch)
    assert "Default" in listed
    assert "other" in listed
    single = tmp_path / "single.model"
    run(select_head, "--head_name", "other", "-o", single, path, monkeypatch=monkeypatch)
    loaded = gaq.load(single)
    assert list(loaded.heads) == ["other"]
    assert state_of(loaded).status == "converted"
    kept = quantized_weights(loaded)
    assert {name for name in quantized_weights(model) if not name.startswith("readouts")} <= set(kept)
    parameters = dict(loaded.named_parameters())
    for name, tensor in kept.items():
        assert torch.equal(tensor.dequantize(), parameters[name].detach().float())
    expected = energies(path, structures, head="other")
    np.testing.assert_allclose(energies(single, structures), expected, rtol=1e-5)


@pytest.mark.parametrize("head", ["Default", "other"])
def test_every_head_is_calibrated(
    float_model: Callable[..., Any], quantized: Callable[..., Any], structures: list[Any], head: str
) -> None:
    """Readouts mask the channels of the other heads: each head has to be observed for itself."""
    result = []
    for model in (float_model("heads"), quantized("gaq", "heads")):
        calculator = MACECalculator(models=model, device="cpu", head=head)
        frame = structures[0].copy()
        frame.calc = calculator
        result.append(frame.get_forces())
    assert np.abs(result[1] - result[0]).mean() < 0.05 * np.abs(result[0]).mean()


@pytest.mark.parametrize("preset", GAQ_FIRST)
def test_eval_configs(
    quantized: Callable[..., Any],
    evaluate: Callable[..., Any],
    structures: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
) -> None:
    model = quantized(preset, dtype=torch.float64)
    gaq.save(model, tmp_path / "quantized.model")
    ase.io.write(tmp_path / "in.xyz", structures, format="extxyz")
    run(
        eval_configs,
        *("--configs", tmp_path / "in.xyz", "--model", tmp_path / "quantized.model", "--output", tmp_path / "out.xyz"),
        "--return_descriptors",
        monkeypatch=monkeypatch,
    )
    written = ase.io.read(tmp_path / "out.xyz", ":")
    energy, forces = evaluate(model, ase.io.read(tmp_path / "in.xyz", ":"))
    np.testing.assert_allclose([atoms.info["MACE_energy"] for atoms in written], energy, rtol=1e-8)
    np.testing.assert_allclose(np.concatenate([atoms.arrays["MACE_forces"] for atoms in written]), forces, atol=1e-7)
    assert all(atoms.arrays["MACE_descriptors"].shape == (len(atoms), 16) for atoms in written)


@pytest.mark.parametrize("preset", GAQ_FIRST)
def test_convert_device(
    quantized: Callable[..., Any],
    structures: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
) -> None:
    path, other = tmp_path / "one.model", tmp_path / "other.model"
    gaq.save(quantized(preset), path)
    run(convert_device, "-t", "cpu", "-o", other, path, monkeypatch=monkeypatch)
    np.testing.assert_array_equal(energies(other, structures), energies(path, structures))
    first, second = quantized_weights(gaq.load(path)), quantized_weights(gaq.load(other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].codes, second[name].codes) for name in first)


@pytest.mark.slow
def test_commands_in_a_fresh_process(
    quantized: Callable[..., Any], structures: list[Any], python: Callable[..., Any], tmp_path: Path
) -> None:
    """Nothing of this package is imported by hand: what torch loads by itself is enough."""
    path, other = tmp_path / "one.model", tmp_path / "other.model"
    gaq.save(quantized("gaq"), path)
    code = (
        "import sys; sys.argv[0] = 'mace_convert_device'\n"
        "from mace.cli.convert_device import main; main()\n"
        "from gaq.model.state import state_of\n"
        "import torch; print(state_of(torch.load(sys.argv[-1], weights_only=False)).status)"
    )
    done = python(code, "-o", str(other), str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "converted"
    np.testing.assert_array_equal(energies(other, structures), energies(path, structures))


@pytest.mark.parametrize(
    ("preset", "dtype"),
    [
        ("gaq", "float64"),
        pytest.param("gaq", "float32", marks=pytest.mark.slow),
        pytest.param("w4", "float64", marks=pytest.mark.slow),
    ],
)
def test_lammps_export(
    quantized: Callable[..., Any],
    structures: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    dtype: str,
) -> None:
    path = tmp_path / "one.model"
    gaq.save(quantized(preset), path)
    options = ("--dtype", "float32") if dtype == "float32" else ()
    run(create_lammps_model, path, *options, monkeypatch=monkeypatch)
    script = torch.jit.load(f"{path}-lammps.pt")
    model = gaq.load(path).to(getattr(torch, dtype))
    expected = energies(path, structures, dtype)
    calculator = MACECalculator(model_paths=str(path), device="cpu", default_dtype=dtype)
    for atoms, energy in zip(structures, expected, strict=True):
        (batch,) = make_batches(model, [atoms], 1)
        local = torch.ones(len(atoms), dtype=getattr(torch, dtype))
        result = script(batch, local, compute_virials=True)
        tolerance = 1e-10 if dtype == "float64" else 2e-6
        assert float(result["total_energy_local"]) == pytest.approx(energy, rel=tolerance)
        frame = atoms.copy()
        frame.calc = calculator
        np.testing.assert_allclose(
            result["forces"].detach().numpy(), frame.get_forces(), atol=1e-6 if dtype == "float64" else 1e-3
        )


@pytest.mark.slow
def test_lammps_export_of_one_head(
    quantized: Callable[..., Any], structures: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "two.model"
    gaq.save(quantized("gaq", "heads"), path)
    run(create_lammps_model, path, "--head", "other", monkeypatch=monkeypatch)
    script = torch.jit.load(f"{path}-lammps.pt")
    (batch,) = make_batches(gaq.load(path).double(), structures[:1], 1)
    local = torch.ones(len(structures[0]), dtype=torch.float64)
    (expected,) = energies(path, structures[:1], "float64", head="other")
    assert float(script(batch, local)["total_energy_local"]) == pytest.approx(expected, rel=1e-10)
