"""Train MACE with and without GAQ on trans-azobenzene, and compare accuracy, size, symmetry and dynamics.

    pip install '.[mace,examples]'
    python examples/quickstart_mace.py

It takes 13 minutes on one CPU core. It makes a small GFN2-xTB data set, writes two MACE training files that
differ in their name and in the line ``quantization: gaq``, runs the stock ``mace_run_train`` on both, and
then runs 1 ps of molecular dynamics with each model in the stock ``MACECalculator``. Results:
``quickstart/comparison.json`` and ``quickstart/nve.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from tqdm import tqdm
from xtb_dataset import draw_velocities, make_dataset

MODELS = ("fp32", "gaq")
TIMESTEP = 0.5  # fs
TEMPERATURE = 300.0  # K, of the velocities the dynamics starts with
LEE_STRUCTURES = 20

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


@dataclass(frozen=True)
class Result:
    """One row of the comparison.

    Attributes:
        force_mae_mev_per_angstrom: mean over the force components of the test set.
        energy_mae_mev_per_atom: mean over the test set.
        file_bytes: size of the model file.
        size_ratio: size of the FP32 file over the size of this one.
        lee_mev_per_angstrom: local equivariance error of the forces under random rotations.
        drift_mev_per_atom_per_ps: slope of the total energy in NVE dynamics.
        drift_standard_error: of that slope, in its unit.
        ms_per_step: median wall time of one molecular dynamics step.
    """

    force_mae_mev_per_angstrom: float
    energy_mae_mev_per_atom: float
    file_bytes: int
    size_ratio: float
    lee_mev_per_angstrom: float
    drift_mev_per_atom_per_ps: float
    drift_standard_error: float
    ms_per_step: float


@dataclass(frozen=True)
class Trajectory:
    """An NVE run.

    Attributes:
        times: fs.
        energies: total energy, eV per atom.
        seconds_per_step: wall time.
        drift: slope of a straight line through the energy and its standard error, meV/atom/ps.
    """

    times: np.ndarray
    energies: np.ndarray
    seconds_per_step: float
    drift: tuple[float, float]


def write_training_files(directory: Path, epochs: int, device: str, seed: int) -> dict[str, Path]:
    """Write ``fp32.yml`` and ``gaq.yml``; the second has the one line ``quantization: gaq`` more.

    Args:
        directory: holds ``train.xyz`` and ``test.xyz``.
        epochs: training epochs; the learning rate falls to a tenth over them.
        device: ``cpu`` or ``cuda``.
        seed: of the initial weights and the batches.

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
    """Run the stock ``mace_run_train`` on a training file, one printed line an epoch.

    The full log goes to ``<name>.log`` beside the file.

    Args:
        config: a MACE training file whose paths are relative to its folder.
        epochs: number of epochs in it, for the progress line.

    Returns:
        The trained model file.

    Raises:
        SystemExit: if the command is missing or fails, with the end of its log.
    """
    directory, name = config.parent, config.stem
    # The console script of this very Python, whichever environment comes first on PATH.
    command = shutil.which("mace_run_train", path=str(Path(sys.executable).parent))
    if command is None:
        raise SystemExit(
            f"There is no mace_run_train beside {sys.executable}.\n"
            "Install MACE there with:  pip install '.[mace,examples]'"
        )
    # MACE ends a run by loading the newest checkpoint of that name: one of an earlier run must not be there.
    for old in (directory / "checkpoints").glob(f"{name}_run-*"):
        old.unlink()
    model = directory / f"{name}.model"
    model.unlink(missing_ok=True)

    log, tail, start = directory / f"{name}.log", deque[str](maxlen=25), time.perf_counter()
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
            # Python would otherwise hold back its lines until a block is full.
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            tail.append(line)
            found = re.search(r"Epoch (\d+):.*MAE_E_per_atom= *(\S+) meV.*MAE_F= *(\S+) meV", line)
            if found:
                epoch, energy, force = int(found[1]) + 1, float(found[2]), float(found[3])
                print(
                    f"{name}: epoch {epoch:3d}/{epochs}  validation force MAE {force:7.1f} meV/Å,"
                    f" energy MAE {energy:6.1f} meV/atom  ({time.perf_counter() - start:4.0f} s)",
                    flush=True,
                )
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
            f"the end of its log is above, the whole log is {log}.{hint}"
        )
    return model


