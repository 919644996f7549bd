"""The key ``attention`` in MACE: density and attention blocks rounded, and an interaction block of our own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("mace", reason="needs MACE: pip install '.[mace]'")

import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read, write
from mace_models import VARIANTS, build_model, molecules, without_distillation
from mace_runs import BASE, BRIEF, labelled
from physics import (
    check_forces_are_the_gradient,
    check_second_derivatives,
    check_smooth_at_the_cutoff,
    check_symmetries,
)
from scipy.spatial.transform import Rotation

import gaq
from gaq.config.parse import ConfigError, parse_config
from gaq.model.state import feature_quantizers, unquantized
from gaq.quantizers.attention import BoundedGate, GridQuantizer, RobustAttention
from gaq_mace import files, packed, safetensors_file
from gaq_mace.attention import GAQAttentionResidualInteractionBlock
from gaq_mace.evaluate import make_batches
from gaq_mace.layers import QuantizedDensity, QuantizedDensityResidual
from gaq_mace.root import is_quantized
from gaq_mace.sites import bystanders, find_sites

OURS = "GAQAttentionResidualInteractionBlock"
BLOCKS = {
    "density": {
        "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
        "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
    },
    "attention_residual": {"interaction_cls": "RealAgnosticAttResidualInteractionBlock"},
    "ours": {"interaction_cls": OURS},
    "ours_first": {"interaction_cls": OURS, "interaction_cls_first": OURS},
    "ours_cutoff": {"interaction_cls": OURS, "apply_cutoff": False},
}
OWN = ("ours", "ours_first", "ours_cutoff")
DOUBLE = torch.float64
# Weights that calibration does not move: the model without quantization is the one it was.
NEAREST = {"weights": {"rounding": "nearest"}}


@cache
def _made(block: str, dtype: Any, seed: int) -> Any:
    VARIANTS[block] = BLOCKS[block]
    model = build_model(block, dtype, seed)
    for module in model.modules():
        if isinstance(module, RobustAttention):
            module.set_temperature(4.0)
    return model


def made(block: str = "ours", dtype: Any = DOUBLE, seed: int = 0) -> Any:
    """A fresh copy of a model with random weights, attention sharp enough to matter."""
    return copy.deepcopy(_made(block, dtype, seed))


@cache
def _calibrated(block: str, spec: str, dtype: Any, seed: int) -> Any:
    model = gaq.prepare(made(block, dtype, seed), json.loads(spec))
    return gaq.calibrate(model, molecules(), progress=False)


def calibrated(block: str, spec: Any, dtype: Any = torch.float32, seed: int = 0) -> Any:
    """A fresh copy of it, calibrated."""
    return copy.deepcopy(_calibrated(block, json.dumps(spec), dtype, seed))


def with_attention(preset: str = "gaq", **attention: Any) -> dict[str, Any]:
    return without_distillation(preset, attention=attention, **NEAREST)


# -- the interaction block --


@pytest.mark.parametrize("block", OWN)
def test_rotation_reflection_translation_permutation(evaluate: Callable[..., Any], block: str) -> None:
    check_symmetries(evaluate, made(block), reflect=True)


@pytest.mark.parametrize("block", OWN)
def test_forces_are_the_gradient(evaluate: Callable[..., Any], block: str) -> None:
    check_forces_are_the_gradient(evaluate, made(block))


@pytest.mark.parametrize("block", OWN)
def test_extensive_and_right_for_lone_atoms(evaluate: Callable[..., Any], block: str) -> None:
    model = made(block)
    first, second = molecules()[0], molecules()[3]
    second.positions += [40.0, 0.0, 0.0]
    lone = Atoms("O", positions=[[0.0, 60.0, 0.0]])
    alone = [evaluate(model, [x]) for x in (first, second, lone)]
    energy, forces = evaluate(model, [first + second + lone])
    np.testing.assert_allclose(energy[0], sum(e[0] for e, _ in alone), atol=1e-9)
    np.testing.assert_allclose(forces, np.concatenate([f for _, f in alone]), atol=1e-9)
    assert not np.abs(alone[2][1]).any()


def pair(r: float, others: bool) -> Atoms:
    """A carbon that leaves an oxygen, which has hydrogens or nothing else around it."""
    atoms = Atoms("OC", positions=[[0.0, 0.0, 0.0], [r, 0.0, 0.0]])
    return atoms + Atoms("H2", positions=[[-0.6, 0.75, 0.1], [-0.4, -0.8, 0.3]]) if others else atoms


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("block", OWN)
def test_smooth_where_a_neighbour_leaves(evaluate: Callable[..., Any], block: str, others: bool) -> None:
    """The only neighbour, and one of several."""
    check_smooth_at_the_cutoff(evaluate, made(block), lambda r: pair(r, others), (1e-2, 1e-3))


def test_second_derivatives() -> None:
    """Training on forces: parameters have the gradient of a force loss that finite differences have."""
    model = made("ours")
    (batch,) = make_batches(model, molecules()[:1], 1)

    def loss() -> torch.Tensor:
        forces = model(copy.deepcopy(batch), training=True, compute_force=True)["forces"]
        return (forces**2).sum()

    names = ("attention.theta", "envelope.log_weight", "linear_query.weight", "radial_key.layer0.weight")
    parameters = [dict(model.interactions[1].named_parameters())[name] for name in names]
    check_second_derivatives(loss, parameters)


def test_attention_does_something(evaluate: Callable[..., Any]) -> None:
    model = made("ours")
    before = evaluate(model, molecules())
    model.interactions[1].attention.set_temperature(0.5)
    assert np.abs(evaluate(model, molecules())[1] - before[1]).max() > 1e-5


def test_every_weight_has_a_place() -> None:
    model = made("ours_first", torch.float32)
    covered = {f"{site.name}.{w.path}" for site in find_sites(model) for w in site.weights}
    left = {name for name, p in model.named_parameters() if p.numel()} - covered
    assert {name.split(".", 2)[2] for name in left} == {"attention.theta", "envelope.log_weight"}
    reasons = {b.name: b.reason for b in bystanders(model)}
    assert reasons["interactions.0.envelope"] == "a cutoff function, kept smooth"
    kinds = {site.name: site.kind for site in find_sites(model)}
    assert kinds["interactions.1.attention"] == "attention"


# -- rounding --


@pytest.mark.parametrize("block", BLOCKS)
def test_without_the_key_nothing_is_attended_to(evaluate: Callable[..., Any], block: str) -> None:
    """No quantizer of the key is there, and what is written does not speak of it."""
    model = calibrated(block, without_distillation("gaq", **NEAREST))
    assert not any(isinstance(m, BoundedGate | GridQuantizer) for m in model.modules())
    assert not any(isinstance(m, QuantizedDensity | QuantizedDensityResidual) for m in model.modules())
    assert "attention" not in packed.take_apart(model).meta["config"]


EXPECTED = {
    "density": {"interactions.0": GridQuantizer, "interactions.1": GridQuantizer},
    "attention_residual": {f"interactions.1.conv_tp_weights.layer{i}": BoundedGate for i in range(4)},
    "ours": {"interactions.1.attention": GridQuantizer},
    "ours_first": {f"interactions.{i}.attention": GridQuantizer for i in range(2)},
    "ours_cutoff": {"interactions.1.attention": GridQuantizer},
}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_key_rounds_and_costs_no_more_than_its_bits(evaluate: Callable[..., Any], block: str) -> None:
    model = made(block, torch.float32)
    exact = evaluate(model, molecules())
    errors = {}
    for bits in (16, 8):
        spec = with_attention("w8", bits=bits)
        calibrated = gaq.calibrate(gaq.prepare(copy.deepcopy(model), spec), molecules(), progress=False)
        quantizer_types = {
            n: type(q) for n, q in feature_quantizers(calibrated).items() if isinstance(q, BoundedGate | GridQuantizer)
        }
        assert quantizer_types == EXPECTED[block]
        with unquantized(calibrated):
            np.testing.assert_allclose(evaluate(calibrated, molecules())[1], exact[1], atol=2e-6)
        rounded = evaluate(calibrated, molecules())
        for quantizer in feature_quantizers(calibrated).values():
            quantizer.scalars_enabled = False
        errors[bits] = np.abs(rounded[1] - evaluate(calibrated, molecules())[1]).max()
    scale = np.abs(exact[1]).max()
    assert 0 < errors[16] < 1e-3 * scale
    assert errors[16] < 0.1 * errors[8]


@pytest.mark.parametrize("block", ["density", "attention_residual"])
def test_with_rounding_off_the_key_is_an_exact_no_op(evaluate: Callable[..., Any], block: str) -> None:
    """Weights only: the same numbers, bit for bit, with the key and without it."""
    plain = calibrated(block, without_distillation("w8", **NEAREST))
    keyed = calibrated(block, with_attention("w8"))
    assert keyed.__dict__["gaq_state"].config.attention is not None
    for first, second in zip(evaluate(plain, molecules()), evaluate(keyed, molecules()), strict=True):
        assert np.array_equal(first, second)


def test_on_a_trained_model_without_attention_the_key_is_an_error(trained_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization\.attention: has no effect on this model: it has no gates"):
        gaq.prepare(gaq.load(trained_file), with_attention("gaq"))


@pytest.mark.parametrize("block", ["density", "ours_first"])
def test_rounded_weights_of_neighbours_vanish_at_the_cutoff(evaluate: Callable[..., Any], block: str) -> None:
    model = calibrated(block, with_attention("w8", bits=8), DOUBLE)
    energies, _ = evaluate(model, [pair(4.0 - 1e-3, True), pair(4.0 + 1e-3, True)])
    assert abs(energies[0] - energies[1]) < 1e-8


@pytest.mark.parametrize("preset", ["gaq", "w4a8"])
def test_rotations_with_everything_rounded(evaluate: Callable[..., Any], preset: str) -> None:
    model = gaq.convert(calibrated("ours", with_attention(preset), DOUBLE))
    atoms = molecules()[0]
    _, forces = evaluate(model, [atoms])
    turn = Rotation.random(random_state=2).as_matrix()
    moved = atoms.copy()
    moved.positions = moved.positions @ turn.T
    np.testing.assert_allclose(evaluate(model, [moved])[1], forces @ turn.T, atol=1e-8)


@pytest.mark.parametrize("block", ["density", "attention_residual", "ours"])
@pytest.mark.parametrize("suffix", [".model", ".safetensors"])
def test_files(tmp_path: Path, evaluate: Callable[..., Any], block: str, suffix: str) -> None:
    spec = with_attention("gaq", temperature=3.0) if block == "ours" else with_attention("gaq")
    model = gaq.convert(calibrated(block, spec))
    path = tmp_path / f"packed{suffix}"
    gaq.save(model, path)
    again = gaq.load(path)
    assert is_quantized(again)
    assert {n: type(q) for n, q in feature_quantizers(again).items()} == {
        n: type(q) for n, q in feature_quantizers(model).items()
    }
    for first, second in zip(evaluate(model, molecules()), evaluate(again, molecules()), strict=True):
        np.testing.assert_allclose(second, first, atol=1e-6)
    ours = any(isinstance(module, GAQAttentionResidualInteractionBlock) for module in again.modules())
    assert ours == (block == "ours")


def test_torchscript(evaluate: Callable[..., Any]) -> None:
    from e3nn.util import jit

    # MACE's own attention block cannot be scripted: the type it promises is not the one it returns.
    for block in ("ours", "density"):
        model = gaq.convert(calibrated(block, with_attention("gaq")))
        (batch,) = make_batches(model, molecules(), 1000)
        expected = model(copy.deepcopy(batch), compute_force=True)["forces"]
        scripted = jit.compile(copy.deepcopy(model))
        forces = scripted(copy.deepcopy(batch), compute_force=True)["forces"]
        torch.testing.assert_close(forces, expected, atol=1e-4, rtol=1e-3)


def test_messages_are_for_nequip() -> None:
    with pytest.raises(ConfigError, match=r"attention\.messages: is for NequIP"):
        gaq.prepare(made("ours", torch.float32), with_attention("gaq", messages=True))


def test_settings_reach_the_block() -> None:
    model = gaq.prepare(made("ours", torch.float32), with_attention("gaq", normalize=False, temperature=2.0))
    attention = model.interactions[1].attention
    assert not attention.normalize
    assert not attention.theta.requires_grad
    torch.testing.assert_close(attention.temperature().detach(), torch.full((4,), 2.0))
    copied = copy.deepcopy(model).interactions[1].attention
    assert not copied.normalize


# -- training --


TRAINING: dict[str, Any] = {**BASE, "interaction": OURS, "max_num_epochs": 1}


def run_training(folder: Path, **changes: Any) -> Any:
    import os
    import subprocess
    import sys

    write(folder / "train.xyz", labelled(("CH3OH", "H2O", "CH4"), 12, seed=0))
    write(folder / "test.xyz", labelled(("CH3OH", "H2O", "CH4"), 3, seed=1))
    (folder / "run.yml").write_text(yaml.safe_dump({**TRAINING, **changes}))
    return subprocess.run(
        [str(Path(sys.executable).with_name("mace_run_train")), "--config", "run.yml"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def predictions(path: Path, frames: Sequence[Atoms]) -> np.ndarray:
    from mace.calculators import MACECalculator

    calculator = MACECalculator(model_paths=str(path), device="cpu", default_dtype="float32")
    forces = []
    for atoms in frames:
        frame = atoms.copy()
        frame.calc = calculator
        forces.append(frame.get_forces())
    return np.concatenate(forces)


@pytest.mark.parametrize(
    "quantization",
    [
        pytest.param(None, marks=pytest.mark.slow),
        {"preset": "gaq", "attention": {}, "vectors": {"start_epoch": 0}, **BRIEF},
    ],
)
def test_stock_training_by_name(tmp_path: Path, evaluate: Callable[..., Any], quantization: Any) -> None:
    changes = {} if quantization is None else {"quantization": quantization}
    done = run_training(tmp_path, **changes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    log = done.stdout + done.stderr
    assert f"{OURS} belongs to gaq: the models of this run can be loaded only where gaq is installed" in log
    path = tmp_path / "tiny.model"
    model = files.load(path)
    assert isinstance(model.interactions[1], GAQAttentionResidualInteractionBlock)
    assert not isinstance(model.interactions[0], GAQAttentionResidualInteractionBlock)
    assert is_quantized(model) == (quantization is not None)
    assert (tmp_path / "tiny_compiled.model").is_file()
    # The weights of the attention were trained.
    theta = model.interactions[1].attention.theta.detach()
    start = RobustAttention(4).theta.detach()
    assert bool((theta != start).all())
    frames: Any = read(tmp_path / "test.xyz", ":")
    stock = predictions(path, frames)
    np.testing.assert_allclose(evaluate(model, frames)[1], stock, atol=2e-5)
    if quantization is not None:
        assert isinstance(model.interactions[1].attention.input_quantizer, GridQuantizer)
        assert "attention" in model.__dict__["gaq_state"].config.to_dict()


@pytest.mark.slow
def test_stock_training_with_rounded_density(tmp_path: Path, evaluate: Callable[..., Any]) -> None:
    """The classes of the blocks change, and what MACE writes of them does not: its own names, a scripted model."""
    done = run_training(
        tmp_path,
        interaction="RealAgnosticDensityResidualInteractionBlock",
        interaction_first="RealAgnosticDensityInteractionBlock",
        quantization={"preset": "gaq", "attention": {}, "vectors": {"start_epoch": 0}, **BRIEF},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "tiny_compiled.model").is_file()
    model = files.load(tmp_path / "tiny.model")
    assert [type(b) for b in model.interactions] == [QuantizedDensity, QuantizedDensityResidual]
    frames: Any = read(tmp_path / "test.xyz", ":")
    stock = predictions(tmp_path / "tiny.model", frames)
    np.testing.assert_allclose(evaluate(model, frames)[1], stock, atol=2e-5)
    config = safetensors_file.config_to_json(packed.model_config(model))
    assert config["interaction_cls"] == "RealAgnosticDensityResidualInteractionBlock"
    assert config["interaction_cls_first"] == "RealAgnosticDensityInteractionBlock"


def test_a_model_of_ours_says_what_it_needs(tmp_path: Path, python: Callable[..., Any]) -> None:
    """Where this package is missing the file names it."""
    path = tmp_path / "ours.model"
    gaq.save(gaq.convert(calibrated("ours", with_attention("gaq"))), path)
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gaq", "gaq_mace"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from mace.calculators import MACECalculator
MACECalculator(model_paths=sys.argv[1], device="cpu", default_dtype="float32")
"""
    done = python(code, str(path), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode != 0
    assert "No module named 'gaq_mace'" in done.stderr


def test_stock_training_rejects_what_does_not_fit(tmp_path: Path) -> None:
    from mace.tools import build_default_arg_parser

    from gaq_mace.hook.patches import ensure_installed

    ensure_installed()
    parse = build_default_arg_parser().parse_args
    with pytest.raises(SystemExit):
        parse(["--name", "x", "--interaction", "GAQAttentionBlock"])
    with pytest.raises(SystemExit):
        parse(["--name", "x", "--interaction", OURS, "--enable_cueq", "True"])
    with pytest.raises(SystemExit):
        parse(["--name", "x", "--quantization", "{'attention': {'bit': 16}}"])
    assert parse(["--name", "x", "--interaction", OURS]).interaction == OURS
    assert parse_config({"attention": {}}).attention is not None


def test_methane_has_one_neighbour_shell() -> None:
    """Weights of equivalent neighbours are equal, and the four of methane's carbon sum to less than one."""
    model = made("ours")
    atoms = molecule("CH4")
    (batch,) = make_batches(model, [atoms], 1)
    outputs: list[torch.Tensor] = []
    handle = model.interactions[1].attention.register_forward_hook(
        lambda *arguments: outputs.append(arguments[2].detach())
    )
    model(batch, compute_force=False)
    handle.remove()
    weights = outputs[0][batch["edge_index"][1] == 0]
    assert weights.shape == (4, 4)
    assert float((weights - weights[0]).abs().max()) < 1e-12
    assert bool((weights.sum(0) < 1).all())
    assert bool((weights > 0.01).all())
