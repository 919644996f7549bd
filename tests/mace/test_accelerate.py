"""Float models through the fused kernels on request: MACE's own results, exactly so when switched off."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from mace import modules
from mace.calculators import MACECalculator
from mace.modules.models import ScaleShiftMACE
from mace.tools.scripts_utils import extract_config_mace_model

import gaq
from gaq import settings
from gaq.kernels.cpu import native
from gaq_mace import engine, neighbours
from gaq_mace.engine import accelerate, decelerate, is_accelerated, serving
from gaq_mace.evaluate import make_batches

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")

ETHANOL = molecule("CH3CH2OH")


def batch_of(model: torch.nn.Module, atoms: Atoms = ETHANOL) -> dict[str, torch.Tensor]:
    return make_batches(model, [atoms], 1)[0]


class Calls:
    """How often an engine computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        forward = engine.Engine.forward

        def counted(step: engine.Engine, *args: Any, **options: Any) -> Any:
            self.count += 1
            return forward(step, *args, **options)

        monkeypatch.setattr(engine.Engine, "forward", counted)

    def during(self, function: Callable[[], Any]) -> int:
        before = self.count
        function()
        return self.count - before


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("variant", ["plain", "heads", "l2", "density", "agnesi"])
def test_energies_and_forces_are_those_of_mace(
    float_model: Callable[..., Any], structures: list[Atoms], crystal: Atoms, variant: str, calls: Calls
) -> None:
    """To the rounding of float32; slopes of the radial tables are less exact than values."""
    model = float_model(variant, torch.float32)
    chosen = (structures[0], crystal)
    stock = [model(batch_of(model, atoms), compute_stress=True) for atoms in chosen]
    assert accelerate(model) is model
    fast: list[Any] = []
    assert calls.during(lambda: fast.extend(model(batch_of(model, a), compute_stress=True) for a in chosen)) == 2
    for ours, theirs in zip(fast, stock, strict=True):
        for key, bound in (("energy", 1e-6), ("forces", 5e-6), ("stress", 5e-6)):
            size = max(1.0, float(theirs[key].detach().abs().max()))
            assert float((ours[key] - theirs[key]).detach().abs().max()) <= bound * size, key


def test_a_stock_file_in_the_stock_calculator(
    float_model: Callable[..., Any], tmp_path: Path, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "float.model"
    torch.save(float_model("plain", torch.float32), path)
    calculator = MACECalculator(model_paths=str(path), device="cpu", default_dtype="float32")
    atoms = ETHANOL.copy()
    atoms.calc = calculator

    def results() -> tuple[float, np.ndarray]:
        calculator.reset()
        return atoms.get_potential_energy(), atoms.get_forces()

    stock = results()
    accelerate(calculator.models[0])
    assert calls.during(results) == 1
    fast = results()
    assert fast[0] == pytest.approx(stock[0], abs=2e-6 * abs(stock[0]))
    np.testing.assert_allclose(fast[1], stock[1], rtol=0, atol=2e-6 * max(1.0, np.abs(stock[1]).max()))
    # Neighbour lists are kept for it.
    assert neighbours.kept_by(calculator) is not None
    # A Hessian is MACE's own business.
    assert calls.during(lambda: calculator.get_hessian(atoms)) == 0
    decelerate(calculator.models[0])
    assert calls.during(results) == 0
    off = results()
    assert off[0] == stock[0]
    assert np.array_equal(off[1], stock[1])
    assert neighbours.kept_by(calculator) is None
    assert type(calculator.models[0]) is ScaleShiftMACE
    assert not any("gaq" in name for name in calculator.models[0].__dict__)


def test_switching_off_gives_exactly_what_mace_gives(float_model: Callable[..., Any]) -> None:
    model = float_model("plain", torch.float32)
    stock = model(batch_of(model))
    accelerate(model)
    with engine.disabled():
        disabled = model(batch_of(model))
    fast = model(batch_of(model))
    off = decelerate(model)(batch_of(model))
    for key in ("energy", "forces", "node_energy"):
        assert torch.equal(disabled[key], stock[key])
        assert torch.equal(off[key], stock[key])
    assert not torch.equal(fast["forces"], stock["forces"])


def test_converted_models_can_be_switched_off(quantized: Callable[..., Any], calls: Calls) -> None:
    model = quantized("gaq", "plain", torch.float32)
    assert is_accelerated(model)
    with engine.disabled():
        reference = model(batch_of(model))["forces"]
    decelerate(model)
    assert not is_accelerated(model)
    assert not is_accelerated(copy.deepcopy(model))
    assert calls.during(lambda: model(batch_of(model))) == 0
    assert torch.equal(model(batch_of(model))["forces"], reference)
    assert is_accelerated(accelerate(model))
    assert calls.during(lambda: model(batch_of(model))) == 1


def gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_training_is_that_of_mace(float_model: Callable[..., Any], calls: Calls) -> None:
    """Gradients by every weight, of forces and of energies alone, and a step of an optimizer in between."""
    model = float_model("plain", torch.float64)
    losses = {
        "forces": lambda: model(batch_of(model), training=True)["forces"].square().sum(),
        "energies": lambda: model(batch_of(model), compute_force=False)["energy"].square().sum(),
        "positional": lambda: model(batch_of(model), True)["forces"].square().sum(),
    }
    expected = {name: gradients(model, loss) for name, loss in losses.items()}
    accelerate(model)
    for name, loss in losses.items():
        computed: dict[str, torch.Tensor] = {}
        assert calls.during(lambda f=computed, l=loss: f.update(gradients(model, l))) == 0  # type: ignore[misc]  # noqa: E741
        assert computed.keys() == expected[name].keys()
        assert all(torch.equal(computed[key], expected[name][key]) for key in computed)
    before = model(batch_of(model))["energy"].detach()
    gradients(model, losses["forces"])
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    after = model(batch_of(model))["energy"].detach()
    with engine.disabled():
        expected_after = model(batch_of(model))["energy"].detach()
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected_after, rtol=1e-10, atol=0)


