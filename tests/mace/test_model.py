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
from gaq.config.parse import ConfigError
from gaq.quantizers.weights import largest_code
from gaq_mace.evaluate import energy_and_forces, make_batches
from gaq_mace.model import feature_quantizers, quantized_weights, state_of, unquantized, weight_quantizers
from gaq_mace.sites import find_sites

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


@pytest.mark.parametrize("preset", PRESETS)
def test_prepare_is_in_place_and_keeps_names(float_model: Callable[..., Any], preset: str) -> None:
    model = float_model()
    keys, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert gaq.prepare(model, preset) is model
    assert [key for key in model.state_dict() if key != "_extra_state"] == keys
    assert [name for name, _ in model.named_parameters()] == names
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert modules.items() <= {name: id(module) for name, module in model.named_modules()}.items()
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert isinstance(model, mace_models.ScaleShiftMACE)
    assert type(model).__name__ == "ScaleShiftMACE"  # MACE finds the constructor's arguments by this name
    # MACE slices whatever is called so, and everything in the readouts, when it selects a head.
    added = {name for name, _ in model.named_buffers()} & set(model.state_dict()) - set(keys)
    assert not added


def slow_unless(quick: bool) -> Any:
    return () if quick else pytest.mark.slow


@pytest.mark.parametrize(
    ("preset", "variant"),
    [
        pytest.param(preset, variant, marks=slow_unless(preset == "gaq" or variant == "plain"))
        for preset in ("gaq", "w4")
        for variant in VARIANTS
    ],
)
def test_variants_compute_close_to_float(
    float_model: Callable[..., Any],
    quantized: Callable[..., Any],
    evaluate: Callable[..., Any],
    structures: list[Any],
    variant: str,
    preset: str,
) -> None:
    """Every architecture runs; eight bits are near the float model, and four are a rounding, not a ruin."""
    energy, forces = evaluate(float_model(variant), structures)
    rounded, rounded_forces = evaluate(quantized(preset, variant), structures)
    scale = np.abs(forces).mean()
    share = {"gaq": 0.05, "w4": 0.5}[preset]
    assert 0 < np.abs(rounded_forces - forces).mean() < share * scale
    assert np.abs(rounded - energy).max() < share * np.ptp(energy)


@pytest.mark.parametrize("status", ["training", "converted"])
@pytest.mark.parametrize("preset", WEIGHTS_ONLY)
def test_rounded_weights_keep_the_physics(
    quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any], preset: str, status: str
) -> None:
    model = quantized(preset, dtype=torch.float64, status=status)
    energy, forces = evaluate(model, structures)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    turned = [atoms.copy() for atoms in structures]
    for atoms in turned:
        atoms.positions = atoms.positions @ rotation.T + 1.0
    turned_energy, turned_forces = evaluate(model, turned)
    assert np.abs(turned_energy - energy).max() < 1e-11
    assert np.abs(turned_forces - forces @ rotation.T).max() < 1e-11

    ethanol = structures[0]
    step = 1e-4
    for atom, axis in ((0, 0), (2, 1), (5, 2)):
        sides = []
        for sign in (1, -1):
            moved = ethanol.copy()
            moved.positions[atom, axis] += sign * step
            sides.append(moved)
        (plus, minus), _ = evaluate(model, sides)
        assert -(plus - minus) / (2 * step) == pytest.approx(forces[atom, axis], rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("preset", PRESETS)
def test_convert_writes_the_codes(
    quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any], preset: str
) -> None:
    model = quantized(preset, status="training")
    before = quantized_weights(model)
    energy, forces = evaluate(model, structures)
    assert gaq.convert(model) is model
    parameters = dict(model.named_parameters())
    assert set(before) == {name for name, p in parameters.items() if p.numel() > 0}
    assert not weight_quantizers(model)
    after = quantized_weights(model)
    for name, tensor in before.items():
        assert int(tensor.codes.abs().max()) <= largest_code(tensor.bits)
        assert torch.equal(parameters[name].detach(), tensor.dequantize())
        assert torch.equal(after[name].codes, tensor.codes)
        assert torch.equal(after[name].scale, tensor.scale)
    converted, converted_forces = evaluate(model, structures)
    # The forward values of the training form are the very same numbers, to the order of float32 sums. With 8 bits that
    # order may decide on which side of a step a number falls: one step of one feature is some 1e-5 of the energy.
    coarse = preset in ("w8a8", "w4a8", "naive_w8a8")
    np.testing.assert_allclose(converted, energy, rtol=2e-5 if coarse else 2e-6)
    np.testing.assert_allclose(converted_forces, forces, atol=2e-5 if preset in WEIGHTS_ONLY else 2e-2)
    assert gaq.convert(model) is model, "converting twice changes nothing"


