"""Deployed models in LAMMPS against the ASE calculator of the same file, in the situations of simulations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from gaq.cli import main
from gaq.lammps import build
from gaq.lammps.check import check
from gaq.lammps.installation import Installation, LammpsError
from gaq.lammps.simulation import evaluate, with_box

pytest.importorskip("mace")

ELEMENTS = ["H", "C", "O"]
VARIANTS = {"plain": {}, "heads": {}, "agnesi": {}, "density": {}, "one layer": {"num_interactions": 1}}


@pytest.fixture(scope="module")
def gaq_plugin(lammps: Installation) -> Path:
    return build.obtain(lammps)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Files of small models, by variant and dtype."""
    import torch
    from mace_models import build_model

    from gaq.deployment import deploy

    folder = tmp_path_factory.mktemp("deployed")
    files = {}
    for variant, dtype in (*((name, "float64") for name in VARIANTS), ("plain", "float32")):
        model, output = folder / f"{variant}.model", folder / f"{variant} {dtype}.gaq"
        kind = "plain" if VARIANTS[variant] else variant
        torch.save(build_model(kind, torch.float64, **VARIANTS[variant]), model)
        assert deploy(model, output, dtype=dtype).written
        files[variant, dtype] = output
    return files


@pytest.fixture(scope="module")
def box() -> Atoms:
    """A triclinic cell that the layers reach across."""
    from ase.build import bulk

    rng = np.random.default_rng(1)
    atoms = bulk("C", "fcc", a=3.4, cubic=True).repeat((2, 1, 1))
    atoms.symbols[:] = ["H", "C", "O", "C", "H", "O", "C", "C"]
    atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
    atoms.set_cell(atoms.cell @ (np.eye(3) + np.tril(rng.normal(0, 0.04, (3, 3)))), scale_atoms=True)
    return with_box(atoms)


