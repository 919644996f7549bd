"""NequIP models as programs: against the models themselves, on whole structures and on parts of space."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import torch
from ase import Atoms
from ase.build import bulk, molecule
from nequip.data import AtomicDataDict
from nequip_models import build_model, few_bits, molecules, without_distillation
from torch import Tensor

import gaq
from gaq.kernels import radial
from gaq.kernels.cpu import native
from gaq_nequip.engine.programs import NequIPProgram, Step, Unsupported, program_of
from gaq_nequip.evaluate import make_batches

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.why_not()}")

TOLERANCE = 1e-12
"""Of radial tables in float64: with the usual 1e-11 forces differ by up to 1e-10 of the largest."""
VARIANTS = ("plain", "parity", "wide", "unequal", "readout")
ZBL = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": ["H", "C", "O"]}


def graph(model: Any, atoms: Atoms) -> dict[str, Tensor]:
    (batch,) = make_batches(model, [atoms], 1)
    return batch


def shifts_of(batch: dict[str, Tensor]) -> Tensor:
    edges = batch[AtomicDataDict.EDGE_INDEX_KEY].shape[1]
    if AtomicDataDict.EDGE_CELL_SHIFT_KEY not in batch:
        return torch.zeros(edges, 3, dtype=torch.float64)
    return batch[AtomicDataDict.EDGE_CELL_SHIFT_KEY].double() @ batch[AtomicDataDict.CELL_KEY].double().view(3, 3)


def of_model(model: Any, batch: dict[str, Tensor]) -> Step:
    """What the model itself gives."""
    out = model(dict(batch))
    energies = out[AtomicDataDict.PER_ATOM_ENERGY_KEY].detach().flatten()
    virial = out[AtomicDataDict.VIRIAL_KEY].detach().view(3, 3)
    return Step(energies, out[AtomicDataDict.FORCE_KEY].detach(), virial)


def of_program(made: NequIPProgram, batch: dict[str, Tensor]) -> Step:
    types = batch[AtomicDataDict.ATOM_TYPE_KEY].view(-1)
    return made.step(batch[AtomicDataDict.POSITIONS_KEY], types, batch[AtomicDataDict.EDGE_INDEX_KEY], shifts_of(batch))


def check(ours: Step, expected: Step, tolerance: float) -> None:
    """Compare results relative to the largest energy, force and component of the virial."""
    for one, other, least in zip(ours, expected, (0.1, 1e-2, 1e-2), strict=True):
        scale = max(float(other.abs().max()), least)
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * scale)


def salt() -> Atoms:
    """A sheared cell, smaller than the cutoff, with atoms of three types."""
    atoms = bulk("C", "diamond", a=3.6)
    atoms = atoms.repeat((2, 1, 1))
    atoms.set_cell(atoms.cell.array @ [[1, 0.1, 0], [0, 1, 0.05], [0, 0, 0.95]], scale_atoms=True)
    atoms.rattle(0.08, seed=3)
    atoms.symbols[0], atoms.symbols[3] = "O", "H"
    return atoms


STRUCTURES = {
    "molecule": molecules()[0],
    "cell": salt(),
    "no edges": Atoms("CH", positions=[[0, 0, 0], [0, 0, 30.0]]),
    "one atom": Atoms("O"),
    "one atom in a cell": Atoms("C", cell=[2.5, 2.6, 2.7], pbc=True),
    "one type": molecule("C60")[:20],
}


def agrees(model: Any, tolerance: float, structures: list[str] | None = None) -> NequIPProgram:
    made = program_of(model, tolerance=TOLERANCE if model.model_dtype == torch.float64 else None)
    for name in structures or STRUCTURES:
        batch = graph(model, STRUCTURES[name])
        check(of_program(made, batch), of_model(model, batch), tolerance)
    return made


@pytest.mark.parametrize("preset", [None, "w8", "gaq"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.smoke
def test_energies_forces_and_virial(
    float_model: Callable[..., Any], quantized: Callable[..., Any], variant: str, preset: str | None
) -> None:
    model = quantized(preset, variant, "float64") if preset else float_model(variant, "float64")
    made = agrees(model, 1e-10)
    layers = 3 if variant in ("parity", "unequal") else 2
    assert len(made.problems) == len(made.radials) == len(made.layers) == layers
    assert made.type_names == ("H", "C", "O")
    assert made.r_max == 4.0
    torch.testing.assert_close(made.shifts, torch.full((3,), 0.1, dtype=torch.float64))
    assert not made.pairs.any()
    for functions, problem in zip(made.radials, made.problems, strict=True):
        assert functions.tables.shape[0] == 1
        assert functions.tables.shape[2:] == (radial.COEFFICIENTS, functions.last.shape[1])
        assert functions.last.shape[::2] == (len(problem.paths), problem.channels)
        assert functions.tables.dtype == functions.last.dtype == torch.float64


@pytest.mark.parametrize("preset", [None, "w8", "gaq"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_float32(
    float_model: Callable[..., Any], quantized: Callable[..., Any], variant: str, preset: str | None
) -> None:
    model = quantized(preset, variant, "float32", "frozen") if preset else float_model(variant, "float32")
    agrees(model, 2e-4 if preset == "gaq" else 2e-5, ["molecule", "cell", "one atom"])


def test_a_folded_self_connection() -> None:
    """A frozen model in float32 has one matrix for each type in the place of a product with the embedding."""
    from gaq_nequip.freeze import freeze

    model = build_model("plain", num_features=16)
    model = freeze(gaq.convert(gaq.calibrate(gaq.prepare(model, few_bits("gaq")), molecules(), progress=False)))
    assert any(hasattr(m, "gaq_folded") for m in model.modules())
    agrees(model, 2e-4, ["molecule", "cell"])


SHAPES: dict[str, dict[str, Any]] = {
    "one layer": {"num_layers": 1},
    "high degrees": {"l_max": 3, "num_features": [6, 5, 4, 3], "parity": True},
    "residual": {"convnet_resnet": True, "num_layers": 4},
    "residual first layer": {
        "convnet_resnet": True,
        "learnable_shift": True,
        "num_layers": 1,
        "type_embed_num_features": 8,
    },
    "self-connection of the first layer": {"learnable_shift": True},
    "no self-connection": {"convnet_sc": False},
    "values by type": {
        "avg_num_neighbors": {"H": 3.0, "C": 6.0, "O": 9.0},
        "per_type_energy_scales": {"H": 0.5, "C": 0.8, "O": 1.5},
        "per_type_energy_shifts": {"H": -1.0, "C": 0.5, "O": 2.0},
    },
    "no scales": {"per_type_energy_scales": None, "per_type_energy_shifts": None},
    "repulsion": {"pair_potential": ZBL},
    "cutoffs by pair": {"per_edge_type_cutoff": {"H": 2.4, "C": {"O": 3.0}}, "pair_potential": ZBL},
    "odd gates": {"convnet_nonlinearity_gates": {"e": "tanh", "o": "tanh"}, "parity": True},
    "deep radial network": {"radial_mlp_depth": 2},
    "linear read-out": {"readout_mlp_hidden_layers_depth": 2, "readout_mlp_nonlinearity": None},
}


@pytest.mark.parametrize("preset", [None, "gaq"])
@pytest.mark.parametrize("shape", SHAPES)
def test_options_of_the_architecture(shape: str, preset: str | None) -> None:
    model = build_model("plain", "float64", **SHAPES[shape])
    if preset:
        model = gaq.convert(gaq.calibrate(gaq.prepare(model, few_bits(preset)), molecules(), progress=False))
    made = agrees(model, 1e-10)
    if shape.startswith("residual"):
        assert any(getattr(module, "resnet", False) for module in model.modules())
    if shape == "values by type":
        assert made.shifts.tolist() == [-1.0, 0.5, 2.0]
    if shape == "cutoffs by pair":
        # The atom that receives comes first in NequIP's cutoffs: hydrogen sees oxygen up to 2.4 Å, but not the other
        # way round.
        values = torch.tensor([2.4, 3.0, 4.0])[made.pairs]
        torch.testing.assert_close(values, torch.tensor([[2.4, 4.0, 4.0], [2.4, 4.0, 4.0], [2.4, 3.0, 4.0]]))
        assert made.radials[0].tables.shape[0] == 3


def test_tables_as_fine_as_usual(float_model: Callable[..., Any]) -> None:
    model = float_model("parity", "float64")
    made, finer = program_of(model), program_of(model, tolerance=TOLERANCE)
    assert made.radials[0].tables.shape[1] < finer.radials[0].tables.shape[1]
    assert finer.radials[0].error < made.radials[0].error <= radial.DOUBLE_TOLERANCE
    batch = graph(model, STRUCTURES["molecule"])
    check(of_program(made, batch), of_model(model, batch), 1e-9)


# -- parts of space --


class Ranks:
    """Ranks that run in threads, and wait for each other where they exchange."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.values: dict[int, dict[int, Any]] = {}
        self.lock = threading.Lock()

    def shared(self, call: int, atoms: list[int], rows: Tensor) -> dict[int, Any]:
        """Sums over all ranks of rows of atoms, for one exchange."""
        with self.lock:
            sums = self.values.setdefault(call, {})
            for atom, row in zip(atoms, rows, strict=True):
                sums[atom] = sums.get(atom, 0) + row.clone()
        self.barrier.wait()
        return sums


