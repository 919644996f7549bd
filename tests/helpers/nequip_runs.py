"""Runs of NequIP's stock training command on shaken molecules, and a checkpoint of a model trained before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import trained
import yaml
from ase.io import write
from nequip_models import molecules

TRAINING = """
run: [train, test]
seed: 1
data:
  _target_: nequip.data.datamodule.ASEDataModule
  seed: 1
  split_dataset: null
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


def training_config(train: Path, test: Path, split: tuple[int, int] = (16, 4)) -> dict[str, Any]:
    """The configuration of a run on two files, the first of which is split for training and validation."""
    config: dict[str, Any] = yaml.safe_load(TRAINING)
    # Absolute paths: packaging and compilation read a structure of it again, from any folder.
    config["data"]["split_dataset"] = {"file_path": str(train), "train": split[0], "val": split[1]}
    config["data"]["test_file_path"] = str(test)
    return config


def write_data(folder: Path) -> None:
    """Shaken molecules in ``train.xyz`` and ``test.xyz``."""
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


class Run:
    """One `nequip-train` run: its output and its files."""

    def __init__(self, folder: Path, done: subprocess.CompletedProcess[str]) -> None:
        self.folder = folder
        self.code = done.returncode
        log = folder / "out" / "train.log"
        # NequIP's logger also writes to a file.
        self.text = done.stdout + done.stderr + (log.read_text() if log.is_file() else "")
        self.best = folder / "out" / "best.ckpt"
        self.last = folder / "out" / "last.ckpt"


def command(name: str, *arguments: str | Path, cwd: Any = None, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Run a console script of this environment; output as text."""
    return subprocess.run(
        [str(Path(sys.executable).with_name(name)), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def prepare_run(folder: Path, changes: Callable[[Any], None] | None = None) -> None:
    """Write data and ``config.yaml`` to a folder; see `train`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    config = training_config(folder / "train.xyz", folder / "test.xyz")
    if changes is not None:
        changes(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def train(folder: Path, changes: Callable[[Any], None] | None = None, *overrides: str) -> Run:
    """Stock `nequip-train` on a tiny data set, in a folder of its own.

    Args:
        folder: folder of the run; made if missing.
        changes: edits the configuration in place before it is written.
        overrides: further arguments of the command.
    """
    prepare_run(folder, changes)
    done = command("nequip-train", "-cp", str(folder), "-cn", "config", "hydra.run.dir=out", *overrides, cwd=folder)
    return Run(folder, done)


def write_trained_checkpoint(path: Path) -> Path:
    """Write the model of ``tests/data/nequip.safetensors`` as `nequip-train` writes its checkpoints."""
    return write_checkpoint(path, {"_target_": "nequip.model.NequIPGNNModel", **trained.options("nequip")}, "nequip")


def write_checkpoint(
    path: Path, model: dict[str, Any], parameters: str | None = None, edit: Callable[[Any], None] | None = None
) -> Path:
    """Write a float model as `nequip-train` writes its checkpoints, without training it.

    Args:
        path: the checkpoint.
        model: configuration of the model.
        parameters: whose parameters of ``tests/data`` it has; None leaves them random.
        edit: changes the configuration of the run in place.
    """
    import lightning
    from hydra.utils import instantiate
    from nequip.utils import get_current_code_versions
    from nequip.utils.global_state import get_latest_global_state

    run = training_config(trained.TRAIN, trained.TEST, trained.SPLIT)
    run["training_module"]["model"] = {**model, "model_dtype": "float32", "seed": 0}
    if edit is not None:
        edit(run)
    metrics = run["training_module"]["val_metrics"]
    module_config = {**run["training_module"], "train_metrics": metrics, "test_metrics": metrics}
    about = {
        "versions": get_current_code_versions(verbose=False),
        "data": run["data"],
        "trainer": {"_target_": "lightning.Trainer"},
        "global_options": get_latest_global_state(),
        "runs": run["run"],
        "training_module": module_config,
    }
    counts = {"train": 1, "val": 1, "test": 1, "predict": 0}
    module = instantiate(module_config, _recursive_=False, _convert_="all", num_datasets=counts, info_dict=about)
    if parameters is not None:
        trained.load_parameters(module.model["sole_model"], parameters)
    for average, parameter in zip(module.ema.ema_weights, module.model.parameters(), strict=True):
        average.copy_(parameter.detach())
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path
