"""The key ``quantization`` in the stock `mace_run_train`, in each of the ways MACE can be run."""

from __future__ import annotations

import re
import shutil
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase.calculators.emt import EMT
from ase.io import read, write
from mace_runs import (
    BASE,
    GAQ,
    THROUGHOUT,
    Run,
    check,
    check_errors,
    check_same,
    execute,
    losses,
    training_form,
    write_data,
)

import gaq
from gaq.config.parse import PRESETS
from gaq.model.state import TRAINED, state_of
from gaq.reporting import open_file
from gaq_mace.weights import weight_quantizers


@pytest.mark.slow
@pytest.mark.smoke
def test_scalar_form(train: Any, stock: Run) -> None:
    run = train(quantization="gaq", swa=None)
    check(run, stock)
    branches = re.findall("Rounded in training: .*", run.log)
    assert len(branches) == 1
    assert "scalars from epoch 0; vectors (l > 0) from epoch 1 of 3. Validation always rounds all" in branches[0]
    assert run.log.index("Epoch 1: vectors are rounded from now on") < run.log.index("Epoch 1: head")
    assert run.log.index("Activation ranges calibrated on 12 training structures") < run.log.index("Epoch 0:")
    # The file says that it was trained, and a report needs no flag for it.
    assert state_of(gaq.load(run.model)).notes[TRAINED] is True
    assert open_file(run.model).training == "qat"
    assert open_file(stock.model).training == "ptq"
    # MACE does not compress what it writes; that is done with packed models when the run is over.
    for path in (path for path in run.folder.glob("**/*.model") if "compiled" not in path.name):
        with zipfile.ZipFile(path) as archive:
            assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_DEFLATED}, path


@pytest.mark.slow
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


@pytest.mark.slow
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
    ({"quantization": {"vectors": {"start_epoch": 10}}}, "vectors.start_epoch: 10 has no effect, because the run ends"),
    ({"quantization": {"weights": {"group_size": 8}}}, "quantization.weights.group_size: 8 has no effect, because"),
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
    from gaq_mace.hook.patches import ensure_installed

    ensure_installed()
    from mace.tools import build_default_arg_parser

    (tmp_path / "run.yml").write_text(yaml.safe_dump({**BASE, **changes}))
    with pytest.raises(SystemExit) as stopped:
        build_default_arg_parser().parse_args(["--config", str(tmp_path / "run.yml")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
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
@pytest.mark.parametrize(
    ("changes", "message"),
    [next(wrong for wrong in WRONG if word in wrong[1]) for word in ("unknown key", "combined with lora")],
    ids=["typo", "lora"],
)
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
        pytest.importorskip("schedulefree", reason="needs schedulefree: pip install schedulefree")
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
    spec = {"preset": "w4", "distillation": {"steps": 10, "batch_atoms": 16}}
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
def test_two_processes_fine_tune_at_four_bits(stock: Run, tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "distributed.py").write_text(textwrap.dedent(DISTRIBUTED))
    command = ("torchrun", "--nproc_per_node=2", "--standalone", "distributed.py")
    quantization = {"preset": "w4", "distillation": {"steps": 4}, "training": THROUGHOUT}
    settings = {**BASE, "quantization": quantization, "foundation_model": str(stock.model), "batch_size": 2}
    run = execute(tmp_path, {**settings, "distributed": True, "launcher": "torchrun"}, command)
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


def test_a_label_that_is_nan_ends_the_run_with_its_reason(train: Any, tmp_path: Path) -> None:
    """MACE itself goes on, and saves a model whose weights are NaN. Nothing could be rounded there."""
    frames = read(tmp_path / "train.xyz", ":")
    for atoms in frames:
        atoms.arrays["REF_forces"][0, 0] = float("nan")
    write(tmp_path / "train.xyz", frames)
    run = train(quantization="gaq", max_num_epochs=2)
    assert run.code != 0
    reason = r"the weights .* have become NaN or infinite in training; training structure 0 has forces that are NaN"
    assert re.search(reason, run.log), run.log[-3000:]
