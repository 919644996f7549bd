"""What every adapter must do: prepare, train a step, calibrate, convert, save, load, and refuse bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
import trained
from ase import Atoms
from ase.optimize import BFGS
from case import Case, Outcome
from physics import check_forces_are_the_gradient
from small import few_bits, without_distillation

import gaq
from gaq.adapter import adapter_for, adapter_for_file
from gaq.checks.conservation import central_difference_error
from gaq.checks.lee import local_equivariance_error
from gaq.cli import main
from gaq.quantizers.weights import largest_code

PRESETS = ("gaq", "w4a16", "w8", "w4", "w8a8", "w4a8", "naive_w8a8")
WEIGHTS_ONLY = ("w8", "w4")
EIGHT_BITS = ("w8a8", "w4a8", "naive_w8a8")
"""Presets that round activations to 8 bits: a feature that moves by one step changes the energy visibly."""
DOUBLE = torch.float64

Evaluate = Callable[..., tuple[np.ndarray, np.ndarray]]


def few_frames() -> list[Any]:
    return trained.ethanol("::10")


# Finding and evaluating


def test_the_adapter_knows_its_models_and_files(case: Case, models: Any, trained_file: Path) -> None:
    assert adapter_for(models.float_model()).name == case.name
    assert adapter_for_file(trained_file).name == case.name
    assert adapter_for(gaq.load(trained_file)).status(gaq.load(trained_file)) == "float"


def test_evaluates_as_the_framework_does(case: Case, trained_file: Path, evaluate: Evaluate) -> None:
    """The adapter's energies and forces equal those of the framework's calculator, and the model is trained."""
    model, frames = gaq.load(trained_file), trained.ethanol()
    energies, forces = evaluate(model, frames)
    calculator = adapter_for(model).calculator(trained_file)
    ends = np.cumsum([len(atoms) for atoms in frames])
    for i in (0, len(frames) // 2):
        atoms = frames[i].copy()
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(energies[i], abs=1e-4)
        np.testing.assert_allclose(atoms.get_forces(), forces[ends[i] - len(atoms) : ends[i]], atol=1e-4)
    labels = np.concatenate([atoms.arrays["REF_forces"] for atoms in frames])
    assert 1e3 * np.abs(forces - labels).mean() == pytest.approx(case.force_mae, rel=1e-3)


# Prepare


def test_every_parameter_is_quantized(models: Any, variant: str) -> None:
    model = models.float_model(variant)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and p.numel() > 0}
    prepared = gaq.prepare(model, "w8")
    assert set(adapter_for(prepared).weight_quantizers(prepared)) == trainable


@pytest.mark.parametrize("preset", PRESETS)
def test_prepare_is_in_place_and_keeps_names(models: Any, preset: str) -> None:
    """Every parameter keeps its name, identity and order, so checkpoints, optimizers and averages find it."""
    model = models.float_model()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    assert gaq.prepare(model, preset) is model
    assert [name for name, _ in model.named_parameters()] == list(before)
    assert [key for key in model.state_dict() if key in keys] == keys
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1]), name
    assert adapter_for(model).status(model) == "training"
    config = adapter_for(model).config(model)
    assert config is not None
    assert config.preset == gaq.parse_config(preset).preset


def test_converting_keeps_names_and_shapes(models: Any, variant: str) -> None:
    before = [(name, tuple(p.shape)) for name, p in models.float_model(variant).named_parameters()]
    for status in ("training", "converted"):
        model = models.quantized("gaq", variant, status=status)
        assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == before


@pytest.mark.parametrize("status", ["training", "converted"])
def test_prepare_refuses_what_is_quantized(models: Any, status: str) -> None:
    with pytest.raises(ValueError, match="already quantized"):
        gaq.prepare(models.quantized("w8", status=status), "w8")


def test_an_override_leaves_its_modules_alone(models: Any, structures: list[Any]) -> None:
    reference = models.float_model()
    every = gaq.prepare(models.float_model(), "w8")
    left = list(adapter_for(every).weight_quantizers(every))[-1]
    pattern = left.rsplit(".", 1)[0]
    spec = {"preset": "gaq", "distillation": {"steps": 0}, "overrides": {pattern: None}}
    model = gaq.quantize(reference, structures, spec, progress=False)
    kinds = dict(reference.named_modules())
    for name, module in model.named_modules():
        if name == pattern or name.startswith(f"{pattern}."):
            assert type(module).__qualname__ == type(kinds[name]).__qualname__
    for (name, float_weight), weight in zip(reference.named_parameters(), model.parameters(), strict=True):
        if float_weight.numel() > 0 and float_weight.requires_grad:
            assert torch.equal(float_weight, weight) == name.startswith(f"{pattern}."), name


# Bad keys


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gak", r"quantization: 'gak' is not a preset\. Did you mean 'gaq'\?"),
        ({"scalar": 8}, r"quantization\.scalar: unknown key.*Did you mean 'scalars'\?"),
        ({"weights": {"bitz": 8}}, r"quantization\.weights\.bitz: unknown key.*Did you mean 'bits'\?"),
        ({"weights": {"bits": 17}}, r"quantization\.weights\.bits: 17 bits cannot be stored"),
        ({"overrides": {"*nowhere*": None}}, r"overrides\['\*nowhere\*'\]: matches no module"),
        ({"overrides": {"*": None}}, "nothing would be quantized"),
    ],
    ids=["preset", "key", "nested", "bits", "override", "all"],
)
def test_bad_keys_are_refused_and_leave_the_model(case: Case, models: Any, spec: Any, message: str) -> None:
    model = models.float_model()
    classes, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(gaq.ConfigError, match=message):
        gaq.prepare(model, spec)
    assert adapter_for(model).status(model) == "float"
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(value, after[name]) for name, value in state.items() if isinstance(value, torch.Tensor))


def test_bad_keys_stop_the_command(case: Case, tmp_path: Path) -> None:
    outcome: Outcome = case.train(tmp_path, {"weights": {"bitz": 8}})
    assert outcome.code != 0
    assert "quantization.weights.bitz: unknown key" in outcome.text
    assert "Did you mean 'bits'?" in outcome.text
    assert not outcome.model.exists()


# Train a step


@pytest.mark.parametrize("preset", ["gaq", "w4a8"])
def test_a_step_along_the_gradient_of_the_forces(models: Any, structures: list[Any], preset: str) -> None:
    """The gradient of a loss on forces reaches every weight, and a step along it lowers the loss."""
    spec = few_bits(preset)
    # Calibrated rounding puts weights into the middle of a step, which no short step leaves.
    spec["weights"]["rounding"] = "nearest"
    model = gaq.calibrate(gaq.prepare(models.float_model(dtype=DOUBLE), spec), structures, progress=False).train()
    adapter = adapter_for(model)
    (batch, *_) = adapter.batches(model, structures, 1000)

    def loss() -> torch.Tensor:
        return (adapter.energy_and_forces(model, batch, create_graph=True)[1] ** 2).mean()

    before = loss()
    before.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.numel() > 0 and p.requires_grad}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    size = sum(float((g**2).sum()) for g in gradients.values()) ** 0.5  # type: ignore[operator]  # starts at int 0
    assert size > 0
    start = {name: p.detach().clone() for name, p in model.named_parameters() if name in gradients}
    after = []
    for share in (0.05, 0.2, 0.8):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in gradients:
                    p.copy_(start[name] - gradients[name] * (share * float(before.detach()) / size**2))
        after.append(float(loss().detach()))
    assert min(after) < float(before.detach())


# Calibrate


def test_steps_out_of_order_are_refused(models: Any, structures: list[Any]) -> None:
    with pytest.raises(ValueError, match="not quantized"):
        gaq.convert(models.float_model())
    with pytest.raises(ValueError, match=r"gaq\.prepare"):
        gaq.calibrate(models.float_model(), structures, progress=False)
    with pytest.raises(ValueError, match="converted"):
        gaq.calibrate(models.quantized("gaq"), structures, progress=False)
    with pytest.raises(ValueError, match="at least one structure"):
        gaq.calibrate(models.quantized("gaq", status="training"), [], progress=False)
    with pytest.raises(ValueError, match="never observed"):
        gaq.convert(gaq.prepare(models.float_model(), {"preset": "gaq", "scalars": {"granularity": "per_channel"}}))


def test_converts_without_structures_where_nothing_needs_them(
    models: Any, evaluate: Evaluate, structures: list[Any]
) -> None:
    model = gaq.convert(gaq.prepare(models.float_model(), "w8"))
    difference = evaluate(model, structures)[1] - evaluate(models.float_model(), structures)[1]
    assert 0 < np.abs(difference).max() < 0.1


def test_quantize_leaves_the_original(models: Any, evaluate: Evaluate, structures: list[Any]) -> None:
    model = models.float_model()
    kind, energies = type(model), evaluate(model, structures)[0]
    result = gaq.quantize(model, structures, {"preset": "w4", "distillation": {"steps": 2}}, progress=False)
    assert type(model) is kind
    assert adapter_for(result).status(result) == "converted"
    assert adapter_for(result).notes(result)["distillation"]["steps"] <= 2
    np.testing.assert_array_equal(evaluate(model, structures)[0], energies)


def test_variants_compute_close_to_float(models: Any, evaluate: Evaluate, structures: list[Any], variant: str) -> None:
    """Every architecture runs, and the default preset keeps its forces close to those of the float model."""
    energies, forces = evaluate(models.float_model(variant), structures)
    actual = evaluate(models.quantized("gaq", variant), structures)
    assert 0 < np.abs(actual[1] - forces).mean() < 0.05 * np.abs(forces).mean()
    assert np.abs(actual[0] - energies).max() < 0.05 * np.ptp(energies)


def test_four_bits_keep_the_forces_roughly(case: Case, models: Any, evaluate: Evaluate, structures: list[Any]) -> None:
    _, forces = evaluate(models.float_model(), structures)
    actual = evaluate(models.quantized("w4"), structures)
    assert 0 < np.abs(actual[1] - forces).mean() < 0.5 * np.abs(forces).mean()


@pytest.mark.parametrize(("preset", "least", "most"), [("gaq", 0.99, 1.01), ("w4", 0.95, 1.3)])
def test_a_trained_model_keeps_its_accuracy(
    case: Case, trained_quantized: Callable[..., Any], evaluate: Evaluate, preset: str, least: float, most: float
) -> None:
    """Ratio of the force error to that of the float model, after calibration without labels."""
    frames = trained.ethanol()
    labels = np.concatenate([atoms.arrays["REF_forces"] for atoms in frames])
    error = 1e3 * np.abs(evaluate(trained_quantized(preset), frames)[1] - labels).mean()
    assert least < error / case.force_mae < most


# Convert


@pytest.mark.parametrize("preset", PRESETS)
def test_convert_writes_the_codes(
    case: Case, models: Any, evaluate: Evaluate, structures: list[Any], preset: str
) -> None:
    """Weights become codes times scales, and the model gives the same results as in training."""
    model = models.quantized(preset, status="training")
    before = case.codes(model)
    energies, forces = evaluate(model, structures)
    assert gaq.convert(model) is model
    parameters = dict(model.named_parameters())
    assert set(before) == {name for name, p in parameters.items() if p.numel() > 0 and p.requires_grad}
    after = case.codes(model)
    for name, tensor in before.items():
        assert int(tensor.codes.abs().max()) <= largest_code(tensor.bits)
        assert torch.equal(parameters[name].detach(), tensor.dequantize())
        assert torch.equal(after[name].codes, tensor.codes)
        assert torch.equal(after[name].scale, tensor.scale)
    converted = evaluate(model, structures)
    # Equal up to the order of float32 sums, which may round a feature near a threshold to the other side.
    np.testing.assert_allclose(converted[0], energies, rtol=2e-5 if preset in EIGHT_BITS else 2e-6)
    np.testing.assert_allclose(converted[1], forces, atol=2e-5 if preset in WEIGHTS_ONLY else 2e-2)
    assert gaq.convert(model) is model, "converting twice changes nothing"
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("preset", ["gaq", "w4"])
def test_a_model_in_float64_stays_so(case: Case, models: Any, preset: str) -> None:
    model = models.quantized(preset, dtype=DOUBLE)
    assert {p.dtype for p in model.parameters()} == {DOUBLE}
    parameters = dict(model.named_parameters())
    for name, tensor in case.codes(model).items():
        assert torch.equal(parameters[name].detach(), tensor.dequantize().double())


@pytest.mark.parametrize("status", ["training", "converted"])
@pytest.mark.parametrize("preset", ["gaq", "w4"])
def test_a_deep_copy_is_equal_and_independent(
    case: Case, models: Any, evaluate: Evaluate, structures: list[Any], preset: str, status: str
) -> None:
    model = models.quantized(preset, status=status)
    adapter, twin = adapter_for(model), copy.deepcopy(model)
    assert adapter.status(twin) == status
    assert adapter.config(twin) == adapter.config(model)
    assert adapter.notes(twin) is not adapter.notes(model)
    # Compared by name, because torch.fx makes a new class for every graph.
    assert [type(m).__qualname__ for m in twin.modules()] == [type(m).__qualname__ for m in model.modules()]
    energies, forces = evaluate(model, structures)
    for actual, expected in zip(evaluate(twin, structures), (energies, forces), strict=True):
        np.testing.assert_array_equal(actual, expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    for quantizer in adapter.feature_quantizers(twin).values():
        quantizer.load_ranges(quantizer.ranges() * 3.0)
    np.testing.assert_array_equal(evaluate(model, structures)[0], energies)


# Save and load


def assert_same_quantization(case: Case, first: Any, second: Any) -> None:
    """Weights, codes, scales and ranges of two models agree to the last bit."""
    others = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert others[name].dtype == parameter.dtype
        assert torch.equal(others[name], parameter), name
    codes, other_codes = case.codes(first), case.codes(second)
    assert codes.keys() == other_codes.keys()
    for name in codes:
        assert torch.equal(codes[name].codes, other_codes[name].codes), name
        assert torch.equal(codes[name].scale, other_codes[name].scale), name
        assert codes[name].bits == other_codes[name].bits
    quantizers = adapter_for(second).feature_quantizers(second)
    assert quantizers.keys() == adapter_for(first).feature_quantizers(first).keys()
    for name, quantizer in adapter_for(first).feature_quantizers(first).items():
        assert torch.equal(quantizer.ranges(), quantizers[name].ranges()), name
        assert torch.equal(quantizer.limit, quantizers[name].limit), name


@pytest.mark.parametrize("preset", ["gaq", *(pytest.param(p, marks=pytest.mark.slow) for p in PRESETS[1:])])
def test_a_file_holds_the_model(
    case: Case,
    trained_quantized: Callable[..., Any],
    trained_file: Path,
    evaluate: Evaluate,
    tmp_path: Path,
    preset: str,
    suffix: str,
) -> None:
    """A loaded model equals the saved one, the framework's calculator runs it, and the file is small."""
    model, form = trained_quantized(preset), case.forms[suffix]
    adapter, path = adapter_for(model), tmp_path / f"model{suffix}"
    adapter.notes(model)["gates"] = {"lee": {"value": 0.1, "passed": True}}
    gaq.save(model, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert adapter.status(model) == "converted", "saving leaves the model as it is"
    if form.packed:
        assert trained_file.stat().st_size / path.stat().st_size >= (7.0 if preset.startswith("w4") else 4.0)
    loaded = gaq.load(path)
    assert adapter.status(loaded) in ("converted", "frozen")
    assert adapter.config(loaded).to_dict() == adapter.config(model).to_dict()  # type: ignore[union-attr]  # not None
    assert adapter.notes(loaded)["gates"] == adapter.notes(model)["gates"]
    if adapter.status(loaded) == "converted":
        assert_same_quantization(case, model, loaded)
    frames = few_frames()
    energies, forces = evaluate(model, frames)
    for actual, expected in zip(evaluate(loaded, frames), (energies, forces), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=form.tolerance)
    calculator = adapter.calculator(path)
    atoms = frames[0].copy()
    atoms.calc = calculator
    assert atoms.get_potential_energy() == pytest.approx(energies[0], rel=2e-6, abs=form.tolerance)
    np.testing.assert_allclose(atoms.get_forces(), forces[: len(atoms)], atol=max(form.tolerance, 1e-4))


def test_a_file_of_before_keeps_its_scalars(
    case: Case, trained_file: Path, evaluate: Evaluate, tmp_path: Path, suffix: str
) -> None:
    """In version 1 of the configuration the default preset rounded scalars to 16 bits, under `overrides` too."""
    model = gaq.load(trained_file)
    names = list(adapter_for(model).feature_quantizers(gaq.prepare(gaq.load(trained_file), "gaq")))
    model = gaq.prepare(model, without_distillation("gaq", version=1, overrides={names[-1]: "w8a16"}))
    model = gaq.convert(gaq.calibrate(model, few_frames(), progress=False))
    gaq.save(model, tmp_path / f"before{suffix}")
    loaded = gaq.load(tmp_path / f"before{suffix}")
    config = adapter_for(loaded).config(loaded)
    assert config is not None
    assert (config.version, config.scalars.bits) == (1, 16)
    for name, quantizer in adapter_for(loaded).feature_quantizers(loaded).items():
        assert (quantizer.scalar_bits, quantizer.scalar_top) == (16, 32639.0), name
        assert f"l=0: {gaq.PRESETS['gaq'].scalars.bits} bits" not in quantizer.describe()
    assert "l=0: 16 bits" in str(gaq.summary(loaded))
    np.testing.assert_allclose(evaluate(loaded, few_frames())[0], evaluate(model, few_frames())[0], rtol=2e-6)


def test_a_file_without_quantization_is_not_written(
    case: Case, trained_file: Path, tmp_path: Path, suffix: str
) -> None:
    with pytest.raises(ValueError, match="not quantized"):
        gaq.save(gaq.load(trained_file), tmp_path / f"float{suffix}")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_where_a_file_cannot_be_written(
    trained_quantized: Callable[..., Any], tmp_path: Path, suffix: str
) -> None:
    with pytest.raises(OSError, match="nowhere"):
        gaq.save(trained_quantized("gaq"), tmp_path / "nowhere" / f"model{suffix}")
    assert not list(tmp_path.iterdir())


# Damaged files


def refuse(path: Path, word: str = "") -> None:
    """Check that loading fails with one line that names the file and says what is wrong with it."""
    with pytest.raises(ValueError) as caught:
        gaq.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert word in message
    assert "\n" not in message


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99, 0.99999])
def test_a_truncated_file_is_refused(
    saved: Callable[[str, str], Path], tmp_path: Path, suffix: str, share: float
) -> None:
    data = saved("w8", suffix).read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: int(share * len(data))])
    refuse(path, "truncated")