def on_rank(made: NequIPProgram, batch: dict[str, Tensor], own: list[int], ranks: Ranks) -> tuple[Tensor, Tensor, int]:
    """Energies of a rank's own atoms, and the forces that its edges give to all atoms, (atoms, 3)."""
    types, (receiver, sender) = batch[AtomicDataDict.ATOM_TYPE_KEY].view(-1), batch[AtomicDataDict.EDGE_INDEX_KEY]
    kept = torch.isin(receiver, torch.tensor(own))
    receiver, sender, shifts = receiver[kept], sender[kept], shifts_of(batch)[kept]
    positions = batch[AtomicDataDict.POSITIONS_KEY]
    vectors = positions[sender] - positions[receiver] + shifts
    # A periodic image of an own atom is a ghost as well.
    keys = [(int(atom), *map(float, shift)) for atom, shift in zip(sender, shifts, strict=True)]
    ghosts = sorted({key for key in keys if any(key[1:]) or key[0] not in own})
    place = {(atom, 0.0, 0.0, 0.0): number for number, atom in enumerate(own)}
    place |= {key: len(own) + number for number, key in enumerate(ghosts)}
    atoms, local, calls = [*own, *(key[0] for key in ghosts)], len(own), 0

    def exchange(back: bool, rows: Tensor) -> None:
        nonlocal calls
        calls += 1
        if back:
            sums = ranks.shared(calls, atoms, rows)
            rows[:local] = torch.stack([sums[atom] for atom in own])
        else:
            sums = ranks.shared(calls, own, rows[:local])
            rows[local:] = torch.stack([sums[atom] for atom in atoms[local:]])

    energies, grad = made(
        types[own],
        torch.tensor([place[key] for key in keys]),
        torch.tensor([place[int(atom), 0.0, 0.0, 0.0] for atom in receiver]),
        vectors,
        types_of_senders=types[atoms],
        exchange=exchange,
    )
    forces = torch.zeros_like(positions).index_add(0, receiver, grad.double()).index_add(0, sender, -grad.double())
    return energies, forces, calls