@pytest.mark.parametrize("status", ["training", "converted"])
@pytest.mark.parametrize("preset", ["gaq", "w4"])
def test_deepcopy_keeps_state(
    quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any], preset: str, status: str
) -> None:
    model = quantized(preset, status=status)
    twin = copy.deepcopy(model)
    assert state_of(twin) is not state_of(model)
    assert state_of(twin).status == status
    assert state_of(twin).config == state_of(model).config
    assert state_of(twin).weights.keys() == state_of(model).weights.keys()
    # By name: torch.fx makes a class of its own for every graph.
    assert [type(m).__qualname__ for m in twin.modules()] == [type(m).__qualname__ for m in model.modules()]
    energy, forces = evaluate(model, structures)
    for got, expected in zip(evaluate(twin, structures), (energy, forces), strict=True):
        np.testing.assert_array_equal(got, expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    for quantizer in feature_quantizers(twin).values():
        quantizer.load_ranges(quantizer.ranges() * 3.0)
    np.testing.assert_array_equal(evaluate(model, structures)[0], energy)


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


def test_override_leaves_modules_alone(float_model: Callable[..., Any], structures: list[Any]) -> None:
    reference = float_model()
    classes = {name: type(module) for name, module in reference.named_modules()}
    model = copy.deepcopy(reference)
    gaq.prepare(model, {"preset": "gaq", "distillation": {"steps": 0}, "overrides": {"readouts.*": None}})
    gaq.calibrate(model, structures, progress=False)
    gaq.convert(model)
    parameters = dict(reference.named_parameters())
    left = [name for name, _ in model.named_parameters() if name.startswith("readouts")]
    assert left
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]) == (name in left or parameter.numel() == 0), name
    for name, module in model.named_modules():
        if name.startswith("readouts"):
            assert type(module) is classes[name]
    assert not set(left) & set(quantized_weights(model))


def test_override_with_presets(float_model: Callable[..., Any], structures: list[Any]) -> None:
    given = {"compression": None, "sensitive_bits": 16, "first_bits": 8}
    overrides = {
        "interactions.*": {"preset": "w4", "weights": given},
        "interactions.1.*": {"preset": "w8a8", "weights": {"bits": 6, "rounding": "nearest"}},
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


def test_override_errors(float_model: Callable[..., Any]) -> None:
    model = float_model()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=r"overrides\['readout\.\*'\]: matches no module"):
        gaq.prepare(model, {"overrides": {"readout.*": None}})
    with pytest.raises(ConfigError, match="nothing would be quantized"):
        gaq.prepare(model, {"overrides": {"*": None}})
    assert [type(module) for module in model.modules()] == classes, "a refused model is left as it was"


def test_refuses_what_cannot_be_quantized(float_model: Callable[..., Any], quantized: Callable[..., Any]) -> None:
    for status in ("training", "converted"):
        with pytest.raises(ValueError, match="already quantized"):
            gaq.prepare(quantized("w8", status=status), "w8")
    lora = float_model()
    inject_lora(lora, rank=2)
    with pytest.raises(ValueError, match="LoRA"):
        gaq.prepare(lora, "gaq")
    config = extract_config_mace_model(float_model())
    for key in ("atomic_inter_scale", "atomic_inter_shift"):
        config.pop(key)
    with pytest.raises(ValueError, match="MACE models cannot be quantized"):
        gaq.prepare(mace_models.MACE(**config), "gaq")
    with pytest.raises(TypeError, match="not a model of a known framework"):
        gaq.prepare(torch.nn.Linear(2, 2), "gaq")


def test_refuses_steps_out_of_order(
    float_model: Callable[..., Any], quantized: Callable[..., Any], structures: list[Any]
) -> None:
    with pytest.raises(ValueError, match="not quantized"):
        gaq.convert(float_model())
    with pytest.raises(ValueError, match=r"gaq\.prepare"):
        gaq.calibrate(float_model(), structures, progress=False)
    with pytest.raises(ValueError, match="converted"):
        gaq.calibrate(quantized("gaq"), structures, progress=False)
    with pytest.raises(ValueError, match="at least one structure"):
        gaq.calibrate(quantized("gaq", status="training"), [], progress=False)
    with pytest.raises(ValueError, match="never observed"):
        gaq.convert(gaq.prepare(float_model(), {"preset": "gaq", "scalars": {"granularity": "per_channel"}}))


def test_converts_without_structures_where_nothing_needs_them(
    float_model: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any]
) -> None:
    model = gaq.convert(gaq.prepare(float_model(), "w8"))
    difference = evaluate(model, structures)[1] - evaluate(float_model(), structures)[1]
    assert 0 < np.abs(difference).max() < 0.1


def test_quantize_leaves_the_original(
    float_model: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any]
) -> None:
    model = float_model()
    energy = evaluate(model, structures)[0]
    result = gaq.quantize(model, structures, {"preset": "w4", "distillation": {"steps": 3}}, progress=False)
    assert type(model) is mace_models.ScaleShiftMACE
    assert state_of(result).status == "converted"
    np.testing.assert_array_equal(evaluate(model, structures)[0], energy)


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
    (batch,) = make_batches(model, structures, 8)
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


@pytest.mark.parametrize("preset", ["gaq", "w4"])
def test_float64_model_stays_float64(quantized: Callable[..., Any], preset: str) -> None:
    model = quantized(preset, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    for name, tensor in quantized_weights(model).items():
        parameter = dict(model.named_parameters())[name]
        assert torch.equal(parameter.detach(), tensor.dequantize().double())


@pytest.mark.parametrize("preset", ["gaq", "w4a8"])
def test_trains_with_forces(quantized: Callable[..., Any], structures: list[Any], preset: str) -> None:
    """The gradient of a force loss reaches every weight, and a step along it lowers the loss."""
    model = quantized(preset, status="training", dtype=torch.float64)
    (batch,) = make_batches(model, structures, 8)
    target = torch.zeros_like(batch["positions"])

    def loss() -> torch.Tensor:
        _, forces, _ = energy_and_forces(model, batch, create_graph=True)
        return ((forces - target) ** 2).mean()

    before = loss()
    before.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.numel() > 0}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    size = sum(float((g**2).sum()) for g in gradients.values()) ** 0.5
    assert size > 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.numel() > 0:
                p.sub_(gradients[name] * (0.05 * float(before.detach()) / size**2))
    assert float(loss().detach()) < float(before.detach())


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
