"""Deployed files without a framework: neighbours, what is refused, and damaged files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list

import gaq.ase
from gaq.deployed import form
from gaq.deployed.check import structures_for
from gaq.deployed.neighbours import NeighbourList
from gaq.deployed.potential import Potential
from gaq.files.kinds import kind_of
from gaq.kernels import signatures
from gaq.kernels.builder import Builder
from gaq.kernels.cpu import native

needs_kernels = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.why_not()}")
D = torch.float64
FIRST = [204.25, 102.25, 204.25]


# -- neighbours --


def skewed() -> Atoms:
    atoms = bulk("Cu", "fcc", a=3.6, cubic=True).repeat((2, 1, 1))
    atoms.set_cell(atoms.cell @ np.array([[1, 0.9, 0], [0, 1, -0.7], [0.4, 0, 1]]), scale_atoms=True)
    return atoms


def in_a_slab() -> Atoms:
    atoms = bulk("Cu", "fcc", a=3.6, cubic=True).repeat((2, 2, 1))
    atoms.pbc = (True, True, False)
    atoms.positions[0, 2] += 25.0
    return atoms


def without_a_third_vector() -> Atoms:
    return Atoms(
        "H2", [[0, 0, 0], [0.5, 0.5, 0.9]], cell=[[2, 0, 0], [0.3, 2.2, 0], [0, 0, 0]], pbc=(True, True, False)
    )


STRUCTURES = {
    "molecule": molecule("C6H6"),
    "crystal": bulk("Cu", "fcc", a=3.6),
    "skewed": skewed(),
    "slab": in_a_slab(),
    "two vectors": without_a_third_vector(),
    "far from the origin": Atoms("H2", [[300, -300, 0], [300, -300, 0.8]]),
    "outside of the cell": Atoms("H2", [[-31.0, 17.0, 2.0], [5.2, 5.2, 5.2]], cell=[4, 4, 4], pbc=True),
    "one atom": Atoms("H"),
}


def edges_of(atoms: Atoms, neighbours: NeighbourList) -> list[tuple[float, ...]]:
    """Receiver, sender and vector of each edge within the cutoff, sorted."""
    sender, receiver = neighbours.sender.numpy(), neighbours.receiver.numpy()
    vectors = atoms.positions[receiver] - atoms.positions[sender] + neighbours.shifts.numpy()
    kept = np.linalg.norm(vectors, axis=1) < neighbours.cutoff
    rows = np.round(np.column_stack([receiver, sender, vectors])[kept], 6) + 0.0
    return sorted(map(tuple, rows.tolist()))


@pytest.mark.parametrize("skin", [0.0, 0.7])
@pytest.mark.parametrize("name", STRUCTURES)
def test_neighbours_are_those_of_ase(name: str, skin: float) -> None:
    atoms, cutoff = STRUCTURES[name].copy(), 4.0
    neighbours = NeighbourList(cutoff, skin)
    neighbours.update(atoms)
    i, j, vectors = neighbor_list("ijD", atoms, cutoff)
    rows = np.round(np.column_stack([i, j, -vectors]), 6) + 0.0
    found = np.array(edges_of(atoms, neighbours))
    expected = np.array(sorted(map(tuple, rows.tolist())))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert (neighbours.receiver[1:] >= neighbours.receiver[:-1]).all()


def test_a_list_is_kept_until_an_atom_has_moved_by_half_of_the_skin() -> None:
    atoms = bulk("Cu", "fcc", a=3.6, cubic=True)
    neighbours = NeighbourList(4.0, 0.6)
    neighbours.update(atoms)
    for moved, made in ((0.29, 1), (0.31, 2), (0.31, 2)):
        atoms.positions[1] = 0, 1.8, 1.8 + moved
        neighbours.update(atoms)
        assert neighbours.made == made, moved
    atoms.set_cell(1.01 * atoms.cell)
    neighbours.update(atoms)
    assert neighbours.made == 3
    atoms.pbc = False
    neighbours.update(atoms)
    assert neighbours.made == 4


def test_positions_that_are_no_numbers_are_refused() -> None:
    atoms = Atoms("H2", [[0, 0, 0], [np.nan, 0, 0]])
    with pytest.raises(ValueError, match="position of atom 1"):
        NeighbourList(4.0, 0.7).update(atoms)


# -- files --


def energies_of_species(dtype: torch.dtype = D) -> form.Deployable:
    """A model without edges: energies that depend on species and head alone."""
    builder = Builder(dtype, torch.tensor([2.0, 3.0], dtype=D), torch.tensor([0.25, 0.5], dtype=D), parts=True)
    builder.energy(builder.gather(torch.tensor([[1.0, 10.0], [2.0, 20.0]])))
    isolated = torch.tensor([[100.0, 200.0], [300.0, 400.0]])
    return form.Deployable(
        builder.record(), [], torch.zeros(2, 2, dtype=torch.int64), ["H", "C"], ["first", "second"], 4.0, isolated
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gaq"
    # What looks like the description of a tensor must not be taken for one.
    form.write(path, energies_of_species(), {"framework": "none", "notes": {'"code":{': '"reals":{"dtype":"F64"'}})
    return path


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_energies_of_species_and_heads(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.gaq"
    form.write(path, energies_of_species(dtype), {})
    none = torch.zeros(0, dtype=torch.int64)
    for head, expected in ((None, FIRST), ("first", FIRST), ("second", [460.5, 330.5, 460.5])):
        potential = Potential(path, ["C", "H"], head)
        assert (potential.dtype, potential.r_max, potential.width) == (dtype, 4.0, 0)
        energies, gradient = potential(torch.tensor([0, 1, 0]), none, none, torch.zeros(0, 3, dtype=D))
        assert gradient.shape == (0, 3)
        torch.testing.assert_close(energies, torch.tensor(expected, dtype=D), rtol=0, atol=1e-12)


@needs_kernels
def test_a_calculator_of_a_file(file: Path) -> None:
    atoms = Atoms("CH", [[0, 0, 0], [0, 0, 1.1]])
    atoms.calc = gaq.ase.Calculator(file, head="second")
    assert atoms.get_potential_energy() == pytest.approx(460.5 + 330.5)
    assert (atoms.get_forces() == 0).all()
    with pytest.raises(Exception, match="stress"):
        atoms.get_stress()
    assert not (atoms.calc.results["energies"] - [460.5, 330.5]).any()


@needs_kernels
def test_what_a_file_does_not_know_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="does not know the element Fe; it knows H, C"):
        Potential(file, ["H", "Fe"])
    with pytest.raises(ValueError, match="has no head third; it has first, second"):
        Potential(file, ["H"], "third")
    with pytest.raises(ValueError, match="no such file"):
        Potential(file.with_name("absent.gaq"), ["H"])
    with pytest.raises(ValueError, match="does not know the element O"):
        Atoms("O", calculator=gaq.ase.Calculator(file)).get_potential_energy()


@needs_kernels
def test_files_of_others_and_damaged_ones_are_refused(file: Path) -> None:
    content, damaged = file.read_bytes(), file.with_name("damaged.gaq")
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    cases = {
        "not a file that `gaq deploy` writes": (b"", b"123", b"\xff" * 64, content[: 8 + length // 2]),
        "cut off": (content[:-1], content[: 8 + length]),
        "missing": (content[:8] + header.replace(b'"reals":', b'"Reals":') + content[8 + length :],),
        "described wrongly": (content[:8] + header.replace(b'"F64"', b'"F32"') + content[8 + length :],),
    }
    for words, contents in cases.items():
        for changed in contents:
            damaged.write_bytes(changed)
            with pytest.raises(ValueError, match=words):
                Potential(damaged, ["H"])
    newer = energies_of_species()
    before, signatures.DEPLOYED_VERSION = signatures.DEPLOYED_VERSION, 99
    try:
        form.write(damaged, newer, {})
    finally:
        signatures.DEPLOYED_VERSION = before
    with pytest.raises(ValueError, match=r"of another version \(99; this program reads 2\)"):
        Potential(damaged, ["H"])


def test_what_a_file_is_and_holds(file: Path) -> None:
    assert kind_of(file).words == "a deployed model"
    assert form.metadata_of(file)["framework"] == "none"
    sizes = form.sizes_of(file)
    assert sum(sizes.values()) == os.path.getsize(file)
    assert sizes["weights"] == 8 * 4
    other = file.with_name("other.safetensors")
    other.write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="is not a file that `gaq deploy` writes"):
        form.metadata_of(other)


def test_too_many_tables_are_refused() -> None:
    form.check_tables(2**20, 256)
    with pytest.raises(ValueError, match=r"257 pairs of elements would take 257 MiB, more than 256: choose"):
        form.check_tables(2**20, 257)


def test_structures_to_compare_on() -> None:
    structures = structures_for(["H", "O"], 5.0)
    assert [len(one) for one in structures] == [1, 1, 2, 16, 4, 32, 72]
    apart = structures[2]
    assert apart.get_distance(0, 1) > 5.0
    assert {symbol for one in structures for symbol in one.get_chemical_symbols()} == {"H", "O"}
    json.dumps([one.get_chemical_formula() for one in structures])