def assert_agree(lammps: Installation, plugin: Path, file: Path, atoms: Atoms, folder: Path, **options: object) -> None:
    from gaq.ase import Calculator

    pair = f"pair_style gaq\npair_coeff * * '{file}' {' '.join(ELEMENTS)}"
    result = evaluate(lammps, plugin, atoms, ELEMENTS, pair, folder, **options)  # type: ignore[arg-type]
    atoms.calc = Calculator(file)
    assert result.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(result.forces, atoms.get_forces(), atol=1e-9)
    if atoms.pbc.all():
        np.testing.assert_allclose(result.stress, atoms.get_stress(), atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_agree_with_ase(
    lammps: Installation, gaq_plugin: Path, deployed: dict[tuple[str, str], Path], variant: str
) -> None:
    rows = list(check(deployed[variant, "float64"], lammps, gaq_plugin, [1, 2]))
    assert {row.ranks for row in rows} == {1, 2}
    assert len({row.head for row in rows}) == (2 if variant == "heads" else 1)
    assert max(row.check.forces / max(row.check.force_scale, 1.0) for row in rows) < 1e-9
    assert all(row.agrees for row in rows)


def test_single_precision_is_exchanged_as_such(
    lammps: Installation, gaq_plugin: Path, deployed: dict[tuple[str, str], Path]
) -> None:
    rows = list(check(deployed["plain", "float32"], lammps, gaq_plugin, [2]))
    assert all(row.agrees for row in rows)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_threads(
    lammps: Installation,
    gaq_plugin: Path,
    deployed: dict[tuple[str, str], Path],
    box: Atoms,
    tmp_path: Path,
    ranks: int,
    threads: int,
) -> None:
    file = deployed["plain", "float64"]
    assert_agree(lammps, gaq_plugin, file, box.repeat((2, 1, 1)), tmp_path, ranks=ranks, threads=threads)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_without_atoms_or_edges(
    lammps: Installation,
    gaq_plugin: Path,
    deployed: dict[tuple[str, str], Path],
    box: Atoms,
    tmp_path: Path,
    ranks: int,
) -> None:
    """Vacuum in half of the box, then a single atom far away in it."""
    for symbols, extra in (("", []), ("H", [[60.0, 4.0, 4.0]])):
        atoms = Atoms(box.symbols, box.positions, cell=[80, 12, 12], pbc=False)
        atoms += Atoms(symbols, extra) if symbols else Atoms()
        atoms.positions += 1.0
        assert_agree(lammps, gaq_plugin, deployed["plain", "float64"], atoms, tmp_path, ranks=ranks)


def test_after_a_box_has_changed(
    lammps: Installation, gaq_plugin: Path, deployed: dict[tuple[str, str], Path], box: Atoms, tmp_path: Path
) -> None:
    """Two models at once through fix npt, on two ranks: the sum is what the models give for the last positions."""
    from gaq.ase import Calculator

    files = [deployed["plain", "float64"], deployed["agnesi", "float64"]]
    pair = "pair_style hybrid/overlay gaq gaq\n"
    pair += "\n".join(f"pair_coeff * * gaq {i} '{file}' {' '.join(ELEMENTS)}" for i, file in enumerate(files, 1))
    before = """velocity all create 300 1
fix run all npt temp 300 300 0.05 tri 0 0 0.5
timestep 0.0005
run 10
unfix run
velocity all set 0 0 0
write_dump all custom places.txt id x y z modify sort id format float %.16g
print "$(lx:%.16g) $(ly:%.16g) $(lz:%.16g) $(xy:%.16g) $(xz:%.16g) $(yz:%.16g)" file box.txt screen no"""
    result = evaluate(lammps, gaq_plugin, box, ELEMENTS, pair, tmp_path, ranks=2, before=before)
    lx, ly, lz, xy, xz, yz = map(float, (tmp_path / "box.txt").read_text().split())
    places = np.loadtxt(tmp_path / "places.txt", skiprows=9)[:, 1:]
    after = Atoms(box.symbols, places, cell=[[lx, 0, 0], [xy, ly, 0], [xz, yz, lz]], pbc=True)
    energy, forces, stress = 0.0, np.zeros((len(after), 3)), np.zeros(6)
    for file in files:
        after.calc = Calculator(file)
        energy += after.get_potential_energy()
        forces += after.get_forces()
        stress += after.get_stress()
    assert result.energy == pytest.approx(energy, abs=1e-9)
    np.testing.assert_allclose(result.forces, forces, atol=1e-9)
    np.testing.assert_allclose(result.stress, stress, atol=1e-8)


class TestCommand:
    """``gaq lammps check``."""

    def test_that_agrees(
        self, gaq_plugin: Path, deployed: dict[tuple[str, str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["lammps", "check", str(deployed["one layer", "float64"])]) == 0
        printed = capsys.readouterr().out
        assert "crystal of 32 atoms" in printed
        assert "allowed: 0.5 meV/Å" in printed
        assert "DIFFERS" not in printed

    def test_that_differs(
        self,
        gaq_plugin: Path,
        deployed: dict[tuple[str, str], Path],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("gaq.lammps.check.allowed", lambda path: (-1.0, -1.0))
        assert main(["lammps", "check", "--json", "--ranks", "1", str(deployed["one layer", "float64"])]) == 1
        result = json.loads(capsys.readouterr().out)
        assert not result["agrees"]
        assert {row["ranks"] for row in result["rows"]} == {1}
        assert {"energy", "forces", "force_scale", "stress", "structures"} == set(result["rows"][0]["check"])


class TestRefusals:
    """One line that says what is wrong with the file."""

    @staticmethod
    def refusal(lammps: Installation, plugin: Path, atoms: Atoms, file: Path, folder: Path, elements: str) -> str:
        with pytest.raises(LammpsError) as caught:
            evaluate(lammps, plugin, atoms, ELEMENTS, f"pair_style gaq\npair_coeff * * '{file}' {elements}", folder, 2)
        assert str(caught.value).count("ERROR") == 1
        return str(caught.value)

    def test_an_element_that_the_file_does_not_know(
        self, lammps: Installation, gaq_plugin: Path, deployed: dict[tuple[str, str], Path], box: Atoms, tmp_path: Path
    ) -> None:
        error = self.refusal(lammps, gaq_plugin, box, deployed["plain", "float64"], tmp_path, "H C Xe")
        assert "does not know the element Xe; it knows H, C, O" in error

    @pytest.mark.parametrize("kept", [0, 5, 300, -100])
    def test_a_file_that_is_cut_off(
        self,
        lammps: Installation,
        gaq_plugin: Path,
        deployed: dict[tuple[str, str], Path],
        box: Atoms,
        tmp_path: Path,
        kept: int,
    ) -> None:
        part = tmp_path / "part.gaq"
        part.write_bytes(deployed["plain", "float64"].read_bytes()[:kept])
        error = self.refusal(lammps, gaq_plugin, box, part, tmp_path, "H C O")
        assert "cut off" in error or "not a file that `gaq deploy` writes" in error
