"""The key ``quantization`` in the stock `mace_run_train`, in each of the ways MACE can be run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("mace", reason="needs MACE: pip install '.[mace]'")

import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.io import read, write

from gaq.config import PRESETS
from gaq.quantizers.weights import WeightQuantizer
from gaq_mace import files
from gaq_mace.engine import disabled
from gaq_mace.model import ScaleShiftMACE, feature_quantizers, state_of, weight_quantizers

BASE: dict[str, Any] = {
    "name": "tiny",
    "train_file": "train.xyz",
    "valid_fraction": 0.25,
    "test_file": "test.xyz",
    "E0s": "{1: 3.2, 6: 3.5, 8: 4.6}",
    "model": "MACE",
    "hidden_irreps": "4x0e + 4x1o",
    "r_max": 3.0,
    "num_radial_basis": 4,
    "radial_MLP": "[8]",
    "max_ell": 2,
    "correlation": 2,
    "num_interactions": 2,
    "batch_size": 4,
    "valid_batch_size": 6,
    "max_num_epochs": 3,
    "energy_key": "REF_energy",
    "forces_key": "REF_forces",
    "default_dtype": "float32",
    "device": "cpu",
    "seed": 1,
    "plot": False,
}
GAQ = {"preset": "gaq", "vectors": {"start_epoch": 1, "anneal_epochs": 1}}
THROUGHOUT = {"round_weights": "throughout"}


def labelled(names: Sequence[str], count: int, seed: int) -> list[Atoms]:
    """Shaken molecules with the energies and forces of a toy potential."""
    random = np.random.default_rng(seed)
    frames = []
    for i in range(count):
        atoms = molecule(names[i % len(names)])
        atoms.positions += random.normal(0, 0.06, atoms.positions.shape)
        atoms.calc = EMT()
        atoms.info["REF_energy"] = atoms.get_potential_energy()
        atoms.arrays["REF_forces"] = atoms.get_forces()
        atoms.calc = None
        frames.append(atoms)
    return frames


def write_data(folder: Path) -> None:
    names = ("CH3OH", "H2O", "CH4")
    write(folder / "train.xyz", labelled(names, 16, seed=0))
    write(folder / "test.xyz", labelled(names, 6, seed=1))


@dataclass
class Run:
    """A finished run of a training command."""

    folder: Path
    code: int
    log: str
    settings: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / f"{self.settings['name']}.model"

    def table(self, row: str = "Default_Default", which: int = 0) -> tuple[float, float]:
        """Energy (meV/atom) and force (meV/Å) RMSE of a row of the test table."""
        text = self.log.split("Error-table on TEST:")[which + 1]
        match = re.search(rf"\| +{row} +\| +([\d.]+) +\| +([\d.]+) +\|", text)
        assert match, text[:1000]
        return float(match[1]), float(match[2])


def execute(
    folder: Path, settings: dict[str, Any], command: Sequence[str] = ("mace_run_train",), **environment: str
) -> Run:
    """Run a training command in a folder, with stdout and stderr as its log."""
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "run.yml").write_text(yaml.safe_dump(settings))
    script = Path(sys.executable).parent / command[0]
    done = subprocess.run(
        [str(script), *command[1:], "--config", "run.yml"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return Run(folder, done.returncode, done.stdout, settings)


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """A function that trains in a temporary folder: settings as keywords, null removes one."""
    write_data(tmp_path)

    def run(environment: dict[str, str] | None = None, **changes: Any) -> Run:
        return execute(tmp_path, {**BASE, **changes}, **(environment or {}))

    return run


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without the key."""
    folder = tmp_path_factory.mktemp("stock")
    write_data(folder)
    run = execute(folder, BASE)
    assert run.code == 0, run.log[-3000:]
    return run


