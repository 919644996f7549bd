"""Converted models read from a file behave under MACE's own calculator as stock models do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from ase.stress import full_3x3_to_voigt_6_stress
from mace.calculators import MACECalculator

import gaq
from gaq.kernels.cpu import native
from gaq.model.state import state_of
from gaq_mace.engine.serving import engine_for

PRESETS = ("gaq", "w8")
# Rounded activations make the energy a fine staircase, so its differences are taken over a longer step; with
# rounded weights alone it is as smooth as a stock model's. (These random weights give forces of 0.03 eV/Å, far below
# a trained model's, on which the step of 0.01 Å is tested further down.)
STEP = {"gaq": 3e-2, "w8": 1e-4}
RELATIVE = {"gaq": 1e-2, "w8": 1e-6}


@pytest.fixture(scope="module")
def model_file(quantized: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``model_file(preset, dtype, seed)``: path of a converted model."""
    folder = tmp_path_factory.mktemp("models")

    def get(preset: str, dtype: Any = torch.float64, seed: int = 0, variant: str = "plain") -> str:
        path = folder / f"{preset}_{str(dtype)[-2:]}_{seed}_{variant}.model"
        if not path.exists():
            gaq.save(quantized(preset, variant, dtype, seed=seed), path)
        return str(path)

    return get


@pytest.fixture(scope="module")
def calculator(model_file: Callable[..., str]) -> Callable[..., MACECalculator]:
    made: dict[Any, MACECalculator] = {}

    def get(preset: str, dtype: Any = torch.float64, variant: str = "plain") -> MACECalculator:
        key = (preset, dtype, variant)
        if key not in made:
            made[key] = MACECalculator(model_paths=model_file(preset, dtype, variant=variant), device="cpu")
        # The constructor sets the default dtype, and other tests put it back.
        torch.set_default_dtype(dtype)
        return made[key]

    return get


