"""The key ``attention`` in NequIP and Allegro: bounded gates and environment weights, attention over messages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import torch
from ase import Atoms
from ase.io import read
from nequip_models import build_model, molecules, with_key, without_distillation
from physics import (
    check_forces_are_the_gradient,
    check_second_derivatives,
    check_smooth_at_the_cutoff,
    check_symmetries,
)
from scipy.spatial.transform import Rotation

import gaq
from gaq.config.parse import ConfigError, parse_config
from gaq.model.state import feature_quantizers, state_of, unquantized
from gaq.quantizers.attention import BoundedGate, GridQuantizer, RobustAttention
from gaq_nequip.attention import AttentionInteractionBlock
from gaq_nequip.evaluate import make_batches

NOTHING = {"weights": None, "scalars": None, "vectors": None}
MESSAGES = {**NOTHING, "attention": {"messages": True, "bits": None, "gate_limit": 1e6}}
"""Nothing rounded, and gates bounded far away: the architecture alone."""


def with_attention(preset: str = "gaq", **attention: Any) -> dict[str, Any]:
    return without_distillation(preset, attention=attention, weights={"rounding": "nearest"})


def made(variant: str = "plain", dtype: str = "float64", spec: Any = None) -> Any:
    """A model with attention over messages, sharp enough to matter."""
    model = gaq.prepare(build_model(variant, dtype), MESSAGES if spec is None else spec)
    for module in model.modules():
        if isinstance(module, RobustAttention):
            module.set_temperature(4.0)
    return model.eval()


@pytest.mark.parametrize("variant", ["plain", "parity"])
def test_rotation_reflection_translation_permutation(evaluate: Callable[..., Any], variant: str) -> None:
    # Without parity NequIP's features do not tell a reflection: rotations only.
    check_symmetries(evaluate, made(variant), reflect=variant == "parity")


def test_forces_are_the_gradient(evaluate: Callable[..., Any]) -> None:
    check_forces_are_the_gradient(evaluate, made("parity"))


def test_extensive_and_right_for_lone_atoms(evaluate: Callable[..., Any]) -> None:
    model = made()
    first, second = molecules()[0], molecules()[3]
    second.positions += [40.0, 0.0, 0.0]
    lone = Atoms("O", positions=[[0.0, 60.0, 0.0]])
    alone = [evaluate(model, [x]) for x in (first, second)]
    together, forces = evaluate(model, [first + second])
    np.testing.assert_allclose(together[0], sum(e[0] for e, _ in alone), atol=1e-9)
    np.testing.assert_allclose(forces, np.concatenate([f for _, f in alone]), atol=1e-9)
    with_lone, forces = evaluate(model, [first + second + lone])
    twice = lone + lone
    twice.positions[1] += [0.0, 30.0, 0.0]
    both, _ = evaluate(model, [first + second + twice])
    np.testing.assert_allclose(both[0] - with_lone[0], with_lone[0] - together[0], atol=1e-9)
    assert not np.abs(forces[-1]).any()


def pair(r: float, others: bool) -> Atoms:
    """A carbon that leaves an oxygen, which has hydrogens around it or nothing within reach."""
    atoms = Atoms("OC", positions=[[0.0, 0.0, 0.0], [r, 0.0, 0.0]])
    # Two far atoms, which are neighbours of each other: NequIP takes no structure without an edge.
    atoms += Atoms("H2", positions=[[50.0, 0.0, 0.0], [50.0, 1.0, 0.0]])
    return atoms + Atoms("H2", positions=[[-0.6, 0.75, 0.1], [-0.4, -0.8, 0.3]]) if others else atoms


@pytest.mark.parametrize("others", [False, True])
def test_smooth_where_a_neighbour_leaves(evaluate: Callable[..., Any], others: bool) -> None:
    """The only neighbour, and one of several."""
    check_smooth_at_the_cutoff(evaluate, made(), lambda r: pair(r, others), (4e-2, 4e-3))


def test_second_derivatives() -> None:
    """Training on forces: parameters have the gradient of a force loss that finite differences have."""
    model = made().train()
    (batch,) = make_batches(model, molecules()[:1], 1)

    def loss() -> torch.Tensor:
        return (model(copy.deepcopy(batch))["forces"] ** 2).sum()

    block = next(m for m in reversed(list(model.modules())) if isinstance(m, AttentionInteractionBlock))
    names = ("attention.theta", "linear_query.weight", "linear_key.weight", "edge_key.mlp.0.weight")
    parameters = [dict(block.named_parameters())[name] for name in names]
    check_second_derivatives(loss, parameters)


def test_the_model_seed_decides_on_the_added_weights() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))  # must not matter
        built = build_model("plain", "float32", seed=seed)
        state = torch.get_rng_state()
        model = gaq.prepare(built, MESSAGES)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(model.state_dict()["model.func.layer1_convnet.conv.linear_query.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# -- gates and environment weights --


SITES = {
    "plain": {"equivariant_nonlin": BoundedGate},
    "parity": {"equivariant_nonlin": BoundedGate},
    "allegro": {"_env_weighter": BoundedGate},
}


@pytest.mark.parametrize("variant", SITES)
def test_without_the_key_nothing_is_there(quantized: Callable[..., Any], variant: str) -> None:
    model = quantized("gaq", variant)
    assert not any(isinstance(m, BoundedGate | GridQuantizer | AttentionInteractionBlock) for m in model.modules())
    assert "attention" not in state_of(model).config.to_dict()
    assert "attention" not in model.metadata["gaq_config"]


@pytest.mark.parametrize("variant", SITES)
def test_the_key_bounds_and_rounds_gates(evaluate: Callable[..., Any], variant: str) -> None:
    exact_model = build_model(variant, "float64")
    exact = evaluate(exact_model.eval(), molecules())
    errors = {}
    for bits in (16, 8):
        spec = with_attention("w8", bits=bits)
        model = gaq.calibrate(gaq.prepare(copy.deepcopy(exact_model), spec), molecules(), progress=False)
        kinds = {n: type(q) for n, q in feature_quantizers(model).items()}
        assert kinds
        assert {n.rsplit(".", 1)[-1]: kind for n, kind in kinds.items()} == SITES[variant]
        with unquantized(model):
            np.testing.assert_allclose(evaluate(model, molecules())[1], exact[1], atol=1e-10)
        rounded = evaluate(model, molecules())
        for quantizer in feature_quantizers(model).values():
            quantizer.scalars_enabled = False
        errors[bits] = np.abs(rounded[1] - evaluate(model, molecules())[1]).max()
    assert 0 < errors[16] < 1e-3 * np.abs(exact[1]).max()
    assert errors[16] < 0.1 * errors[8]


@pytest.mark.parametrize("variant", SITES)
def test_with_rounding_off_the_key_is_an_exact_no_op(evaluate: Callable[..., Any], variant: str) -> None:
    """Weights only: the same numbers, bit for bit, with the key and without it, also on new structures."""
    results = []
    nearest = {"weights": {"rounding": "nearest"}}
    for spec in (without_distillation("w8", **nearest), with_attention("w8")):
        model = gaq.prepare(build_model(variant), spec)
        model = gaq.convert(gaq.calibrate(model, molecules(), progress=False))
        results.append((evaluate(model, molecules()), evaluate(model, molecules(seed=9, amplitude=0.05))))
        gates = [m for m in model.modules() if isinstance(m, BoundedGate)]
        assert bool(gates) == ("attention" in spec)
        assert all(g.calibrated and not g.round_scalars for g in gates)
    for plain, keyed in zip(results[0], results[1], strict=True):
        assert np.array_equal(plain[0], keyed[0])
        assert np.array_equal(plain[1], keyed[1])


def test_ranges_have_to_be_observed() -> None:
    model = gaq.prepare(build_model(), with_attention("w8"))
    with pytest.raises(ValueError, match=r"equivariant_nonlin was never observed"):
        gaq.convert(model)
    assert gaq.convert(gaq.prepare(build_model(), with_attention("w8", gate_limit=20.0))) is not None


@pytest.mark.parametrize("spec", [with_attention("gaq", messages=True), with_attention("w4a8", messages=True, bits=8)])
def test_rotations_with_everything_rounded(evaluate: Callable[..., Any], spec: Any) -> None:
    model = gaq.convert(gaq.calibrate(made(spec=spec), molecules(), progress=False))
    logits = [q for q in feature_quantizers(model).values() if isinstance(q, GridQuantizer)]
    assert len(logits) == 2
    atoms = molecules()[0]
    _, forces = evaluate(model, [atoms])
    turn = Rotation.random(random_state=2).as_matrix()
    moved = atoms.copy()
    moved.positions = moved.positions @ turn.T
    np.testing.assert_allclose(evaluate(model, [moved])[1], forces @ turn.T, atol=1e-8)


def test_frozen_models_are_the_converted_ones(evaluate: Callable[..., Any]) -> None:
    from gaq_nequip.freeze import freeze

    model = gaq.calibrate(made(dtype="float32", spec=with_attention("w8", messages=True)), molecules(), progress=False)
    converted = gaq.convert(model)
    expected = evaluate(converted, molecules())
    frozen = evaluate(freeze(copy.deepcopy(converted)), molecules())
    np.testing.assert_allclose(frozen[1], expected[1], atol=2e-4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no interaction blocks whose messages could be weighted"):
        gaq.prepare(build_model("allegro"), with_attention("gaq", messages=True))
    with pytest.raises(ConfigError, match=r"quantization\.attention\.message: unknown key\. Did you mean 'messages'"):
        gaq.prepare(build_model(), with_attention("gaq", message=True))
    from gaq_nequip.training import start

    with pytest.raises(ConfigError, match="makes a trained one another function"):
        start(build_model(), parse_config(with_attention("gaq", messages=True)), pretrained=True)


# -- training, packages, compilation --


@pytest.mark.slow
def test_training_restart_package(
    train: Callable[..., Any], command: Callable[..., Any], tmp_path: Path, evaluate: Callable[..., Any]
) -> None:
    """Stock `nequip-train` for an epoch, another from its checkpoint, and a package: one function throughout."""
    spec = with_key(
        {"preset": "gaq", "attention": {"messages": True}, "vectors": {"start_epoch": 0, "anneal_epochs": 0}}
    )
    run = train(tmp_path, spec, "trainer.max_epochs=1", "run=[train]")
    assert run.code == 0, run.text
    assert "Gates, attention and density weights are bounded, 16 bits" in run.text
    model = gaq.load(run.last)
    blocks = [m for m in model.modules() if isinstance(m, AttentionInteractionBlock)]
    assert len(blocks) == 2
    assert all(isinstance(b.attention.input_quantizer, GridQuantizer) for b in blocks)
    gates = [m for m in model.modules() if isinstance(m, BoundedGate)]
    assert gates
    assert all(g.calibrated for g in gates)
    start = RobustAttention(4).theta.detach()
    assert all(bool((b.attention.theta.detach() != start).any()) for b in blocks)
    frames: Any = read(tmp_path / "test.xyz", ":")
    expected = evaluate(model, frames)
    second = train(
        tmp_path, spec, "trainer.max_epochs=2", "run=[train]", f"++ckpt_path={run.last}", "hydra.run.dir=again"
    )
    assert second.code == 0, second.text
    moved = gaq.load(tmp_path / "again" / "last.ckpt")
    assert np.abs(evaluate(moved, frames)[1] - expected[1]).max() > 0
    package = tmp_path / "attention.nequip.zip"
    gaq.save(gaq.convert(model), package)
    packed = evaluate(gaq.load(package), frames)
    # Rounded features on the edge of two steps may fall on the other side.
    np.testing.assert_allclose(packed[1], expected[1], atol=2e-3 * np.abs(expected[1]).max())


@pytest.mark.slow
def test_traced_for_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """NequIP's own tracing, for any number of atoms and edges: forces and gradients of a loss on them are the same."""
    from gaq_nequip.training import calibrate_on

    # The graph as it is traced and checked; compiling it takes minutes.
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    spec = with_attention("w8", messages=True, bits=16)
    sizes = {"num_features": 4, "radial_mlp_width": 8}
    results = []
    for mode in ("eager", "compile"):
        model = gaq.prepare(build_model("plain", "float64", compile_mode=mode, **sizes), spec)
        (batch,) = make_batches(model, molecules(), 1000)
        calibrate_on(model, [batch])
        forces = model.train()(dict(batch))["forces"]
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad((forces**2).sum(), [p for _, p in named], allow_unused=True)
        results.append((forces.detach(), {n: g for (n, _), g in zip(named, gradients, strict=True) if g is not None}))
    assert len(model.gaq_graphs) == 1
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-12, rtol=0)
    assert results[0][1].keys() == results[1][1].keys()
    assert sum("attention.theta" in name for name in results[0][1]) == 2
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-11, rtol=0)
        assert bool(gradient.any()), name


