"""The engine on parts of space, as LAMMPS divides it: against MACE's calculator on the whole structure."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mace", reason="needs MACE: pip install '.[mace]'")

import mace  # noqa: F401  (before e3nn)
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list
from mace.calculators import MACECalculator
from mace.calculators.lammps_mliap_mace import LAMMPS_MLIAP_MACE
from mace_models import build_model

from gaq.kernels.cpu import native
from gaq_mace import engine
from gaq_mace.attention import GAQAttentionResidualInteractionBlock
from gaq_mace.engine import accelerate

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")

ATTENTION = GAQAttentionResidualInteractionBlock.__name__
NON_LINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "density": {
        "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
        "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
        "distance_transform": "Agnesi",
        "pair_repulsion": True,
    },
    "cutoff after the network": {"distance_transform": "Agnesi", "apply_cutoff": False, "num_interactions": 3},
    "nonlinear": {"interaction_cls": NON_LINEAR, "interaction_cls_first": NON_LINEAR},
}


class Ranks:
    """Values of all atoms, to which each rank adds those of its own atoms."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.values: dict[int, dict[int, Any]] = {}
        self.lock = threading.Lock()


class Part:
    """What LAMMPS's object has, of one rank. Ranks run in threads, and wait for each other where they exchange."""

    def __init__(self, atoms: Atoms, own: list[int], elements: list[int], r_max: float, ranks: Ranks) -> None:
        i, j, vectors, shifts = neighbor_list("ijDS", atoms, r_max)
        kept = np.isin(i, own)
        i, j, vectors, shifts = i[kept], j[kept], vectors[kept], shifts[kept]
        keys = [(int(b), *map(int, s)) for b, s in zip(j, shifts, strict=True)]
        ghosts = sorted({key for key in keys if any(key[1:]) or key[0] not in own})
        place = {(atom, 0, 0, 0): n for n, atom in enumerate(own)}
        place |= {key: len(own) + n for n, key in enumerate(ghosts)}
        self.atoms = [*own, *(key[0] for key in ghosts)]
        self.ranks, self.calls, self.widths = ranks, 0, []
        self.nlocal, self.ntotal, self.npairs = len(own), len(self.atoms), len(i)
        self.elems = np.array([elements.index(z) for z in atoms.numbers[self.atoms]])
        self.rij = vectors
        self.pair_i = np.array([place[int(a), 0, 0, 0] for a in i])
        self.pair_j = np.array([place[key] for key in keys])
        self.eatoms = np.zeros(len(own))
        self.energy = 0.0

    def _shared(self, rows: torch.Tensor) -> dict[int, Any]:
        """Sums over all ranks of rows of atoms, for one exchange."""
        self.calls += 1
        with self.ranks.lock:
            sums = self.ranks.values.setdefault(self.calls, {})
            for atom, row in zip(self.atoms, rows, strict=True):
                sums[atom] = sums.get(atom, 0) + row.detach().clone()
        self.ranks.barrier.wait()
        return sums

    def forward_exchange(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        self.widths.append(length)
        assert source.shape == target.shape == (self.ntotal, length)
        assert not source[self.nlocal :].any()
        sums = self._shared(source)
        target.copy_(torch.stack([sums[atom] for atom in self.atoms]))

    def reverse_exchange(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        sums = self._shared(source)
        target.zero_()
        target[: self.nlocal] = torch.stack([sums[atom] for atom in self.atoms[: self.nlocal]])

    def update_pair_forces_gpu(self, forces: torch.Tensor) -> None:
        self.pair_forces = forces.numpy()


def on_ranks(model: torch.nn.Module, atoms: Atoms, parts: list[list[int]]) -> tuple[float, np.ndarray, list[Part]]:
    """Energy and forces of a structure whose atoms are divided among ranks."""
    ranks = Ranks(len(parts))
    elements = [int(z) for z in model.atomic_numbers]
    made = [Part(atoms, part, elements, float(model.r_max), ranks) for part in parts]
    objects = [LAMMPS_MLIAP_MACE(model) for _ in parts]
    with ThreadPoolExecutor(len(parts)) as pool:
        for result in [pool.submit(one.compute_forces, part) for one, part in zip(objects, made, strict=True)]:
            result.result(timeout=120)
    forces = np.zeros((len(atoms), 3))
    for part in made:
        owners = np.array(part.atoms)
        np.add.at(forces, owners[part.pair_i], part.pair_forces)
        np.add.at(forces, owners[part.pair_j], -part.pair_forces)
    return sum(part.energy for part in made), forces, made


def structure() -> Atoms:
    """A strained crystal with atoms of three elements; those of one lie in one half only."""
    atoms = bulk("C", "diamond", a=3.4, cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.symbols[2], atoms.symbols[5] = "O", "H"
    return atoms


def whole(model: torch.nn.Module, atoms: Atoms, dtype: str = "float64") -> tuple[float, np.ndarray]:
    atoms = atoms.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype=dtype)
    return atoms.get_potential_energy(), atoms.get_forces()


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    model.lammps_mliap = True  # type: ignore[assignment]  # as MACE's command sets it
    return model.requires_grad_(False)


@pytest.mark.parametrize("parts", [[[*range(8)]], [[5, 0, 1, 2], [3, 4, 6, 7]], [[0], [1, 2, 3], [4, 5, 6, 7]]])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_space_are_the_whole(shape: str, parts: list[list[int]]) -> None:
    model = accelerate(frozen(build_model("plain", torch.float64, **SHAPES[shape])))
    atoms = structure()
    with engine.disabled():
        energy, forces = whole(model, atoms)
    assert np.abs(forces).max() > 0.05
    ours, our_forces, made = on_ranks(model, atoms, parts)
    layers = len(model.interactions)
    for part in made:
        # Of each layer after the first one, what its edges read; and the gradients back.
        assert part.calls == 2 * (layers - 1)
        assert len(set(part.widths)) == 1
    assert ours == pytest.approx(energy, rel=1e-9)
    np.testing.assert_allclose(our_forces, forces, atol=2e-7)


@pytest.mark.parametrize("threads", [1, 2])
def test_quantized_models_in_float32(quantized: Any, threads: int) -> None:
    model = frozen(quantized("gaq", "plain", torch.float32, "converted"))
    atoms = structure()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        energy, forces = whole(model, atoms, "float32")
        ours, our_forces, made = on_ranks(model, atoms, [[0, 1, 2, 3], [4, 5, 6, 7]])
    finally:
        torch.set_num_threads(before)
    assert all(part.calls == 2 for part in made)
    assert ours == pytest.approx(energy, rel=1e-6)
    # A vector rounded the other way for a difference in the last place of a float32 moves a force by a step.
    np.testing.assert_allclose(our_forces, forces, atol=2e-3 * np.abs(forces).max())


def test_attention_runs_through_the_reference_path() -> None:
    """There edges read keys of their senders, which nothing exchanges."""
    model = accelerate(frozen(build_model("plain", torch.float64, interaction_cls=ATTENTION)))
    assert engine.serves(model, {})
    with pytest.warns(UserWarning, match="reference path: edges read more of their senders"):
        on_ranks(model, molecule("CH3OH"), [[*range(6)]])
    assert not engine.serves(model, {"lammps_mliap": True, "compute_edge_forces": True})