def results(
    model: Any, frames: list[Atoms], dtype: str, head: str | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Energies and forces by MACE's own calculator, of a file or a model."""
    from mace.calculators import MACECalculator

    source = {"model_paths": str(model)} if isinstance(model, Path) else {"models": [model]}
    options = {} if head is None else {"head": head}
    calculator = MACECalculator(**source, device="cpu", default_dtype=dtype, **options)
    energies, forces = [], []
    for atoms in frames:
        atoms = atoms.copy()
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    return np.array(energies), forces


def check_errors(run: Run, path: Path, row: str = "Default_Default", which: int = 0, head: str | None = None) -> None:
    """The model file, in stock MACE's calculator, has the test error that the log's table gives it."""
    frames = read(run.folder / run.settings.get("check_file", "test.xyz"), ":")
    energies, forces = results(path, frames, run.settings["default_dtype"], head)
    sizes = np.array([len(atoms) for atoms in frames])
    wanted = np.array([atoms.info["REF_energy"] for atoms in frames])
    energy = 1e3 * np.sqrt(np.mean(((wanted - energies) / sizes) ** 2))
    delta = np.concatenate([atoms.arrays["REF_forces"] - f for atoms, f in zip(frames, forces, strict=True)])
    force = 1e3 * np.sqrt(np.mean(delta**2))
    table = run.table(row, which)
    assert energy == pytest.approx(table[0], abs=0.06)
    assert force == pytest.approx(table[1], abs=0.06)


def training_form(run: Run, path: Path, suffix: str = "") -> torch.nn.Module:
    """The model as it was in training, from the last checkpoint."""
    packed = files.load(path)
    dtype = getattr(torch, run.settings["default_dtype"])
    model = files.build(files.model_config(packed), dtype)
    model.__class__ = ScaleShiftMACE
    pattern = f"{run.settings['name']}_run-{run.settings['seed']}_epoch-*{suffix}.pt"
    found = [p for p in (run.folder / "checkpoints").glob(pattern) if suffix or "_swa" not in p.name]
    latest = max(found, key=lambda p: int(re.findall(r"epoch-(\d+)", p.name)[0]))
    checkpoint = torch.load(latest, map_location="cpu", weights_only=False)
    model.load_state_dict(checkpoint["model"], strict=False)
    state = state_of(model)
    assert state is not None
    assert state.status == "training"
    return model


def check_same(run: Run, path: Path, suffix: str = "") -> None:
    """The packed file is the function that was trained."""
    frames = read(run.folder / "test.xyz", ":")
    dtype = run.settings["default_dtype"]
    head = None if "heads" not in run.settings else files.load(path).heads[0]
    trained = results(training_form(run, path, suffix), frames, dtype, head)
    # By the same operations: in others a feature may fall on the other side of a step.
    with disabled():
        packed = results(path, frames, dtype, head)
    np.testing.assert_allclose(packed[0], trained[0], rtol=1e-6)
    for a, b in zip(packed[1], trained[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(np.abs(b).max())))


def check(
    run: Run, stock: Run | None = None, activations: bool = True, errors: bool = True, compiled: bool = True
) -> None:
    """What every successful quantized run owes its user."""
    assert run.code == 0, run.log[-4000:]
    late = "Weights are trained in float" in run.log
    table = re.split("rounded from the first epoch|Weights are trained", run.log.split("Quantized layers:")[1])[0]
    assert re.search(r"interactions\.0\.linear_up .*int\d+ per_", table)
    assert re.search(r"products\.0\.symmetric_contractions .*int\d+ per_", table)
    assert late or "rounded from the first epoch" in run.log
    assert late == ("Weights rounded: RMS force difference to the float model" in run.log)
    if activations:
        assert "Vectors (l > 0) are rounded from epoch" in run.log
        assert re.search("Activation ranges calibrated on|Quantization ranges taken from the checkpoint", run.log)
    assert run.log.count("The same weights without quantization") >= 1
    model = files.load(run.model)
    for written in (run.model, *(run.folder / "checkpoints").glob("*.model")):
        with zipfile.ZipFile(written) as archive:
            assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_DEFLATED}, written
    assert state_of(model).status == "converted"
    assert bool(feature_quantizers(model)) == activations
    assert (run.folder / f"{run.settings['name']}_compiled.model").is_file() == compiled
    if stock is not None:
        assert run.model.stat().st_size < stock.model.stat().st_size / 4
    if errors:
        check_errors(run, run.model)
        if not late:
            check_same(run, run.model)