def run_nve(calculator: Any, start: Atoms, length: float, label: str) -> Trajectory:
    """Constant-energy dynamics with the velocity Verlet algorithm.

    Args:
        calculator: an ASE calculator.
        start: structure with velocities; left unchanged.
        length: in fs.
        label: of the progress bar.

    Returns:
        Total energy at every step, its drift, and the median wall time of a step.
    """
    from gaq.physics.nve import fit_drift

    atoms = start.copy()
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, TIMESTEP * units.fs)
    steps = max(10, round(length / TIMESTEP))  # fewer give no standard error
    energies, seconds = [atoms.get_total_energy() / len(atoms)], []
    for _ in tqdm(range(steps), desc=f"NVE with {label}", unit="step"):
        before = time.perf_counter()
        dynamics.run(1)
        seconds.append(time.perf_counter() - before)
        energies.append(atoms.get_total_energy() / len(atoms))
    # The median: other programs on the machine lengthen some of the steps.
    times, per_atom = TIMESTEP * np.arange(steps + 1), np.array(energies)
    drift = fit_drift(times * 1e-3, per_atom * 1e3)
    return Trajectory(times, per_atom, float(np.median(seconds)), drift)


def evaluate(
    model: Path, reference: Path, test: list[Atoms], start: Atoms, length: float, device: str
) -> tuple[Result, Trajectory]:
    """Measure one model file in the stock ``MACECalculator``.

    Args:
        model: the file to measure.
        reference: the FP32 model file, for the ratio of sizes.
        test: structures with ``REF_energy`` (eV) and ``REF_forces`` (eV/Å).
        start: structure and velocities for the dynamics.
        length: of the dynamics, in fs.
        device: ``cpu`` or ``cuda``.

    Returns:
        The row of the table and the trajectory.
    """
    from mace.calculators import MACECalculator

    from gaq.physics.errors import force_and_energy_mae
    from gaq.physics.lee import local_equivariance_error
    from gaq.physics.potential import CalculatorPotential

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading any MACE model warns of its pickle and TorchScript parts
        calculator = MACECalculator(model_paths=str(model), device=device, default_dtype="float32")
    potential = CalculatorPotential(calculator)
    errors = force_and_energy_mae(potential, test)
    lee = local_equivariance_error(potential, test[:LEE_STRUCTURES], rotations=4, seed=0)
    trajectory = run_nve(calculator, start, length, model.stem)
    size = model.stat().st_size
    return (
        Result(
            force_mae_mev_per_angstrom=errors.force_mae_mev_per_angstrom,
            energy_mae_mev_per_atom=errors.energy_mae_mev_per_atom,
            file_bytes=size,
            size_ratio=reference.stat().st_size / size,
            lee_mev_per_angstrom=lee.mean_mev_per_angstrom,
            drift_mev_per_atom_per_ps=trajectory.drift[0],
            drift_standard_error=trajectory.drift[1],
            ms_per_step=1e3 * trajectory.seconds_per_step,
        ),
        trajectory,
    )


