"""Deployed files of MACE models: against the model, on the whole and on parts of space; what is refused."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mace", reason="needs MACE: pip install '.[mace]'")

import mace  # noqa: F401  (before e3nn)
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import write
from e3nn import o3
from mace.calculators import MACECalculator
from mace_models import build_model
from parts import on_parts

import gaq
import gaq.ase
from gaq.cli import main
from gaq.deployed import check, form
from gaq.kernels.cpu import native
from gaq.process import default_dtype
from gaq_mace import engine
from gaq_mace.adapter import MACEAdapter

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")

D = torch.float64
DENSITY: dict[str, Any] = {
    "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
    "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
}
HEADS: dict[str, Any] = {
    "heads": ["Default", "other"],
    "atomic_energies": [[-1.0, -3.0, -5.0], [-1.5, -2.5, -4.5]],
    "atomic_inter_scale": [0.8, 1.1],
    "atomic_inter_shift": [0.1, -0.2],
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one layer": {"num_interactions": 1},
    "three layers": {"num_interactions": 3},
    "first residual": {"interaction_cls_first": "RealAgnosticResidualInteractionBlock"},
    "density, distances of pairs, repulsion": {**DENSITY, "distance_transform": "Agnesi", "pair_repulsion": True},
    "tensors": {"hidden_irreps": "8x0e+8x1o+8x2e", "correlation": 3},
    "heads": HEADS,
}
NON_LINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
BOTH: dict[str, Any] = {"interaction_cls_first": NON_LINEAR, "interaction_cls": NON_LINEAR}
CHARGED = {
    name: {"type": "categorical", "per": "graph", "in_dim": 1, "emb_dim": 4, "num_classes": 7, "offset": offset}
    for name, offset in (("total_charge", 3), ("total_spin", 0))
}
SHAPES |= {
    "non-linear": {
        **BOTH,
        **HEADS,
        "edge_irreps": o3.Irreps("4x0e+4x1o"),
        "use_edge_irreps_first": True,
        "use_agnostic_product": True,
        "apply_cutoff": False,
        "pair_repulsion": True,
        "distance_transform": "Agnesi",
    },
    "transformed distances": {**DENSITY, "apply_cutoff": False, "distance_transform": "Agnesi"},
    "soft distances": {"num_interactions": 3, "apply_cutoff": False, "distance_transform": "Soft"},
}
CHARGE_AND_SPIN: dict[str, Any] = {
    **BOTH,
    "num_interactions": 3,
    "hidden_irreps": "6x0e+6x1o+6x2e",
    "edge_irreps": o3.Irreps("4x0e+4x1o+4x2e"),
    "apply_cutoff": False,
    "embedding_specs": CHARGED,
    "use_embedding_readout": True,
}


def model_of(**options: Any) -> torch.nn.Module:
    """A model in which species and density matter: MACE starts with next to no influence of either."""
    model, generator = build_model("plain", D, **options), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "source_embedding" in name or "target_embedding" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=D))
            elif name.endswith((".alpha", ".beta")):
                parameter.fill_(2.0)
    return model


def crystal() -> Atoms:
    """A strained crystal with atoms of three elements; those of one lie in one half only."""
    atoms = bulk("C", "diamond", a=3.4, cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.symbols[2], atoms.symbols[5] = "O", "H"
    atoms.set_cell(atoms.cell @ np.array([[1, 0.05, 0], [0, 1, -0.04], [0.02, 0, 1.03]]), scale_atoms=True)
    return atoms


def structures() -> list[Atoms]:
    return [
        crystal(),
        molecule("CH3CHO"),
        Atoms("O"),
        Atoms("H2", [[0, 0, 0], [0, 0, 30]]),
        Atoms("CO", [[0] * 3, [0, 0, 1.1]]),
    ]


def deployed(model: torch.nn.Module, path: Path, elements: str = "HCO", dtype: torch.dtype = D) -> Path:
    form.write(path, MACEAdapter().deployable(model, list(elements), dtype), {})
    return path


def of_mace(model: torch.nn.Module, dtype: str = "float64", head: str | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {} if head is None else {"head": head}
        return MACECalculator(models=[model], device="cpu", default_dtype=dtype, **options)


def results(atoms: Atoms, calculator: Any) -> tuple[float, Any, Any]:
    atoms = atoms.copy()
    atoms.calc = calculator
    with default_dtype(getattr(torch, getattr(calculator, "default_dtype", "float64"))):
        return _results(atoms)


def _results(atoms: Atoms) -> tuple[float, Any, Any]:
    stress = atoms.get_stress() if atoms.pbc.all() else np.zeros(6)
    return atoms.get_potential_energy(), atoms.get_forces(), stress


def agree(ours: tuple[float, Any, Any], theirs: tuple[float, Any, Any], tolerance: float) -> None:
    scale = max(1.0, float(np.abs(theirs[1]).max()))
    assert ours[0] == pytest.approx(theirs[0], abs=tolerance * max(1.0, abs(theirs[0])))
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=tolerance * scale)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_computes_what_its_model_computes(shape: str, tmp_path: Path) -> None:
    model = model_of(**SHAPES[shape])
    path = deployed(model, tmp_path / "model.gaq")
    for head in SHAPES[shape].get("heads", [None]):
        ours, of_model = gaq.ase.Calculator(path, head=head), of_mace(model, head=head)
        for atoms in structures():
            with engine.disabled():
                theirs = results(atoms, of_model)
            agree(results(atoms, ours), theirs, 1e-9)


@pytest.mark.parametrize("preset", ["gaq", "w8", "w4a16"])
def test_a_file_of_a_quantized_model(preset: str, quantized: Any, tmp_path: Path) -> None:
    model = quantized(preset, "plain", D)
    path = deployed(model, tmp_path / "model.gaq")
    ours, theirs = gaq.ase.Calculator(path), of_mace(model)
    for atoms in structures():
        agree(results(atoms, ours), results(atoms, theirs), 1e-9)


def test_a_file_in_float32(tmp_path: Path) -> None:
    model = build_model("density", torch.float32, distance_transform="Agnesi")
    path = deployed(model, tmp_path / "model.gaq", dtype=torch.float32)
    exact = of_mace(build_model("density", torch.float32, distance_transform="Agnesi").double())
    for atoms in structures():
        agree(results(atoms, gaq.ase.Calculator(path)), results(atoms, exact), 2e-6)


@pytest.mark.parametrize(
    "shape",
    [
        "plain",
        "three layers",
        "density, distances of pairs, repulsion",
        "non-linear",
        "soft distances",
        "charge and spin",
    ],
)
def test_parts_of_space_are_the_whole(shape: str, tmp_path: Path) -> None:
    model = model_of(**(CHARGE_AND_SPIN if shape == "charge and spin" else SHAPES[shape]))
    path, atoms = deployed(model, tmp_path / "model.gaq"), crystal()
    theirs = results(atoms, gaq.ase.Calculator(path))
    for parts in ([[*range(8)]], [[5, 0, 1, 2], [3, 4, 6, 7]], [[0], [], [1, 2, 3, 4, 5, 6, 7]]):
        energy, forces, calls = on_parts(path, atoms, parts)
        agree((energy, forces, theirs[2]), theirs, 1e-11)
        # Also where there are no atoms: all parts wait for each other.
        assert calls == [2 * (len(model.interactions) - 1)] * len(parts)


@pytest.mark.parametrize(("charge", "spin"), [(0, 1), (-2, 2)])
def test_charge_and_spin_are_fixed_at_deployment(charge: int, spin: int, tmp_path: Path) -> None:
    model, adapter = model_of(**CHARGE_AND_SPIN), MACEAdapter()
    values = adapter.fixed_at_deployment(model, charge or None, None if spin == 1 else spin)
    assert values == {"charge": charge, "spin": spin}
    path = tmp_path / "model.gaq"
    form.write(path, adapter.deployable(model, [*"HCO"], D, values), {})
    ours, of_model = gaq.ase.Calculator(path), of_mace(model)
    for atoms in structures():
        (held,) = adapter.hold(model, [atoms], values)
        assert "charge" not in atoms.info
        with engine.disabled():
            theirs = results(held, of_model)
        agree(results(atoms, ours), theirs, 1e-9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        (CHARGE_AND_SPIN, None),
        ({"interaction_cls": "RealAgnosticAttResidualInteractionBlock"}, "an interaction block computes attention"),
        ({"embedding_specs": {"total_field": CHARGED["total_charge"]}}, "it embeds total_field"),
    ],
    ids=["plain", "charge and spin", "attention", "field"],
)
def test_what_cannot_be_deployed_is_known_at_once(options: dict[str, Any], reason: str | None) -> None:
    prepared = gaq.prepare(build_model("plain", D, **options), {"preset": "w8", "weights": {"rounding": "nearest"}})
    found = MACEAdapter().undeployable(gaq.convert(prepared))
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("preset", ["gaq", "w4a16"])
def test_a_file_of_a_quantized_model_with_charge_and_spin(preset: str, tmp_path: Path) -> None:
    held = MACEAdapter().hold(model_of(**CHARGE_AND_SPIN), structures(), {"charge": 0, "spin": 1})
    plain = {"preset": preset, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
    model = gaq.quantize(model_of(**CHARGE_AND_SPIN), held[:2], plain, progress=False)
    ours, theirs = gaq.ase.Calculator(deployed(model, tmp_path / "model.gaq")), of_mace(model)
    for atoms in held:
        # A code may fall to the other side of a threshold.
        agree(results(atoms, ours), results(atoms, theirs), 2e-6)


@pytest.mark.parametrize("shape", ["density, distances of pairs, repulsion", "non-linear"])
def test_some_of_the_elements_take_a_part_of_the_file(shape: str, tmp_path: Path) -> None:
    model = model_of(**SHAPES[shape])
    all_of_them, some = deployed(model, tmp_path / "a.gaq"), deployed(model, tmp_path / "s.gaq", "OC")
    atoms = Atoms("CO2", [[0, 0, 0], [0, 0, 1.2], [0.1, 0, -1.2]])
    agree(results(atoms, gaq.ase.Calculator(some)), results(atoms, gaq.ase.Calculator(all_of_them)), 1e-9)
    sizes = [form.sizes_of(path) for path in (all_of_them, some)]
    assert sizes[1]["radial tables"] < 0.6 * sizes[0]["radial tables"]
    assert sizes[1]["weights"] < sizes[0]["weights"]
    with pytest.raises(ValueError, match="does not know the element H; it knows O, C"):
        results(molecule("H2O"), gaq.ase.Calculator(some))


def test_a_calculator_follows_its_atoms(tmp_path: Path) -> None:
    """New elements, cells and numbers of atoms; steps of a simulation, with a list that is kept."""
    model = build_model("plain", D)
    ours, theirs = gaq.ase.Calculator(deployed(model, tmp_path / "model.gaq"), skin=1.0), of_mace(model)
    atoms = crystal()
    rng = np.random.default_rng(0)
    for _ in range(8):
        atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
        agree(results(atoms, ours), results(atoms, theirs), 1e-9)
    assert ours._list.made < 6
    for other in (molecule("C2H6"), crystal(), 1.02 * np.eye(3)):
        if isinstance(other, np.ndarray):
            atoms.set_cell(atoms.cell @ other, scale_atoms=True)
        else:
            atoms = other
        agree(results(atoms, ours), results(atoms, theirs), 1e-9)


def test_threads_may_share_a_file(tmp_path: Path) -> None:
    path = deployed(build_model("plain", D), tmp_path / "model.gaq")
    expected = [results(atoms, gaq.ase.Calculator(path)) for atoms in structures()]
    barrier = threading.Barrier(4)

    def run(_: int) -> list[tuple[float, Any, Any]]:
        calculator = gaq.ase.Calculator(path)
        barrier.wait()
        return [results(atoms, calculator) for atoms in structures() for _ in range(3)][::3]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(4)):
            for ours, theirs in zip(found, expected, strict=True):
                agree(ours, theirs, 1e-12)


# -- the command --


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, quantized: Any) -> Path:
    made = tmp_path_factory.mktemp("files")
    gaq.save(quantized("gaq", "plain", torch.float32), made / "gaq.model")
    attention = "RealAgnosticAttResidualInteractionBlock"
    torch.save(build_model("plain", interaction_cls=attention), made / "other.model")
    torch.save(build_model("plain", torch.float32, **CHARGE_AND_SPIN), made / "charged.model")
    per_atom = {"site_charge": {**CHARGED["total_charge"], "per": "node"}}
    torch.save(build_model("plain", embedding_specs=per_atom), made / "sites.model")
    return made


@pytest.fixture
def folder(tmp_path: Path, files: Path) -> Path:
    """Copies of the files, which a test may add to."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_deploy_and_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "model.gaq"
    write(folder / "more.xyz", crystal())
    command = ["deploy", str(folder / "gaq.model"), str(out), "--elements", "O,C,H", "--structures"]
    assert main([*command, str(folder / "more.xyz"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["elements"] == ["H", "C", "O"]
    assert result["checks"]["Default"]["structures"] == 9
    assert result["checks"]["Default"]["forces"] < 0.1
    assert sum(result["bytes"].values()) == out.stat().st_size
    assert main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "a deployed model, preset w8a16" in printed
    assert "H, C, O" in printed
    assert main(["inspect", str(out), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["status"], described["preset"], described["made of"]) == ("deployed", "w8a16", "gaq.model")
    assert described["bytes"] == out.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "fixed"),
    [([], {"charge": 0, "spin": 1}), (["--charge", "-1", "--spin", "2"], {"charge": -1, "spin": 2})],
)
def test_a_charge_and_spin_are_said(
    folder: Path, arguments: list[str], fixed: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "model.gaq"
    write(folder / "more.xyz", crystal())
    command = ["deploy", str(folder / "charged.model"), str(out), "--structures", str(folder / "more.xyz")]
    assert main([*command, *arguments]) == 0
    said = f"fixed in the file: charge {fixed['charge']}, spin {fixed['spin']}"
    assert said + ("" if arguments else " (--charge and --spin set others)") in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert f"charge         {fixed['charge']}, fixed at deployment" in capsys.readouterr().out
    assert form.metadata_of(out)["fixed"] == fixed
    atoms = crystal()
    atoms.info["charge"] = fixed["charge"] + 1
    with pytest.raises(ValueError, match=f"charge {fixed['charge']} is fixed in the file"):
        results(atoms, gaq.ase.Calculator(out))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gaq.model", "model.pt"], "has to end in .gaq"),
        (["gaq.model", "model.gaq", "--elements", "H,Fe"], "Fe"),
        (["gaq.model", "model.gaq", "--tolerance", "nan"], "--tolerance nan: give a force difference"),
        (["gaq.model", "model.gaq", "--structures", "absent.xyz"], "does not exist"),
        (["absent.model", "model.gaq"], "no such file"),
        (["other.model", "model.gaq"], "the model cannot be deployed: an interaction block computes attention"),
        (["sites.model", "model.gaq"], "the model cannot be deployed: it embeds site_charge"),
        (["gaq.model", "model.gaq", "--charge", "1"], "--charge 1: the model does not read a charge; leave it out"),
        (["charged.model", "model.gaq", "--spin", "9"], "--spin 9: the model knows 0 to 6"),
    ],
)
def test_what_cannot_be_deployed_is_one_line(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    assert main(["deploy", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gaq:")]
    assert words in line
    assert sorted(folder.iterdir()) == before


def test_a_file_that_disagrees_is_not_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gaq.deployed.check.RELATIVE_ROUNDED", 0.0)
    assert main(["deploy", str(folder / "gaq.model"), str(folder / "model.gaq"), "--tolerance", "0"]) == 1
    assert "not written, because forces differ" in capsys.readouterr().err
    assert not (folder / "model.gaq").exists()


def test_noise_of_rounding_may_grow_with_forces(quantized: Any) -> None:
    """6 meV/Å of forces of 100 eV/Å are less than three steps of 16 bits, but no error that float weights explain."""
    difference = check.Check(energy=0.0, forces=6.0, force_scale=1e5, structures=1)
    rounded, exact = (quantized(preset, "plain", torch.float32) for preset in ("gaq", "w8"))
    bounds = [
        (check.default_tolerance(config), check.relative_tolerance(config))
        for config in (MACEAdapter().config(rounded), MACEAdapter().config(exact), None)
    ]
    assert bounds == [(5.0, 1e-4), (0.5, 1e-5), (0.5, 1e-5)]
    assert [difference.within(*bound) for bound in bounds] == [True, False, False]


def test_features_of_8_bits_are_refused(quantized: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the model cannot be deployed: .* do not round"):
        deployed(quantized("w8a8", "plain", D), tmp_path / "model.gaq")
    assert not list(tmp_path.iterdir())
