"""The console scripts for training and for LAMMPS."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mace", reason="needs MACE: pip install '.[mace]'")

import torch
from ase.neighborlist import neighbor_list

from gaq.model.state import feature_quantizers
from gaq_mace import files
from gaq_mace.commands import create_lammps_model

LOAD = """
import pickle, sys
import mace
import numpy as np
import torch
class Data:
    def __init__(self, inputs):
        self.__dict__.update(inputs)
        self.eatoms = np.zeros(self.nlocal)
    def forward_exchange(self, source, target, length):
        # Ghosts take the features of the atoms they are images of.
        target[: self.nlocal] = source[: self.nlocal]
        target[self.nlocal :] = source[self.owners]
    def reverse_exchange(self, source, target, length):
        target.copy_(source)
        target[self.nlocal :] = 0
        target.index_add_(0, torch.as_tensor(self.owners), source[self.nlocal :])
    def update_pair_forces_gpu(self, forces):
        self.pair_forces = forces.detach().numpy()
def run(path, inputs):
    model = torch.load(path, map_location="cpu", weights_only=False)
    data = Data(inputs)
    model.compute_forces(data)
    return data.energy, data.pair_forces, model
"""


def lammps_inputs(atoms: Any, model: torch.nn.Module) -> dict[str, Any]:
    """What LAMMPS hands over for a structure: pairs, and ghost atoms for the images of a periodic one."""
    i, j, vectors, shifts = neighbor_list("ijDS", atoms, float(model.r_max))
    keys = [(int(b), *map(int, s)) for b, s in zip(j, shifts, strict=True)]
    ghosts = sorted({key for key in keys if any(key[1:])})
    place = {key: len(atoms) + n for n, key in enumerate(ghosts)}
    numbers = [int(z) for z in model.atomic_numbers]
    elements = np.array([numbers.index(z) for z in atoms.numbers])
    owners = np.array([key[0] for key in ghosts], dtype=np.int64)
    order = np.argsort(i, kind="stable")
    return {
        "nlocal": len(atoms),
        "ntotal": len(atoms) + len(ghosts),
        "npairs": len(i),
        "elems": np.concatenate([elements, elements[owners]]),
        "rij": vectors[order],
        "pair_i": i[order],
        "pair_j": np.array([place.get(key, key[0]) for key in keys])[order],
        "owners": owners,
    }


def atom_forces(inputs: dict[str, Any], pair_forces: np.ndarray) -> np.ndarray:
    """Forces on atoms from those along pairs, ghosts included."""
    forces = np.zeros((inputs["nlocal"], 3))
    owners = np.concatenate([np.arange(inputs["nlocal"]), inputs["owners"]])
    np.add.at(forces, owners[inputs["pair_i"]], pair_forces)
    np.add.at(forces, owners[inputs["pair_j"]], -pair_forces)
    return forces


@pytest.fixture(scope="module")
def written(quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the content of the file of a quantized model."""
    folder = tmp_path_factory.mktemp("written")

    @cache
    def content(suffix: str, *arguments: Any) -> bytes:
        path = folder / f"small{suffix}"
        files.save(quantized(*arguments), path)
        return path.read_bytes()

    return content


@pytest.fixture
def saved(written: Any, tmp_path: Path) -> Any:
    """A function that stores a quantized model and gives its path."""

    def save(*arguments: Any, suffix: str = ".model") -> Path:
        path = tmp_path / f"small{suffix}"
        path.write_bytes(written(suffix, *arguments))
        return path

    return save


def expected(path: Path, atoms: Any, dtype: str, head: str | None = None) -> tuple[float, np.ndarray]:
    """Energy and forces by MACE's calculator."""
    from mace.calculators import MACECalculator

    options = {} if head is None else {"head": head}
    calculator = MACECalculator(models=[files.load(path)], device="cpu", default_dtype=dtype, **options)
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms.get_potential_energy(), atoms.get_forces()


