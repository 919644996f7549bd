"""Small NequIP and Allegro models with random weights, the same on every machine, and structures to run them on."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from nequip_models import build_model, diamond, few_bits, molecules, with_key

if find_spec("nequip") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

if TYPE_CHECKING:
    from ase import Atoms

ROOT = Path(__file__).parents[2]


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "ignore:.*TorchScript type system.*:UserWarning",
        "ignore:.*torch.jit.*:DeprecationWarning",
        "ignore:.*torch.jit.*:FutureWarning",
        "ignore:Found `per_type_energy.*:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def nequip_globals() -> Iterator[None]:
    """NequIP's own settings, float64 as torch's default among them, for the tests below this folder only."""
    from nequip.utils.global_state import set_global_state

    before = torch.get_default_dtype()
    set_global_state()
    torch.set_default_dtype(torch.float64)  # NequIP does it once only, which may have been for other tests
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def unchanged_globals() -> Iterator[None]:
    """One thread, and the random state and dtype as they were."""
    dtype, state, threads = torch.get_default_dtype(), torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def structures() -> list[Atoms]:
    return molecules()


@pytest.fixture(scope="session")
def crystal() -> Atoms:
    return diamond()


@pytest.fixture(scope="session")
def float_model() -> Callable[..., Any]:
    """``float_model(variant, dtype)``: a fresh copy of a model with random weights."""
    made: dict[Any, Any] = {}

    def get(variant: str = "plain", dtype: str = "float32") -> Any:
        if (variant, dtype) not in made:
            made[variant, dtype] = build_model(variant, dtype)
        return copy.deepcopy(made[variant, dtype])

    return get


@pytest.fixture(scope="session")
def quantized(float_model: Callable[..., Any]) -> Callable[..., Any]:
    """``quantized(preset, variant, dtype, status)``: a fresh copy of a calibrated model."""
    import gaq
    from gaq_nequip.freeze import freeze

    made: dict[Any, Any] = {}

    def get(preset: str = "gaq", variant: str = "plain", dtype: str = "float32", status: str = "converted") -> Any:
        key = (preset, variant, dtype)
        if key not in made:
            model = gaq.prepare(float_model(variant, dtype), few_bits(preset))
            made[key] = gaq.calibrate(model, [*molecules(), diamond()], progress=False)
        model = copy.deepcopy(made[key])
        if status == "training":
            return model
        gaq.convert(model)
        return freeze(model) if status == "frozen" else model

    return get


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., Any]:
    """``evaluate(model, structures)``: energies (structures,) and forces, in float64 arrays."""
    import numpy as np

    from gaq_nequip.evaluate import NequIPPotential

    def get(model: Any, structures: Sequence[Atoms]) -> tuple[Any, Any]:
        energies, forces = NequIPPotential(model)(structures)
        return np.asarray(energies, dtype=np.float64), np.concatenate(forces).astype(np.float64)

    return get


TRAINING = """
run: [train, test]
seed: 1
data:
  _target_: nequip.data.datamodule.ASEDataModule
  seed: 1
  split_dataset: {file_path: train.xyz, train: 16, val: 4}
  test_file_path: test.xyz
  ase_args: {}
  include_keys: [REF_energy, REF_forces]
  key_mapping: {REF_energy: total_energy, REF_forces: forces}
  transforms:
  - _target_: nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper
    model_type_names: [H, C, O]
    chemical_species_to_atom_type_map: {H: H, C: C, O: O}
  - {_target_: nequip.data.transforms.NeighborListTransform, r_max: 4.0}
  train_dataloader: {_target_: torch.utils.data.DataLoader, batch_size: 4, shuffle: true}
  val_dataloader: {_target_: torch.utils.data.DataLoader, batch_size: 4}
  test_dataloader: {_target_: torch.utils.data.DataLoader, batch_size: 4}
  stats_manager:
    _target_: nequip.data.CommonDataStatisticsManager
    dataloader_kwargs: {batch_size: 4}
    type_names: [H, C, O]
