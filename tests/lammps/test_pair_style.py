"""The pair style in LAMMPS against the same potential without LAMMPS: exchanges, ghosts, ranks, hybrid styles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from exchanging_potential import CHARGES, Exchanging, write

from gaq.lammps import simulation
from gaq.lammps.installation import Installation, LammpsError
from gaq.lammps.simulation import Evaluation, evaluate

ELEMENTS = ["H", "C", "O"]
Evaluate = Callable[..., Evaluation]


@pytest.fixture
def computed(lammps: Installation, plugin: Path, tmp_path: Path) -> Evaluate:
    """``computed(atoms)``: what LAMMPS gives for a structure."""

    def call(atoms: Atoms, pair: str = "", **options: object) -> Evaluation:
        model = write(tmp_path / "model.txt")
        pair = pair or f"pair_style gaq\npair_coeff * * {model} {' '.join(ELEMENTS)}"
        elements = options.pop("elements", ELEMENTS)
        return evaluate(lammps, plugin, atoms, elements, pair, tmp_path, **options)  # type: ignore[arg-type]

    return call


def assert_agree(result: Evaluation, atoms: Atoms, calculator: Exchanging, tolerance: float = 1e-12) -> None:
    atoms = atoms.copy()
    atoms.calc = calculator
    assert result.energy == pytest.approx(atoms.get_potential_energy(), abs=tolerance * len(atoms))
    np.testing.assert_allclose(result.forces, atoms.get_forces(), atol=tolerance)
    if atoms.pbc.all():
        np.testing.assert_allclose(result.stress, atoms.get_stress(), atol=tolerance)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number_bytes", [4, 8])
@pytest.mark.parametrize("repeats", [1, 3])
def test_triclinic_crystals(
    computed: Evaluate, crystal: Atoms, tmp_path: Path, ranks: int, number_bytes: int, repeats: int
) -> None:
    """Images of an atom among its own neighbours, exchanges of an odd number of floats, ghosts of ghosts."""
    model = write(tmp_path / "other.txt", number_bytes=number_bytes)
    atoms = crystal.repeat((repeats, 1, 1))
    result = computed(atoms, f"pair_style gaq\npair_coeff * * {model} H C O", ranks=ranks)
    assert_agree(result, atoms, Exchanging(), 1e-12 if number_bytes == 8 else 1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_without_atoms(computed: Evaluate, crystal: Atoms, ranks: int) -> None:
    """All atoms lie in the lower half of the box, with vacuum above: the other ranks have neither atoms nor ghosts."""
    atoms = Atoms(crystal.symbols, crystal.positions, cell=[40, 8, 8], pbc=False)
    atoms.positions += 1.0
    assert_agree(computed(atoms, ranks=ranks), atoms, Exchanging())


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_models_and_another_style_at_once(computed: Evaluate, crystal: Atoms, tmp_path: Path, ranks: int) -> None:
    first, second = write(tmp_path / "first.txt"), write(tmp_path / "second.txt", {"H": 0.2, "C": 0.3, "O": -0.5})
    pair = f"""pair_style hybrid/overlay gaq head double gaq zero 5.0
pair_coeff * * gaq 1 {first} H C O
pair_coeff * * gaq 2 {second} H C O
pair_coeff * * zero"""
    result = computed(crystal, pair, ranks=ranks)
    parts = [Exchanging(scale=2.0), Exchanging({"H": 0.2, "C": 0.3, "O": -0.5})]
    energy, forces, stress = 0.0, np.zeros((len(crystal), 3)), np.zeros(6)
    for part in parts:
        part.calculate(crystal)
        energy += part.results["energy"]
        forces += part.results["forces"]
        stress += part.results["stress"]
    assert result.energy == pytest.approx(energy, abs=1e-11)
    np.testing.assert_allclose(result.forces, forces, atol=1e-12)
    np.testing.assert_allclose(result.stress, stress, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("style", ["hybrid", "hybrid/overlay"])
def test_types_without_an_element(computed: Evaluate, crystal: Atoms, tmp_path: Path, ranks: int, style: str) -> None:
    """Atoms of other styles count neither as neighbours nor in the energy."""
    model = write(tmp_path / "model.txt")
    pair = f"""pair_style {style} gaq zero 4.0
