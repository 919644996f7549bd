"""Post-training quantization of a small pair potential, through an adapter of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from gaq.config.parse import DistillationConfig, ScalarConfig, VectorConfig
from gaq.quantizers.features import OBSERVER_DECAY, FeatureLayout, FeatureQuantizer
from gaq.quantizers.weights import Block, WeightLayout, WeightQuantizer, gptq_round
from gaq.training import distillation, ptq
from gaq.training.distillation import TARGET
from gaq.training.sampling import by_atoms, choose

ATOMS = 6


class Linear(torch.nn.Module):
    """``x @ weight + bias``; only the weight is rounded."""

    def __init__(self, inputs: int, outputs: int, bits: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = torch.randn(inputs, outputs, generator=generator) / math.sqrt(inputs)
        self.weight = torch.nn.Parameter(weight)
        self.bias = torch.nn.Parameter(0.1 * torch.randn(outputs, generator=generator))
        self.quantizer = WeightQuantizer(WeightLayout.single((inputs, outputs)), bits, "per_channel", 32)
        self.inputs: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.inputs = x.detach()
        return x @ self.quantizer(self.weight) + self.bias


class PairPotential(torch.nn.Module):
    """A sum over pairs of a network of their distance, with two readouts, one of them loud."""

    def __init__(self, bits: int = 4, feature_bits: tuple[int, int] = (16, 8), loudness: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = Linear(12, 32, bits, generator)
        self.mix = Linear(32, 32, bits, generator)
        self.quiet = Linear(32, 1, bits, generator)
        self.loud = Linear(32, 1, bits, generator)
        self.loudness = loudness
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        layout = FeatureLayout(((32, 1),))
        self.features = torch.nn.ModuleList(
            FeatureQuantizer(layout, ScalarConfig(bits=n, granularity="per_channel"), VectorConfig(), headroom=2.0)
            for n in feature_bits
        )

    def forward(self, positions: Tensor) -> Tensor:
        """Energies, shape (graphs,), of positions (graphs, atoms, 3)."""
        first, second = torch.triu_indices(ATOMS, ATOMS, 1)
        distance = (positions[:, first] - positions[:, second]).norm(dim=-1).reshape(-1, 1)
        basis = torch.exp(-4 * (distance - torch.linspace(0.5, 4.0, 12)) ** 2)
        x = torch.nn.functional.silu(self.up(basis))
        x = torch.nn.functional.silu(self.mix(self.features[0](x)))
        x = self.features[1](x)
        energy = self.quiet(x) + self.loudness * self.loud(x)
        return self.scale * energy.view(len(positions), -1).sum(1)


class PairAdapter:
    """The part of `gaq.adapter.Adapter` that post-training quantization asks for."""

    def __init__(self) -> None:
        self.switches: list[list[tuple[bool, bool]]] = []

    def linears(self, model: torch.nn.Module) -> dict[str, Linear]:
        return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}

    def weight_quantizers(self, model: torch.nn.Module) -> dict[str, WeightQuantizer]:
        return {f"{name}.weight": module.quantizer for name, module in self.linears(model).items()}

    def feature_quantizers(self, model: torch.nn.Module) -> dict[str, FeatureQuantizer]:
        return {name: module for name, module in model.named_modules() if isinstance(module, FeatureQuantizer)}

    @contextmanager
    def unquantized(self, model: torch.nn.Module) -> Iterator[None]:
        weights = self.weight_quantizers(model).values()
        features = self.feature_quantizers(model).values()
        before = [q.enabled for q in weights], [(q.scalars_enabled, q.vectors_enabled) for q in features]
        for q in weights:
            q.enabled = False
        for q in features:
            q.scalars_enabled = q.vectors_enabled = False
        yield
        for q, on in zip(weights, before[0], strict=True):
            q.enabled = on
        for q, (scalars, vectors) in zip(features, before[1], strict=True):
            q.scalars_enabled, q.vectors_enabled = scalars, vectors

    def sizes(self, structures: Sequence[Tensor]) -> list[int]:
        return [len(structure) for structure in structures]

    def batches(self, model: torch.nn.Module, structures: Sequence[Tensor], atoms: int) -> list[Tensor]:
        return [torch.stack(list(structures[span])) for span in by_atoms(self.sizes(structures), atoms)]

    def energy_and_forces(
        self, model: torch.nn.Module, batch: Tensor, create_graph: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        if create_graph:
            features = self.feature_quantizers(model).values()
            self.switches.append([(q.scalars_enabled, q.vectors_enabled) for q in features])
        positions = batch.clone().requires_grad_()
        energy = model(positions)
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=create_graph)
        return energy, -gradient.reshape(-1, 3), torch.full((len(batch),), float(ATOMS))

    def input_moments(self, model: torch.nn.Module, batches: Sequence[Tensor]) -> dict[str, list[Tensor | None]]:
        moments: dict[str, list[Tensor | None]] = {}
        with self.unquantized(model):
            for batch in batches:
                self.energy_and_forces(model, batch)
                for name, module in self.linears(model).items():
                    assert module.inputs is not None
                    moment = module.inputs.t() @ module.inputs
                    held = moments.setdefault(f"{name}.weight", [torch.zeros_like(moment)])
                    held[0] = held[0] + moment
        # As a layer that is no matrix.
        moments["quiet.weight"] = [None]
        return moments


@pytest.fixture
def adapter() -> Any:
    return PairAdapter()


def structures(count: int = 40, seed: int = 0) -> list[Tensor]:
    """Octahedra of edge 1.7, rattled."""
    corners = torch.cat((torch.eye(3), -torch.eye(3))) * 1.2
    generator = torch.Generator().manual_seed(seed)
    return list(corners + 0.15 * torch.randn(count, ATOMS, 3, generator=generator))


def forces(adapter: Any, model: torch.nn.Module, data: Sequence[Tensor]) -> Tensor:
    return torch.cat([adapter.energy_and_forces(model, batch)[1] for batch in adapter.batches(model, data, 16 * ATOMS)])


def exact_forces(adapter: Any, model: torch.nn.Module, data: Sequence[Tensor]) -> Tensor:
    with adapter.unquantized(model):
        return forces(adapter, model, data)


def rms(difference: Tensor) -> float:
    """In meV/Å."""
    return 1000 * float(difference.detach().double().square().mean().sqrt())


def held_out(data: Sequence[Tensor], config: DistillationConfig, seed: int = 0) -> list[Any]:
    chosen = choose(data, config.max_structures, seed)
    return chosen[: len(chosen) // 10]


# Ranges.


def test_choose_draws_without_replacement() -> None:
    data: list[Any] = list(range(20))
    drawn = choose(data, 8, seed=1)
    assert len(set(drawn)) == 8
    assert drawn == choose(data, 8, seed=1)
    assert drawn != choose(data, 8, seed=2)
    assert sorted(choose(data, 100, seed=0)) == data


def test_observed_ranges_are_those_of_exact_features(adapter: Any) -> None:
    model = PairPotential(feature_bits=(4, 4))
    data = structures(20)
    first, second = adapter.feature_quantizers(model).values()
    second.scalars_enabled = False
    # Old ranges are forgotten.
    first.load_ranges(torch.full((32,), 100.0))
    inputs: dict[int, Tensor] = {}
    for i, quantizer in enumerate((first, second)):
        quantizer.register_forward_pre_hook(lambda _, x, i=i: inputs.update({i: x[0].detach()}))
    ptq.observe_ranges(adapter, model, data, atoms=7 * ATOMS)
    assert (first.scalars_enabled, first.vectors_enabled) == (True, True)
    assert (second.scalars_enabled, second.vectors_enabled) == (False, True)
    for quantizer in (first, second):
        assert not quantizer.observing
        assert quantizer.decay == OBSERVER_DECAY
    # Neither quantizer rounds what the other sees, while weights are as they are rounded.
    first.scalars_enabled = second.scalars_enabled = False
    forces(adapter, model, data[:16])
    largest = [inputs[i].abs().amax(0) for i in (0, 1)]
    forces(adapter, model, data[16:])
    for i, quantizer in enumerate((first, second)):
        expected = torch.maximum(largest[i], inputs[i].abs().amax(0))
        assert torch.allclose(quantizer.ranges(), expected, rtol=1e-5)
        assert torch.equal(quantizer.limit, torch.maximum(quantizer.ranges(), quantizer.ranges().max() / 64) * 2)


def test_nothing_is_run_where_nothing_is_observed(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "feature_quantizers", lambda model: {})
    monkeypatch.setattr(adapter, "batches", lambda *_: pytest.fail("batches were made"))
    ptq.observe_ranges(adapter, PairPotential(), structures(2))


# Calibrated rounding.


def test_gptq_keeps_the_outputs_of_layers_better_than_nearest(adapter: Any) -> None:
    model = PairPotential()
    linears = adapter.linears(model)
    exact = {name: module.weight.detach().clone() for name, module in linears.items()}
    exact_forces(adapter, model, structures(16, seed=1))
    inputs = {name: module.inputs for name, module in linears.items()}

    def output_errors() -> dict[str, float]:
        return {name: rms(inputs[name] @ (m.quantizer(m.weight) - exact[name])) for name, m in linears.items()}

    quiet = model.quiet.quantizer.quantized(model.quiet.weight).codes
    before = output_errors()
    assert ptq.gptq(adapter, model, structures(40)) == 3
    after = output_errors()
    gains = {name: before[name] / after[name] for name in linears}
    assert gains == pytest.approx({"up": 3.2, "mix": 9.9, "quiet": 1.0, "loud": 4.8}, rel=0.15)
    assert all(module.quantizer.scale_is_fixed for module in linears.values())
    # Layers that are no matrix are left to nearest rounding.
    assert torch.equal(model.quiet.quantizer.quantized(model.quiet.weight).codes, quiet)
    # What was rounded stays where it is.
    for name in ("up", "mix", "loud"):
        assert torch.equal(linears[name].quantizer(linears[name].weight), linears[name].weight)


def test_gptq_rounds_each_species_by_its_own_inputs() -> None:
    class Stub(PairAdapter):
        def __init__(self, quantizer: WeightQuantizer, moments: list[Tensor | None]) -> None:
            self.quantizer, self.moments = quantizer, moments

        def weight_quantizers(self, model: torch.nn.Module) -> dict[str, WeightQuantizer]:
            return {"weight": self.quantizer}

        def input_moments(self, model: torch.nn.Module, batches: Any) -> dict[str, list[Tensor | None]]:
            return {"weight": self.moments}

    generator = torch.Generator().manual_seed(0)
    layout = WeightLayout((8 * 3 * 5 + 4 * 6,), (Block(0, (8, 3, 5)), Block(120, (4, 6), input_axis=1)))
    weight = torch.randn(144, generator=generator)
    inputs = torch.randn(3, 50, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    hessian = inputs.transpose(1, 2) @ inputs
    quantizer = WeightQuantizer(layout, 4, "per_channel", 32)
    model = torch.nn.ParameterDict({"weight": torch.nn.Parameter(weight.clone())})
    nearest = quantizer(weight)
    hessian[1] = 0.0
    adapter: Any = Stub(quantizer, [hessian, torch.eye(6)])
    assert ptq.gptq(adapter, model, []) == 2
    step = quantizer.current_scale(weight)[:15].view(3, 5)
    rounded = model["weight"].detach()
    # Of a species that the structures lack nothing is known: its matrix is left to nearest rounding.
    assert torch.equal(rounded[:120].view(8, 3, 5)[:, 1], weight[:120].view(8, 3, 5)[:, 1])
    for species in (0, 2):
        codes = gptq_round(weight[:120].view(8, 3, 5)[:, species], hessian[species], step[species], 4)
        assert torch.equal(rounded[:120].view(8, 3, 5)[:, species], codes * step[species])
    assert not torch.equal(rounded[:120], nearest[:120])
    # A block with its inputs on another axis is left to nearest rounding.
    assert torch.equal(rounded[120:], weight[120:])


# Self-distillation.

CONFIG = DistillationConfig()

RATE = 1e-2 / 16
"""At the four bits of these models 1e-2: it doubles with every bit less than eight."""


def prepared(adapter: Any, bits: int = 4, **options: Any) -> PairPotential:
    model = PairPotential(bits, **options)
    ptq.observe_ranges(adapter, model, structures(40))
    return model


def test_distillation_reproduces_the_forces_of_the_float_model(adapter: Any) -> None:
    model = prepared(adapter)
    fresh = structures(60, seed=1)
    target = exact_forces(adapter, model, fresh)
    before = rms(forces(adapter, model, fresh) - target)
    config = DistillationConfig(steps=300, learning_rate=RATE)
    result = ptq.distill(adapter, model, structures(60), config, progress=False)
    after = rms(forces(adapter, model, fresh) - target)
    # 34 to 2 meV/Å, on the structures held out and on others, long before the last step.
    assert result.before / result.after > 8
    assert before / after > 8
    assert result.slow
    assert (result.steps, result.structures) == (160, 54)


def test_distillation_reports_the_error_on_structures_held_out(adapter: Any) -> None:
    # With the weights alone rounded: activations are left exact during distillation, however coarse.
    model = prepared(adapter, feature_bits=(8, 8))
    for quantizer in model.features:
        quantizer.scalars_enabled = quantizer.vectors_enabled = False
    data = structures(60)
    config = DistillationConfig(steps=40, learning_rate=RATE, max_structures=40)
    held = held_out(data, config)
    assert len(held) == 4
    target = exact_forces(adapter, model, held)
    before = rms(forces(adapter, model, held) - target)
    result = ptq.distill(adapter, model, data, config, progress=False)
    assert result.structures == 36
    assert result.before == pytest.approx(before, rel=1e-4)
    assert result.after == pytest.approx(rms(forces(adapter, model, held) - target), rel=1e-4)
    assert result.after < result.before


def test_weights_whose_rounding_is_negligible_move_exactly(adapter: Any) -> None:
    """They train without rounding, and all are rounded in what is reported and left behind."""
    model = prepared(adapter, feature_bits=(16, 16))
    for quantizer in model.features:
        quantizer.scalars_enabled = quantizer.vectors_enabled = False
    close = WeightQuantizer(WeightLayout.single((12, 32)), 14, "per_channel", 32)
    close.negligible = True
    model.up.quantizer = close
    data = structures(60)
    config = DistillationConfig(steps=40, learning_rate=RATE)
    held = held_out(data, config)
    target = exact_forces(adapter, model, held)
    enabled_flags: list[bool] = []
    close.register_forward_pre_hook(lambda quantizer, _: enabled_flags.append(bool(quantizer.enabled)))
    weight = model.up.weight.detach().clone()
    result = ptq.distill(adapter, model, data, config, progress=False)
    # Labels; the first error; steps and their errors; the last error.
    enabled = [i for i, on in enumerate(enabled_flags) if on]
    assert enabled_flags.count(False) > 40
    assert enabled[-1] == len(enabled_flags) - 1
    assert close.enabled
    assert not torch.equal(model.up.weight, weight)
    largest = model.up.weight.abs().amax(0)
    assert torch.allclose(close.current_scale(model.up.weight), largest / close.top, rtol=0.01, atol=0.0)
    assert result.after == pytest.approx(rms(forces(adapter, model, held) - target), rel=1e-4)
    assert result.after < 0.5 * result.before


def test_distillation_leaves_everything_else_as_it_was(adapter: Any) -> None:
    """Scales too: kept in bfloat16, they could move in steps of 0.4 % only, half a code of a large weight."""
    model = prepared(adapter)
    model.scale.requires_grad_(False)
    model.mix.weight.requires_grad_(False)
    fine, coarse = model.features
    coarse.vectors_enabled = False
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ranges = [q.ranges() for q in model.features]
    scales = {name: q.current_scale(before[name]) for name, q in adapter.weight_quantizers(model).items()}
    ptq.distill(adapter, model, structures(20), DistillationConfig(steps=20, learning_rate=RATE), progress=False)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not name.endswith("weight")), name
    for module in adapter.linears(model).values():
        assert module.quantizer.enabled
        assert module.quantizer.scale_is_fixed
        assert not module.quantizer.fixed_step.requires_grad
    for name, quantizer in adapter.weight_quantizers(model).items():
        assert torch.equal(quantizer.current_scale(before[name]), scales[name]), name
    for quantizer, observed in zip(model.features, ranges, strict=True):
        assert torch.equal(quantizer.ranges(), observed)
    assert (fine.scalars_enabled, fine.vectors_enabled) == (True, True)
    assert (coarse.scalars_enabled, coarse.vectors_enabled) == (True, False)
    # Meanwhile all rounding of features was off.
    assert len(adapter.switches) == 20
    assert all(state == [(False, False), (False, False)] for state in adapter.switches)
    copy.deepcopy(model)


def test_distillation_keeps_the_best_it_saw(adapter: Any) -> None:
    model = prepared(adapter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rounded = forces(adapter, model, structures(10))
    result = ptq.distill(
        adapter, model, structures(20), DistillationConfig(steps=40, learning_rate=3000 * RATE), progress=False
    )
    assert result.after == result.before
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert torch.allclose(forces(adapter, model, structures(10)), rounded, rtol=1e-5, atol=1e-6)


def test_distillation_is_left_out_where_rounding_met_the_target(adapter: Any) -> None:
    model = prepared(adapter, bits=16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = ptq.distill(adapter, model, structures(20), DistillationConfig(steps=40), progress=False)
    assert 0 < result.after == result.before < result.target
    assert (result.steps, result.structures, len(adapter.switches)) == (0, 0, 0)
    assert result.target == pytest.approx(TARGET * rms(exact_forces(adapter, model, held_out(structures(20), CONFIG))))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert "no self-distillation" in result.describe()


def test_distillation_ends_where_it_meets_the_target(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = structures(60), DistillationConfig(steps=200, learning_rate=RATE)
    monkeypatch.setattr(distillation, "TARGET", 0.02)
    model = prepared(adapter)
    result = ptq.distill(adapter, model, data, config, progress=False)
    assert result.after <= result.target < result.before
    assert 0 < result.steps < 200
    assert result.steps % distillation.CHECK_INTERVAL == 0
    # Only what was drawn has labels.
    assert result.structures <= min(54, 20 * result.steps)


def test_distillation_ends_where_it_does_not_help(adapter: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The start is kept, one line says why, and another one said before how long it might take."""
    model = prepared(adapter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = DistillationConfig(steps=300, learning_rate=3e5 * RATE)
    with caplog.at_level("INFO", "gaq.training.distillation"):
        result = ptq.distill(adapter, model, structures(20), config, progress=False)
    assert (result.steps, result.slow) == (10 * (distillation.HALVINGS + 1), True)
    assert result.after == result.before
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert "after 90 steps of self-distillation" in result.describe()
    assert result.describe().endswith("ended, because more steps would gain too little")
    (announced,) = [record.getMessage() for record in caplog.records]
    assert announced.startswith("self-distillation: at most 300 steps of about ")


def test_a_start_that_training_does_not_improve_is_kept_with_its_scales(adapter: Any) -> None:
    """Weights of negligible rounding train unrounded; their rounding afterwards may cost more than training gained."""
    model = prepared(adapter, feature_bits=(16, 16))
    coarse = WeightQuantizer(WeightLayout.single((12, 32)), 3, "per_tensor", 32)
    coarse.negligible = True
    model.up.quantizer = coarse
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = DistillationConfig(steps=20, learning_rate=100 * RATE)
    result = ptq.distill(adapter, model, structures(40), config, progress=False)
    assert result.after == result.before
    assert result.steps == 20
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    for name, quantizer in adapter.weight_quantizers(model).items():
        assert torch.equal(quantizer.fixed_step, type(quantizer).current_scale(_unfixed(quantizer), before[name])), name
        assert quantizer.enabled


def _unfixed(quantizer: WeightQuantizer) -> WeightQuantizer:
    free = copy.deepcopy(quantizer)
    free.scale_is_fixed = False
    return free


def test_no_steps_change_nothing(adapter: Any) -> None:
    model = prepared(adapter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for count in (1, 2):
        result = ptq.distill(adapter, model, structures(count), DistillationConfig(steps=0), progress=False)
        assert result.after == result.before > 0
        assert (result.steps, result.structures) == (0, 0)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name])


