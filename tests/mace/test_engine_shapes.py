"""The engine on the shapes of newer foundation models, against MACE's own forward pass in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from e3nn import nn, o3
from mace_models import agree, build_model

import gaq
from gaq.kernels import convolution, harmonics
from gaq.kernels.cpu import native
from gaq.model.sites import POSITION_FREE, ROUNDED
from gaq.model.state import feature_quantizers
from gaq_mace import engine
from gaq_mace.attention import GAQAttentionResidualInteractionBlock
from gaq_mace.engine import accelerate, first_messages, pair_tables
from gaq_mace.engine.programs import Compiled
from gaq_mace.evaluate import MACEPotential, make_batches
from gaq_mace.sites import bystanders, find_sites
from gaq_mace.weights import quantized_weights

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")

NON_LINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
OURS = GAQAttentionResidualInteractionBlock.__name__
MACES = "RealAgnosticAttResidualInteractionBlock"
DENSITY = {
    "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
    "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
}
RESIDUAL = "RealAgnosticResidualInteractionBlock"
BOTH = {"interaction_cls": NON_LINEAR, "interaction_cls_first": NON_LINEAR}
EMBEDDED = {
    "total_charge": {"type": "categorical", "per": "graph", "in_dim": 1, "emb_dim": 4, "num_classes": 7, "offset": 3},
    "total_spin": {"type": "continuous", "per": "graph", "in_dim": 1, "emb_dim": 3},
}
HEADS = {
    "heads": ["Default", "other"],
    "atomic_energies": [[-1.0, -3.0, -5.0], [-1.5, -2.5, -4.5]],
    "atomic_inter_scale": [0.8, 1.1],
    "atomic_inter_shift": [0.1, -0.2],
}
SHAPES: dict[str, dict[str, Any]] = {
    "nonlinear": {**BOTH},
    "multihead": {
        **BOTH,
        **HEADS,
        "hidden_irreps": "6x0e+6x1o",
        "edge_irreps": o3.Irreps("4x0e+4x1o"),
        "use_edge_irreps_first": True,
        "use_agnostic_product": True,
        "apply_cutoff": False,
        "pair_repulsion": True,
        "distance_transform": "Agnesi",
    },
    "charge_and_spin": {
        **BOTH,
        "num_interactions": 3,
        "hidden_irreps": "6x0e+6x1o+6x2e",
        "edge_irreps": o3.Irreps("4x0e+4x1o+4x2e"),
        "apply_cutoff": False,
        "embedding_specs": EMBEDDED,
        "use_embedding_readout": True,
    },
    "tables_and_networks": {"interaction_cls": NON_LINEAR, "embedding_specs": EMBEDDED},
    "transformed_distances": {**DENSITY, "apply_cutoff": False, "distance_transform": "Agnesi"},
    "attention": {"interaction_cls_first": OURS, "interaction_cls": OURS, "distance_transform": "Agnesi"},
    "attention_of_uneven_heads": {
        "interaction_cls": OURS,
        "hidden_irreps": "6x0e+6x1o",
        "apply_cutoff": False,
    },
    "maces_attention": {"interaction_cls": MACES},
    "fewer_channels_on_edges": {
        "interaction_cls_first": RESIDUAL,
        "interaction_cls": RESIDUAL,
        "edge_irreps": o3.Irreps("4x0e+4x1o"),
    },
}


def charged(name: str, charge: int, spin: int) -> Atoms:
    atoms = molecule(name)
    atoms.info.update(charge=charge, spin=spin)
    return atoms


STRUCTURES = [
    charged("CH3OH", 1, 2),
    charged("H2O", -2, 1),
    Atoms("OH", positions=[[0, 0, 0], [0, 0, 9.0]]),
    bulk("C", "diamond", a=3.6),
]


def made(shape: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model in which species and density matter: MACE starts with next to no influence of either."""
    model = build_model("plain", dtype, **SHAPES[shape])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "source_embedding" in name or "target_embedding" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            elif name.endswith((".alpha", ".beta")):
                parameter.fill_(2.0)
    return model


