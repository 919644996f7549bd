"""Prepare, calibrate, convert: what changes in a MACE model and what must not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from e3nn.util.jit import compile as jit_compile
from mace.modules import models as mace_models
from mace.modules.lora import inject_lora
from mace.tools.scripts_utils import extract_config_mace_model, extract_model

import gaq
from gaq.adapter import adapter_for
from gaq.model.state import feature_quantizers, state_of, unquantized
from gaq_mace.evaluate import energy_and_forces, make_batches
from gaq_mace.sites import find_sites
from gaq_mace.weights import quantized_weights, weight_quantizers

PRESETS = ("gaq", "w4a16", "w8", "w4", "w8a8", "w4a8", "naive_w8a8")
VARIANTS = ("plain", "heads", "l2", "density", "correlation3", "residual_first")
WEIGHTS_ONLY = ("w8", "w4")
QUICK_SCRIPTS = (("w4", "training"), ("w8a8", "converted"), ("naive_w8a8", "training"))


def jolted(structures: list[Any]) -> list[Any]:
    generator = np.random.default_rng(5)
    others = [atoms.copy() for atoms in structures]
    for atoms in others:
        atoms.positions += generator.normal(scale=0.03, size=atoms.positions.shape)
    return others


def test_prepare_keeps_what_mace_goes_by(float_model: Callable[..., Any]) -> None:
    model = float_model()
    keys, modules = set(model.state_dict()), {name: id(module) for name, module in model.named_modules()}
    gaq.prepare(model, "gaq")
    assert modules.items() <= {name: id(module) for name, module in model.named_modules()}.items()
    assert isinstance(model, mace_models.ScaleShiftMACE)
    assert type(model).__name__ == "ScaleShiftMACE"  # MACE finds the constructor's arguments by this name
    # MACE slices whatever is called so, and everything in the readouts, when it selects a head.
    assert {name for name, _ in model.named_buffers()} & set(model.state_dict()) <= keys


def slow_unless(quick: bool) -> Any:
    return () if quick else pytest.mark.slow


@pytest.mark.parametrize("status", ["training", "converted"])
@pytest.mark.parametrize("preset", [pytest.param(p, marks=slow_unless(p in ("gaq", "w4"))) for p in PRESETS])
def test_state_dict_restores_quantization(
    quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any], preset: str, status: str
) -> None:
    model = quantized(preset, status=status)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = type(model)(**extract_config_mace_model(model))
    assert state_of(fresh) is None
    fresh.load_state_dict(state)
    assert state_of(fresh).status == status
    assert state_of(fresh).config == state_of(model).config
    for name, quantizer in feature_quantizers(model).items():
        assert torch.equal(feature_quantizers(fresh)[name].ranges(), quantizer.ranges())
        assert torch.equal(feature_quantizers(fresh)[name].limit, quantizer.limit)
    assert feature_quantizers(fresh).keys() == feature_quantizers(model).keys()
    first, second = quantized_weights(model), quantized_weights(fresh)
    assert first.keys() == second.keys()
    for name in first:
        assert int((first[name].codes != second[name].codes).sum()) == 0, name
        assert int((first[name].scale != second[name].scale).sum()) == 0, name
    np.testing.assert_array_equal(evaluate(fresh, structures)[0], evaluate(model, structures)[0])


def test_rebuilding_as_mace_does_keeps_quantization(
    quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any]
) -> None:
    model = quantized("gaq")
    rebuilt = extract_model(model)
    assert state_of(rebuilt).status == "converted"
    np.testing.assert_allclose(evaluate(rebuilt, structures)[0], evaluate(model, structures)[0], rtol=1e-6)


def test_scales_survive_a_state_dict(
    float_model: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any]
) -> None:
    """After distillation the scales are no longer those that the weights alone would give."""
    model = gaq.prepare(float_model(), {"preset": "w4", "distillation": {"steps": 4, "learning_rate": 0.05}})
    gaq.calibrate(model, structures, progress=False)
    fresh = type(model)(**extract_config_mace_model(model))
    fresh.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(evaluate(fresh, structures)[0], evaluate(model, structures)[0])


def test_unquantized_is_the_float_model(
    float_model: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any]
) -> None:
    reference = float_model()
    energy, forces = evaluate(reference, structures)
    model = gaq.prepare(copy.deepcopy(reference), {"preset": "w4a8", "distillation": {"steps": 0}})
    adapter_ranges = jolted(structures)
    from gaq.training.ptq import observe_ranges

    observe_ranges(adapter_for(model), model, adapter_ranges)
    rounded = evaluate(model, structures)[0]
    with unquantized(model):
        inside = evaluate(model, structures)
    np.testing.assert_allclose(inside[0], energy, rtol=1e-6)
    np.testing.assert_allclose(inside[1], forces, atol=1e-5)
    np.testing.assert_array_equal(evaluate(model, structures)[0], rounded)
    assert np.abs(rounded - energy).max() > 1e-4
    with pytest.raises(RuntimeError, match="stop"), unquantized(model):
        raise RuntimeError("stop")
    np.testing.assert_array_equal(evaluate(model, structures)[0], rounded)


def test_unquantized_converted_has_exact_activations(
    quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any]
) -> None:
    model = quantized("w8a8")
    plain = extract_config_mace_model(model)
    stock = mace_models.ScaleShiftMACE(**plain)
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if k != "_extra_state"}, strict=True)
    with unquantized(model):
        inside = evaluate(model, structures)[0]
    np.testing.assert_allclose(inside, evaluate(stock, structures)[0], rtol=1e-6)
    assert np.abs(inside - evaluate(model, structures)[0]).max() > 1e-5


def test_override_with_presets(float_model: Callable[..., Any], structures: list[Any]) -> None:
    given = {"compression": None, "sensitive_bits": 16, "first_bits": 8}
    overrides = {
        "interactions.*": {"preset": "w4", "weights": given},
        "interactions.1.*": {"preset": "w8a8", "weights": {"bits": 6}},
        "readouts.0.*": {"preset": "w8", "weights": {"sensitive_bits": None}},
    }
    model = gaq.prepare(float_model(), {"preset": "gaq", "distillation": {"steps": 0}, "overrides": overrides})
    gaq.calibrate(model, structures, progress=False)
    gaq.convert(model)
    bits = {name: tensor.bits for name, tensor in quantized_weights(model).items()}
    assert bits["interactions.0.linear_up.weight"] == 16, "it acts on species embeddings only"
    assert bits["interactions.0.linear.weight"] == 8, "the first interaction has more bits where the rest has 4"
    assert bits["interactions.0.conv_tp_weights.layer1.weight"] == 8
    assert bits["interactions.1.linear_up.weight"] == 6, "the later pattern wins"
    assert bits["products.0.linear.weight"] == 16, "it belongs to the first interaction"
    assert bits["readouts.0.linear.weight"] == 8
    assert bits["readouts.1.linear_1.weight"] == 16
    assert not any(name.startswith("interactions.0.") for name in feature_quantizers(model))
    # A preset that goes by size is held to it among the modules it is for.
    small = gaq.prepare(float_model(), {"preset": "gaq", "overrides": {"interactions.*": "w4"}})
    bits = {name: quantizer.bits for name, quantizer in weight_quantizers(small).items()}
    assert {own for name, own in bits.items() if name.startswith("interactions.")} == {4}
    assert bits["products.0.linear.weight"] == 16


def test_refuses_what_cannot_be_quantized(float_model: Callable[..., Any]) -> None:
    lora = float_model()
    inject_lora(lora, rank=2)
    with pytest.raises(ValueError, match="LoRA"):
        gaq.prepare(lora, "gaq")
    config = extract_config_mace_model(float_model())
    for key in ("atomic_inter_scale", "atomic_inter_shift"):
        config.pop(key)
    with pytest.raises(ValueError, match="of MACE's class MACE, from which no packed file"):
        gaq.prepare(mace_models.MACE(**config), "gaq")
    with pytest.raises(TypeError, match="not a model of a known framework"):
        gaq.prepare(torch.nn.Linear(2, 2), "gaq")


def test_functions_and_modules_of_one_name(quantized: Callable[..., Any]) -> None:
    """`gaq.summary` and `gaq.report` are the functions, whatever was imported before."""
    import gaq.model.summary_table
    import gaq.reporting

    assert "interactions.0.linear_up" in gaq.summary(quantized("gaq"))
    assert callable(gaq.report)


@pytest.mark.parametrize(
    ("preset", "status"),
    [
        pytest.param(preset, status, marks=slow_unless(preset == "gaq" or (preset, status) in QUICK_SCRIPTS))
        for preset in PRESETS
        for status in ("training", "converted")
    ],
)
def test_torchscript(
    quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any], preset: str, status: str
) -> None:
    model = quantized(preset, dtype=torch.float64, status=status)
    energy, forces = evaluate(model, structures)
    script = jit_compile(copy.deepcopy(model))
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    (batch,) = make_batches(model, structures, 1000)
    got, got_forces, _ = energy_and_forces(loaded, batch)
    np.testing.assert_allclose(got.detach().numpy(), energy, rtol=1e-10)
    np.testing.assert_allclose(got_forces.detach().numpy(), forces, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_float64_and_float32_hold_the_same_numbers(
    quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any], preset: str
) -> None:
    single = quantized(preset)
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    double = copy.deepcopy(single).double()
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert quantized_weights(double).keys() == quantized_weights(single).keys()
    coarse = {"w8a8", "w4a8", "naive_w8a8"}
    np.testing.assert_allclose(
        evaluate(double, structures)[0], evaluate(single, structures)[0], rtol=1e-2 if preset in coarse else 1e-4
    )


@pytest.mark.parametrize("preset", ["gaq", "naive_w8a8"])
def test_no_edges_and_no_neighbours(
    float_model: Callable[..., Any], quantized: Callable[..., Any], evaluate: Callable[..., Any], preset: str
) -> None:
    from ase import Atoms

    far = Atoms("HC", positions=[[0, 0, 0], [50, 0, 0]])
    alone = Atoms("O", positions=[[0, 0, 0]])
    for status in ("training", "converted"):
        model = quantized(preset, status=status)
        for quantizer in feature_quantizers(model).values():
            quantizer.observing = status == "training"
        energies, forces = evaluate(model, [far, alone])
        assert np.isfinite(energies).all()
        np.testing.assert_array_equal(forces, 0.0)


def test_rows_name_every_site(quantized: Callable[..., Any], float_model: Callable[..., Any]) -> None:
    from gaq_mace.summary import rows

    for model in (float_model(), quantized("gaq", status="training"), quantized("w4a16")):
        table = {row.name: row for row in rows(model)}
        assert {site.name for site in find_sites(model)} <= set(table)
        assert all(row.status for row in table.values())