def relative(measured: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((measured - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("preset", PRESETS)
def test_reads_the_quantized_model(calculator: Callable[..., MACECalculator], preset: str) -> None:
    (model,) = calculator(preset).models
    assert state_of(model).status == "converted"
    assert state_of(model).config.preset == {"gaq": "w8a16"}.get(preset, preset)


@pytest.mark.parametrize(
    ("preset", "variant"), [("gaq", "plain"), pytest.param("gaq", "heads", marks=pytest.mark.slow), ("w8", "plain")]
)
def test_energies(
    calculator: Callable[..., MACECalculator],
    quantized: Callable[..., Any],
    evaluate: Callable[..., Any],
    structures: list[Any],
    preset: str,
    variant: str,
) -> None:
    calc = calculator(preset, variant=variant)
    model = quantized(preset, variant, torch.float64)
    energies, forces = evaluate(model, structures)
    got = []
    for i, atoms in enumerate(structures):
        frame = atoms.copy()
        frame.calc = calc
        assert frame.get_potential_energy() == pytest.approx(energies[i], rel=1e-10)
        node_energies = calc.results["node_energy"]
        assert node_energies.shape == (len(frame),)
        np.testing.assert_allclose(calc.results["energies"].sum(), energies[i], rtol=1e-10)
        isolated = dict(zip((1, 6, 8), (-1.0, -3.0, -5.0), strict=True))
        total = node_energies.sum() + sum(isolated[z] for z in frame.numbers)
        assert total == pytest.approx(energies[i], rel=1e-10)
        got.append(frame.get_forces())
    # One at a time or in a batch.
    np.testing.assert_allclose(np.concatenate(got), forces, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.smoke
def test_forces_are_the_slope(
    calculator: Callable[..., MACECalculator], structures: list[Any], crystal: Any, preset: str
) -> None:
    step = STEP[preset]
    for atoms in (structures[0].copy(), crystal.copy()):
        atoms.calc = calculator(preset)
        forces = atoms.get_forces()
        measured = np.zeros_like(forces)
        for i in range(len(atoms)):
            for k in range(3):
                energies = []
                for factor in (1, -1):
                    moved = atoms.copy()
                    moved.calc = atoms.calc
                    moved.positions[i, k] += factor * step
                    energies.append(moved.get_potential_energy())
                measured[i, k] = -(energies[0] - energies[1]) / (2 * step)
        assert relative(measured, forces) < RELATIVE[preset]
        np.testing.assert_allclose(forces.sum(0), 0, atol=1e-10)


@pytest.mark.parametrize("preset", PRESETS)
def test_stress_is_the_slope(calculator: Callable[..., MACECalculator], crystal: Any, preset: str) -> None:
    step = STEP[preset] / 1.5  # times the distance of nearest neighbours, the displacement
    atoms = crystal.copy()
    atoms.calc = calculator(preset)
    stress = atoms.get_stress()
    measured = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            energies = []
            for factor in (1, -1):
                strain = np.eye(3)
                strain[i, j] += 0.5 * factor * step
                strain[j, i] += 0.5 * factor * step
                strained = crystal.copy()
                strained.set_cell(crystal.cell @ strain, scale_atoms=True)
                strained.calc = atoms.calc
                energies.append(strained.get_potential_energy())
            measured[i, j] = (energies[0] - energies[1]) / (2 * step * crystal.get_volume())
    assert relative(full_3x3_to_voigt_6_stress(measured), stress) < RELATIVE[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_supercell_is_extensive(calculator: Callable[..., MACECalculator], crystal: Any, preset: str) -> None:
    small, large = crystal.copy(), crystal.repeat((2, 2, 1))
    for atoms in (small, large):
        atoms.calc = calculator(preset)
    # A sum over neighbours in another order may round a feature to the code next to it.
    tolerance = 1e-12 if preset == "w8" else 1e-6
    assert large.get_potential_energy() == pytest.approx(4 * small.get_potential_energy(), rel=tolerance)
    np.testing.assert_allclose(large.get_stress(), small.get_stress(), atol=tolerance * 10)


@pytest.mark.parametrize("preset", PRESETS)
def test_descriptors(calculator: Callable[..., MACECalculator], structures: list[Any], preset: str) -> None:
    atoms = structures[0].copy()
    calc = calculator(preset)
    invariant = calc.get_descriptors(atoms)
    assert invariant.shape == (len(atoms), 16)  # two layers of 8 scalars
    assert calc.get_descriptors(atoms, num_layers=1).shape == (len(atoms), 8)
    assert calc.get_descriptors(atoms, invariants_only=False).shape == (len(atoms), 8 * 4 + 8)
    turned = atoms.copy()
    turned.rotate(77, (1, 2, 3), center="COM")
    tolerance = {"w8": 1e-10, "gaq": 1e-4}[preset]  # a step of the 16-bit grid
    np.testing.assert_allclose(calc.get_descriptors(turned), invariant, atol=tolerance)
    moved = atoms.copy()
    moved.positions[0] += 0.1
    assert np.abs(calc.get_descriptors(moved) - invariant).max() > 1e-3


@pytest.mark.parametrize("preset", ["gaq", pytest.param("w8", marks=pytest.mark.slow)])
def test_committee(model_file: Callable[..., str], structures: list[Any], preset: str) -> None:
    paths = [model_file(preset, seed=seed) for seed in (0, 1)]
    atoms = structures[1].copy()
    atoms.calc = MACECalculator(model_paths=paths, device="cpu")
    energy = atoms.get_potential_energy()
    singles = []
    for path in paths:
        frame = atoms.copy()
        frame.calc = MACECalculator(model_paths=path, device="cpu")
        singles.append(frame.get_potential_energy())
    assert energy == pytest.approx(np.mean(singles), rel=1e-10)
    np.testing.assert_allclose(atoms.calc.results["energy_comm"], singles, rtol=1e-10)
    assert atoms.calc.results["energy_var"] == pytest.approx(np.var(singles), rel=1e-6)
    assert atoms.calc.results["forces_comm"].shape == (2, len(atoms), 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_hessian(calculator: Callable[..., MACECalculator], structures: list[Any], preset: str) -> None:
    atoms = structures[1].copy()
    calc = calculator(preset)
    hessian = calc.get_hessian(atoms).reshape(9, 9)
    tolerance = RELATIVE[preset]
    assert relative(hessian, hessian.T) < tolerance
    assert np.abs(hessian.sum(0)).max() < tolerance * np.abs(hessian).max()  # a rigid shift moves nothing
    step = STEP[preset]
    measured = np.zeros((9, 9))
    for i in range(9):
        forces = []
        for factor in (1, -1):
            moved = atoms.copy()
            moved.positions.reshape(-1)[i] += factor * step
            moved.calc = calc
            forces.append(moved.get_forces().reshape(-1))
        measured[i] = -(forces[0] - forces[1]) / (2 * step)
    assert relative(measured, hessian) < (tolerance if preset == "w8" else 3 * tolerance)


@pytest.mark.parametrize("preset", PRESETS)
def test_isolated_atoms(calculator: Callable[..., MACECalculator], preset: str) -> None:
    from ase import Atoms

    pair = Atoms("CO", positions=[[0, 0, 0], [0, 0, 30]])
    single = Atoms("C")
    for atoms in (pair, single):
        atoms.calc = calculator(preset)
        assert np.isfinite(atoms.get_potential_energy())
        np.testing.assert_array_equal(atoms.get_forces(), 0.0)
    oxygen = Atoms("O")
    oxygen.calc = calculator(preset)
    separate = single.get_potential_energy() + oxygen.get_potential_energy()
    assert pair.get_potential_energy() == pytest.approx(separate, rel=1e-12)


@pytest.mark.parametrize("preset", ["gaq", pytest.param("w8", marks=pytest.mark.slow)])
def test_single_precision(
    calculator: Callable[..., MACECalculator],
    model_file: Callable[..., str],
    structures: list[Any],
    crystal: Any,
    preset: str,
) -> None:
    """A float32 file runs as it is, and a request for the other precision is followed."""
    for atoms in (structures[0].copy(), crystal.copy()):
        results = {}
        for dtype in ("float32", "float64"):
            atoms.calc = MACECalculator(
                model_paths=model_file(preset, torch.float32), device="cpu", default_dtype=dtype
            )
            assert next(atoms.calc.models[0].parameters()).dtype == getattr(torch, dtype)
            assert state_of(atoms.calc.models[0]) is not None
            results[dtype] = atoms.get_potential_energy(), atoms.get_forces()
        assert results["float32"][0] == pytest.approx(results["float64"][0], rel=1e-4)
        assert relative(results["float32"][1], results["float64"][1]) < 1e-2


@pytest.mark.slow
def test_safetensors_through_the_adapter(quantized: Callable[..., Any], structures: list[Any], tmp_path: Path) -> None:
    from gaq_mace import MACEAdapter

    energies = []
    for suffix in (".model", ".safetensors"):
        gaq.save(quantized("gaq"), tmp_path / f"m{suffix}")
        atoms = structures[0].copy()
        atoms.calc = MACEAdapter().calculator(tmp_path / f"m{suffix}")
        energies.append(atoms.get_potential_energy())
    assert energies[0] == energies[1]


@pytest.mark.skipif(not native.available(), reason="no C++ compiler here")
def test_the_choice_of_a_path_can_be_traced(calculator: Callable[..., MACECalculator]) -> None:
    """MACE's ``compile_mode`` asks for one graph, which is the reference path."""
    (model,) = calculator("w8").models
    assert engine_for(model, {}) is not None
    assert torch.compile(lambda: engine_for(model, {}) is None, backend="eager", fullgraph=True)()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("preset", PRESETS)
def test_compiled(
    model_file: Callable[..., str],
    structures: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    backend: str,
) -> None:
    """The graph alone, and with the code that Inductor makes of it."""
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode, **given: compile_model(model, backend=backend, **given))
    eager, compiled = (structures[0].copy() for _ in range(2))
    eager.calc = MACECalculator(model_paths=model_file(preset), device="cpu")
    # To compile, MACE rebuilds a model in torch's default dtype, whatever its own.
    torch.set_default_dtype(torch.float64)
    compiled.calc = MACECalculator(model_paths=model_file(preset), device="cpu", compile_mode="default")
    tolerance = 1e-9 if preset == "w8" else 1e-6
    assert compiled.get_potential_energy() == pytest.approx(eager.get_potential_energy(), rel=tolerance)
    np.testing.assert_allclose(compiled.get_forces(), eager.get_forces(), atol=1e-7 if preset == "w8" else 1e-4)
