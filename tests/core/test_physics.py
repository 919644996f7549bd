"""The physics checks against potentials whose faults are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import write

from gaq.checks.conservation import central_difference_error
from gaq.checks.errors import force_and_energy_mae, read_structures
from gaq.checks.labels import MissingLabelsError
from gaq.checks.lee import local_equivariance_error, random_rotations
from gaq.checks.nve import fit_drift, nve_drift
from gaq.checks.potential import CalculatorPotential
from gaq.checks.smoothness import bond_stretch_scan

_ZAXIS = np.array([0.0, 0.0, 1.0])


def p4() -> Atoms:
    """A regular tetrahedron of phosphorus atoms at the minimum of `morse`."""
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    return Atoms("P4", 2.21 / np.sqrt(8) * corners)


def morse(epsilon: float = 2.0) -> MorsePotential:
    """P4 as four atoms that attract each other; bonds of 13 eV/Å² at 2.21 Å."""
    return MorsePotential(epsilon=epsilon, r0=2.21, rho0=4.0, rcut1=3.0, rcut2=4.0)


def clusters(count: int = 3, amplitude: float = 0.1) -> list[Atoms]:
    frames = []
    for seed in range(count):
        frame = p4()
        frame.rattle(amplitude, seed=seed)
        frames.append(frame)
    return frames


class Broken:
    """A sound potential with a fault put on its energies or forces; counts its calls."""

    def __init__(self, energy=None, force=None, potential=None):
        self.sound = potential or CalculatorPotential(morse())
        self.energy, self.force, self.calls = energy, force, 0

    def __call__(self, structures):
        self.calls += 1
        energies, forces = self.sound(structures)
        if self.energy is not None:
            energies = self.energy(energies)
        if self.force is not None:
            forces = [f + self.force(s.positions) for f, s in zip(forces, structures, strict=True)]
        return energies, forces


def staircase(height):
    """Energies rounded to multiples of a height (eV), as by a quantized invariant."""
    return lambda energies: height * np.round(energies / height)


class TestEquivariance:
    def test_rotations_are_proper_and_uniform(self):
        rotations = random_rotations(20_000, np.random.default_rng(0))
        identity = np.broadcast_to(np.eye(3), rotations.shape)
        np.testing.assert_allclose(rotations @ rotations.transpose(0, 2, 1), identity, atol=1e-12)
        np.testing.assert_allclose(np.linalg.det(rotations), 1.0)
        # Haar moments of the l=1 character: <tr R> = 0 and <(tr R)^2> = 1.
        trace = np.trace(rotations, axis1=1, axis2=2)
        assert abs(trace.mean()) < 4 / np.sqrt(20_000)
        assert abs((trace**2).mean() - 1.0) < 0.05
        np.testing.assert_allclose(rotations.mean(axis=0), 0.0, atol=0.02)

    def test_sound_molecule_and_crystal_have_none(self):
        assert local_equivariance_error(CalculatorPotential(morse()), clusters()).max_mev_per_angstrom < 1e-9
        crystal = bulk("Cu", cubic=True)
        crystal.rattle(0.1, seed=0)
        error = local_equivariance_error(CalculatorPotential(EMT()), [crystal])
        assert error.max_mev_per_angstrom < 1e-8
        assert error.energy_mean_mev < 1e-8

    def test_size_of_a_fault_fixed_in_the_laboratory(self):
        # R b is uniform on a sphere of radius |b|; the mean chord from a fixed point is 4/3 |b|.
        fault = 3e-3 * _ZAXIS
        error = local_equivariance_error(
            Broken(force=lambda x: np.broadcast_to(fault, x.shape)), clusters(20), rotations=20
        )
        assert error.mean_mev_per_angstrom == pytest.approx(4.0, abs=4 * error.standard_error)
        assert 0.01 < error.standard_error < 0.1  # chord spread sqrt(2) / sqrt(400) = 0.07
        assert 5.5 < error.max_mev_per_angstrom <= 6.0 + 1e-9

    def test_energy_error_and_reference(self):
        class TiltedEnergy(Broken):
            def __call__(self, structures):
                energies, forces = super().__call__(structures)
                return energies + 1e-3 * np.array([s.positions[0] @ _ZAXIS for s in structures]), forces

        error = local_equivariance_error(TiltedEnergy(), clusters(), reference=CalculatorPotential(morse()))
        assert 0.01 < error.energy_mean_mev < 10
        assert error.mean_mev_per_angstrom < 1e-9
        assert error.reference_mean_mev_per_angstrom is not None
        assert error.reference_mean_mev_per_angstrom < 1e-9

    def test_one_call_a_rotation_same_seed_same_answer(self):
        fault = 3e-3 * _ZAXIS
        potential = Broken(force=lambda x: np.broadcast_to(fault, x.shape))
        first = local_equivariance_error(potential, clusters(), rotations=4, seed=5)
        assert potential.calls == 5  # once unrotated, then once a rotation
        assert local_equivariance_error(potential, clusters(), rotations=4, seed=5) == first
        assert local_equivariance_error(potential, clusters(), rotations=4, seed=6) != first

    def test_constraints_do_not_hide_errors_and_inputs_stay(self):
        frame = clusters(1)[0]
        frame.set_constraint(FixAtoms(range(4)))
        before = frame.positions.copy()
        # ASE itself would return zero forces for the fixed atoms, and so no error.
        faulty = CalculatorPotential(Faulty(lambda atoms: 3e-3 * _ZAXIS))
        free = local_equivariance_error(faulty, [frame])
        assert free.mean_mev_per_angstrom > 1.0
        np.testing.assert_array_equal(frame.positions, before)
        assert len(frame.constraints) == 1

    def test_atoms_on_which_no_force_acts_measure_nothing(self):
        apart = [Atoms("P2", positions=[[0, 0, 0], [60, 0, 0]])]
        error = local_equivariance_error(CalculatorPotential(morse()), apart)
        assert error.mean_mev_per_angstrom is None
        faulty = CalculatorPotential(Faulty(lambda atoms: 1e-9 * atoms.positions[:, :1] * _ZAXIS))
        assert local_equivariance_error(faulty, apart).mean_mev_per_angstrom > 0.0

    @pytest.mark.parametrize(("structures", "rotations"), [([], 4), (clusters(1), 0)])
    def test_bad_input(self, structures, rotations):
        with pytest.raises(ValueError, match="local_equivariance_error"):
            local_equivariance_error(CalculatorPotential(morse()), structures, rotations=rotations)


class TestCentralDifferences:
    def test_truncation_of_a_smooth_potential_falls_as_the_square(self):
        sound = Broken()
        errors = central_difference_error(sound, clusters(5), reference=CalculatorPotential(morse()))
        assert sound.calls == 2  # forces of the structures, energies of all displaced ones
        assert list(errors) == [0.1, 0.03, 0.01]
        assert errors[0.01].samples == 30
        assert errors[0.01].relative_error < 1e-3
        assert errors[0.1].relative_error / errors[0.01].relative_error == pytest.approx(100, rel=0.1)
        for error in errors.values():
            assert error.reference_relative_error == pytest.approx(error.relative_error)

    def test_staircase_error_grows_as_the_step_falls(self):
        # Two independent roundings differ by s / sqrt(6) in rms, over 2 h.
        height = 0.02
        structures = clusters(12)
        errors = central_difference_error(Broken(energy=staircase(height)), structures, steps=(0.03, 0.01))
        sound = central_difference_error(Broken(force=lambda x: np.full(x.shape, 1e3)), structures, steps=(0.01,))
        assert sound[0.01].relative_error == pytest.approx(1.0, abs=0.01)  # constant force without energy
        forces = np.concatenate([f.ravel() for f in CalculatorPotential(morse())(structures)[1]])
        expected = height / np.sqrt(6) / 0.02 / np.sqrt(np.mean(forces**2))
        assert errors[0.01].relative_error == pytest.approx(expected, rel=0.25)
        assert errors[0.01].relative_error > 0.1  # far beyond the bound of 1 %
        assert 2 < errors[0.01].relative_error / errors[0.03].relative_error < 4.5
        assert errors[0.01].reference_relative_error is None

    def test_curl_force_tends_to_a_constant(self):
        curl = Broken(force=lambda x: 0.1 * np.cross(_ZAXIS, x))
        errors = central_difference_error(curl, clusters(5), components_per_structure=12)
        forces = np.concatenate([f.ravel() for f in curl(clusters(5))[1]])
        fault = np.concatenate([0.1 * np.cross(_ZAXIS, s.positions).ravel() for s in clusters(5)])
        expected = np.sqrt(np.mean(fault**2) / np.mean(forces**2))
        assert errors[0.01].relative_error == pytest.approx(expected, rel=0.01)
        assert errors[0.01].samples == 60

    def test_vanishing_forces(self):
        class Flat:
            def __call__(self, structures):
                return np.zeros(len(structures)), [np.zeros((len(s), 3)) for s in structures]

        flat = central_difference_error(Flat(), clusters(1))
        assert flat[0.01].relative_error is None

        class Tilted(Flat):
            def __call__(self, structures):
                return np.array([s.positions.sum() for s in structures]), super().__call__(structures)[1]

        assert central_difference_error(Tilted(), clusters(1))[0.01].relative_error == float("inf")

    @pytest.mark.parametrize(
        ("structures", "options"),
        [([], {}), (1, {"steps": ()}), (1, {"steps": (0.0,)}), (1, {"components_per_structure": 0})],
    )
    def test_bad_input(self, structures, options):
        structures = clusters(structures) if structures else []
        with pytest.raises(ValueError, match="central_difference_error"):
            central_difference_error(CalculatorPotential(morse()), structures, **options)


class Faulty(Calculator):
    """A Morse potential with an extra force of positions and velocities."""

    implemented_properties = ("energy", "forces")

    def __init__(self, force, scale=1.0):
        super().__init__()
        self.force, self.scale, self.sound = force, scale, morse()

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.sound.calculate(atoms, ["energy", "forces"], all_changes)
        self.results = {
            "energy": self.scale * self.sound.results["energy"],
            "forces": self.scale * self.sound.results["forces"] + self.force(atoms),
        }


@pytest.fixture(scope="module")
def sound_run():
    return nve_drift(morse(), p4(), duration_ps=1.0, equilibrate_ps=0.2, seed=1)


class TestNVE:
    def test_conservative_force_does_not_drift(self, sound_run):
        assert sound_run.stable
        assert sound_run.reason == ""
        assert abs(sound_run.drift_mev_per_atom_per_ps) < 0.1
        assert abs(sound_run.drift_mev_per_atom_per_ps) < 4 * sound_run.standard_error
        assert sound_run.drift_over_std_kinetic < 0.05
        assert sound_run.duration_ps == pytest.approx(1.0)
        assert len(sound_run.times_ps) == 101  # every 10 fs, both ends
        assert sound_run.total_energy_ev.shape == sound_run.kinetic_energy_ev.shape == (101,)
        assert sound_run.mean_temperature_K <= sound_run.max_temperature_K < 2000

    def test_same_seed_same_run(self, sound_run):
        # A shorter run is the beginning of the longer one.
        again = nve_drift(morse(), p4(), duration_ps=0.2, equilibrate_ps=0.2, seed=1)
        np.testing.assert_array_equal(again.total_energy_ev, sound_run.total_energy_ev[:21])

    def test_drift_of_friction_is_known(self):
        # F = -gamma p loses energy at 2 gamma times the kinetic energy.
        gamma = 1e-3  # in ASE's inverse time unit
        run = nve_drift(
            Faulty(lambda atoms: -gamma * atoms.get_momenta()),
            p4(),
            duration_ps=0.6,
            equilibrate_ps=0.2,
            seed=1,
        )
        from ase import units

        per_ps = 1e3 * units.fs * -2 * gamma * run.kinetic_energy_ev.mean()
        assert run.drift_mev_per_atom_per_ps == pytest.approx(1e3 * per_ps / 4, rel=0.15)
        assert run.drift_mev_per_atom_per_ps < -5 * run.standard_error
        assert run.drift_over_std_kinetic == pytest.approx(0.26, rel=0.2)
        assert run.stable

    def test_curl_force_is_seen(self):
        def curl(atoms):
            return 0.05 * np.cross(_ZAXIS, atoms.positions - atoms.positions.mean(axis=0))

        run = nve_drift(Faulty(curl), p4(), duration_ps=0.6, equilibrate_ps=0.0, seed=1)
        assert run.drift_mev_per_atom_per_ps > 5 * run.standard_error
        assert run.drift_over_std_kinetic > 1

    def test_explosion(self):
        run = nve_drift(
            Faulty(lambda atoms: 0.2 * atoms.get_momenta()),
            p4(),
            duration_ps=1.0,
            equilibrate_ps=0.0,
            check_bonds=False,
        )
        assert not run.stable
        assert "temperature rose" in run.reason
        assert run.max_temperature_K > 10_300
        assert run.duration_ps < 1.0

    def test_detached_atom(self):
        def no_force(atoms):
            return np.zeros((len(atoms), 3))

        run = nve_drift(Faulty(no_force, scale=0.0), molecule("CH4"), duration_ps=1.0, equilibrate_ps=0.0)
        assert not run.stable
        assert "came apart" in run.reason

    def test_free_flight_measures_nothing(self):
        apart = Atoms("P3", positions=[[0, 0, 0], [60, 0, 0], [0, 60, 0]])
        run = nve_drift(morse(), apart, duration_ps=0.1, equilibrate_ps=0.02)
        assert run.stable
        assert np.isnan([run.drift_mev_per_atom_per_ps, run.standard_error, run.drift_over_std_kinetic]).all()

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    @pytest.mark.parametrize("equilibrate_ps", [0.0, 0.1])
    def test_nan(self, equilibrate_ps):
        def nan(atoms):
            return np.full((len(atoms), 3), np.nan)

        run = nve_drift(Faulty(nan), p4(), duration_ps=0.1, equilibrate_ps=equilibrate_ps)
        assert not run.stable
        assert "not finite" in run.reason

    def test_errors_of_the_calculator_are_not_swallowed(self):
        def fail(atoms):
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            nve_drift(Faulty(fail), p4(), duration_ps=0.1, equilibrate_ps=0.0)

    def test_error_bar_covers_correlated_noise(self):
        # Residuals correlated over 10 samples: the naive error of the slope is 4 times too small.
        rng = np.random.default_rng(0)
        times = np.linspace(0.0, 1.0, 2000)
        scores = []
        for _ in range(200):
            noise = np.zeros(2000)
            kicks = rng.standard_normal(2000)
            for n in range(1, 2000):
                noise[n] = 0.9 * noise[n - 1] + kicks[n]
            slope, error = fit_drift(times, 3.0 * times + noise)
            scores.append((slope - 3.0) / error)
        assert 0.9 < np.std(scores) < 1.5  # Student's t with 8 degrees of freedom: 1.15
        assert abs(np.mean(scores)) < 0.3

    def test_fit_of_a_line(self):
        times = np.linspace(0.0, 2.0, 50)
        slope, error = fit_drift(times, 7.0 - 0.5 * times)
        assert slope == pytest.approx(-0.5)
        assert error < 1e-12
        assert np.isnan(fit_drift(times[:1], times[:1])[0])
        assert np.isnan(fit_drift(times[:4], times[:4])[1])

    def test_given_velocities_are_kept(self, sound_run):
        atoms = p4()
        atoms.set_velocities(0.01 * np.random.default_rng(0).standard_normal((4, 3)))
        run = nve_drift(morse(), atoms, duration_ps=0.01, timestep_fs=0.5, sample_fs=0.5, keep_velocities=True)
        assert len(run.times_ps) == 21  # every step, both ends
        assert run.kinetic_energy_ev[0] == atoms.get_kinetic_energy()
        atoms.calc = morse()
        assert run.total_energy_ev[0] == atoms.get_total_energy()
        assert 0 < run.seconds_per_step < 1

    @pytest.mark.parametrize(
        "options",
        [{"duration_ps": 0.0}, {"timestep_fs": -1.0}, {"equilibrate_ps": -1}, {"duration_ps": 0.01}],
    )
    def test_bad_input(self, options):
        with pytest.raises(ValueError, match="nve_drift"):
            nve_drift(morse(), p4(), **options)


class TestSmoothness:
    def test_smooth_change_passes(self):
        result = bond_stretch_scan(CalculatorPotential(morse(2.2)), p4(), CalculatorPotential(morse(2.0)))
        assert result.passed
        assert result.largest_jump_mev == pytest.approx(0.1 * result.allowed_mev, rel=1e-3)
        assert result.lengths_angstrom.shape == (141,)
        assert np.ptp(result.lengths_angstrom) == pytest.approx(0.7)
        assert not result.nothing_measured

    def test_a_bond_that_the_model_does_not_have(self):
        short = CalculatorPotential(MorsePotential(r0=2.2, rcut1=0.5, rcut2=0.7))
        assert bond_stretch_scan(short, p4(), short).nothing_measured
        assert not bond_stretch_scan(short, p4(), CalculatorPotential(morse())).nothing_measured

    @pytest.mark.parametrize(("height_mev", "passes"), [(20.0, False), (0.1, True)])
    def test_staircase(self, height_mev, passes):
        sound = CalculatorPotential(morse())
        result = bond_stretch_scan(Broken(energy=staircase(1e-3 * height_mev)), p4(), sound)
        assert result.passed is passes
        assert 0.9 * height_mev < result.largest_jump_mev <= 2 * height_mev
        assert 1.0 < result.allowed_mev < 5.0

    def test_isolated_step_is_measured_and_located(self):
        class Step(Broken):
            def __call__(self, structures):
                energies, forces = super().__call__(structures)
                lengths = np.array([s.get_distance(0, 1) for s in structures])
                return energies + 0.015 * (lengths > 2.4001), forces

        result = bond_stretch_scan(Step(), p4(), Broken(), bond=(0, 1))
        assert not result.passed
        assert result.largest_jump_mev == pytest.approx(15.0)
        assert result.jump_at_angstrom == pytest.approx(2.4, abs=0.0051)
        finer = bond_stretch_scan(Step(), p4(), Broken(), bond=(0, 1), points=281)
        assert finer.largest_jump_mev == pytest.approx(15.0)
        assert finer.allowed_mev == pytest.approx(result.allowed_mev / 4, rel=0.05)

    def test_single_precision_totals_are_not_steps(self):
        def single(energies):
            return (energies - 60_000.0).astype(np.float32).astype(float)

        sound = CalculatorPotential(morse())
        result = bond_stretch_scan(Broken(energy=single), p4(), Broken(energy=lambda e: e - 60_000.0), points=281)
        assert result.largest_jump_mev > 1e3 * np.max(np.abs(np.diff(sound_energies(sound, result), 2)))
        assert result.passed

    def test_nan_fails(self):
        result = bond_stretch_scan(Broken(energy=lambda e: e * np.nan), p4(), Broken())
        assert not result.passed

    def test_picks_a_hydrogen_and_moves_the_right_side(self):
        class Recorder:
            def __call__(self, structures):
                self.last = structures[-1]
                return np.zeros(len(structures)), [np.zeros((len(s), 3)) for s in structures]

        ethanol, recorder = molecule("CH3CH2OH"), Recorder()
        result = bond_stretch_scan(recorder, ethanol, recorder)
        assert ethanol.symbols[result.bond[1]] == "H"
        moved = np.linalg.norm(recorder.last.positions - ethanol.positions, axis=1)
        assert np.flatnonzero(moved > 1e-9).tolist() == [result.bond[1]]
        assert moved[result.bond[1]] == pytest.approx(0.5)

        carbon, oxygen = 1, 2
        bond = (oxygen, carbon) if ethanol.symbols[oxygen] == "O" else (carbon, oxygen)
        bond_stretch_scan(recorder, ethanol, recorder, bond=bond)
        moved = np.linalg.norm(recorder.last.positions - ethanol.positions, axis=1) > 1e-9
        assert 1 < moved.sum() < len(ethanol)
        assert not moved[bond[0]]

        benzene = molecule("C6H6")
        bond_stretch_scan(recorder, benzene, recorder, bond=(0, 1))  # a ring: the atom alone
        moved = np.linalg.norm(recorder.last.positions - benzene.positions, axis=1) > 1e-9
        assert np.flatnonzero(moved).tolist() == [1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"points": 4}, "points"),
            ({"span": (0.1, 0.1)}, "span"),
            ({"span": (-3.0, 0.1)}, "to nothing"),
            ({"bond": (0, 9)}, "does not name"),
            ({"bond": (1, 1)}, "does not name"),
        ],
    )
    def test_bad_input(self, options, message):
        sound = CalculatorPotential(morse())
        with pytest.raises(ValueError, match=message):
            bond_stretch_scan(sound, p4(), sound, **options)

    def test_no_bond(self):
        sound = CalculatorPotential(morse())
        with pytest.raises(ValueError, match=r"bond=\(i, j\)"):
            bond_stretch_scan(sound, Atoms("Ar2", [[0, 0, 0], [0, 0, 8]]), sound)


def sound_energies(potential, result):
    """The exact energies of the scan of P4 that a result describes."""
    first = p4()
    i, j = result.bond
    vector = first.positions[j] - first.positions[i]
    frames = []
    for length in result.lengths_angstrom:
        frame = first.copy()
        frame.positions[j] = first.positions[i] + vector * length / np.linalg.norm(vector)
        frames.append(frame)
    return potential(frames)[0]


class TestLabels:
    def labelled(self, energy_key="REF_energy", forces_key="REF_forces"):
        frames = clusters(3)
        energies, forces = CalculatorPotential(morse())(frames)
        for frame, energy, force in zip(frames, energies, forces, strict=True):
            frame.info[energy_key] = energy + 0.008
            frame.arrays[forces_key] = force + np.array([0.003, -0.006, 0.0])
        return frames

    def test_pinned(self):
        errors = force_and_energy_mae(CalculatorPotential(morse()), self.labelled())
        assert errors.force_mae_mev_per_angstrom == pytest.approx(3.0)
        assert errors.energy_mae_mev_per_atom == pytest.approx(2.0)
        assert (errors.structures, errors.force_components) == (3, 36)
        assert errors.force_labels.shape == errors.force_predictions.shape == (36,)

    def test_other_keys_and_stored_results(self):
        frames = self.labelled("dft", "dft_forces")
        potential = CalculatorPotential(morse())
        errors = force_and_energy_mae(potential, frames, energy_key="dft", forces_key="dft_forces")
        assert errors.force_mae_mev_per_angstrom == pytest.approx(3.0)
        for frame in frames:
            frame.calc = SinglePointCalculator(
                frame, energy=frame.info.pop("dft"), forces=frame.arrays.pop("dft_forces")
            )
        stored = force_and_energy_mae(potential, frames)
        assert stored.energy_mae_mev_per_atom == pytest.approx(2.0)

    def test_labels_that_are_there_count(self):
        """One frame without forces, one with an energy that is no number, one with neither."""
        frames = self.labelled()
        del frames[1].arrays["REF_forces"]
        frames[1].calc = morse()  # a live calculator is not a source of labels
        frames[2].info["REF_energy"] = np.nan
        bare = clusters(1)
        errors = force_and_energy_mae(CalculatorPotential(morse()), [*frames, *bare])
        assert errors.force_mae_mev_per_angstrom == pytest.approx(3.0)
        assert errors.energy_mae_mev_per_atom == pytest.approx(2.0)
        assert (errors.structures, errors.energies, errors.force_components) == (2, 2, 24)

    def test_energies_alone(self):
        frames = self.labelled()
        for frame in frames:
            del frame.arrays["REF_forces"]
        errors = force_and_energy_mae(CalculatorPotential(morse()), frames)
        assert errors.energy_mae_mev_per_atom == pytest.approx(2.0)
        assert errors.force_mae_mev_per_angstrom is errors.force_rmse_mev_per_angstrom is None
        assert (errors.structures, errors.energies) == (0, 3)

    def test_no_labels(self):
        frames = self.labelled("dft_energy", "dft_forces")
        with pytest.raises(MissingLabelsError, match=r"no structure has.*dft_energy.*--energy-key and --forces-key"):
            force_and_energy_mae(CalculatorPotential(morse()), frames)
        with pytest.raises(ValueError, match="no structures"):
            force_and_energy_mae(CalculatorPotential(morse()), [])

    def test_read_structures(self, tmp_path):
        path = tmp_path / "data.xyz"
        write(path, self.labelled(), format="extxyz")
        frames = read_structures(path)
        assert len(frames) == 3
        assert force_and_energy_mae(CalculatorPotential(morse()), frames).structures == 3
        assert len(read_structures(path, ":2")) == 2
        assert len(read_structures(str(path), "0")) == 1

    def test_read_structures_errors(self, tmp_path):
        (tmp_path / "empty.xyz").touch()
        (tmp_path / "bad.xyz").write_text("three\nnot a structure\n")
        write(tmp_path / "one.xyz", p4())
        for name, index, message in (
            ("none.xyz", ":", "does not exist"),
            (".", ":", "directory"),
            ("empty.xyz", ":", "is empty"),
            ("bad.xyz", ":", "bad.xyz"),
            ("one.xyz", "7", "one.xyz"),
            ("one.xyz", "5:", "one.xyz"),
        ):
            with pytest.raises(ValueError, match=message):
                read_structures(tmp_path / name, index)
