"""Quantized NequIP and Allegro models in memory: what is rounded, and that the codes are exact."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import numpy as np
import torch
from nequip_models import few_bits

import gaq
from gaq.config.parse import ConfigError, parse_config
from gaq.model.state import feature_quantizers, state_of, unquantized
from gaq_nequip.freeze import FoldedSelfConnection, freeze
from gaq_nequip.insertion import site_quantizers
from gaq_nequip.model import in_float64, prepare
from gaq_nequip.packed import PackedWeight
from gaq_nequip.root import QuantizedGraphModel
from gaq_nequip.sites import bystanders, find_sites
from gaq_nequip.weights import (
    hold_codes,
    packed_weights,
    quantized_weights,
    release_codes,
    species_quantizers,
    weight_quantizers,
)

VARIANTS = ("plain", "parity", "wide", "readout", "allegro", "spline")
PRESETS = ("gaq", "w8", "w4", "w4a16", "w8a8", "w4a8", "naive_w8a8")


def test_elements_and_heads_are_not_chosen_here(float_model: Callable[..., Any]) -> None:
    for options in ({"elements": "C,H"}, {"head": "other"}):
        with pytest.raises(ValueError, match="elements and heads can be chosen in MACE models only"):
            gaq.select(float_model(), **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_covered(float_model: Callable[..., Any], variant: str) -> None:
    model = float_model(variant)
    covered = {f"{site.name}.{w.path}" for site in find_sites(model) for w in site.weights}
    assert covered == {name for name, p in model.named_parameters() if p.requires_grad}
    for site in find_sites(model):
        for weight in site.weights:
            parameter = dict(model.named_parameters())[f"{site.name}.{weight.path}"]
            assert weight.layout.shape == tuple(parameter.shape)
            assert sum(b.numel for b in weight.layout.blocks) == parameter.numel()
    assert all(b.reason != "not a known kind" for b in bystanders(model))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.smoke
def test_converted_frozen_and_folded_are_the_same(
    quantized: Callable[..., Any],
    float_model: Callable[..., Any],
    evaluate: Callable[..., Any],
    structures: list[Any],
    variant: str,
    dtype: str,
) -> None:
    converted = quantized("w8", variant, dtype)
    energies, forces = evaluate(converted, structures)
    training = quantized("w8", variant, dtype, "training")
    assert np.array_equal(evaluate(training, structures)[0], energies)
    frozen = freeze(copy.deepcopy(converted), fold=False)
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    frozen_energies, frozen_forces = evaluate(frozen, structures)
    assert np.allclose(frozen_energies, energies, rtol=tolerance)
    assert np.allclose(frozen_forces, forces, rtol=0, atol=10 * tolerance)
    assert not [p for p in frozen.parameters() if p.requires_grad]
    assert all(not p.is_floating_point() or p.numel() == 0 for p in frozen.parameters())
    folded = freeze(copy.deepcopy(converted))
    is_folded = any(isinstance(m, FoldedSelfConnection) for m in folded.modules())
    assert is_folded == (variant in ("plain", "wide", "readout") and dtype == "float32")
    atol = 5e-4 if is_folded else 10 * tolerance
    assert np.allclose(evaluate(folded, structures)[1], forces, rtol=0, atol=atol)
    exact_energies, _ = evaluate(float_model(variant, dtype), structures)
    assert not np.allclose(energies, exact_energies, rtol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", ["plain", "allegro"])
def test_presets(
    quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any], variant: str, preset: str
) -> None:
    model = quantized(preset, variant)
    weights = quantized_weights(model)
    config = state_of(model).config
    weight_config = config.weights
    groups = {
        weight_config.bits,
        weight_config.sensitive_bits,
        weight_config.first_bits,
        weight_config.mixing_bits,
        weight_config.species_bits,
    }
    assert {q.bits for q in weights.values()} <= groups
    rounds = bool(feature_quantizers(model))
    assert rounds == config.rounds_activations
    energies, forces = evaluate(model, structures)
    frozen = freeze(copy.deepcopy(model))
    after, _ = evaluate(frozen, structures)
    with unquantized(model):
        smooth, _ = evaluate(model, structures)
    assert np.isfinite(forces).all()
    spread = max(np.abs(energies - smooth).max(), 1e-5)
    assert np.abs(after - energies).max() <= (20 * spread if rounds else 1e-4)


def test_bits_follow_from_what_passes_through(quantized: Callable[..., Any], float_model: Callable[..., Any]) -> None:
    """Few bits only where there are many weights; a self-connection with few types needs the fewest."""
    model = quantized("w4", "wide", status="training")
    weight_config = state_of(model).config.weights
    assert weight_config.compression is None
    expected = {
        "sensitive": weight_config.sensitive_bits,
        "first": weight_config.first_bits,
        "mixing": weight_config.mixing_bits,
        "rest": weight_config.bits,
        "species": 3,
    }
    assert expected["sensitive"] >= expected["first"] >= expected["mixing"] >= expected["rest"] >= 4
    groups_met = set()
    for site in find_sites(model):
        for quantizer in site_quantizers(site).values():
            group = "rest"
            if site.name.endswith(".sc"):
                group = "species"
            elif site.sensitive:
                group = "sensitive"
            elif "layer0_convnet" in site.name:
                group = "first"
            elif "linear_" in site.name:
                group = "mixing"
            assert quantizer.bits == expected[group], site.name  # type: ignore[union-attr]  # of torch's Module
            assert (type(quantizer).__name__ == "SpeciesWeightQuantizer") == (group == "species")
            groups_met.add(group)
    assert groups_met == set(expected)
    alike = gaq.prepare(float_model("wide"), {"preset": "w8", "weights": {"species_bits": None}})
    assert {type(q).__name__ for site in find_sites(alike) for q in site_quantizers(site).values()} == {
        "WeightQuantizer"
    }


def test_room_goes_to_the_other_weights(float_model: Callable[..., Any]) -> None:
    """The self-connection needs few bits, so that with 8 bits named the rest can have more within a fifth of FP32."""
    model = gaq.prepare(float_model("wide"), "gaq")
    weight_config = state_of(model).config.weights
    assert (weight_config.species_bits, weight_config.sensitive_bits, weight_config.first_bits) == (4, 16, 16)
    assert 8 < weight_config.bits <= weight_config.mixing_bits < 16
    tensors = quantized_weights(model).values()
    stored = sum(t.bits * t.codes.numel() / 8 + 2 * t.scale.numel() for t in tensors)
    assert 4 * sum(p.numel() for p in model.parameters()) >= 5 * stored
    allegro = state_of(gaq.prepare(float_model("allegro"), "gaq")).config.weights
    assert (allegro.bits, allegro.mixing_bits) == (8, 8)


def test_held_codes_are_those_of_the_weights(
    quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an epoch of training and in validation, the codes of the self-connection are chosen once."""
    model = quantized("gaq", "wide", "float64", status="training")
    energies, forces = evaluate(model, structures)
    before = hold_codes(model)
    assert before
    assert not any(offset.numel() for offset in before.values())

    def refuse(*args: Any) -> Any:
        raise AssertionError("codes are chosen anew")

    with monkeypatch.context() as patch:
        patch.setattr("gaq.quantizers.species._operations", refuse)
        held = evaluate(model, structures)
    assert np.allclose(held[0], energies, rtol=1e-12)
    assert np.allclose(held[1], forces, rtol=0, atol=1e-10)
    first = hold_codes(model)
    assert all(offset.numel() for offset in first.values())
    release_codes(model, first)
    assert all(torch.equal(q.offset, first[name]) for name, q in species_quantizers(model).items())
    release_codes(model)
    assert np.array_equal(evaluate(model, structures)[0], energies)