def test_scalar_form(train: Any, stock: Run) -> None:
    run = train(quantization="gaq", swa=None)
    check(run, stock)
    assert "vectors.start_epoch 10 is not reached in 3 epochs" in run.log
    assert run.log.index("Activation ranges calibrated on 12 training structures") < run.log.index("Epoch 0:")


def test_mapping_form(train: Any) -> None:
    run = train(
        quantization={**GAQ, "equivariance_loss": {"weight": 1.0}, "overrides": {"readouts.0.*": None}},
        ema=True,
        default_dtype="float64",
    )
    check(run)
    assert "Epoch 1: vectors are rounded from now on" in run.log
    assert "Equivariance loss: weight 1" in run.log
    assert re.search(r"readouts\.0\.linear .*left alone by overrides", run.log)


@pytest.mark.parametrize("rounded", [True, False])
def test_averages_are_of_rounded_weights(train: Any, rounded: bool) -> None:
    """An average that forgets at once is what was deployed last: on the grid of the scales kept beside it."""
    spec = {"preset": "w4", "training": {**THROUGHOUT, "average_rounded": rounded}}
    run = train(quantization=spec, ema=True, ema_decay=0.0)
    check(run, activations=False)
    model = training_form(run, run.model)
    parameters = dict(model.named_parameters())
    on_grid = [
        torch.allclose(quantizer(parameters[name]), parameters[name], rtol=1e-6, atol=0)
        for name, quantizer in weight_quantizers(model).items()
    ]
    assert all(on_grid) if rounded else not any(on_grid)


