"""The stock `nequip-train` with the key ``quantization``: where the key may stand, what it does, what is refused."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import numpy as np
import torch
import yaml
from ase.io import read, write
from nequip_runs import prepare_run

import gaq
from gaq.adapter import adapter_for
from gaq.model.state import TRAINED, UNFINISHED, feature_quantizers, state_of
from gaq.reporting import open_file
from gaq_nequip.evaluate import NequIPPotential
from gaq_nequip.freeze import freeze
from gaq_nequip.weights import weight_quantizers

# Self-distillation at the end of a run costs more than all its epochs: just enough steps to show that it runs.
BRIEF: dict[str, Any] = {"distillation": {"steps": 4, "batch_atoms": 16}}


def with_model_key(value: Any) -> Callable[[Any], None]:
    def edit(config: Any) -> None:
        config["training_module"]["model"]["quantization"] = value

    return edit


def with_key(value: Any, **vectors: Any) -> Callable[[Any], None]:
    def edit(config: Any) -> None:
        config["quantization"] = {"preset": value, "vectors": vectors, **BRIEF} if vectors else value

    return edit


@pytest.mark.smoke
def test_top_level_key(trained: Any, structures: list[Any]) -> None:
    assert "Preset w8a16: weights 10 bits, scalars 24 bits, vectors 16 bits" in trained.text
    assert "scalars from epoch 0; vectors (l > 0) from epoch 1 of 2. Validation always rounds all" in trained.text
    assert "Epoch 1: vectors are rounded from now on" in trained.text
    assert "layer0_convnet.conv.linear_2" in trained.text
    assert "forces MAE: float 0." in trained.text
    stored = torch.load(trained.best, map_location="cpu", weights_only=False)["hyper_parameters"]
    assert stored["model"]["quantization"] == "gaq"
    assert stored["info_dict"]["training_module"]["model"]["quantization"] == "gaq"
    model = gaq.load(trained.best)
    assert state_of(model).config.preset == "w8a16"
    assert len(weight_quantizers(model)) == 11
    assert len(feature_quantizers(model)) == 5
    assert np.isfinite(NequIPPotential(model)(structures)[0]).all()
    assert state_of(model).notes[TRAINED] is True


def test_float_runs_are_left_alone(trained_float: Any) -> None:
    assert "QUANTIZATION" not in trained_float.text
    assert state_of(gaq.load(trained_float.best)) is None
    assert open_file(trained_float.best).training == "ptq"


def test_key_of_the_model_is_the_same(train: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    run = train(tmp_path, with_model_key("gaq"))
    assert run.code == 0, run.text
    ours = torch.load(run.best, map_location="cpu", weights_only=False)["state_dict"]
    theirs = torch.load(trained.best, map_location="cpu", weights_only=False)["state_dict"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if isinstance(ours[k], torch.Tensor) and "extra" not in k)


def with_both_keys(config: Any) -> None:
    with_key("gaq")(config)
    with_model_key("w8")(config)


BAD: dict[str, tuple[Callable[[Any], None], tuple[str, ...]]] = {
    "preset": (with_key("gak"), ("quantization: 'gak' is not a preset", "Did you mean 'gaq'?")),
    "bits": (with_key({"weights": {"bits": 17}}), ("quantization.weights.bits: 17 bits cannot be stored",)),
    "override": (
        with_key({"overrides": {"*sc2": None}}),
        ("quantization.overrides['*sc2']: matches no module",),
    ),
    "model": (with_model_key({"scalar": 8}), ("quantization.scalar: unknown key", "Did you mean 'scalars'?")),
    "typo": (lambda c: c.update(quantisation="gaq"), ("quantisation: unknown key. Did you mean 'quantization'?",)),
    "place": (lambda c: c["training_module"].update(quantization="gaq"), ("quantization",)),
    "both": (with_both_keys, ("Give it once.",)),
}

# Runs the command several times in one process: importing NequIP takes longer than refusing a key.
SEVERAL = """
import sys, traceback
from hydra.core.global_hydra import GlobalHydra
from nequip.scripts.train import main
from omegaconf import OmegaConf
for folder in sys.argv[1:]:
    sys.argv = ["nequip-train", "-cp", folder, "-cn", "config", f"hydra.run.dir={folder}/out"]
    code = 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code
    except Exception:
        traceback.print_exc()
        code = 1
    GlobalHydra.instance().clear()
    OmegaConf.clear_resolver("training_data_stats")
    for stream in (sys.stdout, sys.stderr):
        print(f"END {code}", file=stream, flush=True)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """Exit code, text and folder of a run with each of the bad keys."""
    folders = {}
    for name, (changes, _) in BAD.items():
        folders[name] = tmp_path_factory.mktemp(name)
        prepare_run(folders[name], changes)
    script = [sys.executable, "-c", SEVERAL, *map(str, folders.values())]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    outcomes = {}
    parts = [re.split(r"END (\S+)\n", stream) for stream in (done.stdout, done.stderr)]
    for i, (name, folder) in enumerate(folders.items()):
        outcomes[name] = (int(parts[1][2 * i + 1]), parts[0][2 * i] + parts[1][2 * i], folder)
    return outcomes