def test_rotation_error_is_rounding(quantized: Callable[..., Any], structures: list[Any]) -> None:
    """In float64 every preset but the naive one is equivariant to float64."""
    from gaq.checks.lee import local_equivariance_error
    from gaq_nequip.evaluate import NequIPPotential

    errors = {}
    for preset in ("gaq", "w8a8", "naive_w8a8"):
        model = quantized(preset, "parity", "float64")
        errors[preset] = local_equivariance_error(NequIPPotential(model), structures, rotations=2).mean_mev_per_angstrom
    assert errors["gaq"] < 1e-6
    assert errors["w8a8"] < 1e-6
    assert errors["naive_w8a8"] > 1e-2


@pytest.mark.parametrize("variant", ["plain", "allegro"])
def test_second_derivatives_of_training(quantized: Callable[..., Any], structures: list[Any], variant: str) -> None:
    """The gradient of a loss on forces against differences, with weights exact so that the loss is smooth in them."""
    from gaq_nequip.evaluate import energy_and_forces, make_batches

    model = quantized("w8", variant, "float64", "training").train()
    (batch,) = make_batches(model, structures[:2], 1000)

    def loss() -> Any:
        _, forces, _ = energy_and_forces(model, batch, create_graph=True)
        return (forces**2).sum()

    with unquantized(model):
        model.zero_grad()
        loss().backward()
        for name, parameter in list(model.named_parameters())[:6]:
            index = parameter.numel() // 2
            flat = parameter.data.view(-1)
            step = 1e-5
            values = []
            for sign in (1, -1):
                flat[index] += sign * step
                values.append(float(loss().detach()))
                flat[index] -= sign * step
            numeric = (values[0] - values[1]) / (2 * step)
            assert parameter.grad is not None
            assert float(parameter.grad.view(-1)[index]) == pytest.approx(numeric, rel=1e-5, abs=1e-7), name


