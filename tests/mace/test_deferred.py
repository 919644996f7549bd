"""Models whose generated code is compiled when something asks for it."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from e3nn.util import jit
from mace.modules import models as mace_models

import gaq
from gaq_mace import engine
from gaq_mace.deferred import DEFERRED, Deferred, constructing, settle
from gaq_mace.packed import build, model_config


def waiting(model: torch.nn.Module) -> int:
    return sum(isinstance(module, Deferred) for module in model.modules())


def kinds(model: torch.nn.Module) -> list[tuple[str, str]]:
    return [(name, type(module).__name__) for name, module in model.named_modules()]


@pytest.fixture
def path(quantized: Callable[..., Any], tmp_path: Path) -> Path:
    gaq.save(quantized("gaq"), tmp_path / "packed.model")
    return tmp_path / "packed.model"


def test_constructed_models_are_those_of_the_constructor(float_model: Callable[..., Any]) -> None:
    config = model_config(float_model())
    deferred = build(config, torch.float32)
    model = mace_models.ScaleShiftMACE(**config)
    assert waiting(deferred) > 5
    expected = model.state_dict()
    state = deferred.state_dict()
    assert list(state) == list(expected)
    parameters = dict(model.named_parameters())
    for name, tensor in expected.items():
        assert state[name].shape == tensor.shape
        assert name in parameters or torch.equal(state[name], tensor), name
    settle(deferred)
    assert not waiting(deferred)
    assert kinds(deferred) == kinds(model)
    for ours, theirs in zip(deferred.modules(), model.modules(), strict=True):
        assert getattr(ours, "__codegen__", None) == getattr(theirs, "__codegen__", None)
    # As pickles of MACE's own models.
    torch.save(deferred, io.BytesIO())


def test_constructors_draw_no_weights_but_other_threads_do() -> None:
    with constructing():
        assert not torch.randn(8).any()
        assert torch.randn(8, generator=torch.Generator().manual_seed(0)).all()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.randn, 8).result().all()
    assert torch.randn(8).all()


@pytest.mark.parametrize("load", [gaq.load, lambda path: torch.load(path, weights_only=False)])
def test_loading_compiles_nothing_that_the_engine_does_not_call(
    path: Path, structures: list[Any], evaluate: Callable[..., Any], load: Callable[..., Any]
) -> None:
    model = load(path)
    before = waiting(model)
    assert before > 5
    assert model.__dict__[DEFERRED]
    energies, forces = evaluate(model, structures)
    assert waiting(model) == before
    # The reference path is MACE's code, compiled.
    with engine.disabled():
        reference = evaluate(model, structures)
    assert not waiting(model)
    assert DEFERRED not in model.__dict__
    np.testing.assert_allclose(energies, reference[0], rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(forces), np.concatenate(reference[1]), atol=2e-3)


def test_copies_and_scripts_of_models_that_wait(
    path: Path, structures: list[Any], evaluate: Callable[..., Any]
) -> None:
    model = gaq.load(path)
    double = copy.deepcopy(model).double()
    assert waiting(double) == waiting(model) > 5
    with engine.disabled():
        expected, exact = evaluate(gaq.load(path), structures)[0], evaluate(double, structures)[0]
        np.testing.assert_allclose(expected, exact, rtol=1e-5)
        parts = copy.deepcopy(model.interactions[1].conv_tp)
        assert waiting(parts)
        arguments = [torch.randn(3, n) for n in (parts.irreps_in1.dim, parts.irreps_in2.dim, parts.weight_numel)]
        called = parts(*arguments)
        # Called by itself, a layer compiles what it needs.
        assert torch.equal(called, jit.script(copy.deepcopy(parts))(*arguments))
        assert torch.equal(called, torch.jit.script(parts)(*arguments))
    assert waiting(model) > 5


def test_what_is_compiled_later_warns_no_more_than_a_model_that_is_loaded(path: Path, structures: list[Any]) -> None:
    """TorchScript warns of e3nn's annotations, which no user can change."""
    from mace.calculators import MACECalculator

    calculator = MACECalculator(str(path), device="cpu", default_dtype="float32")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        structures[0].calc = calculator
        structures[0].get_forces()
        settle(calculator.models[0])
    assert not [warning for warning in caught if "TorchScript" in str(warning.message)]
