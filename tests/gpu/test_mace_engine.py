"""MACE's engine through the GPU kernels: the reference path's energies, forces and stresses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("mace") is None:
    pytest.skip("needs MACE: pip install '.[mace]'", allow_module_level=True)

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from e3nn import o3
from mace import modules
from mace_models import agree, build_model
from recorded import Playback
from torch.utils._python_dispatch import TorchDispatchMode

import gaq
from gaq import settings
from gaq.adapter import adapter_for
from gaq.kernels import contraction
from gaq.kernels.gpu import graphs
from gaq_mace import engine
from gaq_mace.attention import GAQAttentionResidualInteractionBlock
from gaq_mace.engine import compositions, pair_tables, replays, soundness

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(kind: str, hidden: str, lmax: int, correlation: int, **options: Any) -> torch.nn.Module:
    torch.manual_seed(3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return modules.ScaleShiftMACE(
            atomic_inter_scale=0.7,
            atomic_inter_shift=0.1,
            r_max=3.0,
            num_bessel=4,
            num_polynomial_cutoff=5,
            max_ell=lmax,
            interaction_cls=modules.interaction_classes[f"RealAgnostic{kind}ResidualInteractionBlock"],
            interaction_cls_first=modules.interaction_classes[f"RealAgnostic{kind}InteractionBlock"],
            num_interactions=2,
            num_elements=3,
            hidden_irreps=o3.Irreps(hidden),
            MLP_irreps=o3.Irreps("4x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=np.array([-1.0, -2.0, -3.0]),
            avg_num_neighbors=4.0,
            atomic_numbers=[1, 6, 8],
            correlation=correlation,
            radial_type="bessel",
            **options,
        )
    finally:
        torch.set_default_dtype(before)


WATER = molecule("H2O")
CRYSTAL = bulk("C", "diamond", a=3.6)
CRYSTAL.rattle(0.05, seed=0)
LONELY = Atoms("OH", positions=[[0, 0, 0], [0, 0, 9.0]])


def converted(model: torch.nn.Module, preset: str, structures: list[Atoms]) -> torch.nn.Module:
    plain = {"preset": preset, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
    prepared = gaq.prepare(model, plain)
    gaq.calibrate(prepared, structures, progress=False)
    return gaq.convert(prepared)


def batch_of(model: torch.nn.Module, structures: list[Atoms], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    batch: Any = next(iter(adapter_for(model).batches(model, structures, 1000)))
    plain = batch if isinstance(batch, dict) else batch.to_dict()
    found = {key: value.clone().to(DEVICE) if torch.is_tensor(value) else value for key, value in plain.items()}
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in found.items()}


@pytest.mark.parametrize(
    ("kind", "hidden", "lmax", "correlation", "options", "preset"),
    [
        ("", "4x0e+4x1o", 2, 2, {}, "gaq"),
        pytest.param("", "4x0e+4x1o", 3, 2, {}, "gaq", marks=pytest.mark.slow),
        pytest.param("", "6x0e", 2, 3, {"distance_transform": "Agnesi"}, "w8", marks=pytest.mark.slow),
        pytest.param("Density", "4x0e+4x1o", 1, 2, {}, "gaq", marks=pytest.mark.slow),
        ("Density", "4x0e+4x1o", 1, 2, {"distance_transform": "Agnesi", "apply_cutoff": False}, "w8"),
    ],
)
def test_the_engine_is_the_reference(
    kind: str, hidden: str, lmax: int, correlation: int, options: dict[str, Any], preset: str
) -> None:
    model = converted(make(kind, hidden, lmax, correlation, **options), preset, [WATER, CRYSTAL]).to(DEVICE)
    structures = [WATER, CRYSTAL, LONELY]
    assert engine.serves(model, {})
    ours = model(batch_of(model, structures), training=False, compute_stress=True)
    with engine.disabled():
        theirs = model(batch_of(model, structures), training=False, compute_stress=True)
    for key in ("energy", "forces", "stress", "node_feats"):
        scale = max(1.0, float(theirs[key].detach().abs().max()))
        torch.testing.assert_close(
            ours[key].detach(), theirs[key].detach(), rtol=0, atol=2e-6 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert float(theirs["forces"].abs().max()) > 1e-3


@pytest.mark.parametrize(
    "block", ["RealAgnosticResidualNonLinearInteractionBlock", GAQAttentionResidualInteractionBlock.__name__]
)
def test_blocks_that_compute_on_edges(block: str) -> None:
    """Radial weights, or factors of them, that differ from edge to edge."""
    small = {"max_ell": 1, "hidden_irreps": "3x0e+3x1o", "r_max": 3.0, "radial_MLP": [8]}
    model = build_model("plain", torch.float64, interaction_cls=block, interaction_cls_first=block, **small)
    model = engine.accelerate(model.to(DEVICE))
    assert engine.serves(model, {})
    ours = model(batch_of(model, [WATER, LONELY]), compute_stress=True)
    with engine.disabled():
        theirs = model(batch_of(model, [WATER, LONELY]), compute_stress=True)
    agree(ours, theirs, 1e-10)
    assert float(theirs["forces"].abs().max()) > 1e-3


def strained(scale: float, seed: int) -> Atoms:
    """A crystal under strain, moved at random; how many neighbours there are depends on both."""
    atoms = CRYSTAL.copy()
    atoms.set_cell(atoms.cell * scale, scale_atoms=True)
    atoms.rattle(0.02, seed=seed)
    atoms.symbols[1] = "O"
    return atoms


def moved(seed: int) -> list[Atoms]:
    found = [WATER.copy(), Atoms("C", positions=[[0, 0, 0]])]
    for atoms in found:
        atoms.rattle(0.05, seed=seed)
    return found


OPTIONS = {"compute_stress": True, "compute_virials": True}
KINDS = [("", {}), ("Density", {"distance_transform": "Agnesi", "pair_repulsion": True})]


@pytest.fixture(scope="module", params=KINDS, ids=["plain", "density"])
def small(request: pytest.FixtureRequest) -> torch.nn.Module:
    kind, options = request.param
    structures = [WATER, CRYSTAL]
    return converted(make(kind, "3x0e+3x1o", 1, 2, **options), "gaq", structures).to(DEVICE)


CRYSTAL_AMONG_MOLECULES = ([WATER], [strained(0.97, 1), *moved(1)], [LONELY])
MOLECULES = (moved(1), [LONELY])


@pytest.mark.parametrize(
    ("small", "kernels", "batches"),
    [
        pytest.param(KINDS[0], "triton", MOLECULES, id="plain-triton", marks=pytest.mark.slow),
        pytest.param(KINDS[0], "triton", CRYSTAL_AMONG_MOLECULES, id="plain-triton-crystal", marks=pytest.mark.slow),
        pytest.param(KINDS[1], "triton", CRYSTAL_AMONG_MOLECULES, id="density-triton", marks=pytest.mark.slow),
        pytest.param(KINDS[0], "", CRYSTAL_AMONG_MOLECULES, id="plain"),
        pytest.param(KINDS[1], "", CRYSTAL_AMONG_MOLECULES, id="density"),
    ],
    indirect=["small"],
)
def test_edges_of_the_padding_contribute_nothing(
    small: torch.nn.Module, kernels: str, batches: tuple[list[Atoms], ...], setting: Callable[..., Any]
) -> None:
    setting(kernels=kernels or "auto")
    small_engine: Any = engine.Engine(small)
    for structures in batches:
        data = batch_of(small, structures)
        given = {name: data[name] for name in replays.INPUTS}
        edges = given["edge_index"].shape[1]
        atoms = small_engine.compositions(given["node_attrs"])
        theirs = small_engine._step({name: t.clone() for name, t in given.items()}, atoms, OPTIONS)
        assert edges == 0 or float(theirs["forces"].abs().max()) > 1e-4
        for size in (graphs.bucket(edges + 40),) if kernels else (edges + 1, graphs.bucket(edges + 40)):
            ours = small_engine._step(
                replays.padded({name: t.clone() for name, t in given.items()}, size), atoms, OPTIONS
            )
            agree(ours, theirs, 1e-13)


CRYSTALS = [[strained(scale, seed)] for seed, scale in enumerate((1.0, 0.99, 1.03, 0.8, 0.79))]
FRAMES = [CRYSTALS[0], moved(0), CRYSTALS[1], CRYSTALS[2], moved(1), CRYSTALS[3], CRYSTALS[4]]
"""A crystal and a batch of molecules, in turns."""


RECORDED = settings.Settings().cuda_graphs


def follow(model: torch.nn.Module, frames: list[list[Atoms]], tolerance: float) -> list[int]:
    """Compare the steps of a trajectory with and without graphs, and return their numbers of edges."""
    sizes, kept = [], []
    for structures in frames:
        data = batch_of(model, structures, next(model.parameters()).dtype)
        sizes.append(data["edge_index"].shape[1])
        ours = model({k: v.clone() if torch.is_tensor(v) else v for k, v in data.items()}, **OPTIONS)
        with settings.override(cuda_graphs=0):
            theirs = model(data, **OPTIONS)
        kept.append((ours, theirs))
    # After all steps, so that a result that a later step overwrites is noticed.
    for ours, theirs in kept:
        agree(ours, theirs, tolerance)
        assert float(theirs["forces"].detach().abs().max()) > 1e-4
    return sizes


def changes(sizes: list[int]) -> None:
    """Check that the number of edges changes within a bucket, and to another bucket."""
    loose, tight = (
        [graphs.bucket(size) for size, frame in zip(sizes, FRAMES, strict=True) if frame in part]
        for part in (CRYSTALS[:3], CRYSTALS[3:])
    )
    assert len(set(loose)) == len(set(tight)) == 1
    assert loose[0] != tight[0]
    assert len(set(sizes)) >= 4


@pytest.mark.parametrize("small", KINDS[:1], ids=["plain"], indirect=True)
def test_a_trajectory_of_replayed_steps(
    small: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, setting: Callable[..., Any]
) -> None:
    """Through the CPU's kernels, where there is no GPU: this tests the padding and the buffers."""
    setting(kernels="auto", cuda_graphs=RECORDED)
    playback = Playback()
    monkeypatch.setattr(engine.engine_of(small), "graphs", graphs.Graphs(playback))
    changes(follow(small, FRAMES, 1e-13))
    assert playback.recorded == 3
    # All but the first of each kind; and once where it is recorded, to see whether it can be.
    assert playback.replayed == len(FRAMES) - 3 + 3