@pytest.mark.parametrize("name", BAD)
def test_bad_keys_stop_the_run(refusals: dict[str, tuple[int, str, Path]], name: str) -> None:
    code, text, folder = refusals[name]
    assert code != 0
    for word in BAD[name][1]:
        assert word in text
    assert not list(folder.rglob("*.ckpt"))


@pytest.mark.slow
def test_builder_and_modifier(train: Callable[..., Any], trained: Any, tmp_path: Path) -> None:
    def builder(config: Any) -> None:
        inner = config["training_module"]["model"]
        config["training_module"]["model"] = {"_target_": "gaq_nequip.quantized", "quantization": "gaq", "model": inner}

    def modifier(config: Any) -> None:
        inner = config["training_module"]["model"]
        config["training_module"]["model"] = {
            "_target_": "nequip.model.modify",
            "modifiers": [{"modifier": "enable_GAQ", "preset": "gaq"}],
            "model": inner,
        }

    expected = torch.load(trained.best, map_location="cpu", weights_only=False)["state_dict"]
    for name, edit in (("builder", builder), ("modifier", modifier)):
        run = train(tmp_path / name, edit)
        assert run.code == 0, run.text
        state = torch.load(run.best, map_location="cpu", weights_only=False)["state_dict"]
        same = [k for k in expected if isinstance(expected[k], torch.Tensor) and "extra" not in k]
        assert all(torch.equal(state[k], expected[k]) for k in same)
        assert state_of(gaq.load(run.best)) is not None


def test_restart(train: Callable[..., Any], tmp_path: Path) -> None:
    """Two epochs, then two more from the checkpoint: the schedule continues where it was.

    NequIP itself does not repeat the order of its structures on a restart, so weights are not compared.
    """
    spec = with_key("gaq", start_epoch=1, anneal_epochs=2)
    first = train(tmp_path, spec, "trainer.max_epochs=2")
    assert first.code == 0, first.text
    assert "Epoch 1: vectors are rounded from now on" in first.text
    stored = torch.load(first.last, map_location="cpu", weights_only=False)["state_dict"]
    second = train(tmp_path, spec, "trainer.max_epochs=4", f"++ckpt_path={first.last}", "hydra.run.dir=again")
    assert second.code == 0, second.text
    again = tmp_path / "again" / "train.log"
    assert "vectors are rounded from now on" not in again.read_text()
    (path,) = (tmp_path / "again").rglob("metrics.csv")
    with open(path) as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file) if row.get("val0_epoch/forces_mae")]
    assert epochs == [2, 3]
    model = gaq.load(tmp_path / "again" / "last.ckpt")
    assert state_of(model).status == "training"
    weight = "model.func.layer0_convnet.conv.linear_2.weight"
    assert not torch.equal(model.state_dict()[weight], stored[f"model.sole_model.{weight}"])


