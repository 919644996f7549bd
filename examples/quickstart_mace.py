"""Train MACE with and without GAQ on trans-azobenzene, and compare accuracy, size, symmetry and dynamics.

    pip install '.[mace,examples]'
    python examples/quickstart_mace.py

``--quick`` runs every stage in minutes, on too little data for the numbers to mean anything. The script makes a small
GFN2-xTB data set, writes two MACE training files that differ in their name and in the line ``quantization: gaq``, runs
the stock ``mace_run_train`` on both, and then runs 1 ps of molecular dynamics with each model in the stock
``MACECalculator``. Results: ``quickstart/comparison.json`` and ``quickstart/nve.png``.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import deque
from collections.abc import Sequence
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
name: {name}
train_file: train.xyz
valid_fraction: 0.05
test_file: test.xyz
energy_key: REF_energy
forces_key: REF_forces
E0s: average
model: MACE
hidden_irreps: 16x0e + 16x1o
r_max: 4.0
max_ell: 2
correlation: 2
num_interactions: 2
default_dtype: float32
device: {device}
batch_size: 5
valid_batch_size: 20
max_num_epochs: {epochs}
lr: 0.02
scheduler: ExponentialLR
lr_scheduler_gamma: {gamma:.4f}
energy_weight: 20
forces_weight: 100
amsgrad: true
ema: true
ema_decay: 0.99
error_table: PerAtomMAE
plot: false
seed: {seed}
"""


def write_training_files(directory: Path, epochs: int, device: str, seed: int) -> dict[str, Path]:
    """Write ``fp32.yml`` and ``gaq.yml``; the second has one more line, ``quantization: gaq``.

    Args:
        directory: holds ``train.xyz`` and ``test.xyz``.
        epochs: training epochs; the learning rate falls to a tenth over them.
        device: ``cpu`` or ``cuda``.
        seed: seed of the initial weights and the batches.

    Returns:
        The file of each model name.
    """
    files = {}
    for name in MODELS:
        text = TRAINING.format(name=name, epochs=epochs, device=device, gamma=0.1 ** (1 / epochs), seed=seed)
        if name == "gaq":
            text += "quantization: gaq\n"
        files[name] = directory / f"{name}.yml"
        files[name].write_text(text)
    return files


def train(config: Path, epochs: int) -> Path:
    """Run the stock ``mace_run_train`` on a training file, and show its progress.

    The full log goes to ``<name>.log`` beside the file.

    Args:
        config: a MACE training file whose paths are relative to its folder.
        epochs: number of epochs in it, for the remaining time.

    Returns:
        The trained model file.

    Raises:
        SystemExit: if the command is missing or fails, with the end of its log.
    """
    directory, name = config.parent, config.stem
    command = console_script("mace_run_train", "MACE", "mace")
    # At the end MACE loads the newest checkpoint of that name, which must not be one of an earlier run.
    for old in (directory / "checkpoints").glob(f"{name}_run-*"):
        old.unlink()
    model = directory / f"{name}.model"
    model.unlink(missing_ok=True)

    log, tail = directory / f"{name}.log", deque[str](maxlen=25)
    print(f"\nmace_run_train --config {config.name}   (log: {log})", flush=True)
    with (
        log.open("w") as file,
        subprocess.Popen(
            [command, "--config", config.name],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Without this, Python writes lines only when a block is full.
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as process,
        Progress(epochs, f"training {name}", "epoch") as progress,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            tail.append(line)
            if epoch := re.search(r"Epoch \d+:.*MAE_E_per_atom= *(\S+) meV.*MAE_F= *(\S+) meV", line):
                energy, force = map(float, epoch.groups())
                progress.note(f"validation MAE {force:.1f} meV/Å, {energy:.1f} meV/atom")
                progress.advance()
    text = "".join(tail)
    if process.returncode != 0 or not model.is_file():
        hint = ""
        if "unrecognized arguments: --quantization" in text:
            hint = (
                "\nMACE does not know the key 'quantization': GAQ is not installed in this environment, or "
                "TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set.\nInstall it with:  pip install '.[mace,examples]'"
            )
        raise SystemExit(
            f"{text}\nmace_run_train --config {config} failed (exit code {process.returncode}); "
            f"the end of its log is above, the full log is {log}.{hint}"
        )
    return model


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run every stage.

    Args:
        argv: command-line arguments; those of the process if None.

    Returns:
        The row of each model.
    """
    description = "Train MACE with and without GAQ and compare the two."
    arguments = parse_arguments(description, "quickstart", 20, argv)
    directory, stages = arguments.directory.resolve(), Stages()
    with stages.measured("data set"):
        test = prepare_data(directory, arguments.train, arguments.test, arguments.seed, arguments.warm_up)
    configs = write_training_files(directory, arguments.epochs, arguments.device, arguments.seed)
    models = {}
    for name, config in configs.items():
        with stages.measured(f"training {name}"):
            models[name] = train(config, arguments.epochs)
    return compare(models, test, arguments, stages)


if __name__ == "__main__":
    main()
