"""What MACE's calculator reads from a structure, calibration, gates and reports read too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from ase import Atoms
from mace.calculators import MACECalculator
from mace_models import build_model, few_bits, molecules

import gaq
from gaq.adapter import adapter_for
from gaq_mace.evaluate import keys_of

# By the name of the property that the model embeds: where the calculator looks for it, and values that it may have.
KNOWN: dict[str, tuple[str, str, list[Any]]] = {
    "total_charge": ("info", "charge", [-1, 0, 2]),
    "total_spin": ("info", "spin", [1, 2, 3]),
    "Qs": ("arrays", "charges", [-0.3, 0.1, 0.5]),
}
# Of no property that the calculator knows by itself: where training looked for it.
ADDED = {"elec_temp": ("info", "kelvin", [0.0, 1.5, 3.0])}
INPUTS = KNOWN | ADDED


def spec(name: str) -> dict[str, Any]:
    categorical = name.startswith("total_")
    place, key, _ = INPUTS[name]
    return {
        "type": "categorical" if categorical else "continuous",
        "per": "graph" if place == "info" else "atom",
        "in_dim": 1,
        "emb_dim": 8,
        **({"num_classes": 20, "offset": 5} if categorical else {}),
        **({"key": key} if name in ADDED else {}),
    }


def model_of(*names: str) -> Any:
    return build_model(dtype=torch.float64, embedding_specs={n: spec(n) for n in names}, use_embedding_readout=True)


def structures(name: str) -> list[Atoms]:
    """One for each value of the input."""
    place, key, values = INPUTS[name]
    made = []
    for value in values:
        atoms = molecules()[0]
        if place == "info":
            atoms.info[key] = value
        else:
            atoms.arrays[key] = np.linspace(value, 1.0, len(atoms))
        made.append(atoms)
    return made


def by_calculator(model: Any, frames: list[Atoms], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    calculator = MACECalculator(models=[model], device="cpu", default_dtype="float64", **options)
    energies, forces = [], []
    for frame in frames:
        atoms = frame.copy()
        atoms.calc = calculator
        calculator.reset()  # it takes atoms at the same positions for the same structure, whatever their arrays
        forces.append(atoms.get_forces())
        energies.append(atoms.get_potential_energy())
    return np.array(energies), np.array(forces)


def test_the_calculator_knows_no_other_inputs() -> None:
    """An electric field is read by models of another class only, whose embeddings would be of a vector."""
    calculator = MACECalculator(models=[build_model()], device="cpu", default_dtype="float32")
    known = {*calculator.info_keys.values(), "charges"}
    assert known == {"charge", "spin", "external_field", "charges"}
    assert {INPUTS[name][1] for name in KNOWN} == known - {"external_field"}


@pytest.mark.parametrize("name", INPUTS)
def test_potentials_read_what_the_calculator_reads(name: str) -> None:
    model, frames = model_of(name), structures(name)
    place, key, _ = INPUTS[name]
    options = {f"{place}_keys": {name: key}} if name in ADDED else {}
    energies, forces = by_calculator(model, frames, **options)
    assert len(set(np.round(energies, 6))) == len(frames)
    ours = adapter_for(model).potential(model)(frames)
    np.testing.assert_allclose(ours[0], energies, rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.array(ours[1]), forces, rtol=0, atol=1e-10)


def test_reports_and_calibration_read_it(tmp_path: Path) -> None:
    """Labels that the float model's stock calculator made have no error in a report; a quantized one keeps close."""
    model, frames = model_of(*INPUTS), structures(next(iter(INPUTS)))
    for name in INPUTS:
        for frame, other in zip(frames, structures(name), strict=True):
            frame.info |= other.info
            frame.arrays |= {key: value for key, value in other.arrays.items() if key not in frame.arrays}
    torch.save(model, tmp_path / "float.model")
    gaq.save(gaq.quantize(model, frames, few_bits("gaq"), progress=False), tmp_path / "gaq.model")
    keys = {place: {n: key for n, (where, key, _) in INPUTS.items() if where == place} for place in ("info", "arrays")}
    labels = by_calculator(model, frames, info_keys=keys["info"], arrays_keys=keys["arrays"])
    for frame, energy, forces in zip(frames, *labels, strict=True):
        frame.info["REF_energy"], frame.arrays["REF_forces"] = energy, forces
    report = gaq.report(tmp_path / "gaq.model", frames, tmp_path / "float.model", progress=False)
    assert report["reference"]["energy_mae_mev_per_atom"] < 1e-4
    assert report["reference"]["force_mae_mev_per_angstrom"] < 1e-4
    assert report["model"]["energy_mae_mev_per_atom"] < 5.0
    assert report["reference"]["seconds_per_step"] > 0  # the calculator of the file finds it as well
    for path in ("float.model", "gaq.model"):
        loaded = adapter_for(model).load(tmp_path / path)
        atoms = frames[1].copy()
        atoms.calc = adapter_for(model).calculator(tmp_path / path, dtype="float64")
        expected = adapter_for(loaded).potential(loaded)([atoms])[0][0]
        assert atoms.get_potential_energy() == pytest.approx(float(expected), abs=1e-9)


def test_a_missing_property_is_named() -> None:
    model = model_of("Qs")
    with pytest.raises(ValueError, match=r"structure 0 \(C2H6O\) has no arrays\['charges'\], the property 'Qs'"):
        adapter_for(model).potential(model)(molecules()[:1])


def test_keys_are_those_of_the_calculator_where_it_has_one() -> None:
    """Charge and spin were read from other keys in training."""
    model = model_of("total_charge", "elec_temp")
    model.embedding_specs["total_charge"]["key"] = "my_charge"
    assert keys_of(model).info_keys == {"total_charge": "charge", "elec_temp": "kelvin"}