@pytest.mark.slow
def test_training_compiled(train: Callable[..., Any], tmp_path: Path) -> None:
    """Under NequIP's train-time compilation, which traces the model: the errors of the eager run."""
    from test_training import validation_errors

    def changes(mode: str) -> Callable[[Any], None]:
        def edit(config: Any) -> None:
            with_key({"preset": "w8", "attention": {"messages": True, "bits": 16}})(config)
            config["training_module"]["model"].update(compile_mode=mode, num_features=4)

        return edit

    few = ("trainer.max_epochs=1", "run=[train]", "++trainer.limit_train_batches=2", "++trainer.limit_val_batches=1")
    eager, compiled = (train(tmp_path / m, changes(m), *few) for m in ("eager", "compile"))
    assert compiled.code == 0, compiled.text
    assert validation_errors(compiled) == pytest.approx(validation_errors(eager), rel=1e-4)


@pytest.mark.slow
def test_compiled_file(train: Callable[..., Any], command: Callable[..., Any], tmp_path: Path) -> None:
    """`nequip-deploy build` compares the compiled file with the model before it writes."""
    run = train(tmp_path, with_key({"preset": "w8", "attention": {"messages": True}}), "trainer.max_epochs=1")
    assert run.code == 0, run.text
    path = tmp_path / "attention.nequip.zip"
    gaq.save(gaq.convert(gaq.load(run.last)), path)
    done = command("nequip-deploy", "build", path, tmp_path / "attention.nequip.pt2", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
