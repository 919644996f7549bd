"""The fused engine against the reference path, through MACE's own interfaces."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from e3nn import o3
from mace import modules
from mace.calculators import MACECalculator
from mace_models import agree, build_model

import gaq
from gaq.kernels.cpu import native
from gaq.model.state import unquantized
from gaq.process import default_dtype
from gaq_mace import engine
from gaq_mace.engine import pair_tables

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")


def make(
    first: str,
    hidden: str,
    correlation: int,
    lmax: int,
    second: str = "RealAgnosticResidualInteractionBlock",
    **options: Any,
) -> torch.nn.Module:
    torch.manual_seed(3)
    with default_dtype(torch.float64):
        model = modules.ScaleShiftMACE(
            atomic_inter_scale=0.7,
            atomic_inter_shift=0.1,
            r_max=4.5,
            num_bessel=6,
            num_polynomial_cutoff=5,
            max_ell=lmax,
            interaction_cls=modules.interaction_classes[second],
            interaction_cls_first=modules.interaction_classes[first],
            num_interactions=2,
            num_elements=3,
            hidden_irreps=o3.Irreps(hidden),
            MLP_irreps=o3.Irreps("8x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=np.array([-1.0, -2.0, -3.0]),
            avg_num_neighbors=7.0,
            atomic_numbers=[1, 6, 8],
            correlation=correlation,
            radial_type="bessel",
            **options,
        )
    return model


def make_density(**options: Any) -> torch.nn.Module:
    """The blocks and, with options, the radial functions of the larger foundation models."""
    first, second = "RealAgnosticDensityInteractionBlock", "RealAgnosticDensityResidualInteractionBlock"
    return make(first, "8x0e+8x1o", 3, 2, second=second, **options)


def converted(model: torch.nn.Module, spec: Any, structures: list[Atoms]) -> torch.nn.Module:
    plain = {"preset": spec, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
    prepared = gaq.prepare(model, plain)
    gaq.calibrate(prepared, structures, progress=False)
    return gaq.convert(prepared)


STRUCTURES = [molecule("CH3OH"), molecule("C6H6"), molecule("H2O"), Atoms("OH", positions=[[0, 0, 0], [0, 0, 9.0]])]
CRYSTAL = bulk("C", "diamond", a=3.6, cubic=True)
CRYSTAL.rattle(0.05, seed=0)
MODELS = {
    "agnostic": lambda: make("RealAgnosticInteractionBlock", "8x0e+8x1o", 3, 3),
    "residual": lambda: make("RealAgnosticResidualInteractionBlock", "8x0e+8x1o+8x2e", 2, 2),
    "scalars": lambda: make("RealAgnosticInteractionBlock", "10x0e", 2, 2),
    "density": lambda: make_density(),
    "agnesi": lambda: make("RealAgnosticInteractionBlock", "8x0e+8x1o", 2, 2, distance_transform="Agnesi"),
    "repulsion": lambda: make_density(distance_transform="Agnesi", pair_repulsion=True),
    "after_cutoff": lambda: make_density(distance_transform="Agnesi", pair_repulsion=True, apply_cutoff=False),
    "soft_after_cutoff": lambda: make(
        "RealAgnosticInteractionBlock", "8x0e+8x1o", 2, 2, distance_transform="Soft", apply_cutoff=False
    ),
    "heads": lambda: make("RealAgnosticInteractionBlock", "8x0e+8x1o", 2, 2, heads=["a", "b"]),
}


def test_wigner_coefficients_exist() -> None:
    assert o3.wigner_3j(1, 1, 2).shape == (3, 3, 5)


@pytest.fixture(params=list(MODELS))
def plain(request: pytest.FixtureRequest) -> Callable[[], torch.nn.Module]:
    if request.param == "heads":
        # An energy for each element and head.
        def build() -> torch.nn.Module:
            model = MODELS["heads"]()
            energies = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], dtype=torch.float64)
            model.atomic_energies_fn.atomic_energies = energies
            model.scale_shift.scale = torch.tensor([0.7, 0.9], dtype=torch.float64)
            model.scale_shift.shift = torch.tensor([0.1, 0.2], dtype=torch.float64)
            return model

        return build
    return MODELS[request.param]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tables of pairs of species when they first occur."""
    monkeypatch.setattr(pair_tables, "EDGES_OF_AN_INTERVAL", 0)