def both(model: Any, structures: Sequence[Atoms], **options: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    outputs = []
    for off in (False, True):
        (batch,) = make_batches(model, structures, 1000)
        if off:
            with engine.disabled():
                outputs.append(model(batch, **options))
        else:
            assert engine.serves(model, {})
            outputs.append(model(batch, **options))
    return outputs[0], outputs[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_is_maces_own_forward_pass(shape: str) -> None:
    model = accelerate(made(shape))
    ours, theirs = both(model, STRUCTURES, compute_stress=True)
    agree(ours, theirs, 1e-10)
    assert float(theirs["forces"].abs().max()) > 1e-2


PROGRAMS = ["nonlinear", "multihead", "charge_and_spin", "tables_and_networks", "transformed_distances"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Radial tables are made in the first step; grows by each step that a program computes."""
    called: list[int] = []
    original = Compiled.step
    monkeypatch.setattr(pair_tables, "EDGES_OF_AN_INTERVAL", 0)
    monkeypatch.setattr(Compiled, "step", lambda *args: called.append(1) or original(*args))
    return called


@pytest.mark.parametrize("shape", PROGRAMS)
def test_the_program_is_maces_own_forward_pass(shape: str, steps: list[int]) -> None:
    """Of each structure by itself and of all at once, whose charges differ; also the second time."""
    model = accelerate(made(shape))
    for structures in (STRUCTURES[:1], STRUCTURES, STRUCTURES[::-1], STRUCTURES):
        ours, theirs = both(model, structures, compute_stress=True)
        agree(ours, theirs, 1e-9)
    assert len(steps) == 4


@pytest.mark.parametrize("shape", PROGRAMS)
def test_forces_of_programs_in_float32(shape: str, steps: list[int]) -> None:
    """They are at most twice as far from those of float64 as those of MACE in float32."""
    exact, single = made(shape), made(shape, torch.float32)
    single.load_state_dict(exact.state_dict())
    structures = [*STRUCTURES[:2], cubic()]
    with engine.disabled():
        expected = exact(make_batches(exact, structures, 1000)[0])["forces"].detach()
    ours, theirs = (of["forces"].detach().double() for of in both(accelerate(single), structures))
    assert steps
    assert float((ours - expected).norm()) <= 2 * float((theirs - expected).norm())


def cubic() -> Atoms:
    """A distorted cell of 8 atoms of three species."""
    atoms = bulk("C", "diamond", a=3.6, cubic=True)
    atoms.rattle(0.05, seed=0)
    atoms.symbols[2], atoms.symbols[5] = "O", "H"
    atoms.info.update(charge=0, spin=1)
    return atoms


def converted(model: Any, preset: str, **changes: Any) -> Any:
    plain = {"preset": preset, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}, **changes}
    prepared = gaq.prepare(model, plain)
    gaq.calibrate(prepared, STRUCTURES[:2], progress=False)
    return gaq.convert(prepared)


@pytest.mark.parametrize("program", [False, True])
@pytest.mark.parametrize("shape", ["multihead", "charge_and_spin"])
def test_converted_models(shape: str, program: bool, request: pytest.FixtureRequest) -> None:
    if program:
        request.getfixturevalue("steps")
    ours, theirs = both(converted(made(shape), "gaq"), STRUCTURES, compute_stress=True)
    # A code may fall to the other side of a threshold.
    agree(ours, theirs, 2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {**DENSITY, "apply_cutoff": False},
        {"interaction_cls": OURS},
        {"interaction_cls": MACES},
    ],
    ids=["density", "ours", "maces"],
)
def test_rounded_attention_and_densities(options: dict[str, Any]) -> None:
    model = converted(build_model("plain", torch.float64, **options), "gaq", attention={})
    ours, theirs = both(model, STRUCTURES)
    agree(ours, theirs, 2e-6)


def test_rounded_hidden_layers_of_radial_networks() -> None:
    """They have steps, so no table: the network is evaluated for each edge."""
    model = converted(build_model("density", torch.float64), "gaq", radial_activations=True)
    assert any("conv_tp_weights" in name for name in feature_quantizers(model))
    ours, theirs = both(model, STRUCTURES)
    agree(ours, theirs, 2e-6)


def test_edges_beyond_the_cutoff_contribute_nothing() -> None:
    """A neighbour list with a skin has such edges, and the density of this block does not vanish there by itself."""
    model = accelerate(made("nonlinear"))
    (batch,) = make_batches(model, STRUCTURES[:1], 1)
    expected = model(dict(batch))
    far = torch.tensor([[0, 1], [1, 0]])
    more = {**batch, "edge_index": torch.cat([batch["edge_index"], far], dim=1)}
    shifts = torch.tensor([[20.0, 0.0, 0.0], [0.0, 20.0, 0.0]], dtype=torch.float64)
    for name in ("shifts", "unit_shifts"):
        more[name] = torch.cat([batch[name], shifts])
    found = model(more)
    for name in ("energy", "forces"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12)


def test_reference_path_of_embedded_charges_in_every_call() -> None:
    """Once TorchScript has optimized it, stock MACE's own code raises for weights that require gradients."""
    model = build_model("plain", torch.float64, **SHAPES["charge_and_spin"])
    results = [MACEPotential(model)(STRUCTURES[:1]) for _ in range(3)]
    assert all(parameter.requires_grad for parameter in model.parameters())
    for energies, forces in results[1:]:
        assert energies == pytest.approx(results[0][0], abs=1e-9)
        assert forces[0] == pytest.approx(results[0][1][0], abs=1e-9)
    assert MACEPotential(model).energies(STRUCTURES[:1]) == pytest.approx(results[0][0], abs=1e-9)


def test_energies_without_forces() -> None:
    model = accelerate(made("charge_and_spin"))
    with torch.no_grad():
        ours, theirs = both(model, STRUCTURES, compute_force=False)
    agree(ours, theirs, 1e-12)


def first_layer(species: int) -> tuple[Any, list[torch.Tensor]]:
    """A convolution of scalars with one path in each group, and tensors of a random structure of 6 atoms."""
    sh = harmonics.fit(lambda d: o3.spherical_harmonics([0, 1, 2], d, True, "component"), 2)
    factors = torch.rand(3, dtype=torch.float64)
    paths = [convolution.Path(0, l, l, f * o3.wigner_3j(0, l, l).double()) for l, f in enumerate(factors)]  # noqa: E741
    problem = convolution.ConvolutionProblem(5, (0,), (0, 1, 2), tuple(paths), tuple(sh), 10.0)
    ends = torch.tensor([[i, j] for i in range(6) for j in range(6) if i != j and (i, j) != (5, 0)]).T
    features, hidden = torch.randn(species, 1, 5).double(), torch.randn(ends.shape[1], 4).double()
    vectors, last = torch.randn(ends.shape[1], 3).double(), torch.randn(4, 15).double()
    kind = torch.arange(6) * species // 6
    return problem, [convolution.Graph(*ends), features, kind, vectors, hidden, last]


@pytest.mark.parametrize("padding", [4, 0], ids=["padded", "summed"])
@pytest.mark.parametrize("species", [1, 3])
def test_sums_before_channels_are_the_convolution(species: int, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_messages, "PADDING", padding)
    torch.manual_seed(0)
    problem, (graph, features, kind, vectors, hidden, last) = first_layer(species)
    assert first_messages.serves(problem)
    results = []
    for before in (False, True):
        inputs = [t.clone().requires_grad_() for t in (vectors, hidden)]
        if before:
            message = first_messages.messages(problem, graph, features, kind, *inputs, last)
        else:
            weights = (inputs[1] @ last).view(-1, 3, 5)
            message = convolution.reference(problem, graph, features[kind], inputs[0], weights, tabulated=False)
        factors = torch.linspace(0.5, 1.5, message.numel(), dtype=torch.float64).view_as(message)
        results.append((message, *torch.autograd.grad((message * factors).sum(), inputs)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", ["nonlinear", "charge_and_spin"])
def test_large_structures_of_few_species(shape: str) -> None:
    """Where each atom has many neighbours, their species are summed first; a batch of charges has no such sums."""
    atoms = bulk("C", "diamond", a=3.6, cubic=True)
    atoms.rattle(0.05, seed=0)
    model = accelerate(made(shape))
    called = []
    original = first_messages.messages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_messages, "messages", lambda *a: called.append(1) or original(*a))
        ours, theirs = both(model, [atoms], compute_stress=True)
        assert called
        agree(ours, theirs, 1e-10)
        called.clear()
        ours, theirs = both(model, [atoms, atoms])
        assert bool(called) == (shape == "nonlinear")
    agree(ours, theirs, 1e-10)


def test_gates_of_files_from_before_mace_had_its_own() -> None:
    model = made("nonlinear")
    for block in model.interactions:
        gate = block.equivariant_nonlin
        silu, sigmoid = torch.nn.functional.silu, torch.nn.functional.sigmoid
        block.equivariant_nonlin = nn.Gate(
            gate.irreps_scalars, [silu], gate.irreps_gates, [sigmoid] * len(gate.irreps_gates), gate.irreps_gated
        ).double()
    ours, theirs = both(accelerate(model), STRUCTURES)
    agree(ours, theirs, 1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_module_has_a_place(shape: str) -> None:
    """Weights of linear layers and embeddings are quantized; the rest has a reason that a user understands."""
    model = made(shape)
    assert all(other.reason != "not a known kind" for other in bystanders(model))
    sites = {site.name: site for site in find_sites(model)}
    quantized = {f"{name}.{weight.path}" for name, site in sites.items() for weight in site.weights}
    large = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert large <= quantized
    for name, site in sites.items():
        if name.endswith(("source_embedding", "target_embedding")) or "joint_embedding" in name:
            assert site.features is None
            assert site.input_note == POSITION_FREE
        if name.endswith("linear_res"):
            assert site.input_note == ROUNDED


@pytest.mark.slow
def test_files_hold_the_codes_of_embeddings(tmp_path: Path) -> None:
    plain = {"preset": "w8", "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
    model = gaq.convert(gaq.prepare(made("charge_and_spin", torch.float32), plain))
    assert "joint_embedding.embedders.total_charge.weight" in quantized_weights(model)
    for suffix in (".model", ".safetensors"):
        gaq.save(model, tmp_path / f"packed{suffix}")
        again = gaq.load(tmp_path / f"packed{suffix}")
        found, expected = both(again, STRUCTURES[:2])[0], both(model, STRUCTURES[:2])[0]
        agree(found, expected, 1e-6)