trainer:
  _target_: lightning.Trainer
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  logger:
    _target_: lightning.pytorch.loggers.CSVLogger
    save_dir: ${hydra:runtime.output_dir}
  callbacks:
  - _target_: lightning.pytorch.callbacks.ModelCheckpoint
    monitor: val0_epoch/forces_mae
    dirpath: ${hydra:runtime.output_dir}
    filename: best
    save_last: true
training_module:
  _target_: nequip.train.EMALightningModule
  loss: {_target_: nequip.train.EnergyForceLoss, per_atom_energy: true, coeffs: {total_energy: 1.0, forces: 100.0}}
  val_metrics: {_target_: nequip.train.EnergyForceMetrics, coeffs: {total_energy_mae: 1.0, forces_mae: 1.0}}
  train_metrics: ${training_module.val_metrics}
  test_metrics: ${training_module.val_metrics}
  optimizer: {_target_: torch.optim.Adam, lr: 0.01}
  model:
    _target_: nequip.model.NequIPGNNModel
    seed: 1
    model_dtype: float32
    r_max: 4.0
    type_names: [H, C, O]
    l_max: 1
    parity: false
    num_layers: 2
    num_features: 32
    radial_mlp_depth: 1
    radial_mlp_width: 16
    avg_num_neighbors: ${training_data_stats:num_neighbors_mean}
    per_type_energy_scales: ${training_data_stats:per_type_forces_rms}
    per_type_energy_shifts: ${training_data_stats:per_atom_energy_mean}
"""


class Run:
    """One `nequip-train` run: what it printed, and the files it left."""

    def __init__(self, folder: Path, done: subprocess.CompletedProcess[str]) -> None:
        self.folder = folder
        self.code = done.returncode
        log = folder / "out" / "train.log"
        # NequIP's logger writes to a file beside the standard streams.
        self.text = done.stdout + done.stderr + (log.read_text() if log.is_file() else "")
        self.best = folder / "out" / "best.ckpt"
        self.last = folder / "out" / "last.ckpt"


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``command(name, *arguments, cwd=...)``: a console script of this environment, output as text."""

    def run(name: str, *arguments: str, cwd: Any = None, timeout: int = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name(name)), *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def train(command: Callable[..., Any]) -> Callable[..., Run]:
    """``train(folder, changes, *overrides)``: stock `nequip-train` on a tiny data set, in a folder of its own.

    ``changes(config)`` may edit the configuration in place before it is written.
    """
    import numpy as np
    import yaml
    from ase.io import write

    def run(folder: Path, changes: Callable[[Any], None] | None = None, *overrides: str) -> Run:
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(0)
        for name, count in (("train.xyz", 20), ("test.xyz", 4)):
            frames = []
            for i in range(count):
                atoms = molecules(seed=i, amplitude=0.05)[i % 4]
                # A harmonic well around the molecule: any labels will do, as long as they are smooth.
                start = molecules(seed=0, amplitude=0.0)[i % 4]
                atoms.arrays["REF_forces"] = -4.0 * (atoms.positions - start.positions)
                atoms.info["REF_energy"] = float(2.0 * ((atoms.positions - start.positions) ** 2).sum())
                atoms.info["REF_energy"] -= 3.0 * len(atoms) + 0.01 * generator.normal()
                frames.append(atoms)
            write(folder / name, frames)
        config = yaml.safe_load(TRAINING)
        # Absolute: packaging and compilation read one structure of it again, from wherever they are run.
        config["data"]["split_dataset"]["file_path"] = str(folder / "train.xyz")
        config["data"]["test_file_path"] = str(folder / "test.xyz")
        if changes is not None:
            changes(config)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        done = command("nequip-train", "-cp", str(folder), "-cn", "config", "hydra.run.dir=out", *overrides, cwd=folder)
        return Run(folder, done)

    return run


@pytest.fixture(scope="session")
def trained(train: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with ``quantization: gaq`` whose checkpoint other tests package and compile; not to be written to."""
    run = train(tmp_path_factory.mktemp("trained"), with_key("gaq"))
    assert run.code == 0, run.text
    return run


@pytest.fixture(scope="session")
def trained_float(train: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run in float."""
    run = train(tmp_path_factory.mktemp("float"))
    assert run.code == 0, run.text
    return run
