"""Models whose types are not chemical symbols, and whose training data have moved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trained
from ase.io import write
from nequip_models import COMMON, VARIANTS
from nequip_runs import write_checkpoint

import gaq
from gaq import cli
from gaq.adapter import adapter_for
from gaq_nequip.calculator import compiled_calculator, saved_calculator
from gaq_nequip.deploy.cli import main as deploy
from gaq_nequip.species import species_in_file, species_of

SPECIES = {"H": "light", "C": "myC", "O": "O"}
BRIEF = {"preset": "gaq", "distillation": {"steps": 0}}
TARGETS = {"nequip": "nequip.model.NequIPGNNModel", "allegro": "allegro.model.AllegroModel"}


def moved(config: Any) -> None:
    """Training data that are no longer where the training found them."""
    config["data"]["split_dataset"]["file_path"] = "/nowhere/train.xyz"


def named(config: Any) -> None:
    """Types that have names of their own, which a map in the configuration of the data gives to elements."""
    moved(config)
    names = list(SPECIES.values())
    model = config["training_module"]["model"]
    for key in ("per_type_energy_scales", "per_type_energy_shifts"):
        if isinstance(model[key], dict):
            model[key] = {SPECIES[symbol]: value for symbol, value in model[key].items()}
    model["type_names"] = names
    config["data"]["stats_manager"]["type_names"] = names
    config["data"]["transforms"][0] |= {"model_type_names": names, "chemical_species_to_atom_type_map": SPECIES}


def unmapped(config: Any) -> None:
    """The same, without the map."""
    named(config)
    del config["data"]["transforms"][0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(edit, kind)``: a float model of ethanol's elements; Allegro's has random weights."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(edit: Callable[[Any], None], kind: str = "nequip") -> Path:
        path = folder / f"{kind}_{edit.__name__}.ckpt"
        if path.exists():
            return path
        if kind == "nequip":
            return write_checkpoint(path, {"_target_": TARGETS[kind], **trained.options("nequip")}, "nequip", edit)
        pytest.importorskip("allegro", reason="needs Allegro: pip install '.[allegro]'")
        return write_checkpoint(path, {**COMMON, **VARIANTS["allegro"], "_target_": TARGETS[kind]}, edit=edit)

    return get


@pytest.fixture(scope="module")
def structures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("structures") / "ethanol.xyz"
    write(path, trained.ethanol("::8"))
    return path


def forces_of(model: torch.nn.Module) -> np.ndarray:
    return np.concatenate(adapter_for(model).potential(model)(trained.ethanol("::20"))[1])


@pytest.mark.parametrize("kind", ["nequip", "allegro"])
def test_types_of_other_names(checkpoint: Callable[..., Path], kind: str, tmp_path: Path) -> None:
    """Every form of the file knows the elements, and names change no number."""
    path = checkpoint(named, kind)
    model = gaq.load(path)
    assert species_of(model) == SPECIES
    assert adapter_for(model).elements(model) == list(SPECIES)
    assert np.array_equal(forces_of(model), forces_of(gaq.load(checkpoint(moved, kind))))
    quantized = gaq.quantize(model, trained.ethanol("::20"), BRIEF, progress=False)
    expected = forces_of(quantized)
    for name in ("quantized.ckpt", "quantized.nequip.zip"):
        gaq.save(quantized, tmp_path / name)
        loaded = gaq.load(tmp_path / name)
        assert species_of(loaded) == SPECIES
        assert species_in_file(tmp_path / name) == SPECIES
        np.testing.assert_allclose(forces_of(loaded), expected, atol=1e-4)
    calculator = saved_calculator(tmp_path / "quantized.nequip.zip", "cpu", SPECIES)
    assert deploy(["build", str(tmp_path / "quantized.ckpt"), str(tmp_path / "deployed.nequip.zip")]) == 0
    atoms = trained.ethanol(":1")[0]
    atoms.calc = calculator
    np.testing.assert_allclose(atoms.get_forces(), expected[: len(atoms)], atol=1e-4)


def test_commands(checkpoint: Callable[..., Path], structures: Path, tmp_path: Path) -> None:
    """`gaq quantize` makes a package without the training data, and `gaq report` measures it; types by an option."""
    path, output = checkpoint(unmapped), tmp_path / "quantized.nequip.zip"
    species = ["--species", "H:light, C:myC"]  # the name of the third is a symbol
    options = ["--config", json.dumps(BRIEF), "--calibration", str(structures)]
    assert cli.main(["quantize", str(path), *options, *species, "-o", str(output)]) == 0
    assert species_of(gaq.load(output)) == SPECIES
    options = ["--data", str(structures), "--reference", str(path), "--nve-ps", "0", "--frames", "1"]
    assert cli.main(["report", str(output), *options, *species, "-o", str(tmp_path / "report")]) == 0


def test_types_without_a_map(
    checkpoint: Callable[..., Path], structures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(unmapped)
    options = [str(path), "--config", json.dumps(BRIEF), "--calibration", str(structures), "-o"]
    for given, message in (
        ([], "the model's types light, myC are not chemical symbols"),
        (["--species", "H:light,C:iron"], "the model has no type 'iron' for C; it has light, myC, O"),
        (["--species", "Hx:light"], "'Hx' is not a chemical symbol"),
        (["--species", "H:light"], "has C, which the model does not know; its elements are H, O"),
        (["--species", "H=light"], "write each symbol once, as H:myH,C:myC"),
    ):
        assert cli.main(["quantize", *options, str(tmp_path / "none.ckpt"), *given]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_example(
    checkpoint: Callable[..., Path], structures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the training data a checkpoint deploys with a structure that is given, and says so before the work."""
    model = gaq.quantize(gaq.load(checkpoint(moved)), trained.ethanol("::20"), BRIEF, progress=False)
    path, output = tmp_path / "trained.ckpt", tmp_path / "deployed.nequip.zip"
    gaq.save(model, path)
    stored = torch.load(path, weights_only=False)
    del stored["gaq_example"]  # as training writes it
    torch.save(stored, path)
    build = ["build", str(path), str(output)]
    assert deploy(build) == 2
    assert "/nowhere/train.xyz" in (error := capsys.readouterr().err)
    assert "--example FILE" in error
    write(tmp_path / "water.xyz", trained.ethanol(":1")[0][:3])
    assert deploy([*build, "--example", str(tmp_path / "water.xyz")]) == 2
    assert "at least 4 atoms" in capsys.readouterr().err
    apart = trained.ethanol(":1")[0]
    apart.positions *= 100.0
    write(tmp_path / "apart.xyz", apart)
    assert deploy([*build, "--example", str(tmp_path / "apart.xyz")]) == 2
    assert "apart.xyz: no two atoms of the example structure are within the model's cutoff" in capsys.readouterr().err
    assert deploy([*build, "--example", str(structures)]) == 0
    assert np.abs(forces_of(gaq.load(output)) - forces_of(model)).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nequip", "allegro"])
def test_compiled(checkpoint: Callable[..., Path], kind: str, structures: Path, tmp_path: Path) -> None:
    model = gaq.load(checkpoint(named, kind))
    quantized = gaq.quantize(model, trained.ethanol("::20"), BRIEF, progress=False)
    gaq.save(quantized, tmp_path / "quantized.ckpt")
    output = tmp_path / "deployed.nequip.pt2"
    assert deploy(["build", str(tmp_path / "quantized.ckpt"), str(output)]) == 0
    compiled = gaq.load(output)
    assert species_of(compiled) == SPECIES
    atoms = trained.ethanol(":1")[0]
    atoms.calc = compiled_calculator(output, "cpu", SPECIES)
    np.testing.assert_allclose(atoms.get_forces(), forces_of(quantized)[: len(atoms)], atol=5e-3)
    options = ["--data", str(structures), "--nve-ps", "0", "--frames", "2", "-o", str(tmp_path / "report")]
    assert cli.main(["report", str(output), *options]) in (0, 1)
