"""First use of quantized models from several threads at once gives what one thread gets."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from mace.calculators import MACECalculator

import gaq
from gaq.kernels.cpu import native
from gaq_mace import engine
from gaq_mace.engine.layer import Layer
from gaq_mace.engine.radial_tables import RadialTables
from gaq_mace.evaluate import make_batches

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")

KINDS = ("plain", "agnesi")
MOLECULES = ("H2O", "CO2")


def at_once(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Results of functions that run in a thread each and begin together; the first exception is raised here."""
    barrier = threading.Barrier(len(tasks))
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            barrier.wait()
            results[number] = tasks[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, quantized: Callable[..., Any]) -> torch.nn.Module:
    """A converted model that has never been called."""
    return quantized("w8", request.param, torch.float32)  # type: ignore[no-any-return]


def calculator_of(model: torch.nn.Module) -> MACECalculator:
    return MACECalculator(models=[copy.deepcopy(model)], device="cpu", default_dtype="float32")


def energy_and_forces(calculator: MACECalculator, atoms: Atoms) -> tuple[float, np.ndarray]:
    copied = atoms.copy()
    copied.calc = calculator
    return copied.get_potential_energy(), copied.get_forces()


def expected_of(model: torch.nn.Module, structures: list[Atoms]) -> list[tuple[float, np.ndarray]]:
    with engine.disabled():
        return [energy_and_forces(calculator_of(model), atoms) for atoms in structures]


def assert_results(results: list[Any], expected: list[Any]) -> None:
    for (energy, forces), (expected_energy, expected_forces) in zip(results, expected, strict=True):
        # To the rounding of float32 and the error of the radial tables.
        assert energy == pytest.approx(expected_energy, rel=2e-6, abs=0)
        np.testing.assert_allclose(forces, expected_forces, rtol=0, atol=2e-5)


def test_each_thread_with_a_calculator_of_its_own(model: torch.nn.Module) -> None:
    structures = [molecule(name) for name in MOLECULES]
    expected = expected_of(model, structures)
    calculators = [calculator_of(model) for _ in structures]
    results = at_once(
        [
            lambda c=c, a=a: energy_and_forces(c, a)  # type: ignore[misc]
            for c, a in zip(calculators, structures, strict=True)
        ]
    )
    assert_results(results, expected)
    assert all(engine.engine_of(c.models[0]) is not None for c in calculators)


def test_one_calculator_for_all_threads(model: torch.nn.Module) -> None:
    """ASE's own cache of results holds one structure, so all threads ask for the same one."""
    atoms = molecule("H2O")
    expected = expected_of(model, [atoms])
    calculator = calculator_of(model)
    results = at_once([lambda: energy_and_forces(calculator, atoms)] * 2)
    assert_results(results, expected * 2)


def test_one_model_with_structures_of_different_species(model: torch.nn.Module) -> None:
    """More compositions than the engine keeps, and radial tables that no thread has made before."""
    converted = copy.deepcopy(model)
    structures = [molecule(name) for name in (*MOLECULES, "CO", "OH", "CH4", "C2H4", "HCO", "CH3OH", "O2", "H2")]
    batches = [make_batches(model, [atoms], 1)[0] for atoms in structures]
    with engine.disabled():
        expected = [float(converted(dict(batch))["energy"].detach()) for batch in batches]

    def run(numbers: range) -> dict[int, float]:
        return {i: float(converted(dict(batches[i]))["energy"].detach()) for i in numbers}

    everything = range(len(batches))
    results = at_once([lambda r=r: run(r) for r in (everything, everything[::-1])])  # type: ignore[misc]
    for energies in results:
        assert [energies[i] for i in everything] == pytest.approx(expected, rel=2e-6, abs=0)