WRONG = [
    ({"quantization": "w9"}, "quantization: 'w9' is not a preset"),
    ({"quantization": True}, "quantization: 'True' is not a preset"),
    ({"quantization": {"weihgts": {"bits": 8}}}, "quantization.weihgts: unknown key. Did you mean 'weights'?"),
    ({"quantization": {"weights": {"bits": 17}}}, "quantization.weights.bits: 17 bits cannot be stored"),
    ({"quantization": {"vectors": {"codebook": "cube"}}}, "quantization.vectors.codebook: 'cube' is not one of"),
    ({"quantisation": "gaq"}, "unrecognized arguments: --quantisation=gaq"),
    ({"quantization": "gaq", "lora": True}, "quantization cannot be combined with lora"),
    ({"quantization": "gaq", "enable_cueq": True}, "quantization cannot be combined with enable_cueq"),
    ({"quantization": "gaq", "enable_oeq": True}, "quantization cannot be combined with enable_oeq"),
    ({"quantization": "gaq", "only_cueq": True}, "quantization cannot be combined with only_cueq"),
    ({"quantization": "gaq", "model": "AtomicDipolesMACE"}, "quantization does not support model: AtomicDipolesMACE"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_parser_refuses(changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from gaq_mace._patches import ensure_installed

    ensure_installed()
    from mace.tools import build_default_arg_parser

    (tmp_path / "run.yml").write_text(yaml.safe_dump({**BASE, **changes}))
    with pytest.raises(SystemExit) as stopped:
        build_default_arg_parser().parse_args(["--config", str(tmp_path / "run.yml")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_unmatched_override_stops_the_run(train: Any) -> None:
    run = train(quantization={"preset": "gaq", "overrides": {"raedouts.*": None}})
    assert run.code == 2
    assert "quantization.overrides['raedouts.*']: matches no module" in run.log
    assert not list(run.folder.rglob("*.model"))
    assert not list(run.folder.rglob("*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_preset(preset: str, train: Any, stock: Run) -> None:
    run = train(quantization=preset)
    check(run, stock, activations=PRESETS[preset].rounds_activations)


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "message"), [WRONG[2], WRONG[6]], ids=["typo", "lora"])
def test_refusal_stops_the_run(changes: dict[str, Any], message: str, train: Any) -> None:
    run = train(**changes)
    assert run.code == 2
    assert message in run.log
    assert not list(run.folder.rglob("*.model"))


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "correlation 3": {"correlation": 3},
    "correlation 1": {"correlation": 1},
    "l = 2": {"hidden_irreps": "4x0e + 4x1o + 4x2e", "max_ell": 3},
    "scalars only": {"hidden_irreps": "4x0e"},
    "one layer": {"num_interactions": 1},
    "three layers": {"num_interactions": 3},
    "density": {
        "interaction": "RealAgnosticDensityResidualInteractionBlock",
        "interaction_first": "RealAgnosticDensityInteractionBlock",
    },
    "density first": {
        "interaction": "RealAgnosticDensityInteractionBlock",
        "interaction_first": "RealAgnosticDensityInteractionBlock",
    },
    "residual first": {"interaction_first": "RealAgnosticResidualInteractionBlock"},
    "nonlinear": {
        "interaction": "RealAgnosticResidualNonLinearInteractionBlock",
        "interaction_first": "RealAgnosticResidualNonLinearInteractionBlock",
    },
    "pair repulsion": {"pair_repulsion": True, "distance_transform": "Agnesi"},
    "scale shift": {"model": "ScaleShiftMACE"},
    "no scaling": {"scaling": "no_scaling"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_architecture(name: str, train: Any) -> None:
    # MACE cannot script its own non-linear block (its gate has an annotation TorchScript does not know).
    check(train(quantization=GAQ, **ARCHITECTURES[name]), compiled=name != "nonlinear")


OPTIONS: dict[str, dict[str, Any]] = {
    "ema": {"ema": True},
    "lbfgs": {"lbfgs": True, "max_num_epochs": 2},
    "amsgrad": {"amsgrad": True, "optimizer": "adamw"},
    "schedulefree": {"optimizer": "schedulefree"},
    "freeze": {"freeze": 5},
    "equivariance loss": {"quantization": {**GAQ, "equivariance_loss": {"weight": 0.5, "rotations": 2}}},
    "average E0s": {"E0s": "average"},
    "float64": {"default_dtype": "float64"},
    "float64 w8a8": {"default_dtype": "float64", "quantization": "w8a8"},
    "all checkpoints": {"save_all_checkpoints": True, "keep_checkpoints": True},
    "plot": {"plot": True},
    # Axes of the laboratory: in a plane of symmetry a table's nearest points are two, and rounding errors choose.
    "codebook": {"quantization": {**GAQ, "vectors": {"codebook": "geodesic", "direction_bits": 5, "frame": "fixed"}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_option(name: str, train: Any) -> None:
    if name == "schedulefree":
        pytest.importorskip("schedulefree", reason="an optional dependency of MACE")
    check(train(**{"quantization": GAQ, **OPTIONS[name]}))


@pytest.mark.slow
def test_stress(train: Any) -> None:
    from ase.build import bulk

    run = train()
    frames = []
    random = np.random.default_rng(2)
    for _ in range(16):
        atoms = bulk("Cu", cubic=True)
        atoms.positions += random.normal(0, 0.05, atoms.positions.shape)
        atoms.set_cell(atoms.cell @ (np.eye(3) + random.normal(0, 0.01, (3, 3))), scale_atoms=True)
        atoms.calc = EMT()
        atoms.info["REF_energy"] = atoms.get_potential_energy()
        atoms.arrays["REF_forces"] = atoms.get_forces()
        atoms.info["REF_stress"] = atoms.get_stress(voigt=False)
        atoms.calc = None
        frames.append(atoms)
    write(run.folder / "train.xyz", frames[:12])
    write(run.folder / "test.xyz", frames[12:])
    shutil.rmtree(run.folder / "checkpoints")
    quantization = {**GAQ, "equivariance_loss": {"weight": 1.0}}
    check(
        train(
            quantization=quantization,
            E0s="average",
            loss="universal",
            compute_stress=True,
            stress_key="REF_stress",
            error_table="PerAtomRMSE",
        )
    )


@pytest.mark.slow
def test_two_stages_are_each_rounded_at_the_end(train: Any, stock: Run) -> None:
    spec = {"preset": "w4", "distillation": {"steps": 10, "batch_size": 2}}
    run = train(quantization=spec, swa=True, start_swa=2, max_num_epochs=4, ema=True)
    check(run, stock, activations=False)
    assert run.log.count("Weights rounded: RMS") == 2
    check_errors(run, run.folder / "tiny_stagetwo.model", which=1)


@pytest.mark.slow
def test_two_stages(train: Any, stock: Run) -> None:
    run = train(quantization=GAQ, swa=True, start_swa=2, max_num_epochs=4, ema=True)
    check(run, stock)
    assert "Loaded Stage two model" in run.log
    second = run.folder / "tiny_stagetwo.model"
    assert (run.folder / "tiny_stagetwo_compiled.model").is_file()
    assert second.stat().st_size < stock.model.stat().st_size / 4
    check_errors(run, second, which=1)
    check_same(run, second, suffix="_swa")


def first_epoch(log: str) -> int:
    """The epoch that was trained first."""
    return int(re.findall(r"Epoch (\d+): head", log)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"ema": True}, {"quantization": "w4"}, {"quantization": {**GAQ, "scalars": {"granularity": "per_channel"}}}],
    ids=["plain", "ema", "w4", "static"],
)
def test_restart(options: dict[str, Any], train: Any) -> None:
    settings = {"quantization": GAQ, **options}
    first = train(max_num_epochs=2, **settings)
    check(first, activations=settings["quantization"] != "w4")
    ranges = {name: q.ranges() for name, q in feature_quantizers(training_form(first, first.model)).items()}
    second = train(max_num_epochs=4, restart_latest=True, **settings)
    check(second, activations=settings["quantization"] != "w4")
    assert "Quantization ranges taken from the checkpoint" in second.log
    assert "calibrated on" not in second.log
    # MACE itself repeats the epoch of the checkpoint.
    assert first_epoch(second.log) == 1
    initial = re.search(r"Initial: head: Default, loss= *([\d.]+)", second.log)[1]
    assert f"Epoch 1: head: Default, loss={initial}" in first.log
    later = {name: q.ranges() for name, q in feature_quantizers(training_form(second, second.model)).items()}
    assert later.keys() == ranges.keys()
    static = "scalars" in settings["quantization"]
    assert static == any(bool(value.any()) for value in ranges.values())  # others are each atom's own
    for name, value in ranges.items():
        # Ranges forget slowly, a factor a step, so they are those of before and not new ones.
        assert bool((later[name] >= 0.5 * value).all())


@pytest.mark.slow
@pytest.mark.parametrize("preset", [GAQ, "w4"], ids=["gaq", "w4"])
def test_restart_from_float(preset: Any, train: Any) -> None:
    first = train(max_num_epochs=2)
    assert first.code == 0
    second = train(max_num_epochs=4, restart_latest=True, quantization=preset)
    check(second, activations=preset != "w4")
    assert first_epoch(second.log) == 1
    if preset != "w4":
        assert "Activation ranges calibrated on" in second.log
        # Rounding at 16 bits is small, so what training left off with is what it goes on with.
        before = float(re.findall(r"Epoch 1: head: Default, loss= *([\d.]+)", first.log)[0])
        after = float(re.search(r"Initial: head: Default, loss= *([\d.]+)", second.log)[1])
        assert after == pytest.approx(before, rel=0.05)


@pytest.mark.slow
def test_restart_with_other_settings(train: Any) -> None:
    assert train(max_num_epochs=2, quantization=GAQ).code == 0
    second = train(max_num_epochs=3, restart_latest=True, quantization="w4a8")
    check(second)
    assert "written with other quantization settings" in second.log
    assert "Activation ranges calibrated on" in second.log
    assert first_epoch(second.log) == 1


@pytest.mark.slow
def test_killed_run_goes_on(train: Any) -> None:
    run = train(max_num_epochs=0, quantization=GAQ)
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "mace_run_train"), "--config", "run.yml", "--max_num_epochs", "1000"],
        cwd=run.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if "Epoch 2: head" in line:
            process.kill()
            break
    process.wait()
    second = train(max_num_epochs=5, restart_latest=True, quantization=GAQ)
    check(second)
    assert "Quantization ranges taken from the checkpoint" in second.log
    assert first_epoch(second.log) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gaq", "w4"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fine_tuning(preset: str, dtype: str, train: Any, stock: Run) -> None:
    run = train(quantization=preset, foundation_model=str(stock.model), max_num_epochs=2, default_dtype=dtype)
    check(run, activations=preset == "gaq")


def test_fine_tuning_starts_from_calibrated_rounding(train: Any, stock: Run) -> None:
    preset = {"preset": "w4", "distillation": {"steps": 40, "batch_size": 2}, "training": THROUGHOUT}
    options = {"foundation_model": str(stock.model), "ema": True}
    run = train(quantization=preset, max_num_epochs=2, **options)
    check(run, activations=False)
    found = re.search(
        r"Warm start: RMS force difference to the float model ([\d.]+) meV/Å .*, ([\d.]+) after 40", run.log
    )
    assert float(found[2]) <= float(found[1])
    before = training_form(run, run.model)
    assert all(q.scale_is_learned for q in before.modules() if isinstance(q, WeightQuantizer))
    # A restart takes the scales where they were and calibrates nothing.
    again = train(quantization=preset, max_num_epochs=4, restart_latest=True, **options)
    check(again, activations=False)
    assert "Warm start" not in again.log
    initial = re.search(r"Initial: head: Default, loss= *([\d.]+)", again.log)[1]
    assert f"Epoch 1: head: Default, loss={initial}" in run.log
    cold = {**preset, "training": {**THROUGHOUT, "warm_start": False}}
    plain = train(name="plain", max_num_epochs=1, quantization=cold, **options)
    assert plain.code == 0, plain.log[-3000:]
    assert "Warm start" not in plain.log


def test_weights_are_rounded_when_training_is_over(train: Any, stock: Run) -> None:
    """The run is that of FP32 step by step, its best weights are rounded by calibration, and that is what is saved."""
    run = train(quantization={"preset": "w4", "distillation": {"steps": 40, "batch_size": 2}})
    check(run, stock, activations=False)
    assert losses(run) == losses(stock)
    (found,) = re.findall(r"Weights rounded: RMS force difference .* ([\d.]+) meV/Å .*, ([\d.]+) after 40", run.log)
    assert float(found[1]) <= float(found[0])
    frames = read(run.folder / "test.xyz", ":")
    _, rounded = results(run.model, frames, "float32")
    _, exact = results(stock.model, frames, "float32")
    difference = np.sqrt(np.mean((np.concatenate(rounded) - np.concatenate(exact)) ** 2))
    assert 0 < 1e3 * difference < 2 * float(found[1]) + 1


def test_training_from_scratch_lets_scales_follow_the_weights(train: Any) -> None:
    run = train(quantization={"preset": "w4", "training": THROUGHOUT}, max_num_epochs=1)
    check(run, activations=False)
    assert "Warm start" not in run.log
    model = training_form(run, run.model)
    assert not any(q.scale_is_learned for q in model.modules() if isinstance(q, WeightQuantizer))


@pytest.mark.slow
def test_fine_tuning_a_quantized_model(train: Any, stock: Run) -> None:
    foundation = train(quantization=GAQ, name="foundation")
    check(foundation)
    start = {"foundation_model": str(foundation.model), "max_num_epochs": 1}
    again = train(quantization=GAQ, name="again", **start)
    check(again, stock)
    assert "is quantized: training starts from its rounded weights" in again.log
    plain = train(name="plain", **start)
    assert plain.code == 0, plain.log[-3000:]
    assert "this run trains a float model" in plain.log
    assert not files.load(plain.model).__dict__.get("gaq_state")
    check_errors(plain, plain.model)


def two_heads(folder: Path) -> dict[str, Any]:
    write(folder / "other.xyz", labelled(("CH4", "H2O", "CH3OH"), 12, seed=5))
    return {
        "heads": {
            "first": {"train_file": "train.xyz", "test_file": "test.xyz", "E0s": BASE["E0s"]},
            "second": {"train_file": "other.xyz", "test_file": "test.xyz", "E0s": BASE["E0s"]},
        },
        "train_file": None,
        "test_file": None,
        "E0s": None,
    }


@pytest.mark.slow
def test_heads(train: Any, tmp_path: Path) -> None:
    run = train(quantization=GAQ, **two_heads(tmp_path))
    check(run, errors=False)
    assert files.load(run.model).heads == ["first", "second"]
    check_errors(run, run.model, row="Default_first", head="first")
    check_same(run, run.model)
    # One head of it, cut out by MACE, as the start of another run.
    tuned = train(
        quantization=GAQ, name="tuned", foundation_model=str(run.model), foundation_head="second", max_num_epochs=1
    )
    check(tuned)


@pytest.mark.slow
@pytest.mark.parametrize("quantized_foundation", [False, True], ids=["float", "gaq"])
def test_multihead_fine_tuning(quantized_foundation: bool, train: Any, stock: Run, tmp_path: Path) -> None:
    foundation = stock
    if quantized_foundation:
        foundation = train(quantization=GAQ, name="foundation")
    run = train(
        quantization=GAQ,
        foundation_model=str(foundation.model),
        multiheads_finetuning=True,
        pt_train_file=str(stock.folder / "train.xyz"),
        num_samples_pt=8,
        max_num_epochs=2,
    )
    check(run, errors=False)
    assert sorted(files.load(run.model).heads) == ["Default", "pt_head"]
    check_errors(run, run.model, head="Default")


DISTRIBUTED = """
import sys
import torch
import torch.distributed
torch.distributed.init_process_group("gloo", init_method="env://")
from mace.cli import run_train
from torch.nn.parallel import DistributedDataParallel
run_train.DDP = lambda model, device_ids: DistributedDataParallel(model)
run_train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [{**GAQ, "equivariance_loss": {"weight": 1.0}}, "w4"], ids=["gaq", "w4"])
def test_two_processes(quantization: Any, tmp_path: Path) -> None:
    # MACE sets up no process group on CPU and gives DistributedDataParallel a device: the script makes up for both.
    write_data(tmp_path)
    (tmp_path / "distributed.py").write_text(textwrap.dedent(DISTRIBUTED))
    command = ("torchrun", "--nproc_per_node=2", "--standalone", "distributed.py")
    settings = {**BASE, "quantization": quantization, "distributed": True, "launcher": "torchrun", "batch_size": 2}
    run = execute(tmp_path, settings, command)
    check(run, activations=quantization != "w4", errors=False)
    # Each process evaluates half of the test set and drops what is left over, so only one row can be told.
    check_same(run, run.model)


@pytest.mark.slow
def test_two_processes_start_warm_and_learn_scales(stock: Run, tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "distributed.py").write_text(textwrap.dedent(DISTRIBUTED))
    command = ("torchrun", "--nproc_per_node=2", "--standalone", "distributed.py")
    quantization = {"preset": "w4", "distillation": {"steps": 4}, "training": THROUGHOUT}
    settings = {**BASE, "quantization": quantization, "foundation_model": str(stock.model), "batch_size": 2}
    run = execute(tmp_path, {**settings, "distributed": True, "launcher": "torchrun"}, command)
    assert "Warm start: RMS force difference" in run.log
    check(run, activations=False, errors=False)
    check_same(run, run.model)


@pytest.mark.slow
@pytest.mark.parametrize("key", [{}, {"quantization": "gaq"}], ids=["stock", "gaq"])
def test_mace_needs_a_gpu_to_distribute(key: dict[str, Any], tmp_path: Path) -> None:
    write_data(tmp_path)
    settings = {**BASE, **key, "distributed": True, "launcher": "torchrun"}
    script = ("torchrun", "--nproc_per_node=2", "--standalone", "-m", "mace.cli.run_train")
    run = execute(tmp_path, settings, script)
    assert run.code != 0
    assert "Default process group has not been initialized" in run.log


def losses(run: Run) -> list[str]:
    return re.findall(r"(?:Initial|Epoch \d+): head.*", run.log)


@pytest.mark.slow
def test_without_the_key_nothing_changes(train: Any, stock: Run) -> None:
    bare = train(environment={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert bare.code == 0
    assert len(losses(bare)) == 4
    assert losses(bare) == losses(stock)
    assert bare.table() == stock.table()
    one, other = (torch.load(r.model, weights_only=False).state_dict() for r in (bare, stock))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key])
    with zipfile.ZipFile(stock.model) as archive:
        assert not any(b"gaq" in archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))


@pytest.mark.slow
def test_own_command_without_autoload(train: Any, tmp_path: Path) -> None:
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    refused = train(quantization="gaq", environment=off)
    assert refused.code == 2
    assert "unrecognized arguments: --quantization=gaq" in refused.log
    run = execute(tmp_path, {**BASE, "quantization": GAQ}, ("gaq_mace_train",), **off)
    check(run)
