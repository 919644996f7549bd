"""Shared by the quickstarts: options, data set, dynamics, measurements, table and plot."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from xtb_dataset import WARM_UP_FRAMES, draw_velocities, make_dataset

if TYPE_CHECKING:
    from gaq.checks.nve import NVEResult

MODELS = ("fp32", "gaq")
TIMESTEP = 0.5  # fs
TEMPERATURE = 300.0  # K, of the velocities the dynamics starts with
LEE_STRUCTURES = 20

QUICK = {"train": 40, "test": 10, "warm_up": 5, "epochs": 10, "md_fs": 20.0}
"""Defaults with ``--quick``: every stage, on too little data for its numbers to mean anything."""


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
        drift_standard_error: standard error of that slope, in its unit.
        ms_per_step: median wall time of one molecular dynamics step.
        times_faster: that of the FP32 model over that of this one.
    """

    force_mae_mev_per_angstrom: float
    energy_mae_mev_per_atom: float
    file_bytes: int
    size_ratio: float
    lee_mev_per_angstrom: float
    drift_mev_per_atom_per_ps: float
    drift_standard_error: float
    ms_per_step: float
    times_faster: float


@dataclass(frozen=True)
class Stage:
    """What a stage of a quickstart took.

    Attributes:
        name: what was done.
        minutes: wall time.
        processor_minutes: time of all processor cores together, commands that the stage started included.
        load: average number of processes that wanted a core in the minute before its end, this one included.
    """

    name: str
    minutes: float
    processor_minutes: float
    load: float