@pytest.mark.parametrize(("preset", "dtype"), [("gaq", "float64"), ("w8a8", "float32"), ("w4", "float64")])
@pytest.mark.smoke
def test_mliap(
    preset: str, dtype: str, saved: Any, structures: Any, crystal: Any, capsys: pytest.CaptureFixture
) -> None:
    path = saved(preset)
    assert create_lammps_model([str(path), "--format", "mliap", "--dtype", dtype]) == 0
    printed = capsys.readouterr().out
    assert "preset" in printed
    assert ("no features are rounded" if preset == "w4" else "features are rounded in") in printed
    assert "LAMMPS runs it through the fused kernels" in printed
    assert "fix pad all property/atom d2_pad 35 ghost yes" in printed  # 8x0e+8x1o and three species
    target = Path(f"{path}-mliap_lammps.pt")
    space: dict[str, Any] = {}
    exec(LOAD, space)
    for atoms in (structures[0], crystal):
        inputs = lammps_inputs(atoms, files.load(path))
        energy, pair_forces, loaded = space["run"](target, inputs)
        assert bool(feature_quantizers(loaded.model.model)) == (preset != "w4")
        assert loaded.config.allow_cpu
        reference = expected(path, atoms, dtype)
        small = 1e-9 if dtype == "float64" else 1e-5
        assert energy == pytest.approx(reference[0], rel=small)
        # A vector rounded the other way for a difference in the last place of a float32 moves a force by a step.
        loose = 1e-7 if dtype == "float64" else 3e-2
        np.testing.assert_allclose(atom_forces(inputs, pair_forces), reference[1], atol=loose)


@pytest.mark.slow
def test_mliap_file_is_packed_and_loads_without_the_plugin(
    saved: Any, quantized: Any, structures: Any, python: Any, tmp_path: Path
) -> None:
    path = saved("gaq")
    target = tmp_path / "lammps.pt"
    assert create_lammps_model([str(path), "--format", "mliap", "-o", str(target)]) == 0
    assert not Path(f"{path}-mliap_lammps.pt").exists()
    with zipfile.ZipFile(target) as archive:
        pickles = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    assert b"gaq." not in pickles
    assert b"gaq_mace" not in pickles
    inputs = lammps_inputs(structures[0], files.load(path))
    (tmp_path / "inputs.pkl").write_bytes(pickle.dumps(inputs))
    code = LOAD + (
        "energy, forces, model = run(sys.argv[1], pickle.load(open(sys.argv[2], 'rb')))\n"
        "print('RESULT', energy, any('Quantizer' in type(m).__name__ for m in model.model.modules()))\n"
    )
    got = {}
    for plugin in ("1", "0"):
        done = python(code, target, tmp_path / "inputs.pkl", TORCH_DEVICE_BACKEND_AUTOLOAD=plugin)
        assert "RESULT" in done.stdout, done.stderr[-2000:]
        got[plugin] = done.stdout.split("RESULT")[1].split()
    assert got["1"][1] == "True"
    assert got["0"][1] == "False"
    assert float(got["1"][0]) == pytest.approx(expected(path, structures[0], "float64")[0], rel=1e-12)
    # Without the plugin: the same rounded weights, with exact features.
    plain = quantized("gaq")
    from gaq.model.state import unquantized

    with unquantized(plain):
        from mace.calculators import MACECalculator

        atoms = structures[0].copy()
        atoms.calc = MACECalculator(models=[plain], device="cpu", default_dtype="float64")
        energy = atoms.get_potential_energy()
    assert float(got["0"][0]) == pytest.approx(energy, rel=1e-12)


