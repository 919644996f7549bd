"""Files of quantized NequIP models: checkpoints and packages, with the plugin and without, whole and damaged."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import numpy as np
import torch

import gaq
from gaq.adapter import adapter_for_file
from gaq.cli import main
from gaq.model.state import ModelFileError, state_of
from gaq_nequip import files
from gaq_nequip.weights import quantized_weights

WITHOUT_PLUGIN = """
import importlib.metadata as metadata, sys
real = metadata.entry_points
def entry_points(**keys):
    entries = real(**keys)
    if keys.get("group") == "nequip.extension":
        entries = metadata.EntryPoints(e for e in entries if not e.value.startswith("gaq"))
    return entries
metadata.entry_points = entry_points
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gaq", "gaq_nequip"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""

ENERGIES = """
import sys, warnings
warnings.simplefilter("ignore")
import logging
logging.disable(logging.INFO)
from ase.io import read
from nequip.integrations.ase import NequIPCalculator
path = sys.argv[1]
if path.endswith(".pt2"):
    calculator = NequIPCalculator.from_compiled_model(path, chemical_species_to_atom_type_map=True)
else:
    calculator = NequIPCalculator._from_saved_model(path, chemical_species_to_atom_type_map=True)
assert not [name for name in sys.modules if name.split(".")[0] in ("gaq", "gaq_nequip")]
for atoms in read(sys.argv[2], ":"):
    atoms.calc = calculator
    print("ENERGY", atoms.get_potential_energy(), *atoms.get_forces().ravel())
"""


def run_without_plugin(path: Path, structures: Path) -> np.ndarray:
    """Energies and forces by stock NequIP, in a process where this package cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN + ENERGIES, str(path), str(structures)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ENERGY")]
    return np.concatenate([np.array(line, dtype=float) for line in lines])


def by_calculator(calculator: Any, structures: list[Any]) -> np.ndarray:
    """Energy and forces of each structure, flat."""
    values = []
    for atoms in structures:
        copied = atoms.copy()
        copied.calc = calculator
        values += [copied.get_potential_energy(), *copied.get_forces().ravel()]
    return np.array(values)


@pytest.fixture(scope="session")
def frames(trained: Any) -> list[Any]:
    from ase.io import read

    return list(read(trained.folder / "test.xyz", ":"))


@pytest.fixture(scope="session")
def quantized_file(trained_float: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``quantized_file(suffix)``: the float checkpoint, quantized to w8 by the command."""
    folder = tmp_path_factory.mktemp("files")
    made: dict[str, Path] = {}

    def get(suffix: str) -> Path:
        if suffix not in made:
            path = folder / f"model{suffix}"
            spec = "{preset: w8, distillation: {steps: 20, max_structures: 16}}"
            data = str(trained_float.folder / "train.xyz")
            arguments = ["quantize", str(trained_float.best), "--config", spec, "-o", str(path), "--force"]
            code = main([*arguments, "--calibration", data])
            assert code in (0, 1)
            made[suffix] = path
        return made[suffix]

    return get


@pytest.mark.smoke
def test_stock_package_of_a_trained_checkpoint(
    trained: Any, command: Callable[..., Any], frames: list[Any], tmp_path: Path
) -> None:
    """`nequip-package build` on a checkpoint of quantization-aware training, used without the plugin, then frozen."""
    path = tmp_path / "qat.nequip.zip"
    done = command("nequip-package", "build", trained.best, path, cwd=trained.folder)
    assert done.returncode == 0, done.stderr
    expected = by_calculator(adapter_for_file(trained.best).calculator(trained.best), frames)
    assert np.allclose(run_without_plugin(path, trained.folder / "test.xyz"), expected, atol=2e-5)
    names = zipfile.ZipFile(path).namelist()
    assert any(name.endswith("gaq_nequip/layers.py") for name in names)
    assert not any("yaml" in name and name.endswith(".py") for name in names)
    info = command("nequip-package", "info", path, "--get-modifiers")
    assert "enable_GAQInt8" in info.stdout
    model = gaq.load(path)
    assert state_of(model).config.preset == "w8a16"
    frozen = tmp_path / "frozen.nequip.zip"
    gaq.save(model, frozen)
    assert frozen.stat().st_size < path.stat().st_size / 3
    without_plugin = run_without_plugin(frozen, trained.folder / "test.xyz")
    assert np.allclose(without_plugin, expected, atol=5e-3)
    assert state_of(gaq.load(frozen)).status == "frozen"
    assert "folded by type" in gaq.summary(gaq.load(frozen))


def weight_bytes(model: Any) -> int:
    from gaq.adapter import adapter_for

    return sum(row.bytes for row in adapter_for(model).rows(model))