def format_table(results: dict[str, Result]) -> str:
    """The comparison as text, one row a model."""
    head = ("model", "force MAE", "energy MAE", "file", "smaller", "LEE", "NVE drift", "step")
    unit = ("", "meV/Å", "meV/atom", "KB", "by", "meV/Å", "meV/atom/ps", "ms")
    rows = [
        (
            name,
            f"{r.force_mae_mev_per_angstrom:.2f}",
            f"{r.energy_mae_mev_per_atom:.2f}",
            f"{r.file_bytes / 1e3:.0f}",
            f"{r.size_ratio:.2f}x",
            f"{r.lee_mev_per_angstrom:.4f}",
            f"{r.drift_mev_per_atom_per_ps:+.4f} ± {r.drift_standard_error:.4f}",
            f"{r.ms_per_step:.1f}",
        )
        for name, r in results.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, unit, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, unit, *rows)
    ]
    lines.insert(2, "-" * len(lines[0]))
    return "\n".join(lines)


def plot_energies(trajectories: dict[str, Trajectory], path: Path) -> None:
    """Total energy relative to the start (meV/atom) against time (fs), one line a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, trajectory in trajectories.items():
        shift = 1e3 * (trajectory.energies - trajectory.energies[0])
        axes.plot(trajectory.times, shift, lw=0.8, label=f"{name}: {trajectory.drift[0]:+.4f} meV/atom/ps")
    axes.set_xlabel("time (fs)")
    axes.set_ylabel("change of total energy (meV/atom)")
    axes.set_title(f"trans-azobenzene, NVE from {TEMPERATURE:g} K velocities, {TIMESTEP:g} fs steps")
    axes.legend()
    figure.savefig(path, dpi=150)


def prepare_data(directory: Path, train_frames: int, test_frames: int, seed: int) -> list[Atoms]:
    """The test structures; both sets are made first unless files of the wanted size are there already."""
    from gaq.physics.errors import read_structures

    files = {directory / "train.xyz": train_frames, directory / "test.xyz": test_frames}
    if all(path.is_file() and len(read_structures(path)) == frames for path, frames in files.items()):
        print(f"using the data set in {directory}")
    else:
        make_dataset(directory, train=train_frames, test=test_frames, seed=seed)
    return read_structures(directory / "test.xyz")


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """Run every stage.

    Args:
        argv: command-line arguments; those of the process if None.

    Returns:
        The row of each model.
    """
    parser = argparse.ArgumentParser(description="Train MACE with and without GAQ and compare the two.")
    parser.add_argument("--directory", type=Path, default=Path("quickstart"), help="output directory")
    parser.add_argument("--train", type=int, default=800, help="number of training structures")
    parser.add_argument("--test", type=int, default=100, help="number of test structures")
    parser.add_argument("--epochs", type=int, default=20, help="training epochs of each model")
    parser.add_argument("--md-fs", type=float, default=1000.0, help="length of the dynamics in fs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    for option in ("train", "test", "epochs", "md_fs"):
        if getattr(arguments, option) <= 0:
            parser.error(f"--{option.replace('_', '-')} must be positive, got {getattr(arguments, option)}")
    # Batches of 24-atom molecules are too small to share out: more threads mostly wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    directory = arguments.directory.resolve()
    test = prepare_data(directory, arguments.train, arguments.test, arguments.seed)
    configs = write_training_files(directory, arguments.epochs, arguments.device, arguments.seed)
    models = {name: train(config, arguments.epochs) for name, config in configs.items()}

    start = min(test, key=lambda atoms: atoms.info["REF_energy"]).copy()
    draw_velocities(start, TEMPERATURE, np.random.default_rng(arguments.seed))
    print()
    results, trajectories = {}, {}
    for name, model in models.items():
        results[name], trajectories[name] = evaluate(
            model, models["fp32"], test, start, arguments.md_fs, arguments.device
        )
    table = {name: asdict(result) for name, result in results.items()}
    (directory / "comparison.json").write_text(json.dumps(table, indent=2) + "\n")
    plot_energies(trajectories, directory / "nve.png")
    print(f"\n{format_table(results)}\n\nwritten to {directory / 'comparison.json'} and {directory / 'nve.png'}")
    return results


if __name__ == "__main__":
    main()