pair_coeff * * zero
pair_coeff * * gaq {model} H NULL O"""
    result = computed(crystal, pair, ranks=ranks)
    assert_agree(result, crystal, Exchanging({"H": CHARGES["H"], "O": CHARGES["O"]}))


def test_several_types_of_one_element(computed: Evaluate, crystal: Atoms, tmp_path: Path) -> None:
    model = write(tmp_path / "model.txt")
    twin = crystal.copy()
    twin.symbols[0] = "He"  # stands for a second type of hydrogen
    pair = f"pair_style gaq\npair_coeff * * {model} H C O H"
    assert_agree(computed(twin, pair, elements=[*ELEMENTS, "He"]), crystal, Exchanging())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_non_periodic_molecule(computed: Evaluate, crystal: Atoms, ranks: int) -> None:
    atoms = Atoms(crystal.symbols, crystal.positions + 6.0, cell=[16, 16, 16], pbc=False)
    assert_agree(computed(atoms, ranks=ranks), atoms, Exchanging())


def test_a_single_atom_and_a_pair_beyond_the_cutoff(computed: Evaluate) -> None:
    for atoms in (Atoms("H", [[5, 5, 5]]), Atoms("HO", [[5, 5, 5], [5, 5, 8.4]])):
        atoms.set_cell([12, 12, 12])
        assert_agree(computed(atoms), atoms, Exchanging())


@pytest.mark.parametrize("communication", ["comm_style tiled", "neighbor 1.0 multi\ncomm_modify mode multi"])
def test_ways_to_communicate(computed: Evaluate, crystal: Atoms, communication: str) -> None:
    atoms = crystal.repeat((2, 1, 1))
    assert_agree(computed(atoms, ranks=2, before=communication), atoms, Exchanging())


def test_energies_and_virials_of_atoms_add_up(
    lammps: Installation, plugin: Path, computed: Evaluate, crystal: Atoms, tmp_path: Path
) -> None:
    before = """compute energies all pe/atom
compute virials all stress/atom NULL virial
compute energy all reduce sum c_energies
compute virial all reduce sum c_virials[1] c_virials[2] c_virials[3] c_virials[4] c_virials[5] c_virials[6]
thermo_style custom step pe press c_energy c_virial[1] c_virial[2] c_virial[3] c_virial[6] c_virial[5] c_virial[4]
dump energies all custom 1 energies.txt id c_energies
dump_modify energies sort id format float %.14g
run 0
undump energies
print "$(c_energy:%.14g) $(c_virial[1]:%.14g) $(c_virial[2]:%.14g) $(c_virial[3]:%.14g) &
 $(c_virial[6]:%.14g) $(c_virial[5]:%.14g) $(c_virial[4]:%.14g)" file sums.txt"""
    result = computed(crystal, ranks=2, before=before)
    energy, *virial = map(float, (tmp_path / "sums.txt").read_text().split())
    assert energy == pytest.approx(result.energy, abs=1e-11)
    stress = np.array(virial) * simulation.EV_PER_BAR_A3 / crystal.get_volume()
    np.testing.assert_allclose(stress, result.stress, atol=1e-12)
    crystal.calc = Exchanging()
    energies = np.loadtxt(tmp_path / "energies.txt", skiprows=9)[:, 1]
    np.testing.assert_allclose(energies, crystal.get_potential_energies(), atol=1e-12)