def test_float_checkpoint_cannot_be_restarted_quantized(
    train: Callable[..., Any], trained_float: Any, tmp_path: Path
) -> None:
    run = train(tmp_path, with_key("gaq"), f"++ckpt_path={trained_float.last}", "trainer.max_epochs=3")
    assert run.code != 0
    assert "this run continues a checkpoint that was trained in float" in run.text


def test_fine_tuning_a_float_checkpoint(train: Callable[..., Any], trained_float: Any, tmp_path: Path) -> None:
    def changes(config: Any) -> None:
        with_key("w4a16", start_epoch=0, anneal_epochs=0)(config)
        config["quantization"]["training"] = {"round_weights": "throughout"}
        target = {"_target_": "nequip.model.ModelFromCheckpoint", "checkpoint_path": str(trained_float.best)}
        config["training_module"]["model"] = target

    run = train(tmp_path, changes)
    assert run.code == 0, run.text
    model = gaq.load(run.best)
    weights = state_of(model).config.weights
    bits = {weights.bits, weights.mixing_bits, weights.first_bits, weights.sensitive_bits}
    assert bits <= {q.bits for q in weight_quantizers(model).values()} <= bits | {3}
    scales = {name: q.fixed_step for name, q in weight_quantizers(model).items()}
    # A restart continues from the stored scales.
    again = train(tmp_path, changes, "trainer.max_epochs=3", f"++ckpt_path={run.last}", "hydra.run.dir=again")
    assert again.code == 0, again.text
    later = {name: q.fixed_step for name, q in weight_quantizers(gaq.load(again.last)).items()}
    for name, scale in scales.items():
        torch.testing.assert_close(later[name], scale, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "module", [pytest.param("NequIPLightningModule", marks=pytest.mark.slow), "EMALightningModule"]
)
def test_weights_are_rounded_when_training_is_over(
    train: Callable[..., Any], structures: list[Any], tmp_path: Path, module: str
) -> None:
    """Validation is that of FP32; kept checkpoints are rounded by calibration, and training can continue from them."""

    def plain(config: Any) -> None:
        config["training_module"]["_target_"] = f"nequip.train.{module}"

    def changes(config: Any) -> None:
        plain(config)
        config["quantization"] = {"preset": "w4", "distillation": {"steps": 40, "batch_atoms": 16}}

    (tmp_path / "float").mkdir()
    exact = train(tmp_path / "float", plain)
    run = train(tmp_path, changes)
    assert (exact.code, run.code) == (0, 0), run.text
    assert validation_errors(run) == validation_errors(exact)
    found = re.findall(r"Weights rounded: .* ([\d.]+) meV/Å after rounding(?:, ([\d.]+) after [1-9])?", run.text)
    errors = [(before, after or before) for before, after in found]
    assert errors
    assert all(float(after) <= float(before) for before, after in errors)
    assert re.search(r"The weights in .*last\.ckpt are rounded", run.text)
    rounded, unrounded = gaq.load(run.last), gaq.load(exact.last)
    potential = adapter_for(unrounded).potential
    ours, theirs = (np.concatenate(potential(m)(structures)[1]) for m in (rounded, unrounded))
    assert 0 < 1e3 * np.sqrt(np.mean((ours - theirs) ** 2)) < 3 * max(float(after) for _, after in errors) + 1
    stored = [torch.load(r.last, map_location="cpu", weights_only=False)["state_dict"] for r in (run, exact)]
    if module.startswith("EMA"):
        # The weights that training continues from are those of the float run.
        for key in ("layer0_convnet.conv.linear_2.weight", "type_embed.embed_module.weight"):
            rounded_run, float_run = (next(v for k, v in state.items() if k.endswith(key)) for state in stored)
            assert torch.equal(rounded_run, float_run)
    again = train(tmp_path, changes, "trainer.max_epochs=3", f"++ckpt_path={run.last}", "hydra.run.dir=again")
    assert again.code == 0, again.text
    assert "Weights rounded" in (tmp_path / "again" / "train.log").read_text()