def batch_of(model: torch.nn.Module, structures: list[Atoms]) -> dict[str, torch.Tensor]:
    from gaq.adapter import adapter_for

    batch = next(iter(adapter_for(model).batches(model, structures, 1000)))
    plain = batch if isinstance(batch, dict) else batch.to_dict()
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in plain.items()}


def both(model: torch.nn.Module, structures: list[Atoms], **options: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    batch = batch_of(model, structures)
    outputs = []
    assert engine.serves(model, {})
    for off in (False, True):
        data = {key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()}
        if off:
            with engine.disabled():
                outputs.append(model(data, training=False, **options))
        else:
            outputs.append(model(data, training=False, **options))
    return outputs[0], outputs[1]


@pytest.mark.parametrize("preset", ["w8", "gaq", "w4a8"])
@pytest.mark.smoke
def test_the_engine_is_the_reference(plain: Callable[[], torch.nn.Module], preset: str) -> None:
    model = converted(plain(), preset, STRUCTURES[:3])
    ours, theirs = both(model, STRUCTURES, compute_stress=True)
    # The error of the radial tables; an 8-bit code may also fall to the other side of a threshold.
    agree(ours, theirs, 2e-6 if preset != "w4a8" else 1e-2)
    assert float(theirs["forces"].abs().max()) > 1e-3


@pytest.mark.parametrize("options", [{}, {"compute_displacement": True}])
def test_periodic_crystals(options: dict[str, bool]) -> None:
    model = converted(MODELS["agnostic"](), "gaq", [CRYSTAL])
    ours, theirs = both(model, [CRYSTAL, CRYSTAL * (1, 1, 2)], compute_stress=True, compute_virials=True, **options)
    agree(ours, theirs, 2e-6)
    assert float(theirs["stress"].detach().abs().max()) > 1e-4


def test_energies_without_forces() -> None:
    model = converted(MODELS["agnostic"](), "w8", STRUCTURES[:3])
    # The energy can be differentiated by the weights then, which the engine does not do.
    assert not engine.serves(model, {"compute_force": False})
    with torch.no_grad():
        assert engine.serves(model, {"compute_force": False})
    model.requires_grad_(False)
    assert engine.serves(model, {"compute_force": False})
    ours, theirs = both(model, STRUCTURES, compute_force=False)
    agree(ours, theirs, 1e-6)


def test_isolated_atoms_and_no_edges() -> None:
    model = converted(MODELS["agnostic"](), "gaq", STRUCTURES[:3])
    lonely = Atoms("OHC", positions=[[0, 0, 0], [20.0, 0, 0], [0, 30.0, 0]])
    ours, theirs = both(model, [lonely])
    agree(ours, theirs, 1e-6)
    assert float(ours["forces"].abs().max()) == 0.0
    ours, theirs = both(model, [STRUCTURES[0], lonely])
    agree(ours, theirs, 2e-6)


@pytest.mark.parametrize("kind", ["agnostic", "density", "agnesi", "repulsion", "after_cutoff"])
@pytest.mark.usefixtures("at_once")
def test_float32_error_is_below_that_of_the_host(kind: str) -> None:
    """Against the float64 reference path, over rattled structures."""
    double = converted(MODELS[kind](), "w8", STRUCTURES[:3])
    single = copy.deepcopy(double).float()
    errors = {"engine": [], "reference": []}
    for seed in range(6):
        structures = [s.copy() for s in (*STRUCTURES[:3], CRYSTAL)]
        for s in structures:
            s.rattle(0.1, seed=seed)
        with engine.disabled():
            exact = double(batch_of(double, structures))["forces"]
            errors["reference"].append(
                (single(batch_of(single, structures))["forces"].double() - exact).square().mean()
            )
        errors["engine"].append((single(batch_of(single, structures))["forces"].double() - exact).square().mean())
    rms = {name: float(torch.stack(values).mean().sqrt()) for name, values in errors.items()}
    # Tables made in float64 are more exact than a network in float32. With densities and transformed distances together
    # the ratio is 1.7, with tables ten times as exact too.
    assert rms["engine"] <= (2 if kind == "repulsion" else 1) * rms["reference"], rms


def test_forces_are_the_gradient_of_the_energy() -> None:
    model = converted(MODELS["residual"](), "w8", STRUCTURES[:3])
    atoms = STRUCTURES[0].copy()
    atoms.rattle(0.05, seed=1)
    forces = model(batch_of(model, [atoms]))["forces"]
    h = 1e-4
    for index, axis in ((0, 0), (1, 2), (4, 1)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[index, axis] += sign * h
            energies.append(float(model(batch_of(model, [moved]))["energy"].detach()))
        # The error of the tables does not matter: forces differentiate the tables themselves.
        assert -(energies[0] - energies[1]) / (2 * h) == pytest.approx(float(forces[index, axis]), abs=2e-7)


@pytest.mark.smoke
def test_calculator_uses_the_engine_without_being_told(tmp_path: Path) -> None:
    path = tmp_path / "model.model"
    gaq.save(converted(MODELS["agnostic"]().float(), "gaq", STRUCTURES[:3]), path)
    calculator = MACECalculator(model_paths=str(path), device="cpu", default_dtype="float32")
    atoms = STRUCTURES[1].copy()
    atoms.calc = calculator
    forces = atoms.get_forces()
    assert isinstance(engine.engine_of(calculator.models[0]), engine.Engine)
    with engine.disabled():
        calculator.reset()
        np.testing.assert_allclose(atoms.get_forces(), forces, atol=2e-5)
    # A Hessian needs second derivatives: the reference path, without being asked.
    assert calculator.get_hessian(atoms).shape == (36, 12, 3)


def test_switched_off_by_the_environment(setting: Callable[..., Any]) -> None:
    model = converted(MODELS["scalars"](), "w8", STRUCTURES[:3])
    setting(engine=False)
    assert not engine.serves(model, {})
    model(batch_of(model, STRUCTURES[:1]))
    assert "gaq_engine" not in model.__dict__


@pytest.mark.smoke
def test_training_goes_through_the_reference_path() -> None:
    model = converted(MODELS["scalars"](), "w8", STRUCTURES[:3])
    assert not engine.serves(model, {"training": True})
    assert not engine.serves(model, {"compute_edge_forces": True})
    assert not engine.serves(gaq.prepare(MODELS["scalars"](), "w8"), {})
    out = model(batch_of(model, STRUCTURES[:1]), training=True)
    out["forces"].square().sum().backward()
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())


def test_unquantized_activations_take_the_reference_path() -> None:
    model = converted(MODELS["agnostic"](), "gaq", STRUCTURES[:3])
    rounded = model(batch_of(model, STRUCTURES[:1]))["forces"]
    with unquantized(model):
        assert not engine.serves(model, {})
        smooth = model(batch_of(model, STRUCTURES[:1]))["forces"]
    assert engine.serves(model, {})
    assert 0.0 < float((rounded - smooth).abs().max()) < 1e-2


def test_changed_weights_make_a_new_engine() -> None:
    model = converted(MODELS["scalars"](), "w8", STRUCTURES[:3])
    before = model(batch_of(model, STRUCTURES[:1]))["energy"].detach()
    with torch.no_grad():
        model.readouts[0].linear.weight.mul_(2.0)
    ours, theirs = both(model, STRUCTURES[:1])
    agree(ours, theirs, 1e-6)
    assert float((ours["energy"].detach() - before).abs().max()) > 1e-6
    assert "gaq_engine" not in copy.deepcopy(model).__dict__


def test_replaced_parts_make_a_new_engine() -> None:
    model = converted(MODELS["scalars"](), "w8", STRUCTURES[:3])
    first = engine.engine_of(model)
    assert engine.engine_of(model) is first
    readout = model.readouts[0]
    readout.linear.weight = torch.nn.Parameter(2.0 * readout.linear.weight.detach())
    second = engine.engine_of(model)
    assert second is not first
    model.readouts[0] = copy.deepcopy(readout)
    third = engine.engine_of(model)
    assert third is not second
    ours, theirs = both(model, STRUCTURES[:1])
    agree(ours, theirs, 1e-6)
    assert engine.engine_of(model) is third
    # A part that is added makes none.
    model.add_module("note", torch.nn.Identity())
    assert engine.engine_of(model) is third


def test_what_is_not_served_says_so_and_runs() -> None:
    model = converted(make("RealAgnosticInteractionBlock", "8x0e", 2, 2, use_so3=True), "w8", STRUCTURES)
    with pytest.warns(UserWarning, match=r"reference path: the edge attributes .* are not plain spherical harmonics"):
        model(batch_of(model, STRUCTURES[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not engine.serves(model, {})  # said once


def pairs_of(model: torch.nn.Module) -> pair_tables.PairTables:
    pairs = engine.engine_of(model).compositions.pairs
    assert pairs is not None
    return pairs


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kind", ["agnesi", "repulsion"])
def test_tables_are_made_for_the_pairs_that_are_met(kind: str) -> None:
    """H, C and O are species 0, 1 and 2; a pair has the code first * 3 + second."""
    model = converted(MODELS[kind](), "w8", STRUCTURES[:3])
    assert pairs_of(model).made.codes == ()
    agree(*both(model, [molecule("H2O")]), 1e-9)
    assert pairs_of(model).made.codes == (0, 2)
    first_tables = pairs_of(model).made.tables
    agree(*both(model, [molecule("CH3OH")]), 1e-9)
    assert pairs_of(model).made.codes == (0, 2, 1, 5)
    agree(*both(model, STRUCTURES), 1e-9)
    assert set(pairs_of(model).made.codes) == {0, 1, 2, 4, 5}
    for layer, tables in zip(engine.engine_of(model).layers, pairs_of(model).made.tables, strict=True):
        assert 0.0 < layer.radial.error <= 1e-11
        assert tables[0].shape[0] % len(layer.problem.paths) == 0
        assert (tables[1] is None) == (kind == "agnesi")
    # What another thread reads is not touched.
    assert first_tables[0][0].shape[0] == 2 * len(engine.engine_of(model).layers[0].problem.paths)
    agree(*both(model, [Atoms("O", positions=[[0, 0, 0]])]), 1e-10)


def test_tables_are_made_when_they_pay() -> None:
    model = converted(MODELS["repulsion"](), "w8", STRUCTURES[:3])
    pairs, atoms = pairs_of(model), molecule("H2O")
    edges = batch_of(model, [atoms])["edge_index"].shape[1]
    price = 2 * pair_tables.EDGES_OF_AN_INTERVAL * max(layer.intervals[0] for layer in pairs.layers)
    batch = batch_of(model, [atoms] * 20)
    evaluated = [model(dict(batch)) for _ in range(-(-price // (20 * edges)) - 1)]
    assert pairs.made.codes == ()
    tabulated = model(dict(batch))
    assert pairs.made.codes == (0, 2)
    agree(tabulated, evaluated[-1], 1e-10)
    assert torch.equal(evaluated[-1]["forces"], evaluated[0]["forces"])
    # A rare pair has its table at once: evaluating the network for all edges of a large structure costs more.
    many = molecule("C60")
    many += Atoms("O", positions=[many.positions[0] * 1.4])
    model(batch_of(model, [many] * 12))
    assert set(pairs.made.codes) == {0, 2, 4, 5}


def test_pairs_without_tables_are_the_reference() -> None:
    for kind in ("agnesi", "repulsion"):
        model = converted(MODELS[kind](), "gaq", STRUCTURES[:3])
        agree(*both(model, STRUCTURES, compute_stress=True), 2e-6)
        assert pairs_of(model).made.codes == ()


@pytest.mark.parametrize("kind", ["after_cutoff", "soft_after_cutoff"])
def test_one_table_of_the_transformed_distance_serves_all_pairs(kind: str) -> None:
    model = engine.accelerate(MODELS[kind]())
    pairs = pairs_of(model)
    assert (pairs.by_species, pairs.made.codes) == (False, (0,))
    # The table has no end before distance 0, and the smallest transformed distances belong to the cutoff.
    near_and_far = [Atoms("OH", positions=[[0, 0, 0], [0, 0, z]]) for z in (0.02, 0.3, 4.49)]
    for structures in (STRUCTURES, [CRYSTAL], *([atoms] for atoms in near_and_far)):
        agree(*both(model, structures, compute_stress=True), 1e-8)
    assert pairs.made.codes == (0,)


@pytest.mark.usefixtures("at_once")
def test_tables_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(MODELS["agnesi"](), "w8", STRUCTURES[:3])
    pairs = pairs_of(model)
    model(batch_of(model, [molecule("H2O")]))
    monkeypatch.setattr(pair_tables, "LIMIT", 3 * sum(layer.bytes_of_pair() for layer in pairs.layers))
    agree(*both(model, [molecule("CO2")]), 1e-9)
    # H-H and H-O made room for C-O and O-O.
    assert pairs.made.codes == (5, 8)
    agree(*both(model, [molecule("CH3OH")]), 1e-9)
    assert pairs.made.codes == (5, 8)  # its four pairs are too many: the network is evaluated
    assert sum(t[0].numel() * 8 for t in pairs.made.tables) <= pair_tables.LIMIT


@pytest.mark.usefixtures("at_once")
def test_tables_that_grow_keep_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(MODELS["agnesi"](), "w8", STRUCTURES[:3])
    pairs = pairs_of(model)
    model(batch_of(model, [Atoms("CC", positions=[[0, 0, 0], [0, 0, 1.3]])]))
    before = sum(layer.bytes_of_pair() for layer in pairs.layers)
    monkeypatch.setattr(pair_tables, "LIMIT", 3 * before)
    # H-H needs more intervals than C-C had, so three tables do not fit.
    agree(*both(model, [molecule("CH4")]), 1e-9)
    assert sum(layer.bytes_of_pair() for layer in pairs.layers) > before
    assert pairs.made.codes == (0, 1)
    assert sum(t[0].numel() * 8 for t in pairs.made.tables) <= pair_tables.LIMIT


@pytest.mark.usefixtures("at_once")
def test_all_tables_have_the_intervals_of_the_pair_that_needs_most() -> None:
    model = converted(MODELS["agnesi"](), "w8", STRUCTURES[:3])
    pairs = pairs_of(model)
    model(batch_of(model, [Atoms("CC", positions=[[0, 0, 0], [0, 0, 1.3]])]))
    before = [layer.intervals[0] for layer in pairs.layers]
    agree(*both(model, [molecule("H2O"), molecule("C6H6")]), 1e-9)
    after = [layer.intervals[0] for layer in pairs.layers]
    assert all(a > b for a, b in zip(after, before, strict=True))
    assert set(pairs.made.codes) == {0, 1, 2, 4}
    assert [tables[0].shape[1] for tables in pairs.made.tables] == after


@pytest.mark.usefixtures("at_once")
def test_a_pair_without_a_table_ends_in_the_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(MODELS["agnesi"](), "w8", STRUCTURES[:3])
    with engine.disabled():
        expected = model(batch_of(model, STRUCTURES[:1]))["energy"].detach()
    tables = engine.engine_of(model).layers[1].radial

    def refuse(pairs: object, out: object) -> bool:
        raise ValueError("the radial function cannot be tabulated")

    monkeypatch.setattr(tables, "make", refuse)
    with pytest.warns(UserWarning, match="reference path: the radial function cannot be tabulated"):
        energy = model(batch_of(model, STRUCTURES[:1]))["energy"].detach()
    assert torch.equal(energy, expected)
    assert not engine.serves(model, {})


def test_hidden_features_are_returned_in_the_hosts_layout() -> None:
    model = converted(MODELS["residual"](), "gaq", STRUCTURES[:3])
    ours, theirs = both(model, [STRUCTURES[0]])
    torch.testing.assert_close(ours["node_feats"], theirs["node_feats"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "changes", "program"),
    [
        ("plain", {}, True),
        ("heads", {}, True),
        ("density", {"pair_repulsion": True}, True),
        ("residual_first", {}, True),
        ("agnesi", {"apply_cutoff": False}, True),  # tables over the transformed distance
        ("density", {"apply_cutoff": False, "distance_transform": "Soft"}, True),
        ("plain", {"interaction_cls": "RealAgnosticAttResidualInteractionBlock"}, False),
        ("plain", {"interaction_cls": "RealAgnosticResidualNonLinearInteractionBlock"}, True),
    ],
)
def test_which_models_run_as_a_program(variant: str, changes: dict[str, Any], program: bool) -> None:
    """And its results are those of the same kernels called one by one, also for several structures at once."""
    model = build_model(variant, dtype=torch.float64, **changes)
    engine.accelerate(model)
    made = engine.engine_of(model)
    assert made is not None
    assert (made.compiled is not None) == program
    if not program:
        return
    batch = batch_of(model, [molecule("CH3OH"), bulk("CO", "rocksalt", a=4.2), molecule("H2O")])
    ours = model(dict(batch), compute_stress=True)
    compiled, made.compiled = made.compiled, None
    try:
        agree(ours, model(dict(batch), compute_stress=True), 1e-12)
    finally:
        made.compiled = compiled