@pytest.fixture(scope="module")
def file(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("threads") / "quantized.model"
    gaq.save(model, path)
    return path


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_calculators_that_are_made_while_others_compute(model: torch.nn.Module, file: Path, dtype: str) -> None:
    """As ASE's bands of images do: each thread loads the file, and computes structures with species new to it.

    MACE's constructor traces its contractions, and torch's tracer would take in what other threads call meanwhile.
    Loading also changes torch's default dtype, which is the same for all threads.
    """
    structures = [molecule(name) for name in ("H2O", "CO2", "HCO")]
    expected = expected_of(model, structures)
    interval = sys.getswitchinterval()
    before = torch.get_default_dtype()

    def run(first: int) -> list[tuple[float, np.ndarray]]:
        order = [(first + i) % len(structures) for i in range(len(structures))]
        calculator = MACECalculator(model_paths=[str(file)], device="cpu", default_dtype=dtype)
        results = {i: energy_and_forces(calculator, structures[i]) for i in order}
        return [results[i] for i in range(len(structures))]

    sys.setswitchinterval(1e-5)
    try:
        results = at_once([lambda i=i: run(i) for i in range(3)])  # type: ignore[misc]
    finally:
        sys.setswitchinterval(interval)
    for one in results:
        assert_results(one, expected)
    assert torch.get_default_dtype() == before


def test_nothing_is_traced(model: torch.nn.Module, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a file is loaded nor at first use of the reference path: torch's tracer is in all threads."""

    def trace(*_: object) -> None:
        raise AssertionError("torch's tracer is in all threads")

    atoms = molecule("H2O")
    expected = expected_of(model, [atoms])
    monkeypatch.setattr(torch.fx.Tracer, "trace", trace)
    calculator = MACECalculator(model_paths=[str(file)], device="cpu", default_dtype="float32")
    assert_results([energy_and_forces(calculator, atoms)], expected)
    with engine.disabled():
        assert_results([energy_and_forces(calculator, molecule("H2O"))], expected)


def test_calculators_of_two_dtypes(model: torch.nn.Module, file: Path) -> None:
    """Float32 keeps seven digits of an energy; float64 is compared to more than that."""
    structures = [molecule(name) for name in MOLECULES]
    before = torch.get_default_dtype()
    calculators = {
        dtype: MACECalculator(model_paths=[str(file)], device="cpu", default_dtype=dtype)
        for dtype in ("float32", "float64")
    }
    expected = {dtype: [energy_and_forces(c, a) for a in structures] for dtype, c in calculators.items()}

    def run(dtype: str) -> list[tuple[float, np.ndarray]]:
        calculator = copy.deepcopy(calculators[dtype])
        results = []
        for _ in range(5):
            results = [energy_and_forces(calculator, atoms) for atoms in structures]
        return results

    for dtype, results in zip(calculators, at_once([lambda d=d: run(d) for d in calculators]), strict=True):  # type: ignore[misc]
        for (energy, forces), (expected_energy, expected_forces) in zip(results, expected[dtype], strict=True):
            tolerance = 1e-12 if dtype == "float64" else 2e-6
            assert energy == pytest.approx(expected_energy, rel=tolerance, abs=0)
            np.testing.assert_allclose(forces, expected_forces, rtol=0, atol=10 * tolerance)
    assert torch.get_default_dtype() == before


def test_first_use_of_the_reference_path(model: torch.nn.Module, setting: Callable[..., Any]) -> None:
    """All threads wait for the code that is compiled for the first call."""
    structures = [molecule(name) for name in MOLECULES]
    expected = expected_of(model, structures)
    setting(engine=False)
    calculators = [calculator_of(model) for _ in range(3)]
    shared = calculator_of(model).models[0]
    calculators += [MACECalculator(models=[shared], device="cpu", default_dtype="float32") for _ in range(2)]
    results = at_once([lambda c=c: [energy_and_forces(c, a) for a in structures] for c in calculators])  # type: ignore[misc]
    for one in results:
        assert_results(one, expected)


def test_a_call_that_fails_leaves_nothing_wrong(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that swallows the exception of a call gets the right energy from the next one."""
    structures = [molecule(name) for name in (*MOLECULES, "CH4")]
    expected = expected_of(model, structures)
    calculator = calculator_of(model)

    class Interruption(Exception):
        pass

    for place in (RadialTables, Layer):
        name = "make" if place is RadialTables else "forward"
        for atoms, (energy, _) in zip(structures, expected, strict=True):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, lambda *_: (_ for _ in ()).throw(Interruption))
                with contextlib.suppress(Interruption):
                    assert energy_and_forces(calculator, atoms)[0] == pytest.approx(energy, rel=2e-6, abs=0)
            assert_results([energy_and_forces(calculator, atoms)], [expected_of(model, [atoms])[0]])