def test_a_run_that_was_cut_off_is_named(float_model: Callable[..., Any], caplog: Any) -> None:
    for finish in (gaq.convert, freeze):
        model = gaq.prepare(float_model(), "w4")
        with caplog.at_level("WARNING"):
            finish(model)
        assert not caplog.text
        model = gaq.prepare(float_model(), "w4")
        state_of(model).notes[UNFINISHED] = True
        with caplog.at_level("WARNING"):
            finish(model)
        assert "The run this checkpoint is of rounds its weights when it is over" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("rounded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_averages_are_of_rounded_weights(train: Callable[..., Any], tmp_path: Path, rounded: bool) -> None:
    """An average with decay 0 equals the last deployed weights, on the grid of the scales in the checkpoint."""

    def changes(config: Any) -> None:
        training = {"round_weights": "throughout", "average_rounded": rounded}
        config["quantization"] = {"preset": "w4", "weights": {"species_bits": None}, "training": training}
        config["training_module"] |= {"_target_": "nequip.train.EMALightningModule", "ema_decay": 0.0}

    run = train(tmp_path, changes)
    assert run.code == 0, run.text
    model = gaq.load(run.last)
    assert state_of(model).status == "training"
    parameters = dict(model.named_parameters())
    on_grid = [
        torch.allclose(quantizer(parameters[name]), parameters[name], rtol=1e-6, atol=0)
        for name, quantizer in weight_quantizers(model).items()
    ]
    assert all(on_grid) if rounded else not any(on_grid)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["nequip.train.NequIPLightningModule", "nequip.train.EMALightningModule"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_modules_and_dtypes(train: Callable[..., Any], tmp_path: Path, module: str, dtype: str) -> None:
    def changes(config: Any) -> None:
        with_key("w8a8", start_epoch=1, anneal_epochs=1)(config)
        config["training_module"]["_target_"] = module
        config["training_module"]["model"]["model_dtype"] = dtype

    run = train(tmp_path, changes)
    assert run.code == 0, run.text
    assert next(gaq.load(run.best).parameters()).dtype == getattr(torch, dtype)


@pytest.mark.slow
def test_static_ranges_and_equivariance_loss(train: Callable[..., Any], tmp_path: Path) -> None:
    def changes(config: Any) -> None:
        config["quantization"] = {
            "preset": "gaq",
            "scalars": {"granularity": "per_channel"},
            "vectors": {"granularity": "per_channel", "frame": "fixed", "start_epoch": 0},
            "equivariance_loss": {"weight": 1.0, "rotations": 2},
            **BRIEF,
        }

    run = train(tmp_path, changes)
    assert run.code == 0, run.text
    assert "Equivariance loss: weight 1, 2 rotations a step" in run.text
    assert "Activation ranges observed on 16 training structures" in run.text
    assert all(bool((q.observed > 0).any()) for q in feature_quantizers(gaq.load(run.best)).values())


@pytest.mark.slow
def test_two_processes(train: Callable[..., Any], tmp_path: Path) -> None:
    """Lightning's distributed training on CPU: both processes round alike and write one file."""

    def changes(config: Any) -> None:
        config["quantization"] = {"preset": "gaq", "scalars": {"granularity": "per_channel"}}
        config["trainer"].update({"devices": 2, "num_nodes": 1})
        config["trainer"]["strategy"] = {"_target_": "nequip.train.SimpleDDPStrategy", "process_group_backend": "gloo"}

    run = train(tmp_path, changes)
    assert run.code == 0, run.text
    assert state_of(gaq.load(run.best)) is not None


def validation_errors(run: Any) -> list[float]:
    """The mean force error of each validation of a run."""
    (path,) = (run.folder / "out").rglob("metrics.csv")
    with open(path) as file:
        return [float(row["val0_epoch/forces_mae"]) for row in csv.DictReader(file) if row["val0_epoch/forces_mae"]]


@pytest.mark.parametrize(
    ("spec", "generated"),
    [
        # What NequIP traced, run operation by operation: it is the tracing that can lose gradients and switches.
        # Rounded throughout: a thousand steps of distillation at the end would magnify the last digits.
        ({"preset": "w4", "training": {"round_weights": "throughout"}}, False),
        pytest.param({"vectors": {"start_epoch": 1, "anneal_epochs": 1}}, False, marks=pytest.mark.slow),
        pytest.param("w8", True, marks=pytest.mark.slow),
    ],
    ids=["weights", "branches", "generated"],
)
def test_train_time_compilation(
    train: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spec: Any,
    generated: bool,
) -> None:
    """A model compiled for training learns what the eager one does."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0" if generated else "1")

    def changes(mode: str) -> Callable[[Any], None]:
        def edit(config: Any) -> None:
            with_key(spec)(config)
            config["training_module"]["model"].update(compile_mode=mode, num_features=8)

        return edit

    eager, compiled = (train(tmp_path / m, changes(m), "trainer.max_epochs=3") for m in ("eager", "compile"))
    assert compiled.code == 0, compiled.text
    errors = validation_errors(compiled)
    assert len(errors) == 3
    assert errors[2] < errors[1] < errors[0]
    assert errors == pytest.approx(validation_errors(eager), rel=1e-5)
    ours, theirs = (dict(gaq.load(run.last).named_parameters()) for run in (compiled, eager))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4)
    assert state_of(gaq.load(compiled.best)).status == "training"


@pytest.mark.slow
def test_allegro(train: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("allegro", reason="needs Allegro: pip install '.[allegro]'")

    def changes(config: Any) -> None:
        with_key("gaq", start_epoch=1, anneal_epochs=1)(config)
        model = config["training_module"]["model"]
        for key in ("num_features", "radial_mlp_depth", "radial_mlp_width"):
            del model[key]
        model.update(
            {
                "_target_": "allegro.model.AllegroModel",
                "num_scalar_features": 16,
                "num_tensor_features": 8,
                "radial_chemical_embed": {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed"},
            }
        )

    run = train(tmp_path, changes)
    assert run.code == 0, run.text
    quantizers = feature_quantizers(gaq.load(run.best))
    assert any(name.endswith("tensor_track") for name in quantizers)
    assert any(name.endswith("_env_weighter") for name in quantizers)


def test_mapping_survives_the_checkpoint(train: Callable[..., Any], tmp_path: Path) -> None:
    weights = {"sensitive_bits": None, "compression": None}
    spec = {"preset": "w8", "overrides": {"*layer0_convnet*": None}, "weights": weights, **BRIEF}
    run = train(tmp_path, with_key(spec), "trainer.max_epochs=1")
    assert run.code == 0, run.text
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["quantization"] == spec
    quantizers = weight_quantizers(gaq.load(run.best))
    assert not [name for name in quantizers if "layer0_convnet" in name]
    assert {(".sc" in name, q.bits) for name, q in quantizers.items()} == {(False, 8), (True, 4)}


def test_a_label_that_is_nan_ends_the_run_with_its_reason(train: Callable[..., Any], tmp_path: Path) -> None:
    """NequIP itself goes on, and keeps checkpoints whose weights are NaN."""

    def edit(config: Any) -> None:
        frames = read(tmp_path / "train.xyz", ":")
        for atoms in frames:
            atoms.arrays["REF_forces"][0, 0] = np.nan
        write(tmp_path / "train.xyz", frames)
        config["quantization"] = "gaq"

    run = train(tmp_path, edit)
    assert run.code != 0
    reason = r"the weights .* have become NaN or infinite in training; training structure 0 has forces that are NaN"
    assert re.search(reason, run.text), run.text[-3000:]