@pytest.mark.parametrize("preset", [None, "gaq"])
@pytest.mark.parametrize("parts", [[[*range(4)]], [[2], [3, 0], [1]]])
@pytest.mark.parametrize("shape", ["parity", "unequal", "cutoffs by pair", "self-connection of the first layer"])
def test_parts_of_space_are_the_whole(shape: str, parts: list[list[int]], preset: str | None) -> None:
    model = build_model(shape if shape in VARIANTS else "plain", "float64", **SHAPES.get(shape, {}))
    if preset:
        model = gaq.convert(gaq.calibrate(gaq.prepare(model, few_bits(preset)), molecules(), progress=False))
    batch = graph(model, STRUCTURES["cell"])
    expected = of_program(program_of(model), batch)
    made, ranks = program_of(model, parts=True), Ranks(len(parts))
    with ThreadPoolExecutor(len(parts)) as pool:
        results = [pool.submit(on_rank, made, batch, own, ranks) for own in parts]
        energies, forces, calls = zip(*(result.result(timeout=120) for result in results), strict=True)
    assert calls == (2 * (len(made.problems) - 1),) * len(parts)
    order = [atom for own in parts for atom in own]
    torch.testing.assert_close(torch.cat(energies), expected.energies[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(forces), expected.forces, rtol=0, atol=1e-11 * float(expected.forces.abs().max()))


def test_an_exchange_where_it_belongs(float_model: Callable[..., Any]) -> None:
    model = float_model("plain", "float64")
    with pytest.raises(ValueError, match="an exchange belongs to a program for parts of space"):
        of_program(program_of(model, parts=True), graph(model, STRUCTURES["molecule"]))


# -- what is refused --

LENNARD_JONES = {"_target_": "nequip.nn.pair_potential.LennardJones", "lj_sigma": 1.0, "lj_epsilon": 0.1}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "norm": ({"convnet_nonlinearity_type": "norm"}, "layer0_convnet: .* nonlinearity of a NormActivation"),
    "gates": (
        {"convnet_nonlinearity_scalars": {"e": "ssp", "o": "tanh"}},
        "layer0_convnet: .* activation function <function shifted_softplus",
    ),
    "pairs": ({"pair_potential": LENNARD_JONES}, "pair_potential, a LennardJones"),
    "read-out": (
        {"readout_mlp_hidden_layers_depth": 1, "readout_mlp_nonlinearity": "gelu"},
        "per_atom_energy_readout: there is a GELU among scalar layers",
    ),
    "cutoffs": ({"per_edge_type_cutoff": {"H": 2.71828}}, r"no multiples of a part of 4 Å: \[2\.7"),
    "degrees": ({"l_max": 5, "num_features": 2}, "layer0_convnet: features up to l = 4 are served"),
    "graphs": (
        {"categorical_graph_field_embed": [{"field": "charge", "num_features": 2, "min": -1, "max": 1}]},
        "embeds properties of structures",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(Unsupported, match=message):
        program_of(build_model("plain", "float64", **changes))


def test_attention_is_refused() -> None:
    spec = without_distillation("w8", attention={"messages": True}, weights={"rounding": "nearest"})
    model = gaq.convert(gaq.calibrate(gaq.prepare(build_model(), spec), molecules(), progress=False))
    with pytest.raises(Unsupported, match="interaction of a AttentionInteractionBlock"):
        program_of(model)


def test_allegro_is_refused() -> None:
    with pytest.raises(Unsupported, match="not one sequence of convolution layers"):
        program_of(build_model("allegro"))


def test_rounding_and_training_are_refused(quantized: Callable[..., Any]) -> None:
    with pytest.raises(Unsupported, match="the model is in training"):
        program_of(quantized("gaq", "plain", "float64", "training"))
    with pytest.raises(Unsupported, match="layer0_convnet: the kernels do not round the features of a Linear"):
        program_of(quantized("w8a8", "plain", "float64"))