def test_distillation_is_reproducible(adapter: Any) -> None:
    results = []
    for seed in (0, 0, 1):
        model = prepared(adapter)
        config = DistillationConfig(steps=20)
        results.append((ptq.distill(adapter, model, structures(30), config, seed, progress=False), model.up.weight))
    assert results[0][0] == results[1][0] != results[2][0]
    assert torch.equal(results[0][1], results[1][1])


def test_a_teacher_labels_where_the_weights_were_already_rounded(adapter: Any) -> None:
    model = prepared(adapter)
    data = structures(60)
    config = DistillationConfig(steps=100, learning_rate=RATE)
    teacher = copy.deepcopy(model)
    held = held_out(data, config)
    target = exact_forces(adapter, model, held)
    ptq.gptq(adapter, model, data)
    assert rms(exact_forces(adapter, model, held) - target) > 1.0
    original = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    result = ptq.distill(adapter, model, data, config, progress=False, teacher=teacher)
    assert result.after == pytest.approx(rms(forces(adapter, model, held) - target), rel=2e-2)
    assert result.after < 0.6 * result.before
    for name, p in teacher.named_parameters():
        assert torch.equal(p, original[name])


def test_distillation_serves_channels_of_very_different_size(adapter: Any) -> None:
    # The same function with some outputs of a layer a thousand times smaller, and the weights that read them larger.
    model = prepared(adapter)
    with torch.no_grad():
        model.mix.weight[:, ::4] *= 1e-3
        model.quiet.weight[::4] *= 1e3
        model.loud.weight[::4] *= 1e3
    config = DistillationConfig(steps=200, learning_rate=RATE)
    result = ptq.distill(adapter, model, structures(60), config, progress=False)
    assert result.before / result.after > 4