@pytest.mark.parametrize("suffix", [".ckpt", ".nequip.zip"])
@pytest.mark.smoke
def test_quantize_command(
    quantized_file: Callable[[str], Path], trained_float: Any, frames: list[Any], suffix: str
) -> None:
    path = quantized_file(suffix)
    model = gaq.load(path)
    state = state_of(model)
    assert state.config.preset == "w8"
    assert state.status == ("converted" if suffix == ".ckpt" else "frozen")
    distilled = state.notes["distillation"]
    names = [f"force_rms_{name}_mev_per_angstrom" for name in ("before", "after", "target")]
    before, after, target = (distilled[name] for name in names)
    assert after <= before
    assert (distilled["steps"] == 0) == (before <= target)
    # A checkpoint stores float weights, and is judged by its codes and scales; so is a package against a checkpoint.
    size = state.notes["gates"]["file_size_ratio"]
    assert size["passed"]
    assert size["enforced"]
    assert size["value"] == pytest.approx(weight_bytes(gaq.load(trained_float.best)) / weight_bytes(model), rel=1e-12)
    assert state.notes["gates"]["lee_against_naive"]["passed"]
    calculator = adapter_for_file(path).calculator(path)
    floats = adapter_for_file(trained_float.best).calculator(trained_float.best)
    rounded, exact = by_calculator(calculator, frames), by_calculator(floats, frames)
    assert 0 < np.abs(rounded - exact).max() < 0.1
    # In a package the self-connection, whose codes have 4 bits, is folded.
    assert {q.bits for q in quantized_weights(model).values()} == ({4, 10, 16} if suffix == ".ckpt" else {10, 16})
    if suffix == ".nequip.zip":
        assert np.allclose(run_without_plugin(path, trained_float.folder / "test.xyz"), rounded, atol=2e-5)
        assert path.stat().st_size < 400_000
    else:
        stored = torch.load(path, map_location="cpu", weights_only=False)
        assert stored["optimizer_states"] == []
        assert stored["hyper_parameters"]["model"]["quantization"]["preset"] == "w8"


def test_both_forms_agree(quantized_file: Callable[[str], Path], frames: list[Any]) -> None:
    first, second = (
        by_calculator(adapter_for_file(path).calculator(path), frames)
        for path in (quantized_file(".ckpt"), quantized_file(".nequip.zip"))
    )
    # Two runs of the same command, and the fold.
    assert np.allclose(first, second, atol=2e-3)


def test_float_packages_can_be_quantized(
    trained_float: Any, command: Callable[..., Any], frames: list[Any], tmp_path: Path
) -> None:
    package = tmp_path / "float.nequip.zip"
    assert command("nequip-package", "build", trained_float.best, package, cwd=trained_float.folder).returncode == 0
    model = gaq.load(package)
    assert state_of(model) is None
    spec = {"preset": "gaq", "distillation": {"steps": 4}}
    quantized = gaq.quantize(model, frames, spec, progress=False)
    path = tmp_path / "gaq.nequip.zip"
    gaq.save(quantized, path)
    expected = by_calculator(adapter_for_file(path).calculator(path), frames)
    assert np.allclose(run_without_plugin(path, trained_float.folder / "test.xyz"), expected, atol=2e-5)
    assert package.stat().st_size / path.stat().st_size > 3
    with pytest.raises(ValueError, match="a checkpoint can only be made from a checkpoint"):
        gaq.save(quantized, tmp_path / "gaq.ckpt")
    assert not (tmp_path / "gaq.ckpt").exists()


