"""Some of a model's elements and one of its heads: the same energies and forces, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import mace  # noqa: F401  (before e3nn)
import pytest
import torch
from ase.build import molecule
from e3nn import o3
from mace_models import build_model, without_distillation

import gaq
from gaq.cli import main
from gaq.model.state import require_state
from gaq_mace.engine import accelerate
from gaq_mace.evaluate import energy_and_forces, make_batches

NON_LINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
CHARGE_AND_SPIN = {
    f"total_{name}": {
        "type": "categorical",
        "per": "graph",
        "in_dim": 1,
        "emb_dim": 8,
        "num_classes": classes,
        "offset": offset,
    }
    for name, classes, offset in (("spin", 101, 0), ("charge", 201, 100))
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "residual": {"interaction_cls_first": "RealAgnosticResidualInteractionBlock", "num_interactions": 3},
    "density": {
        "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
        "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
        "distance_transform": "Agnesi",
        "pair_repulsion": True,
        "hidden_irreps": "8x0e+8x1o+8x2e",
    },
    "attention": {"interaction_cls": "RealAgnosticAttResidualInteractionBlock"},
    "non-linear": {
        "interaction_cls_first": NON_LINEAR,
        "interaction_cls": NON_LINEAR,
        "edge_irreps": o3.Irreps("4x0e+4x1o"),
        "use_edge_irreps_first": True,
        "use_agnostic_product": True,
        "apply_cutoff": False,
    },
    "charge and spin": {
        "interaction_cls_first": NON_LINEAR,
        "interaction_cls": NON_LINEAR,
        "apply_cutoff": False,
        "embedding_specs": CHARGE_AND_SPIN,
        "use_embedding_readout": True,
    },
}


def structures() -> list[Any]:
    """Methane and ethane, distorted, with a charge and a spin."""
    made = [molecule("CH4"), molecule("C2H6")]
    for atoms in made:
        atoms.rattle(0.05, seed=2)
        atoms.info.update(total_charge=1, total_spin=3)
    return made


def results(model: Any, head: str) -> tuple[Any, Any]:
    batch = make_batches(model, structures(), 1000, head)[0]
    energy, forces, _ = energy_and_forces(model, batch)
    return energy, forces


def full_model(kind: str) -> Any:
    """A float64 model over H, C and O with two heads; parameters that start at zero are drawn."""
    model = build_model("heads", dtype=torch.float64, **KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and not parameter.any():
                parameter.normal_(generator=generator)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_same_energies_and_forces(kind: str) -> None:
    model = full_model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part = gaq.select(model, "C,H", head="other")
    assert [int(z) for z in part.atomic_numbers] == [1, 6]  # in the order of the model
    assert list(part.heads) == ["other"]
    assert part.atomic_energies_fn.atomic_energies.shape[-1] == 2
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in model.parameters())
    energy, forces = results(model, "other")
    other_energy, other_forces = results(part, "other")
    torch.testing.assert_close(other_energy, energy, rtol=0, atol=1e-12 * float(energy.detach().abs().max()))
    torch.testing.assert_close(other_forces, forces, rtol=0, atol=1e-13 * max(1.0, float(forces.abs().max())))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_all_heads_stay_where_none_is_chosen() -> None:
    model = full_model("plain")
    part = gaq.select(model, ["H", "C"])
    for head in ("Default", "other"):
        torch.testing.assert_close(results(part, head), results(model, head), rtol=0, atol=1e-13)


def test_accelerated_model_stays_as_it_is() -> None:
    model = accelerate(full_model("plain"))
    before = type(model)
    part = gaq.select(model, "C,H")
    assert type(model) is before
    # The kernels read radial functions from tables.
    torch.testing.assert_close(results(part, "Default"), results(model, "Default"), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ("C,Xx", "'Xx' is not the symbol of a chemical element"),
        ("C,h", "'h' is not the symbol of a chemical element"),
        ("", "none given; name some of H, C, O"),
        ("C,H,C", "C named more than once"),
        ("C,Fe,Li", "the model does not know Fe, Li; it knows H, C, O"),
    ],
)
def test_refused_elements(float_model: Callable[..., Any], elements: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaq.select(float_model(), elements)


def test_quantized_models_are_refused(quantized: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="this model is quantized: choose its elements and its head before that"):
        gaq.select(quantized("gaq"), "C,H")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elements")
    torch.save(build_model("heads"), path / "float.model")
    torch.save(build_model("elements"), path / "many.model")
    ase.io.write(path / "hydrocarbons.xyz", structures(), format="extxyz")
    ase.io.write(path / "water.xyz", [molecule("H2O")], format="extxyz")
    return path


def quantize(folder: Path, output: Path, *options: str, data: str = "hydrocarbons", model: str = "float") -> int:
    arguments = ["quantize", f"{folder}/{model}.model", "-o", str(output), "--calibration", f"{folder}/{data}.xyz"]
    return main([*arguments, "--config", "{preset: gaq, distillation: {steps: 0}}", "--force", *options])


@pytest.mark.slow
def test_file_of_one_head_and_some_elements(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gates compare it with the same part of the float model; against the complete one, in another head, they fail."""
    output = tmp_path / "part.model"
    assert quantize(folder, output, "--elements", "H,C", "--head", "other") in (0, 1)
    assert "part.model: knows H, C, head other" in capsys.readouterr().out
    ours, stock = gaq.load(output), gaq.load(folder / "float.model")
    assert [list(ours.heads), ours.atomic_numbers.tolist()] == [["other"], [1, 6]]
    assert "force_mae_ratio" not in require_state(ours).notes["failed_gates"]
    expected = results(stock, "other")[1].detach()
    assert float((results(ours, "other")[1].detach() - expected).norm() / expected.norm()) < 0.02
    assert float((results(stock, "Default")[1].detach() - expected).norm() / expected.norm()) > 0.2


def test_two_of_89_elements(folder: Path, tmp_path: Path) -> None:
    """In Python: the file is much smaller than that of all elements, and no less exact."""
    model, config = gaq.load(folder / "many.model"), without_distillation("gaq")
    paths = {"H,C": tmp_path / "some.model", None: tmp_path / "all.model"}
    expected, errors = results(model, "Default")[1].detach(), []
    for elements, path in paths.items():
        ours = gaq.quantize(model, structures(), config, progress=False, elements=elements)
        gaq.save(ours, path)
        errors.append(float((results(gaq.load(path), "Default")[1].detach() - expected).norm() / expected.norm()))
    assert errors[0] < 2 * errors[1]
    assert max(errors) < 0.05
    assert paths["H,C"].stat().st_size < 0.2 * paths[None].stat().st_size
    with pytest.raises(ValueError, match="no calibration structure holds O; add structures that do, or name only H, C"):
        gaq.quantize(model, structures(), config, progress=False, elements="H,C,O")


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        (("--elements", "H,C,Fe"), "hydrocarbons", "the model does not know Fe; it knows H, C, O"),
        (("--elements", "H,C,H"), "hydrocarbons", "H named more than once"),
        (("--elements", "H,C"), "water", "the calibration data also hold O"),
        (("--elements", "H,C,O"), "water", "no calibration structure holds C"),
        (("--head", "third"), "hydrocarbons", "no head 'third'; it has Default, other"),
    ],
)
def test_bad_input_is_one_line_and_no_file(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, str],
    data: str,
    message: str,
) -> None:
    assert quantize(folder, tmp_path / "out.model", *options, data=data) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("gaq: ")
    assert message in lines[0]
    assert not list(tmp_path.iterdir())
