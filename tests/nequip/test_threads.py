"""Calculators of quantized NequIP models in several threads at once give what one thread gets."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import numpy as np
import torch
from ase.build import molecule

import gaq
from gaq_nequip.calculator import Calculator, model_calculator, saved_calculator

SPECIES = {name: name for name in ("H", "C", "O")}
MOLECULES = ("H2O", "CO2", "CH3OH")


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

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(tasks))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


def energies_and_forces(calculator: Calculator) -> list[tuple[float, np.ndarray]]:
    results = []
    for atoms in map(molecule, MOLECULES):
        atoms.calc = calculator
        results.append((atoms.get_potential_energy(), atoms.get_forces()))
    return results


def assert_results(results: list[Any], expected: list[Any]) -> None:
    for (energy, forces), (expected_energy, expected_forces) in zip(results, expected, strict=True):
        assert energy == pytest.approx(expected_energy, rel=1e-6, abs=0)
        np.testing.assert_allclose(forces, expected_forces, rtol=0, atol=1e-5)


@pytest.fixture
def process_in_float32() -> Any:
    """As in a program that has nothing to do with NequIP: torch's default dtype is not NequIP's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("process_in_float32")
def test_calculators_in_threads(quantized: Callable[..., Any], shared: bool) -> None:
    """NequIP's calculator converts structures in torch's default dtype, which is the same for all threads."""
    molecule("H2O")  # ASE reads its molecules at first use, and not for several threads
    model = quantized()
    expected = energies_and_forces(model_calculator(copy.deepcopy(model), "cpu"))
    calculators = [model_calculator(model if shared else copy.deepcopy(model), "cpu") for _ in range(4)]
    for results in at_once([lambda c=c: energies_and_forces(c) for c in calculators]):  # type: ignore[misc]
        assert_results(results, expected)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.usefixtures("process_in_float32")
def test_calculators_that_are_made_while_others_compute(package: Path) -> None:
    """Loading a model changes torch's default dtype and traces e3nn's code, both for all threads."""
    molecule("H2O")
    expected = energies_and_forces(saved_calculator(package, "cpu", SPECIES))
    first = saved_calculator(package, "cpu", SPECIES)
    tasks = [lambda: energies_and_forces(saved_calculator(package, "cpu", SPECIES))] * 2
    for results in at_once([*tasks, lambda: energies_and_forces(first)]):
        assert_results(results, expected)
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nequip_runs import write_trained_checkpoint
    from small import molecules, without_distillation

    folder = tmp_path_factory.mktemp("threads")
    model = gaq.load(write_trained_checkpoint(folder / "float.ckpt"))
    gaq.prepare(model, without_distillation("gaq"))
    gaq.calibrate(model, molecules())
    gaq.convert(model)
    gaq.save(model, folder / "quantized.nequip.zip")
    return folder / "quantized.nequip.zip"