@pytest.mark.smoke
def test_deep_copies_and_states(
    quantized: Callable[..., Any], float_model: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any]
) -> None:
    model = quantized("gaq", "plain", status="training")
    copied = copy.deepcopy(model)
    assert isinstance(copied, QuantizedGraphModel)
    assert np.array_equal(evaluate(copied, structures)[0], evaluate(model, structures)[0])
    other = gaq.prepare(float_model("plain"), few_bits("gaq"))
    other.load_state_dict(model.state_dict())
    assert np.array_equal(evaluate(other.eval(), structures)[0], evaluate(model.eval(), structures)[0])
    different = gaq.prepare(float_model("plain"), "w4a16")
    with pytest.raises(ValueError, match="other quantization settings"):
        different.load_state_dict(model.state_dict())
    converted = gaq.convert(copy.deepcopy(model))
    again = gaq.prepare(float_model("plain"), few_bits("gaq"))
    again.load_state_dict(converted.state_dict())
    assert state_of(again).status == "converted"
    assert np.array_equal(evaluate(again, structures)[0], evaluate(converted, structures)[0])
    assert {n: q.scale.tolist() for n, q in quantized_weights(again).items()} == {
        n: q.scale.tolist() for n, q in quantized_weights(converted).items()
    }


def test_static_ranges_travel_with_the_state(
    float_model: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any]
) -> None:
    spec = {
        "preset": "gaq",
        "scalars": {"granularity": "per_channel"},
        "vectors": {"granularity": "per_channel"},
        "distillation": {"steps": 0},
    }
    model = gaq.convert(gaq.calibrate(gaq.prepare(float_model("plain"), spec), structures, progress=False))
    other = gaq.prepare(float_model("plain"), spec)
    with pytest.raises(ValueError, match="never observed"):
        gaq.convert(copy.deepcopy(other))
    other.load_state_dict(model.state_dict())
    # Rounding for training is written otherwise; a step of 24 bits is the last digit of a float32.
    assert np.allclose(evaluate(other, structures)[0], evaluate(model, structures)[0], rtol=2e-7, atol=0)


def test_overrides(float_model: Callable[..., Any]) -> None:
    model = gaq.prepare(
        float_model("plain"),
        {"preset": "gaq", "overrides": {"*edge_mlp*": None, "*linear_2": {"weights": {"bits": 4}}}},
    )
    weights = quantized_weights(model)
    assert not [name for name in weights if "edge_mlp" in name]
    assert {q.bits for name, q in weights.items() if "linear_2" in name} == {4}
    frozen = freeze(model)
    assert [name for name, _ in frozen.named_parameters() if "edge_mlp" in name]
    with pytest.raises(ConfigError, match=r"overrides\['\*linear_3'\]: matches no module"):
        gaq.prepare(float_model("plain"), {"overrides": {"*linear_3": None}})


def test_only_complete_models_are_prepared(float_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="give a complete NequIP model"):
        prepare(float_model("plain").model, parse_config("gaq"))


