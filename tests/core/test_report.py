"""Measuring a model against its reference, and the written report."""

from __future__ import annotations

import base64
import json
import math
import re
import sys

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.morse import MorsePotential
from reports import Staircase, cluster, morse

from gaq.checks.nve import nve_drift
from gaq.checks.potential import CalculatorPotential
from gaq.checks.uses import fitness_line
from gaq.reporting import Subject, failed_gates, measure_subject, quality, write_report
from gaq.reporting.gates import NOTHING, unmeasured, verdict

METRICS = {
    "force_rmse_mev_per_angstrom",
    "force_mae_mev_per_angstrom",
    "energy_mae_mev_per_atom",
    "lee_mev_per_angstrom",
    "central_difference_relative_error",
    "nve",
    "file_kind",
    "file_bytes",
    "weight_bytes",
    "seconds_per_step",
    "peak_bytes",
}
OF_THE_MODEL = {
    "preset",
    "training",
    "rounds_features",
    "not_applicable",
    "engine_error_ratio",
    "force_difference",
    "lee_naive_ratio",
    "smoothness",
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Ten labelled clusters, a model file and a reference file."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "fp32.model").write_bytes(bytes(4000))
    (folder / "quantized.model").write_bytes(bytes(900))
    structures = [cluster(seed) for seed in range(10)]
    energies, forces = CalculatorPotential(morse())(structures)
    for frame, energy, force in zip(structures, energies, forces, strict=True):
        frame.info["REF_energy"] = energy + 0.004
        frame.arrays["REF_forces"] = force + 0.01

    def subject(name, preset="float", potential=None, **changes):
        """A Morse potential in a file of that name."""
        sound = CalculatorPotential(morse())
        return Subject(potential or sound, potential or sound, morse, str(folder / name), preset, **changes)

    return subject, structures


def tilted(structures):
    """The twin of plain rounding: forces that do not turn with the structure, by 30 meV/Å."""
    return Staircase(morse())


@pytest.fixture(scope="module")
def good_report(case):
    subject, structures = case
    model = subject("quantized.model", "gaq", engine_error=lambda structures: 1.5)
    return measure_subject(model, structures, subject("fp32.model", naive=tilted), nve_ps=0.3)


class TestReport:
    def test_fields_and_numbers(self, good_report):
        assert set(good_report) == {
            "model",
            "reference",
            "versions",
            "hardware",
            "command",
            "gates",
            "uses",
            "partial",
            "left_out",
            "head",
            "heads",
            "figures",
        }
        assert good_report["left_out"] == []
        assert set(good_report["model"]) == METRICS | OF_THE_MODEL | {"path"}
        assert set(good_report["reference"]) == METRICS | {"path"}
        model = good_report["model"]
        assert model["force_mae_mev_per_angstrom"] == pytest.approx(10.0)
        assert model["energy_mae_mev_per_atom"] == pytest.approx(1.0)
        assert model["lee_mev_per_angstrom"] < 1e-9
        assert set(model["central_difference_relative_error"]) == {"0.1", "0.03", "0.01"}
        assert {"drift_mev_per_atom_per_ps", "standard_error", "drift_over_std_kinetic"} <= set(model["nve"])
        assert (model["file_bytes"], good_report["reference"]["file_bytes"]) == (900, 4000)
        assert 0 < model["seconds_per_step"] < 1
        assert 1e7 < model["peak_bytes"] < 1e11
        gates = good_report["gates"]
        assert [name for name, gate in gates.items() if gate["passed"] is not True] == []
        assert gates["engine"]["value"] == 1.5
        assert gates["lee_against_naive"]["value"] > 1e9
        assert gates["file_size_ratio"]["value"] == pytest.approx(4000 / 900)
        assert gates["bond_stretch"]["value"] == 0.0

    def test_a_broken_model_fails_the_gates_that_see_it(self, case):
        subject, structures = case
        broken = subject("quantized.model", "gaq", Staircase(morse()))
        report = measure_subject(broken, structures, subject("fp32.model", naive=tilted))
        assert report["model"]["lee_mev_per_angstrom"] == pytest.approx(40.0, rel=0.15)  # 4/3 of 30 meV/Å
        assert report["model"]["nve"] is None
        failed = {name for name, gate in report["gates"].items() if gate["passed"] is False}
        assert failed == {
            "force_mae_ratio",
            "force_difference",
            "lee",
            "lee_against_naive",
            "central_difference",
            "bond_stretch",
        }
        assert report["gates"]["nve_drift"]["passed"] is None

    def test_uses(self, good_report):
        """The same potential in both files: no measure moves, and what a cluster has no number for is not shown."""
        uses = good_report["uses"]
        fit = ("geometry optimisation", "vibrations", "energy profiles", "constant-energy dynamics")
        assert [use for use, entry in uses.items() if entry["fit"]] == list(fit)
        values = {name: one["value"] for use in fit for name, one in uses[use]["criteria"].items()}
        assert values.pop("force_left_ev_per_angstrom") < 1e-3
        assert set(values.values()) == {0.0}
        assert fitness_line(uses) == (
            "fit for: geometry optimisation, vibrations, energy profiles, constant-energy dynamics; "
            "not shown: equation of state, structure at 300 K"
        )
        run = good_report["figures"]["nve"]["model"]
        # 0.3 ps hold 151 velocities, 2 fs apart.
        assert run.wave_numbers_per_cm[1] == pytest.approx(1 / (151 * 2.0 * 2.99792458e-5))
        assert run.vibrations.sum() == pytest.approx(1.0)

    def test_stopped(self, case, monkeypatch, tmp_path):
        """Ctrl-C in the second simulation: what was measured before is there, and the page says that more is not."""
        subject, structures = case
        runs = []

        def stopped(*arguments, **options):
            runs.append(nve_drift(*arguments, **options))
            if len(runs) == 2:
                raise KeyboardInterrupt
            return runs[-1]

        monkeypatch.setattr("gaq.reporting.measure.nve_drift", stopped)
        model, reference = subject("quantized.model", "gaq"), subject("fp32.model")
        report = measure_subject(model, structures, reference, nve_ps=0.1, keep_partial=True)
        assert report["partial"] == "stopped while simulating with the reference; what follows was not measured"
        assert report["model"]["nve"]["stable"]
        assert report["reference"]["nve"] is None
        assert report["gates"]["lee"]["passed"]
        assert report["gates"]["force_difference"]["passed"]
        assert report["gates"]["nve_drift_against_reference"]["passed"] is None
        assert report["uses"]["vibrations"]["fit"]
        page = write_report(report, tmp_path)[1].read_text()
        assert "Partial report: stopped while simulating with the reference" in page

        def at_once(*arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr("gaq.reporting.measure._by_itself", at_once)
        with pytest.raises(KeyboardInterrupt):
            measure_subject(model, structures, reference, nve_ps=0.1)

    def test_written_files(self, good_report, tmp_path):
        json_path, html_path = write_report(good_report, tmp_path / "deep" / "report")
        data = json.loads(json_path.read_text())
        assert set(data) == set(good_report) - {"figures"}
        assert data["model"]["file_bytes"] == 900
        assert data["gates"]["lee"] == good_report["gates"]["lee"]
        page = html_path.read_text()
        assert "http" not in page
        assert "<script" not in page
        assert page.count("<table>") == 3
        images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
        assert len(images) == 3
        assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
        assert page.count('class="pass">pass') == 11
        assert "Energy is smooth along a bond<br><code class='muted'>bond_stretch</code>" in page
        assert "8.583e-04</td>" in page or "8.58e-04</td>" in page  # 900 bytes in MiB
        assert '<p class="pass">11 of 11 gates measured, none failed.</p>' in page
        # A report read back from disk makes a page too, without figures.
        write_report(data, tmp_path / "again")
        assert "No figure data" in (tmp_path / "again" / "report.html").read_text()

    def test_json_has_no_nan_and_the_page_escapes(self, good_report, tmp_path):
        hostile = {
            **good_report,
            "command": "gaq report '<b>.model' & more",
            "model": {**good_report["model"], "lee_mev_per_angstrom": float("nan")},
            "gates": {"nve_drift": {**good_report["gates"]["nve_drift"], "value": float("inf"), "passed": False}},
        }
        json_path, html_path = write_report(hostile, tmp_path)
        data = json.loads(json_path.read_text(), parse_constant=lambda name: pytest.fail(name))
        assert data["model"]["lee_mev_per_angstrom"] is None
        assert data["gates"]["nve_drift"]["value"] is None
        page = html_path.read_text()
        assert "<b>" not in page
        assert "∞" in page
        assert '<p class="fail">1 of 1 gates measured; failed: nve_drift.</p>' in page
        data["gates"]["nve_drift"]["enforced"] = False
        write_report(data, tmp_path)
        page = html_path.read_text()
        assert "not finite" in page
        assert 'class="pass"' not in page.partition("<h2>Gates</h2>")[2]

    def test_without_matplotlib(self, good_report, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        page = write_report(good_report, tmp_path)[1].read_text()
        assert "pip install gaq[report]" in page

    def test_unlabelled_structures_without_reference(self, case, tmp_path):
        report = measure_subject(case[0]("quantized.model", "w8"), [cluster()])
        assert report["reference"] is None
        assert report["model"]["force_mae_mev_per_angstrom"] is None
        assert report["gates"]["force_mae_ratio"]["passed"] is None
        page = write_report(report, tmp_path)[1].read_text()
        assert "Nothing to plot" in page
        # Never green over gates that were not measured, and no rows of theirs.
        assert '<p class="muted">3 of 10 gates measured, none failed.</p>' in page
        assert "<td>nve_drift</td>" not in page
        assert "<li>nve_drift: needs an NVE run" in page
        assert "Force MAE" not in page

    def test_the_force_difference_needs_no_labels(self, case):
        """Measured on the structures and on copies with displaced atoms; a model of other forces fails."""
        subject, _ = case
        bare = [cluster(seed) for seed in range(3)]
        reference = subject("fp32.model")
        same = measure_subject(subject("quantized.model", "gaq"), bare, reference)
        assert same["model"]["force_difference"]["structures"] == 6
        assert same["model"]["force_difference"]["rms_mev_per_angstrom"] == 0.0
        assert same["gates"]["force_difference"]["passed"]
        other = CalculatorPotential(MorsePotential(epsilon=1.0, r0=2.21, rho0=4.0, rcut1=3.0, rcut2=4.0))
        for preset in ("gaq", "w4", "naive_w8a8"):
            report = measure_subject(subject("quantized.model", preset, other), bare, reference)
            assert report["gates"]["force_difference"]["value"] == pytest.approx(
                0.5 * report["model"]["force_difference"]["force_rms_mev_per_angstrom"]
            )
            assert "force_difference" in failed_gates(report["gates"])

    def test_labels_of_the_reference_itself_are_none(self, case):
        """As a simulation with the float model writes them."""
        subject, _ = case
        structures = [cluster(seed) for seed in range(3)]
        energies, forces = CalculatorPotential(morse())(structures)
        for frame, energy, force in zip(structures, energies, forces, strict=True):
            frame.info["REF_energy"], frame.arrays["REF_forces"] = energy, np.round(force, 8)
        report = measure_subject(subject("quantized.model", "gaq"), structures, subject("fp32.model"))
        assert report["gates"]["force_mae_ratio"]["passed"] is None
        assert report["gates"]["force_difference"]["passed"] is True
        assert report["model"]["force_difference"]["structures"] == 6

    def test_nan_from_a_model_fails(self, case):
        class Broken(CalculatorPotential):
            def __call__(self, structures):
                energies, forces = super().__call__(structures)
                return np.where(np.arange(len(energies)) == 1, np.nan, energies), forces

        subject, structures = case
        report = measure_subject(
            subject("quantized.model", "naive_w8a8", Broken(morse())), structures, subject("fp32.model")
        )
        assert "finite" in failed_gates(report["gates"])

    def test_a_float_model_is_reported(self, case, tmp_path):
        subject, structures = case
        report = measure_subject(subject("fp32.model"), structures)
        assert report["gates"] == {}
        assert report["model"]["preset"] == "float"
        assert report["model"]["lee_naive_ratio"] is None
        page = write_report(report, tmp_path)[1].read_text()
        assert "no gates apply" in page
        assert 'class="pass"' not in page

    def test_plain_operations_are_spared_large_structures(self, case, monkeypatch):
        def never(structures):
            raise AssertionError

        monkeypatch.setattr("gaq.reporting.measure.MAX_REFERENCE_PATH_ATOMS", 3)
        subject, structures = case
        model = subject("quantized.model", "gaq", engine_error=never)
        report = measure_subject(model, structures[:1], subject("fp32.model", naive=never))
        for name in ("engine", "lee_against_naive"):
            assert verdict(report["gates"][name]) == "not measured"

    def test_quality_measures_what_it_is_given_structures_for(self, case):
        subject, structures = case
        result = quality(subject("fp32.model"), rotated=structures[:2])
        assert set(result.metrics) == {"lee_mev_per_angstrom"}
        assert result.labels is None

    def test_bad_input(self, case):
        subject, structures = case
        good = subject("quantized.model", "gaq")
        lost, double = cluster(), cluster()
        lost.positions[1, 2] = math.nan
        double.positions[3] = double.positions[1]
        for frames, model, message in (
            ([], good, "no structures"),
            ([cluster(), lost], good, r"frame 1 \(P4\): the positions hold NaN"),
            ([cluster(), double], good, r"frame 1 \(P4\): atoms 1 \(P\) and 3 \(P\) are at one place"),
            ([cluster()[:1]] * 3, good, "every structure has a single atom"),
            (structures, subject("none.model", "gaq"), "none.model does not exist"),
            (structures, subject("quantized.model", "w2"), "'w2'"),
        ):
            with pytest.raises(ValueError, match=message):
                measure_subject(model, frames)

    def test_what_is_there_is_used_and_the_rest_is_said(self, case):
        """Errors are those of the labelled structures; a single atom is neither rotated nor simulated."""
        subject, structures = case
        model, reference = subject("quantized.model", "gaq"), subject("fp32.model")
        whole = measure_subject(model, structures, reference)
        broken, energy_only, single = structures[0].copy(), structures[1].copy(), cluster()[:1]
        broken.arrays["REF_forces"][0, 0] = broken.info["REF_energy"] = math.nan
        del energy_only.arrays["REF_forces"]
        report = measure_subject(model, [single, *structures, broken, energy_only, cluster()], reference)
        for metric in ("force_mae_mev_per_angstrom", "energy_mae_mev_per_atom"):
            assert report["model"][metric] == pytest.approx(whole["model"][metric])
        assert report["left_out"] == [
            "left out: energies 'REF_energy' of 2 of 14 structures, missing: frames 0, 13",
            "left out: energies 'REF_energy' of 1 of 14 structures, not one finite number: frame 11",
            "left out: forces 'REF_forces' of 3 of 14 structures, missing: frames 0, 12, 13",
            "left out: forces 'REF_forces' of 1 of 14 structures, not finite: frame 11",
            "left out: 1 of 14 structures, a single atom has no forces: frame 0",
        ]
        assert report["model"]["lee_mev_per_angstrom"] == pytest.approx(
            whole["model"]["lee_mev_per_angstrom"], abs=1e-9
        )

    def test_energies_without_forces(self, case):
        subject, structures = case
        frames = [structure.copy() for structure in structures]
        for frame in frames:
            del frame.arrays["REF_forces"]
        report = measure_subject(subject("quantized.model", "gaq"), frames, subject("fp32.model"))
        assert report["model"]["energy_mae_mev_per_atom"] == pytest.approx(1.0)
        assert report["model"]["force_mae_mev_per_angstrom"] is None
        assert report["gates"]["force_mae_ratio"]["passed"] is None
        assert report["gates"]["force_difference"]["passed"]
        assert report["left_out"] == [
            "left out: forces 'REF_forces' of all structures, missing: frames 0, 1, 2, 3, 4 and 5 more"
        ]

    def test_forces_that_vanish_pass_nothing(self, case, tmp_path):
        """Atoms out of each other's reach: no difference to a force of zero is measured."""
        subject, _ = case
        apart = [Atoms("P2", positions=[[0, 0, 0], [60.0 + n, 0, 0]]) for n in range(3)]
        for n, atoms in enumerate(apart):
            atoms.info["REF_energy"], atoms.arrays["REF_forces"] = 0.1, np.full((2, 3), 0.1 * n)
        flat = {"engine_error": lambda structures: None}
        model = subject("quantized.model", "gaq", **flat)
        reference = subject("fp32.model", naive=lambda structures: CalculatorPotential(morse()))
        report = measure_subject(model, apart, reference)
        assert report["model"]["lee_mev_per_angstrom"] is None
        assert report["model"]["central_difference_relative_error"] == {"0.1": None, "0.03": None, "0.01": None}
        measured = {name for name, gate in report["gates"].items() if gate["passed"] is not None}
        assert measured == {"finite", "file_size_ratio"}
        needs = unmeasured(report["gates"])
        assert {name for name, text in needs.items() if text != NOTHING} == {"nve_drift", "nve_drift_against_reference"}
        page = write_report(report, tmp_path)[1].read_text()
        assert '<p class="muted">2 of 10 gates measured, none failed.</p>' in page
        assert page.count("there is nothing to measure") == 6

    def test_a_cutoff_below_all_distances_measures_no_bond(self, case):
        """Atoms that look bonded and do not interact in the model: a flat scan is not a smooth one."""
        subject, _ = case
        short = CalculatorPotential(MorsePotential(epsilon=2.0, r0=2.21, rho0=4.0, rcut1=0.3, rcut2=0.5))
        reference = subject("fp32.model", "float", short)
        report = measure_subject(subject("quantized.model", "gaq", short), [cluster()], reference)
        assert report["gates"]["bond_stretch"]["passed"] is None
        assert unmeasured(report["gates"])["bond_stretch"] == NOTHING
        assert report["figures"]["scan"] is None

    def test_a_force_on_atoms_that_should_be_free_fails(self, case):
        subject, _ = case
        apart = [Atoms("P2", positions=[[0, 0, 0], [60.0 + n, 0, 0]]) for n in range(3)]
        report = measure_subject(subject("quantized.model", "gaq", Staircase(morse())), apart, subject("fp32.model"))
        assert {"force_difference", "lee", "central_difference"} <= set(failed_gates(report["gates"]))