def test_inspect_says_what_is_not_fused(
    case: Case,
    saved: Callable[[str, str], Path],
    suffix: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = saved("w8", suffix)
    adapter = adapter_for_file(path)
    with adapter.process_state():
        assert adapter.unfused(adapter.load(path)) == {}
        assert adapter.undeployable(adapter.load(path)) is None
    monkeypatch.setattr(type(adapter), "unfused", lambda self, model: {"interactions.0": "a reason"})
    monkeypatch.setattr(type(adapter), "undeployable", lambda self, model: "another reason")
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "not on the fast path: interactions.0: a reason" in printed
    assert "`gaq deploy` refuses this model: another reason" in printed


def test_a_flipped_bit_is_noticed(saved: Callable[[str, str], Path], tmp_path: Path, checked_suffix: str) -> None:
    data = saved("w8", checked_suffix).read_bytes()
    path = tmp_path / f"flipped{checked_suffix}"
    for position in (len(data) // 3, len(data) // 2, 2 * len(data) // 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        refuse(path, "damaged")


def test_other_files_are_refused(case: Case, tmp_path: Path, suffix: str) -> None:
    refuse(tmp_path / f"missing{suffix}", "no such file")
    text = tmp_path / f"text{suffix}"
    text.write_text("not a model at all\n" * 50)
    refuse(text)
    other = tmp_path / f"other{suffix}"
    torch.save({"weights": 1}, other)
    refuse(other)


# Gates


def write_bare(path: Path, count: int) -> Path:
    """Frames of the trained model's molecule without labels, as calibration data."""
    frames = trained.ethanol("::4")[:count]
    for atoms in frames:
        atoms.calc = None
        del atoms.info["REF_energy"], atoms.arrays["REF_forces"]
    ase.io.write(path, frames, format="extxyz")
    return path


RUINED = "weights: {bits: 2, rounding: nearest, compression: null, least_compression: null, sensitive_bits: 2}"


@pytest.mark.parametrize("preset", ["gaq", pytest.param("w4", marks=pytest.mark.slow)])
def test_a_ruined_model_fails_without_labels(
    case: Case, trained_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    """The float model's forces are labels enough: exit code 1, and no file."""
    data, output = write_bare(tmp_path / "data.xyz", 5), tmp_path / f"out{next(iter(case.forms))}"
    config = f"{{preset: {preset}, {RUINED}, distillation: {{steps: 0}}}}"
    code = main(["quantize", str(trained_file), "-o", str(output), "--config", config, "--calibration", str(data)])
    printed = capsys.readouterr()
    assert code == 1, printed.out
    assert "force_difference" in printed.err.splitlines()[-1]
    assert not output.exists()
    (row,) = (line for line in printed.out.splitlines() if line.startswith("force_difference"))
    assert "FAIL" in row
    assert "not measured: force_mae_ratio: needs a reference model and labelled structures" in printed.out


@pytest.mark.parametrize("count", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_sound_model_passes_without_labels(
    case: Case, trained_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """On structures that calibration did not see: some that are held out, or displaced copies of a single one."""
    data, output = write_bare(tmp_path / "data.xyz", count), tmp_path / f"out{next(iter(case.forms))}"
    config = "{preset: gaq, distillation: {steps: 0}}"
    code = main(["quantize", str(trained_file), "-o", str(output), "--config", config, "--calibration", str(data)])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    gate = adapter_for_file(output).notes(gaq.load(output))["gates"]["force_difference"]
    assert gate["passed"]
    assert 0 < gate["value"] < gate["bound"] / 2
    assert "gates measured, none failed" in printed.out


@pytest.mark.slow
def test_structures_at_rest(
    case: Case, trained_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A relaxed molecule, or a perfect crystal: forces are zero, and errors relative to them say nothing."""
    (relaxed,) = trained.ethanol("0:1")
    relaxed.calc = adapter_for_file(trained_file).calculator(trained_file)
    assert BFGS(relaxed, logfile=None).run(fmax=8e-3, steps=300)
    data, output = tmp_path / "data.xyz", tmp_path / f"out{next(iter(case.forms))}"
    ase.io.write(data, Atoms(relaxed.symbols, relaxed.positions), format="extxyz")
    config = "{preset: gaq, distillation: {steps: 0}}"
    code = main(["quantize", str(trained_file), "-o", str(output), "--config", config, "--calibration", str(data)])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    assert "the calibration structures are at rest" in caplog.text + printed.err
    code = main(["report", str(output), "--data", str(data), "--nve-ps", "0", "-o", str(tmp_path / "report")])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    assert "atoms displaced at random by 0.05 Å in 1 of 1 structures checked" in printed.out


def test_frames_and_labels_that_are_there_are_used(
    case: Case, trained_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One frame of an isolated atom, one without labels, one with a NaN, one with an energy alone."""
    frames = trained.ethanol("::4")[:7]
    single, broken, bare, energy = frames[0][:1], *(frame.copy() for frame in frames[:3])
    broken.arrays["REF_forces"][2, 1] = np.nan
    del bare.info["REF_energy"], bare.arrays["REF_forces"], energy.arrays["REF_forces"]
    data, output = tmp_path / "data.xyz", tmp_path / f"out{next(iter(case.forms))}"
    ase.io.write(data, [single, broken, bare, energy, *frames[3:]], format="extxyz")
    config = "{preset: gaq, distillation: {steps: 0}}"
    arguments = ["quantize", str(trained_file), "-o", str(output), "--config", config, "--calibration", str(data)]
    code = main(arguments)
    printed = capsys.readouterr().out
    assert code == 0, printed
    for line in (
        "left out: energies 'REF_energy' of 1 of 8 structures, missing: frame 2",
        "left out: forces 'REF_forces' of 2 of 8 structures, missing: frames 2, 3",
        "left out: forces 'REF_forces' of 1 of 8 structures, not finite: frame 1",
        "left out: 1 of 8 structures, a single atom has no forces: frame 0",
    ):
        assert line in printed


# Equivariance


def rotated(structures: list[Any]) -> tuple[list[Any], np.ndarray]:
    """Rotate and shift the structures; return them and the rotation."""
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    others = [atoms.copy() for atoms in structures]
    for atoms in others:
        atoms.positions = atoms.positions @ rotation.T + 1.0
    return others, rotation


@pytest.mark.parametrize("status", ["training", "converted"])
@pytest.mark.parametrize("preset", WEIGHTS_ONLY)
def test_rounded_weights_keep_the_symmetry(
    models: Any, evaluate: Evaluate, structures: list[Any], preset: str, status: str
) -> None:
    model = models.quantized(preset, dtype=DOUBLE, status=status)
    energies, forces = evaluate(model, structures)
    others, rotation = rotated(structures)
    actual = evaluate(model, others)
    assert np.abs(actual[0] - energies).max() < 1e-11
    assert np.abs(actual[1] - forces @ rotation.T).max() < 1e-11


def trained_in_float64(case: Case, preset: str) -> Any:
    return gaq.quantize(case.trained(DOUBLE), few_frames(), without_distillation(preset), progress=False)


@pytest.mark.parametrize(("preset", "bound"), [("gaq", 1e-6), ("w8a8", 1e-6), ("naive_w8a8", None)])
def test_rotation_error_is_rounding(case: Case, preset: str, bound: float | None) -> None:
    """In float64 every preset except the naive one is equivariant to float64 rounding (meV/Å)."""
    model = trained_in_float64(case, preset)
    potential = adapter_for(model).potential(model)
    error = local_equivariance_error(potential, few_frames()[:2], rotations=2).mean_mev_per_angstrom
    if bound is None:
        assert error > 1.0
    else:
        assert error < bound


def test_rotation_error_in_float32(trained_quantized: Callable[..., Any]) -> None:
    """The rotation error meets the gate of the default preset, 0.15 meV/Å."""
    model = trained_quantized("gaq")
    potential = adapter_for(model).potential(model)
    error = local_equivariance_error(potential, few_frames()[:2], rotations=2).mean_mev_per_angstrom
    assert error < 0.15


# Forces are the gradient of the energy


@pytest.mark.parametrize("status", ["training", "converted"])
@pytest.mark.parametrize("preset", WEIGHTS_ONLY)
def test_rounded_weights_keep_forces_exact(models: Any, evaluate: Evaluate, preset: str, status: str) -> None:
    check_forces_are_the_gradient(evaluate, models.quantized(preset, dtype=DOUBLE, status=status), tolerance=1e-8)


@pytest.mark.parametrize("preset", ["gaq", "w8"])
def test_central_differences_of_a_trained_model(case: Case, preset: str) -> None:
    """Forces and energy differences meet the gate: at steps of 0.01 Å they agree within 1 %."""
    model = trained_in_float64(case, preset)
    errors = central_difference_error(adapter_for(model).potential(model), few_frames()[:3], seed=0)
    assert errors[0.01].relative_error <= 1e-2
    # Truncation alone falls by a factor of 100 between the steps; 16-bit activations add a little.
    assert errors[0.01].relative_error < errors[0.1].relative_error / 10
