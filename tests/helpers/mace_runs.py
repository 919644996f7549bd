"""Runs of MACE's stock training command on shaken molecules, and what every quantized one owes its user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.io import read, write

from gaq.model.state import feature_quantizers, round_weights, state_of
from gaq.untyped import Document
from gaq_mace import files
from gaq_mace.engine import disabled
from gaq_mace.packed import build, model_config
from gaq_mace.root import ScaleShiftMACE

BASE: Document = {
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
# Steps of self-distillation at the end of a run cost more than all its epochs: as few as show that they are made.
BRIEF: Document = {"distillation": {"steps": 4, "batch_atoms": 16}}
GAQ: Document = {"preset": "gaq", "vectors": {"start_epoch": 1, "anneal_epochs": 1}, **BRIEF}
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
    settings: Document

    @property
    def model(self) -> Path:
        return self.folder / f"{self.settings['name']}.model"

    def table(self, row: str = "Default_Default", which: int = 0) -> tuple[float, float]:
        """Energy (meV/atom) and force (meV/Å) RMSE of a row of the test table."""
        text = self.log.split("Error-table on TEST:")[which + 1]
        match = re.search(rf"\| +{row} +\| +([\d.]+) +\| +([\d.]+) +\|", text)
        assert match, text[:1000]
        return float(match[1]), float(match[2])


def execute(folder: Path, settings: Document, command: Sequence[str] = ("mace_run_train",), **environment: str) -> Run:
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
    references = np.array([atoms.info["REF_energy"] for atoms in frames])
    energy = 1e3 * np.sqrt(np.mean(((references - energies) / sizes) ** 2))
    delta = np.concatenate([atoms.arrays["REF_forces"] - f for atoms, f in zip(frames, forces, strict=True)])
    force = 1e3 * np.sqrt(np.mean(delta**2))
    table = run.table(row, which)
    assert energy == pytest.approx(table[0], abs=0.06)
    assert force == pytest.approx(table[1], abs=0.06)


def training_form(run: Run, path: Path, suffix: str = "") -> torch.nn.Module:
    """The model as it was in training, from the last checkpoint."""
    packed = files.load(path)
    dtype = getattr(torch, run.settings["default_dtype"])
    model = build(model_config(packed), dtype)
    model.__class__ = ScaleShiftMACE
    pattern = f"{run.settings['name']}_run-{run.settings['seed']}_epoch-*{suffix}.pt"
    checkpoints = [p for p in (run.folder / "checkpoints").glob(pattern) if suffix or "_swa" not in p.name]
    latest = max(checkpoints, key=lambda p: int(re.findall(r"epoch-(\d+)", p.name)[0]))
    checkpoint = torch.load(latest, map_location="cpu", weights_only=False)
    model.load_state_dict(checkpoint["model"], strict=False)
    state = state_of(model)
    assert state is not None
    assert state.status == "training"
    return model


def rounding_errors(run: Run) -> list[tuple[float, float]]:
    """RMS force differences (meV/Å) to the float weights: after rounding, and where distillation ended, by stage."""
    found = re.findall(r"Weights rounded: .* ([\d.]+) meV/Å after rounding(?:, ([\d.]+) after [1-9])?", run.log)
    return [(float(before), float(after or before)) for before, after in found]


def check_same(run: Run, path: Path, suffix: str = "") -> None:
    """The packed file is the function that was trained, up to what its log says where weights were rounded at the
    end."""
    frames = read(run.folder / "test.xyz", ":")
    dtype = run.settings["default_dtype"]
    head = None if "heads" not in run.settings else files.load(path).heads[0]
    model = training_form(run, path, suffix)
    late = rounding_errors(run)
    # Scales of a checkpoint whose weights are rounded later are those of the beginning of its epoch.
    round_weights(model, not late)
    trained = results(model, frames, dtype, head)
    # By the same operations: in others a feature may fall on the other side of a step.
    with disabled():
        packed = results(path, frames, dtype, head)
    if late:
        difference = np.sqrt(np.mean((np.concatenate(packed[1]) - np.concatenate(trained[1])) ** 2))
        assert 0 < 1e3 * difference < 2 * late[-1 if suffix else 0][1] + 1
        shifts = np.abs(packed[0] - trained[0]) / [len(atoms) for atoms in frames]
        assert shifts.max() < 1e-3  # eV/atom
        return
    np.testing.assert_allclose(packed[0], trained[0], rtol=1e-6)
    for a, b in zip(packed[1], trained[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(np.abs(b).max())))


def check(
    run: Run, stock: Run | None = None, activations: bool = True, errors: bool = True, compiled: bool = True
) -> None:
    """What every successful quantized run owes its user."""
    assert run.code == 0, run.log[-4000:]
    late = "Weights are trained in float" in run.log
    table = re.split("Rounded in training|Weights are ", run.log.split("Quantized layers:")[1])[0]
    assert re.search(r"interactions\.0\.linear_up .*int\d+ per_", table)
    assert re.search(r"products\.0\.symmetric_contractions .*int\d+ per_", table)
    assert ("Rounded in training: weights when training is over" in run.log) == late
    assert ("Rounded in training: weights from epoch 0" in run.log) != late
    assert late == ("Weights rounded: RMS force difference to the float model" in run.log)
    if activations:
        assert "; vectors (l > 0) from epoch" in run.log
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


def losses(run: Run) -> list[str]:
    return re.findall(r"(?:Initial|Epoch \d+): head.*", run.log)
