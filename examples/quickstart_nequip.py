"""Train NequIP with and without GAQ on trans-azobenzene, and compare accuracy, size, symmetry and dynamics.

    pip install '.[nequip,examples]'
    python examples/quickstart_nequip.py

``--quick`` runs every stage in minutes, on too little data for the numbers to mean anything, with a model of two
layers. NequIP's compilation needs a C++ compiler (g++). The script makes a small GFN2-xTB data set, writes two NequIP
training files that differ in their name and in the line ``quantization: gaq``, runs the stock ``nequip-train`` on both,
deploys the first with the stock ``nequip-compile`` and the second with ``nequip-deploy``, and then runs 1 ps of
molecular dynamics with each in the stock ``NequIPCalculator``. Results: ``quickstart/nequip/comparison.json`` and
``quickstart/nequip/nve.png``.
"""

from __future__ import annotations

import csv
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from comparison import (
    MODELS,
    Result,
    Stages,
    compare,
    console_script,
    parse_arguments,
    prepare_data,
)

from gaq.progress import Progress

TRAINING = """\
name: %(name)s
hydra: {run: {dir: "${name}"}}
run: [train]
seed: %(seed)d
cutoff: 4.0
types: [H, C, N]

data:
  _target_: nequip.data.datamodule.ASEDataModule
  seed: ${seed}
  split_dataset: {file_path: train.xyz, train: 0.95, val: 0.05}
  ase_args: {}
  include_keys: [REF_energy, REF_forces]
  key_mapping: {REF_energy: total_energy, REF_forces: forces}
  transforms:
  - _target_: nequip.data.transforms.NonPeriodicCellTransform # compiling needs a cell with a volume
    override_cell: true # ASE gives molecules one of zeros
  - _target_: nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper
    model_type_names: ${types}
    chemical_species_to_atom_type_map: ${list_to_identity_dict:${types}}
  - _target_: nequip.data.transforms.NeighborListTransform
    r_max: ${cutoff}
  train_dataloader: {_target_: torch.utils.data.DataLoader, batch_size: 5, shuffle: true}
  val_dataloader: {_target_: torch.utils.data.DataLoader, batch_size: 20}
  stats_manager:
    _target_: nequip.data.CommonDataStatisticsManager
    dataloader_kwargs: {batch_size: 20}
    type_names: ${types}

trainer:
  _target_: lightning.Trainer
  max_epochs: %(epochs)d
  accelerator: %(accelerator)s
  devices: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: "${name}", name: "", version: ""}
  callbacks:
  - _target_: lightning.pytorch.callbacks.ModelCheckpoint
    monitor: val0_epoch/forces_mae
    dirpath: ${name}
    filename: best
    enable_version_counter: false

training_module:
  _target_: nequip.train.EMALightningModule
  ema_decay: 0.99
  loss:
    _target_: nequip.train.EnergyForceLoss
    per_atom_energy: true
    coeffs: {total_energy: 20.0, forces: 100.0}
  val_metrics:
    _target_: nequip.train.EnergyForceMetrics
    coeffs: {per_atom_energy_mae: 1.0, forces_mae: 1.0}
  optimizer: {_target_: torch.optim.Adam, lr: 0.01}
  lr_scheduler:
    scheduler: {_target_: torch.optim.lr_scheduler.ExponentialLR, gamma: %(gamma).4f}
    interval: epoch
    frequency: 1
  model:
    _target_: nequip.model.NequIPGNNModel
    seed: ${seed}
    model_dtype: float32
    r_max: ${cutoff}
    type_names: ${types}
    l_max: 1
    parity: false
    num_layers: %(layers)d
    num_features: 32
    radial_mlp_depth: 1
    radial_mlp_width: 64
    avg_num_neighbors: ${training_data_stats:num_neighbors_mean}
    per_type_energy_scales: ${training_data_stats:per_type_forces_rms}
    per_type_energy_shifts: ${training_data_stats:per_atom_energy_mean}
"""


def write_training_files(directory: Path, epochs: int, device: str, seed: int, layers: int = 3) -> dict[str, Path]:
    """Write ``fp32.yaml`` and ``gaq.yaml``; the second has one more line, ``quantization: gaq``.

    Args:
        directory: holds ``train.xyz``.
        epochs: training epochs; the learning rate falls to a tenth over them.
        device: ``cpu`` or ``cuda``.
        seed: seed of the initial weights and the batches.
        layers: number of layers; the time to compile grows with it.

    Returns:
        The file of each model name.
    """
    accelerator = "gpu" if device == "cuda" else "cpu"
    values = {
        "epochs": epochs,
        "accelerator": accelerator,
        "gamma": 0.1 ** (1 / epochs),
        "seed": seed,
        "layers": layers,
    }
    files = {}
    for name in MODELS:
        text = TRAINING % {"name": name, **values}
        if name == "gaq":
            text += "\nquantization: gaq\n"
        files[name] = directory / f"{name}.yaml"
        files[name].write_text(text)
    return files