@pytest.mark.parametrize(("preset", "suffix"), [("gaq", ".model"), ("w8", ".model"), ("w8a8", ".safetensors")])
@pytest.mark.smoke
def test_libtorch(preset: str, suffix: str, saved: Any, structures: Any, capsys: pytest.CaptureFixture) -> None:
    from mace import data
    from mace.tools import torch_geometric, utils

    path = saved(preset, suffix=suffix)
    assert create_lammps_model([str(path)]) == 0
    assert f"Wrote {path}-lammps.pt (libtorch, float64" in capsys.readouterr().out
    model = torch.jit.load(f"{path}-lammps.pt")
    atoms = structures[0]
    energy, forces = expected(path, atoms, "float64")
    torch.set_default_dtype(torch.float64)
    table = utils.AtomicNumberTable([int(z) for z in model.atomic_numbers])
    item = data.AtomicData.from_config(
        data.config_from_atoms(atoms), z_table=table, cutoff=float(files.load(path).r_max)
    )
    batch = next(iter(torch_geometric.dataloader.DataLoader([item], batch_size=1))).to_dict()
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    tensors["positions"].requires_grad_(True)
    out = model(tensors, torch.ones(len(atoms)), False)
    assert out["total_energy_local"].item() == pytest.approx(energy, rel=1e-10)
    np.testing.assert_allclose(out["forces"].numpy(), forces, atol=1e-8)


def test_heads(saved: Any, structures: Any, capsys: pytest.CaptureFixture) -> None:
    path = saved("gaq", "heads")
    assert create_lammps_model([str(path), "--format", "mliap"]) == 2
    assert "the model has the heads Default, other: choose one with --head" in capsys.readouterr().err
    assert not list(path.parent.glob("*.pt*"))
    space: dict[str, Any] = {}
    exec(LOAD, space)
    inputs = lammps_inputs(structures[0], files.load(path))
    energies = {}
    for head in ("Default", "other"):
        target = path.parent / f"{head}.pt"
        assert create_lammps_model([str(path), "--format", "mliap", "--head", head, "-o", str(target)]) == 0
        energies[head] = space["run"](target, inputs)[0]
        assert energies[head] == pytest.approx(expected(path, structures[0], "float64", head)[0], rel=1e-9)
    assert abs(energies["Default"] - energies["other"]) > 0.1


def test_float_model(float_model: Any, tmp_path: Path, structures: Any, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "float.model"
    torch.save(float_model(), path)
    assert create_lammps_model([str(path), "--format", "mliap"]) == 0
    assert "The model is not quantized." in capsys.readouterr().out
    space: dict[str, Any] = {}
    exec(LOAD, space)
    inputs = lammps_inputs(structures[0], files.load(path))
    energy = space["run"](f"{path}-mliap_lammps.pt", inputs)[0]
    assert energy == pytest.approx(expected(path, structures[0], "float64")[0], rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.model"], "missing.model: no such file."),
        (["bad.model"], "bad.model: truncated, damaged, or not a MACE model"),
        (["small.model", "--head", "third"], "--head third: no such head; the model has Default."),
        (["small.model", "-o", "nowhere/lammps.pt"], "the folder nowhere does not exist"),
        (["small.model", "-o", "."], "is a folder; give the name of a file"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    saved: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    saved("w8")
    monkeypatch.chdir(tmp_path)
    Path("bad.model").write_bytes(b"nothing of the kind")
    before = sorted(tmp_path.rglob("*"))
    assert create_lammps_model(arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["x.model", "--dtype", "float16"], ["x.model", "--format", "onnx"], []])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        create_lammps_model(arguments)
    assert stopped.value.code == 2
    assert "usage: gaq_mace_create_lammps_model" in capsys.readouterr().err


def test_nothing_is_left_when_writing_fails(
    saved: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = saved("w8")

    def fail(*arguments: Any, **options: Any) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    assert create_lammps_model([str(path), "--format", "mliap"]) == 2
    assert "no space left" in capsys.readouterr().err
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_scripts_are_installed() -> None:
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONWARNINGS": "ignore"}
    script = Path(sys.executable).parent / "gaq_mace_train"
    done = subprocess.run([script, "--help"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--quantization" in done.stdout