class Stages(list[Stage]):
    """The stages of a quickstart in order, each measured by ``with stages.measured(name):``."""

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Measure the block as a stage of this name."""
        start, processor = time.monotonic(), sum(os.times()[:4])
        yield
        spent = sum(os.times()[:4]) - processor
        self.append(Stage(name, (time.monotonic() - start) / 60, spent / 60, os.getloadavg()[0]))

    def __str__(self) -> str:
        each = ", ".join(f"{stage.name} {stage.minutes:.1f}" for stage in self)
        return f"{sum(stage.minutes for stage in self):.1f} minutes ({each})"


def parse_arguments(
    description: str, directory: str, epochs: int, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options of a quickstart; exits with a message if one is out of range.

    Args:
        description: description of the script, for its help.
        directory: default output directory.
        epochs: default number of training epochs.
        argv: command-line arguments; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--directory", type=Path, default=Path(directory), help="output directory")
    parser.add_argument("--train", type=int, default=800, help="number of training structures")
    parser.add_argument("--test", type=int, default=100, help="number of test structures")
    parser.add_argument(
        "--warm-up", type=int, default=WARM_UP_FRAMES, help="frames discarded at the start of the data's dynamics"
    )
    parser.add_argument("--epochs", type=int, default=epochs, help="training epochs of each model")
    parser.add_argument("--md-fs", type=float, default=1000.0, help="length of the dynamics in fs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    shortened = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in QUICK.items())
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"run every stage in minutes, on too little data for the numbers to mean anything: {shortened}",
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        parser.set_defaults(**QUICK)
        arguments = parser.parse_args(argv)
    for option in ("train", "test", "epochs", "md_fs"):
        if getattr(arguments, option) <= 0:
            parser.error(f"--{option.replace('_', '-')} must be positive, got {getattr(arguments, option)}")
    # Batches of 24-atom molecules are too small for several threads, which mostly wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return arguments


def console_script(name: str, package: str, extra: str) -> str:
    """Path of a command in the environment of this Python, whichever comes first on PATH.

    Args:
        name: name of the command.
        package: package that brings it, as its authors write the name.
        extra: extra of this project that installs it.

    Raises:
        SystemExit: if the command is not there.
    """
    command = shutil.which(name, path=str(Path(sys.executable).parent))
    if command is None:
        raise SystemExit(
            f"There is no {name} beside {sys.executable}.\n"
            f"Install {package} with:  pip install '.[{extra},examples]'\n"
            "MACE and NequIP need different versions of e3nn, so each needs an environment of its own."
        )
    return command


def prepare_data(
    directory: Path, train_frames: int, test_frames: int, seed: int, warm_up: int = WARM_UP_FRAMES
) -> list[Atoms]:
    """The test structures. Makes both sets first, unless files with these numbers of frames are there."""
    from gaq.checks.errors import read_structures

    files = {directory / "train.xyz": train_frames, directory / "test.xyz": test_frames}
    if all(path.is_file() and len(read_structures(path)) == frames for path, frames in files.items()):
        print(f"using the data set in {directory}")
    else:
        make_dataset(directory, train=train_frames, test=test_frames, seed=seed, warm_up=warm_up)
    return read_structures(directory / "test.xyz")


def starting_structure(test: list[Atoms], seed: int) -> Atoms:
    """The test structure of lowest energy, with velocities of `TEMPERATURE`."""
    start = min(test, key=lambda atoms: atoms.info["REF_energy"]).copy()
    draw_velocities(start, TEMPERATURE, np.random.default_rng(seed))
    return start


def run_nve(calculator: Any, start: Atoms, length: float) -> NVEResult:
    """Constant-energy dynamics with the velocity Verlet algorithm, sampled at every step.

    Args:
        calculator: an ASE calculator.
        start: structure with velocities; left unchanged.
        length: length in fs. At least ten steps are run, since fewer give no standard error.
    """
    from gaq.checks.nve import nve_drift

    return nve_drift(
        calculator,
        start,
        duration_ps=1e-3 * max(length, 10 * TIMESTEP),
        timestep_fs=TIMESTEP,
        sample_fs=TIMESTEP,
        check_bonds=False,
        keep_velocities=True,
        progress=True,
    )


def measure(
    model: Path, reference: Result | None, test: list[Atoms], start: Atoms, length: float, device: str
) -> tuple[Result, NVEResult]:
    """Errors, symmetry, size, dynamics and speed of one model file in the stock calculator.

    Args:
        model: the file.
        reference: the row of the FP32 model, for the ratios of size and speed; None for that model itself.
        test: structures with ``REF_energy`` (eV) and ``REF_forces`` (eV/Å).
        start: structure and velocities for the dynamics.
        length: length of the dynamics, in fs.
        device: ``cpu`` or ``cuda``.

    Returns:
        The row of the table and the trajectory.
    """
    from gaq.reporting import open_file, quality

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading a model warns of its pickle and TorchScript parts
        subject = open_file(model, device, through_calculator=True)
    metrics = quality(subject, test, rotated=test[:LEE_STRUCTURES]).metrics
    trajectory = run_nve(subject.calculator, start, length)
    size, ms = model.stat().st_size, 1e3 * trajectory.seconds_per_step
    return (
        Result(
            force_mae_mev_per_angstrom=metrics["force_mae_mev_per_angstrom"],
            energy_mae_mev_per_atom=metrics["energy_mae_mev_per_atom"],
            file_bytes=size,
            size_ratio=reference.file_bytes / size if reference else 1.0,
            lee_mev_per_angstrom=metrics["lee_mev_per_angstrom"],
            drift_mev_per_atom_per_ps=trajectory.drift_mev_per_atom_per_ps,
            drift_standard_error=trajectory.standard_error,
            ms_per_step=ms,
            times_faster=reference.ms_per_step / ms if reference else 1.0,
        ),
        trajectory,
    )


def compare(models: dict[str, Path], test: list[Atoms], arguments: argparse.Namespace, stages: Stages) -> list[Result]:
    """Measure the models, write ``comparison.json`` and ``nve.png`` to the folder of the quickstart, print the table.

    Args:
        models: the file of each of `MODELS`, FP32 first.
        test: see `measure`.
        arguments: what `parse_arguments` returned.
        stages: those before this one.

    Returns:
        The row of each model.
    """
    start = starting_structure(test, arguments.seed)
    results: dict[str, Result] = {}
    trajectories: dict[str, NVEResult] = {}
    print()
    for name, model in models.items():
        print(f"measuring {name}")
        with stages.measured(f"measuring {name}"):
            results[name], trajectories[name] = measure(
                model, results.get("fp32"), test, start, arguments.md_fs, arguments.device
            )
    write_comparison(arguments.directory.resolve(), results, trajectories, stages)
    return list(results.values())


def format_table(results: dict[str, Result]) -> str:
    """The comparison as text, one row for each model."""
    head = ("model", "force MAE", "energy MAE", "file", "smaller", "LEE", "NVE drift", "step", "faster")
    unit = ("", "meV/Å", "meV/atom", "KB", "by", "meV/Å", "meV/atom/ps", "ms", "by")
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
            f"{r.times_faster:.1f}x",
        )
        for name, r in results.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, unit, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, unit, *rows)
    ]
    lines.insert(2, "-" * len(lines[0]))
    return "\n".join(lines)


def plot_energies(trajectories: dict[str, NVEResult], path: Path) -> None:
    """Total energy relative to the start (meV/atom) against time (fs), one line for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, trajectory in trajectories.items():
        shift = 1e3 * (trajectory.total_energy_ev - trajectory.total_energy_ev[0]) / trajectory.n_atoms
        label = f"{name}: {trajectory.drift_mev_per_atom_per_ps:+.4f} meV/atom/ps"
        axes.plot(1e3 * trajectory.times_ps, shift, lw=0.8, label=label)
    axes.set_xlabel("time (fs)")
    axes.set_ylabel("change of total energy (meV/atom)")
    axes.set_title(f"trans-azobenzene, NVE from {TEMPERATURE:g} K velocities, {TIMESTEP:g} fs steps")
    axes.legend()
    figure.savefig(path, dpi=150)


def write_comparison(
    directory: Path, results: dict[str, Result], trajectories: dict[str, NVEResult], stages: Stages
) -> None:
    """Write ``comparison.json`` and ``nve.png`` to a folder, and print the table and what the stages took."""
    from gaq.reporting.environment import hardware, versions

    content = {
        "models": {name: asdict(result) for name, result in results.items()},
        "stages": [asdict(stage) for stage in stages],
        "hardware": hardware(),
        "versions": versions(),
        "command": shlex.join(["python", *sys.argv]),
    }
    (directory / "comparison.json").write_text(json.dumps(content, indent=2) + "\n")
    plot_energies(trajectories, directory / "nve.png")
    print(f"\n{format_table(results)}\n\nwritten to {directory / 'comparison.json'} and {directory / 'nve.png'}")
    print(f"took {stages}")