def test_energies_alone_are_fast_where_no_weight_asks_for_a_gradient(
    float_model: Callable[..., Any], calls: Calls
) -> None:
    model = accelerate(float_model("plain", torch.float64))
    with torch.no_grad():
        assert calls.during(lambda: model(batch_of(model), compute_force=False)) == 1
    model.requires_grad_(False)
    assert calls.during(lambda: model(batch_of(model), compute_force=False)) == 1


def test_files_and_configurations_are_those_of_mace(float_model: Callable[..., Any]) -> None:
    model = float_model("plain", torch.float32)
    keys, energy = list(model.state_dict()), model(batch_of(model))["energy"]
    accelerate(model)
    model(batch_of(model))
    assert list(model.state_dict()) == keys
    assert extract_config_mace_model(model)["hidden_irreps"] == model.products[0].linear.irreps_out
    file = io.BytesIO()
    torch.save(model, file)
    assert b"gaq" not in file.getvalue()
    file.seek(0)
    for other in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert type(other) is ScaleShiftMACE
        assert torch.equal(other(batch_of(other))["energy"], energy)
    double = copy.deepcopy(model)
    assert is_accelerated(double)
    assert serving.RECORD not in double.__dict__
    assert double.double() is double
    assert float(double(batch_of(double))["energy"]) == pytest.approx(float(energy), rel=1e-6)


def test_an_accelerated_model_is_quantized_as_the_float_model_it_is(
    float_model: Callable[..., Any], structures: list[Atoms]
) -> None:
    spec = {"preset": "w8", "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
    prepared = gaq.prepare(accelerate(float_model("plain", torch.float64)), spec)
    assert not is_accelerated(prepared)
    with pytest.raises(engine.Unsupported, match=r"in training.*gaq\.convert"):
        accelerate(prepared)
    converted = gaq.convert(prepared)
    expected = gaq.convert(gaq.prepare(float_model("plain", torch.float64), spec))
    assert is_accelerated(converted)
    assert torch.equal(converted(batch_of(converted))["energy"], expected(batch_of(expected))["energy"])


def test_what_cannot_be_served_is_named(float_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(engine.Unsupported, match=r"torch\.nn\..*Linear cannot be accelerated.*ScaleShiftMACE"):
        accelerate(torch.nn.Linear(1, 1))
    model = float_model("plain", torch.float32)
    with pytest.raises(engine.Unsupported, match=r"float16 on cpu cannot be accelerated.*float32 or float64"):
        accelerate(copy.deepcopy(model).half())
    other = copy.deepcopy(model)
    block = type("SomeInteractionBlock", (modules.interaction_classes["RealAgnosticResidualInteractionBlock"],), {})
    other.interactions[1].__class__ = block
    with pytest.raises(engine.Unsupported, match=r"interactions\.1 is a SomeInteractionBlock"):
        accelerate(other)
    assert type(other) is ScaleShiftMACE
    assert not any("gaq" in name for name in other.__dict__)

    def no_compiler() -> None:
        raise native.CompilerError("no C++ compiler found: install g++")

    monkeypatch.setattr(native, "library", no_compiler)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler found: install g\+\+"):
        accelerate(model)


def test_where_everything_is_switched_off(
    float_model: Callable[..., Any], caplog: pytest.LogCaptureFixture, calls: Calls
) -> None:
    with settings.override(engine=False):
        model = accelerate(float_model("plain", torch.float32))
        assert "switched off (GAQ_ENGINE=0)" in caplog.text
        assert calls.during(lambda: model(batch_of(model))) == 0
    assert calls.during(lambda: model(batch_of(model))) == 1


def test_a_step_is_decided_once(float_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the neighbour lists, which are kept for accelerated models."""
    decisions = []
    decide = serving.engine_for

    def counted(model: Any, options: dict[str, Any]) -> Any:
        decisions.append(decide(model, options))
        return decisions[-1]

    monkeypatch.setattr(serving, "engine_for", counted)
    model = accelerate(float_model("plain", torch.float32))
    atoms = ETHANOL.copy()
    atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype="float32")
    for step in range(3):
        atoms.positions[0, 0] += 1e-3
        atoms.get_forces()
        assert len(decisions) == step + 1
    assert all(isinstance(decision, engine.Engine) for decision in decisions)
    assert neighbours.kept_by(atoms.calc) is not None