def test_summary_names_every_module(quantized: Callable[..., Any]) -> None:
    for status in ("training", "converted", "frozen"):
        text = gaq.summary(quantized("gaq", "wide", status=status))
        assert "layer0_convnet.conv.linear_2" in text
        assert "analytic functions of distance" in text
        assert "per_atom_energy_readout" in text
    assert "rounded, folded by type" in text
    assert "int16 per_channel" in text


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7, 8, 9, 13, 16])
def test_packed_weights_are_exact(bits: int) -> None:
    from gaq.quantizers.weights import Block, WeightLayout, WeightQuantizer

    layout = WeightLayout((35,), (Block(0, (5, 3)), Block(15, (4, 5))))
    quantizer = WeightQuantizer(layout, bits, "per_group", 2)
    weight = torch.randn(35, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    packed = PackedWeight(quantizer.quantized(weight))
    for dtype in (torch.float32, torch.float64):
        rounded = quantizer(weight.to(dtype))
        assert torch.equal(packed(torch.empty(0, dtype=dtype)), rounded)
    assert packed.codes.dtype == {8: torch.int8, 16: torch.int16}.get(bits, torch.uint8)
    assert packed.codes.numel() * packed.codes.element_size() == -(-35 * bits // 8)
    assert torch.equal(packed.tensor().codes, quantizer.quantized(weight).codes)
    packed.widen()
    assert packed.codes.dtype == (torch.int16 if bits > 8 else torch.int8 if bits == 8 else torch.uint8)
    assert torch.equal(packed(torch.empty(0, dtype=torch.float64)), quantizer(weight))
    assert torch.equal(packed.tensor().codes, quantizer.quantized(weight).codes)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_packed_weights_are_exact_in_compiled_files(tmp_path: Path) -> None:
    """Code compiled ahead of time takes other paths than eager code, so unpacking has to be run there as well."""
    from gaq.quantizers.weights import WeightLayout, WeightQuantizer

    layout = WeightLayout.single((11, 5), 0)
    weight = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))

    class AllBits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            quantizers = [WeightQuantizer(layout, bits, "per_channel", 0) for bits in range(2, 17)]
            self.packed = torch.nn.ModuleList(PackedWeight(q.quantized(weight)) for q in quantizers)

        def forward(self, placeholder: torch.Tensor) -> torch.Tensor:
            return torch.stack([packed(placeholder) for packed in self.packed])

    model, placeholder = AllBits(), torch.zeros(1)
    exported = torch.export.export(model, (placeholder,))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "packed.pt2"))
    assert torch.equal(torch._inductor.aoti_load_package(path)(placeholder), model(placeholder))


def test_frozen_weights_are_small(quantized: Callable[..., Any], float_model: Callable[..., Any]) -> None:
    total = 4 * sum(p.numel() for p in float_model("wide").parameters())
    for preset, least in (("gaq", 4.0), ("w8", 4.0), ("w4", 7.0), ("w4a16", 7.0)):
        frozen = quantized(preset, "wide", status="frozen")
        assert total / int(frozen.metadata["gaq_weight_bytes"]) >= least
        assert int(frozen.metadata["gaq_float_weight_bytes"]) == total
        assert packed_weights(frozen)


def test_in_float64(quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any]) -> None:
    single = quantized("w8", "parity")
    double = in_float64(single)
    assert next(double.parameters()).dtype == torch.float64
    first, second = evaluate(single, structures), evaluate(double, structures)
    assert np.abs(first[0] - second[0]).max() < 1e-5
    assert np.abs(first[1] - second[1]).max() < 1e-4
    assert next(single.parameters()).dtype == torch.float32


def test_distillation_and_calibrated_rounding(
    float_model: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any]
) -> None:
    """Four bits after the fact: each step brings the forces closer to those of the float model."""
    _, exact = evaluate(float_model("plain"), structures)
    errors = []
    for rounding, steps in (("nearest", 0), ("gptq", 0), ("gptq", 60)):
        spec = {
            "preset": "w4",
            "weights": {"rounding": rounding},
            "distillation": {"steps": steps, "batch_atoms": 60} if steps else {"steps": 0},
        }
        model = gaq.prepare(float_model("plain"), spec)
        gaq.calibrate(model, structures * 5, progress=False)
        weights = len(weight_quantizers(model))
        assert weights == len(find_sites(model)) - sum(not s.weights for s in find_sites(model))
        _, forces = evaluate(gaq.convert(model), structures)
        errors.append(float(np.abs(forces - exact).mean()))
    assert errors[2] < 0.7 * errors[0]
    assert errors[2] < errors[1]