DYNAMICS = {
    "npt": """velocity all create 600 1
fix run all npt temp 600 600 0.05 tri 0 2000 0.5
timestep 0.0005
run 40
unfix run""",
    "minimize": "minimize 0 1e-9 5 20",
    "rebuilt": """velocity all create 3000 1
fix run all nve
neighbor 0.3 bin
timestep 0.001
run 60
unfix run""",
    "deposit": """region top block 0 4 0 4 0 4
delete_atoms group gone
create_atoms 2 single 0.3 0.4 0.2
velocity all create 300 1
fix run all nve
run 10
unfix run""",
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_after_dynamics_the_forces_are_those_of_the_positions(
    computed: Evaluate, crystal: Atoms, tmp_path: Path, ranks: int, dynamics: str
) -> None:
    """A changing box, atoms that change ranks, and atoms that come and go."""
    before = f"""group gone id 2 5
{DYNAMICS[dynamics]}
velocity all set 0 0 0
reset_atoms id sort yes
write_dump all custom places.txt id type x y z modify sort id format float %.16g
print "$(xlo:%.16g) $(ylo:%.16g) $(zlo:%.16g) $(lx:%.16g) $(ly:%.16g) $(lz:%.16g) &
 $(xy:%.16g) $(xz:%.16g) $(yz:%.16g)" file box.txt screen no"""
    result = computed(crystal.repeat((2, 1, 1)), ranks=ranks, before=before)
    *_, lx, ly, lz, xy, xz, yz = map(float, (tmp_path / "box.txt").read_text().split())
    table = np.loadtxt(tmp_path / "places.txt", skiprows=9)
    symbols = [ELEMENTS[int(kind) - 1] for kind in table[:, 1]]
    after = Atoms(symbols, table[:, 2:], cell=[[lx, 0, 0], [xy, ly, 0], [xz, yz, lz]], pbc=True)
    assert_agree(result, after, Exchanging(), 1e-11)


def test_total_energy_is_conserved(computed: Evaluate, crystal: Atoms, tmp_path: Path) -> None:
    before = """velocity all create 300 4711
fix run all nve
timestep 0.00025
variable total equal etotal
fix print all print 1 "${total}" file totals.txt screen no
run 100
unfix print
unfix run"""
    computed(crystal, ranks=2, before=before)
    totals = np.loadtxt(tmp_path / "totals.txt")
    assert np.ptp(totals) < 1e-3 * len(crystal)


BONDED = """plugin load {plugin}
units {units}
atom_style bond
region box block 0 12 0 12 0 12
create_box 3 box bond/types 1 extra/bond/per/atom 2 extra/special/per/atom 4
create_atoms 1 single 5 5 5
create_atoms 2 single 5 5 6.2
create_atoms 3 single 5 6.1 6.9
mass * 12
bond_style zero
bond_coeff *
{special}
create_bonds single/bond 1 1 2
create_bonds single/bond 1 2 3
pair_style gaq
pair_coeff * * {model} H C O
run 0
print "$(pe:%.14g)" file energy.txt
"""


@pytest.mark.parametrize(
    ("units", "special", "message"),
    [
        ("metal", "special_bonds lj/coul 1 1 1", ""),
        ("metal", "", "needs special_bonds lj/coul 1 1 1: bonded atoms would not be neighbors"),
        ("metal", "special_bonds lj/coul 0.5 0.5 0.5", ""),
        ("real", "special_bonds lj/coul 1 1 1", r"needs units metal \(eV, Å\), not units real"),
    ],
)
def test_bonds_and_units(
    lammps: Installation, plugin: Path, tmp_path: Path, units: str, special: str, message: str
) -> None:
    """Bonds do not change the neighbours, unless LAMMPS would leave bonded atoms out."""
    model = write(tmp_path / "model.txt")
    script = BONDED.format(plugin=plugin, model=model, units=units, special=special)
    if message:
        with pytest.raises(LammpsError, match=message):
            simulation.run(lammps, script, tmp_path)
        return
    simulation.run(lammps, script, tmp_path, ranks=2)
    atoms = Atoms("HCO", [[5, 5, 5], [5, 5, 6.2], [5, 6.1, 6.9]], cell=[12, 12, 12], pbc=True)
    atoms.calc = Exchanging()
    assert float((tmp_path / "energy.txt").read_text()) == pytest.approx(atoms.get_potential_energy(), abs=1e-12)


class TestRefusals:
    """Each is one line that says what helps, on one rank and on two."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return write(tmp_path / "model.txt")

    def test_unknown_element(self, refused: Callable[..., str], model: Path) -> None:
        assert "does not know Xe" in refused(f"pair_style gaq\npair_coeff * * {model} H C Xe")

    def test_missing_file(self, refused: Callable[..., str]) -> None:
        assert "none.gaq: cannot be read" in refused("pair_style gaq\npair_coeff * * none.gaq H C O")

    def test_another_file(self, refused: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "other").write_text("{braces} are no model")
        assert "other: not a model" in refused("pair_style gaq\npair_coeff * * other H C O")

    def test_unknown_head(self, refused: Callable[..., str], model: Path) -> None:
        assert "no head omat" in refused(f"pair_style gaq head omat\npair_coeff * * {model} H C O")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("cutoff 5", "unknown keyword cutoff; there are head NAME and threads N"),
            ("head", "head needs a value"),
            ("threads 0", "threads must be at least 1"),
            ("threads many", "Expected integer"),
        ],
    )
    def test_options(self, refused: Callable[..., str], model: Path, options: str, message: str) -> None:
        assert message in refused(f"pair_style gaq {options}\npair_coeff * * {model} H C O")

    @pytest.mark.parametrize("coefficients", ["* * {} H C", "* * {} H C O N", "* *"])
    def test_coefficients(self, refused: Callable[..., str], model: Path, coefficients: str) -> None:
        error = refused(f"pair_style gaq\npair_coeff {coefficients.format(model)}")
        assert "pair_coeff needs * * FILE and an element, or NULL, for each of 3 atom types" in error

    def test_newton_off(self, refused: Callable[..., str], model: Path) -> None:
        error = refused(f"newton off on\npair_style gaq\npair_coeff * * {model} H C O")
        assert "needs newton on" in error

    def test_a_type_that_no_style_serves(self, refused: Callable[..., str], model: Path) -> None:
        assert "All pair coeffs are not set" in refused(f"pair_style gaq\npair_coeff * * {model} H C NULL")

    def test_heat_flux(self, refused: Callable[..., str], model: Path) -> None:
        before = """compute ke all ke/atom
compute pe all pe/atom
compute stress all centroid/stress/atom NULL virial
compute flux all heat/flux ke pe stress
thermo_style custom step c_flux[1]"""
        error = refused(f"pair_style gaq\npair_coeff * * {model} H C O", before=before)
        assert "centroid" in error