# Sensitivity.


def test_the_scan_finds_the_loud_tensor(adapter: Any) -> None:
    model = prepared(adapter, loudness=30.0)
    model.features[0].vectors_enabled = False
    data = structures(8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scan = ptq.sensitivity_scan(adapter, model, data, progress=False)
    costs = {entry.parameter: entry.force_difference for entry in scan}
    assert list(costs.values()) == sorted(costs.values(), reverse=True)
    assert set(costs) == {"up.weight", "mix.weight", "quiet.weight", "loud.weight"}
    assert {entry.parameter for entry in scan if entry.deserves_16_bits} == {"loud.weight"}
    assert all(entry.bits == 4 for entry in scan)
    assert {entry.parameter: entry.numel for entry in scan}["mix.weight"] == 1024
    # Against the definition: one tensor rounded, all else exact.
    target = exact_forces(adapter, model, data)
    for name, module in adapter.linears(model).items():
        with adapter.unquantized(model):
            module.quantizer.enabled = True
            got = 1000 * float((forces(adapter, model, data) - target).abs().mean())
        assert costs[f"{name}.weight"] == pytest.approx(got, rel=1e-4)
    # All is as it was.
    assert all(module.quantizer.enabled for module in adapter.linears(model).values())
    assert [(q.scalars_enabled, q.vectors_enabled) for q in model.features] == [(True, False), (True, True)]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("name", ["up", "mix", "quiet", "loud"])
def test_a_tensor_with_outliers_comes_first(adapter: Any, name: str) -> None:
    model = PairPotential(8)
    with torch.no_grad():
        # One weight of each channel makes the steps of the others coarse.
        adapter.linears(model)[name].weight[0] *= 200.0
    scan = ptq.sensitivity_scan(adapter, model, structures(8), progress=False)
    assert scan[0].parameter == f"{name}.weight"
    assert scan[0].force_difference > 1.5 * scan[1].force_difference


def test_the_share_of_16_bits_is_limited(adapter: Any) -> None:
    model = prepared(adapter)
    total = 12 * 32 + 32 * 32 + 64
    for share in (0.0, 0.01, 0.03, 0.05, 0.5, 1.0):
        scan = ptq.sensitivity_scan(adapter, model, structures(4), share=share, progress=False)
        assert sum(entry.numel for entry in scan if entry.deserves_16_bits) <= share * total
    assert all(entry.deserves_16_bits for entry in scan)