def run_command(
    command: str, arguments: Sequence[str], directory: Path, log: Path, watch: Callable[[], None] | None = None
) -> None:
    """Run a console script of this environment with its output in a log.

    Args:
        command: ``nequip-train``, ``nequip-compile`` or ``nequip-deploy``.
        arguments: its arguments.
        directory: where it runs.
        log: file for its output.
        watch: called twice a second while it runs, and once afterwards.

    Raises:
        SystemExit: if the command is missing or fails, with the end of its log.
    """
    script = console_script(command, "NequIP and GAQ", "nequip")
    shown = " ".join((command, *arguments))
    print(f"\n{shown}   (log: {log})", flush=True)
    # Without this, Python writes lines only when a block is full.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (
        log.open("w") as file,
        subprocess.Popen(
            [script, *arguments], cwd=directory, stdout=file, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        while process.poll() is None:
            time.sleep(0.5)
            if watch is not None:
                watch()
    if watch is not None:
        watch()
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(
            f"{tail}\n{shown} failed (exit code {process.returncode}); the end of its log is above, the full log is "
            f"{log}."
        )


class EpochCounter:
    """Show the epochs that NequIP added to its ``metrics.csv`` since the last call.

    Args:
        metrics: the file, which need not exist yet.
        progress: advances by one for each epoch.
    """

    def __init__(self, metrics: Path, progress: Progress) -> None:
        self.metrics = metrics
        self.progress = progress
        self.counted = 0

    def __call__(self) -> None:
        if not self.metrics.is_file():
            return
        with self.metrics.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("val0_epoch/forces_mae")]
        for row in rows[self.counted :]:
            # The last row may be read before its line is complete.
            if not (row.get("epoch") and row.get("val0_epoch/per_atom_energy_mae")):
                break
            force, energy = (1e3 * float(row[f"val0_epoch/{key}_mae"]) for key in ("forces", "per_atom_energy"))
            self.progress.note(f"validation MAE {force:.1f} meV/Å, {energy:.1f} meV/atom")
            self.progress.advance()
            self.counted += 1


def train(config: Path, epochs: int) -> Path:
    """Run the stock ``nequip-train`` on a training file, and show its progress.

    Args:
        config: a NequIP training file whose paths are relative to its folder.
        epochs: number of epochs in it, for the remaining time.

    Returns:
        The best checkpoint, ``<name>/best.ckpt`` beside the file.

    Raises:
        SystemExit: if the command is missing or fails, with the end of its log.
    """
    directory, name = config.parent, config.stem
    run = directory / name
    # Files of an earlier run must not be taken for those of this run.
    for old in ("best.ckpt", "metrics.csv"):
        (run / old).unlink(missing_ok=True)
    arguments = ["-cp", str(directory), "-cn", name]
    with Progress(epochs, f"training {name}", "epoch") as progress:
        counter = EpochCounter(run / "metrics.csv", progress)
        run_command("nequip-train", arguments, directory, directory / f"{name}.log", counter)
    return run / "best.ckpt"


def deploy(checkpoint: Path, device: str) -> Path:
    """Compile a checkpoint for ASE: FP32 with the stock ``nequip-compile``, GAQ with ``nequip-deploy``.

    Args:
        checkpoint: ``<name>/best.ckpt``.
        device: ``cpu`` or ``cuda``.

    Returns:
        The deployed file, ``<name>.nequip.pt2`` beside that folder.

    Raises:
        SystemExit: if the command is missing or fails, with the end of its log.
    """
    # The checkpoint has the path of its training data relative to this folder, and compiling reads a structure.
    directory, name = checkpoint.parent.parent, checkpoint.parent.name
    model = directory / f"{name}.nequip.pt2"
    model.unlink(missing_ok=True)
    files = [str(path.relative_to(directory)) for path in (checkpoint, model)]
    options = ["--target", "ase", "--device", device]
    log = directory / f"{name}_deploy.log"
    if name == "fp32":
        run_command("nequip-compile", [*files, "--mode", "aotinductor", *options], directory, log)
    else:
        run_command("nequip-deploy", ["build", *files, *options], directory, log)
    return model


def slimmed_bytes(model: Path) -> int:
    """Size of a compiled file after the slimming of ``nequip-deploy``: the part of a ratio that is not quantization."""
    from gaq_nequip.deploy.artefact import slim

    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        slimmed = Path(folder) / model.name
        slim(model, slimmed)
        return slimmed.stat().st_size


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run every stage.

    Args:
        argv: command-line arguments; those of the process if None.

    Returns:
        The row of each model.
    """
    description = "Train NequIP with and without GAQ and compare the two."
    arguments = parse_arguments(description, "quickstart/nequip", 20, argv)
    # Without GAQ, NequIP ignores the key and trains in float. Check this before the long part.
    for command in ("nequip-train", "nequip-compile", "nequip-deploy"):
        console_script(command, "NequIP and GAQ", "nequip")
    directory, stages = arguments.directory.resolve(), Stages()
    with stages.measured("data set"):
        test = prepare_data(directory, arguments.train, arguments.test, arguments.seed, arguments.warm_up)
    layers = 2 if arguments.quick else 3
    configs = write_training_files(directory, arguments.epochs, arguments.device, arguments.seed, layers)
    checkpoints, models = {}, {}
    for name, config in configs.items():
        with stages.measured(f"training {name}"):
            checkpoints[name] = train(config, arguments.epochs)
    for name, checkpoint in checkpoints.items():
        with stages.measured(f"compiling {name}"):
            models[name] = deploy(checkpoint, arguments.device)
    results = compare(models, test, arguments, stages)
    slim = slimmed_bytes(models["fp32"])
    print(
        f"nequip-deploy also leaves out debug symbols and sources and compresses: that alone would make the FP32 file "
        f"{slim / 1e3:.0f} KB, {slim / results[-1].file_bytes:.2f} times the size of the quantized one."
    )
    return results


if __name__ == "__main__":
    main()