@pytest.mark.slow
@pytest.mark.parametrize("small", KINDS[1:], ids=["density"], indirect=True)
def test_replayed_steps_of_radial_functions_of_the_species(
    small: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, setting: Callable[..., Any]
) -> None:
    setting(cuda_graphs=RECORDED)
    playback = Playback()
    monkeypatch.setattr(engine.engine_of(small), "graphs", graphs.Graphs(playback))
    sizes = follow(small, CRYSTALS[:3:2], 1e-13)
    assert len(set(sizes)) > 1
    assert (playback.recorded, playback.replayed) == (1, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_trajectory_on_a_gpu(small: torch.nn.Module, dtype: torch.dtype, setting: Callable[..., Any]) -> None:
    setting(cuda_graphs=RECORDED)
    model = copy.deepcopy(small).to(dtype)
    # Sums by atomics are not the same from run to run, and a code of 16 bits may fall to the other side.
    changes(follow(model, FRAMES, 1e-10 if dtype == torch.float64 else 1e-3))
    small_engine: Any = engine.engine_of(model)
    assert small_engine.graphs.failed is None
    assert len(small_engine.graphs.kept) == 3
    # Nothing in a replayed step waits for the GPU once the atoms are known.
    data = batch_of(model, [strained(1.0, 0)], dtype)
    model(dict(data), **OPTIONS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(dict(data), **OPTIONS)
        setting(cuda_graphs=0)
        model(dict(data), compute_virials=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class WaitingOperations(TorchDispatchMode):
    """Counts operations for which the host would wait for a GPU, or the GPU for the host."""

    WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "lift_fresh", "equal", "linalg_lu", "_det")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        name = str(func)
        to_host = name.startswith("aten._to_copy") and (kwargs or {}).get("device") not in (None, args[0].device)
        if to_host or any(part in name for part in self.WAITING):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_nothing_in_a_step_asks_for_a_value(small: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    # Checks whose values are read on the CPU only.
    monkeypatch.setattr(contraction, "has_data", lambda tensor: False)
    monkeypatch.setattr(soundness, "_reads_values", lambda device: False)
    small_engine: Any = engine.Engine(small)
    data = batch_of(small, [WATER])
    given = replays.padded({name: data[name] for name in replays.INPUTS}, 64)
    atoms = small_engine.compositions(given["node_attrs"])
    small_engine._step({name: t.clone() for name, t in given.items()}, atoms, {"compute_virials": True})
    with WaitingOperations() as waiting:
        found = small_engine._step(given, atoms, {"compute_virials": True})
    assert found["forces"].isfinite().all()
    assert waiting.operations > 100
    assert not waiting.names


@pytest.mark.parametrize("small", KINDS[:1], ids=["plain"], indirect=True)
def test_what_is_not_replayed(
    small: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, setting: Callable[..., Any]
) -> None:
    setting(kernels="auto", cuda_graphs=RECORDED)
    playback = Playback()
    small_engine: Any = engine.engine_of(small)
    monkeypatch.setattr(small_engine, "graphs", graphs.Graphs(playback))
    # Energies alone keep their graph of autograd, as do positions that depend on something else.
    for _ in range(2):
        energy = small(batch_of(small, [WATER]), compute_force=False)["energy"]
        assert energy.requires_grad
        data = batch_of(small, [WATER])
        shift = torch.zeros(3, dtype=torch.float64, device=DEVICE, requires_grad=True)
        data["positions"] = data["positions"] + shift
        small(data)
    setting(cuda_graphs=3)
    for _ in range(2):
        small(batch_of(small, [WATER]))
    assert playback.recorded == 0
    setting(cuda_graphs=RECORDED)
    for _ in range(2):
        found = small(batch_of(small, [WATER]))
    assert playback.recorded == 1
    assert not any(value is not None and value.requires_grad for value in found.values())


@pytest.mark.parametrize("small", KINDS[:1], ids=["plain"], indirect=True)
def test_the_composition_is_looked_at_once(small: torch.nn.Module) -> None:
    small_engine: Any = engine.engine_of(small)
    data = batch_of(small, [WATER, strained(1.0, 0)])
    first = small_engine.compositions(data["node_attrs"])
    assert small_engine.compositions(data["node_attrs"]) is first
    assert small_engine.compositions(data["node_attrs"].clone()) is first
    # Changed in place it has another order of atoms, which is another composition.
    data["node_attrs"][[0, 1]] = data["node_attrs"][[1, 0]]
    other = small_engine.compositions(data["node_attrs"])
    assert other.key != first.key
    assert other.bounds == first.bounds
    for i in range(2 * compositions.COMPOSITIONS):
        small_engine.compositions(torch.eye(3, dtype=torch.float64, device=DEVICE)[[0] * (i + 1)])
    assert len(small_engine.compositions.kept) == compositions.COMPOSITIONS


@pytest.mark.slow
def test_structures_of_many_species_look_at_their_edges(
    small: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compositions, "MOST_SPECIES", 1)
    monkeypatch.setattr(pair_tables, "EDGES_OF_AN_INTERVAL", 0)
    small_engine: Any = engine.Engine(small)
    data = batch_of(small, [WATER, LONELY])
    found = small_engine(dict(data), **OPTIONS)
    agree(found, engine.engine_of(small)(dict(data), **OPTIONS), 1e-13)
    by_species = small_engine.layers[0].radial.by_species
    assert (small_engine.compositions(data["node_attrs"]).tables is None) == by_species


@pytest.mark.slow
def test_linear_layers_in_integers(setting: Callable[..., Any]) -> None:
    """The products of a float32 model on its integer codes, against those of floats."""
    model = converted(make("", "32x0e+32x1o", 1, 2), "gaq", [WATER]).float().to(DEVICE)
    by_floats: Any = engine.engine_of(model)
    assert not any(layer.by_integers for layer in by_floats.layers)
    setting(linear="int8")
    by_integers: Any = engine.engine_of(model)
    assert by_integers is not by_floats
    generator = torch.Generator().manual_seed(0)
    for number, (layer, plain) in enumerate(zip(by_integers.layers, by_floats.layers, strict=True)):
        # The weights of the first interaction have 16 bits.
        served = {"linear", "skip", "final", "up"} if number else set()
        assert {name.split("_")[0] for name in layer.by_integers} == served
        for name, integers in layer.by_integers.items():
            matrix_name, _, species = name.partition(".")
            matrix = getattr(plain, matrix_name)
            matrix = matrix[int(species)] if species else matrix
            scale = integers.scale
            if integers.group_size:
                scale = scale.repeat_interleave(integers.group_size, 0)[: len(matrix)]
            torch.testing.assert_close(integers.codes * scale, matrix, rtol=1e-6, atol=0)
        x = torch.randn(5, layer.channels, generator=generator).to(DEVICE)
        exact = x.double() @ plain.final_0.double()
        # Half a step for each input.
        tops = {name.split("_")[1][0]: integers.top for name, integers in layer.by_integers.items()}
        assert tops in ({}, {"0": 8355711}, {"0": 8355711, "1": 32639})  # 24 bits: three planes; vectors: two
        step = x.abs().amax(1, keepdim=True).double() / 8355711
        bound = 0.51 * step * plain.final_0.double().abs().sum(0) + 1e-6 * exact.abs().max()
        assert bool(((layer._product(x, "final_0").double() - exact).abs() <= bound).all())
    data = batch_of(model, [WATER], torch.float32)
    theirs = by_floats(dict(data), compute_stress=True)
    ours = by_integers(dict(data), compute_stress=True)
    for key in ("energy", "forces", "node_feats"):
        scale = max(1.0, float(theirs[key].detach().abs().max()))
        # Steps of 1/32639 of the largest component, in a few layers one after the other.
        torch.testing.assert_close(ours[key].detach(), theirs[key].detach(), rtol=0, atol=3e-4 * scale)
    assert not torch.equal(ours["node_feats"], theirs["node_feats"])
    # Layers in float64, or whose features are not rounded to 16 bits, stay with floats.
    for other in (
        converted(make("", "4x0e", 1, 2), "gaq", [WATER]),
        converted(make("", "4x0e", 1, 2), "w8", [WATER]).float(),
    ):
        assert not any(layer.by_integers for layer in engine.Engine(other.to(DEVICE)).layers)