def test_inspect_and_report(
    quantized_file: Callable[[str], Path], trained_float: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = quantized_file(".nequip.zip")
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "preset w8, frozen" in out
    assert "folded by type" in out
    data = str(trained_float.folder / "test.xyz")
    arguments = ["report", str(path), "--reference", str(trained_float.best), "--data", data, "--nve-ps", "0.02"]
    code = main([*arguments, "-o", str(tmp_path / "report")])
    assert code in (0, 1)
    assert (tmp_path / "report" / "report.json").is_file()
    assert main(["inspect", str(trained_float.best)]) == 0
    assert "a float model" in capsys.readouterr().out


@pytest.mark.slow
def test_packages_are_compared_with_packages(
    quantized_file: Callable[[str], Path], trained_float: Any, command: Callable[..., Any], tmp_path: Path
) -> None:
    package = tmp_path / "float.nequip.zip"
    assert command("nequip-package", "build", trained_float.best, package, cwd=trained_float.folder).returncode == 0
    path = quantized_file(".nequip.zip")
    from ase.io import read

    report = gaq.report(path, read(trained_float.folder / "test.xyz", ":2"), package, progress=False)
    assert (report["model"]["file_kind"], report["reference"]["file_kind"]) == ("package", "package")
    assert report["gates"]["file_size_ratio"]["value"] == package.stat().st_size / path.stat().st_size
    assert "engine" not in report["gates"]  # nothing can measure it in a package


def test_trained_models_are_held_to_their_own_bound(
    trained: Any, quantized_file: Callable[[str], Path], trained_float: Any, tmp_path: Path
) -> None:
    """Checkpoints of a training say that they are; other files can be said to be."""
    package, data = str(quantized_file(".nequip.zip")), str(trained_float.folder / "test.xyz")
    for path, options, bound in (
        (package, [], 1.02),
        (package, ["--trained"], 1.00),
        (str(trained.best), [], 1.00),
    ):
        rest = ["--reference", str(trained_float.best), "--data", data, "--nve-ps", "0", "--frames", "2", *options]
        assert main(["report", path, *rest, "-o", str(tmp_path / "report")]) in (0, 1)
        gates = json.loads((tmp_path / "report" / "report.json").read_text())["gates"]
        assert gates["force_mae_ratio"]["bound"] == bound


def test_files_of_other_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    with pytest.raises(
        ModelFileError,
        match=r"model\.pt: a text file, not a model file of NequIP \(\.ckpt",
    ):
        files.load(path)


def test_newer_files_are_refused(trained: Any, tmp_path: Path) -> None:
    model = gaq.load(trained.best)
    state_of(model).notes["meta"]["format"] = 99
    gaq.save(model, tmp_path / "newer.ckpt")
    with pytest.raises(ModelFileError, match="format 99"):
        gaq.load(tmp_path / "newer.ckpt")


def test_saving_needs_a_source(quantized: Callable[..., Any], trained_float: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the file this model came from is not known"):
        gaq.save(quantized("w8"), tmp_path / "a.nequip.zip")
    model = gaq.load(trained_float.best)
    with pytest.raises(ValueError, match="not quantized"):
        files.save(copy.deepcopy(model), tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        gaq.save(gaq.prepare(model, "w8"), tmp_path / "nowhere" / "a.ckpt")
    with pytest.raises(ValueError, match="nequip-deploy build"):
        gaq.save(model, tmp_path / "a.nequip.pt2")
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_higher_degrees_loads_in_stock_nequip(train: Callable[..., Any], tmp_path: Path) -> None:
    """e3nn's generated code holds constants at l = 2, which are buffers in one process and not in another."""
    from ase.io import read
    from nequip.integrations.ase import NequIPCalculator

    def changes(config: Any) -> None:
        config["trainer"]["max_epochs"] = 1
        config["training_module"]["model"].update(l_max=2, parity=True, num_features=4)

    run = train(tmp_path / "run", changes)
    assert run.code == 0, run.text
    frames = read(run.folder / "test.xyz", ":")
    spec = {"preset": "w8", "distillation": {"steps": 0}}
    path = tmp_path / "out.ckpt"
    gaq.save(gaq.quantize(gaq.load(run.best), frames, spec, progress=False), path)
    calculator = NequIPCalculator._from_saved_model(str(path), chemical_species_to_atom_type_map=True)
    assert np.isfinite(by_calculator(calculator, list(frames))).all()


def test_unknown_elements_and_empty_data(
    trained_float: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ase.build import molecule
    from ase.io import write

    write(tmp_path / "other.xyz", [molecule("NH3")])
    output = tmp_path / "out.ckpt"
    arguments = ["quantize", str(trained_float.best), "-o", str(output), "--calibration"]
    assert main([*arguments, str(tmp_path / "other.xyz")]) == 2
    assert "has N, which the model does not know; its elements are H, C, O" in capsys.readouterr().err
    (tmp_path / "empty.xyz").write_text("")
    assert main([*arguments, str(tmp_path / "empty.xyz")]) == 2
    assert not output.exists()


@pytest.mark.smoke
def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "nequip-train knows the key `quantization`" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["renamed", "missing", "extra", "reshaped"])
def test_checkpoints_of_another_nequip(trained: Any, tmp_path: Path, change: str) -> None:
    """A tensor that the model or the file lacks is named, with the versions that wrote the file."""
    from importlib.metadata import version

    path = tmp_path / "other.ckpt"
    checkpoint = torch.load(trained.best, map_location="cpu", weights_only=False)
    entries = checkpoint["state_dict"]
    name = next(name for name in entries if name.startswith("model.") and name.endswith("weight"))
    value = entries[name]
    if change in ("renamed", "missing"):
        del entries[name]
    if change in ("renamed", "extra"):
        entries[f"{name}_of_another_name"] = value
    if change == "reshaped":
        entries[name] = torch.cat((value, value))
    torch.save(checkpoint, path)
    with pytest.raises(ModelFileError) as caught:
        gaq.load(path)
    message = str(caught.value)
    for word in (str(path), name, f"nequip {version('nequip')}", "pip install nequip=="):
        assert word in message, message
    assert "\n" not in message


def test_a_checkpoint_that_was_overwritten_is_not_written_into(
    trained_float: Any, trained: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.ckpt"
    checkpoint = torch.load(trained_float.best, map_location="cpu", weights_only=False)
    torch.save(checkpoint, path)
    model = gaq.prepare(gaq.load(path), "w8")
    name = next(name for name in checkpoint["state_dict"] if name.startswith("model.") and name.endswith("weight"))
    checkpoint["state_dict"][f"{name}_of_another_name"] = checkpoint["state_dict"].pop(name)
    torch.save(checkpoint, path)
    with pytest.raises(ModelFileError, match="weight_of_another_name"):
        files.save(model, tmp_path / "out.ckpt")
