"""Gates, tables and the written report."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.morse import MorsePotential

from gaq.checks.accuracy import LOWEST_FLOAT_ERROR
from gaq.checks.potential import CalculatorPotential
from gaq.reporting import (
    BOUNDS,
    Subject,
    evaluate_gates,
    failed_gates,
    format_table,
    gate_rows,
    hardware,
    markdown_table,
    measure_subject,
    quality,
    summary,
    unmeasured,
    versions,
    write_report,
)
from gaq.reporting.cost import seconds_per_step
from gaq.reporting.gates import COMPARE, passes_all, verdict
from gaq.reporting.tables import format_comparison, metric_rows

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

FP32 = {
    "force_mae_mev_per_angstrom": 10.0,
    "force_rmse_mev_per_angstrom": 15.0,
    "nve": {"drift_mev_per_atom_per_ps": 0.001, "standard_error": 0.002},
    "file_bytes": 4_000_000,
}
DIFFERENCE = {"rms_mev_per_angstrom": 2.9, "force_rms_mev_per_angstrom": 1000.0, "structures": 8}
GOOD = {
    "force_mae_mev_per_angstrom": 10.1,
    "force_difference": DIFFERENCE,
    "lee_mev_per_angstrom": 0.1,
    "lee_naive_ratio": 174.0,
    "central_difference_relative_error": {"0.1": 0.016, "0.03": 0.0014, "0.01": 0.0002},
    "nve": {"drift_mev_per_atom_per_ps": 0.005, "drift_over_std_kinetic": 0.1, "stable": True},
    "smoothness": {"largest_jump_mev": 0.1, "allowed_mev": 1.0},
    "engine_error_ratio": 1.5,
    "file_bytes": 900_000,
}


def cluster(seed: int = 0) -> Atoms:
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    atoms = Atoms("P4", 2.21 / np.sqrt(8) * corners)
    atoms.rattle(0.05, seed=seed)
    return atoms


def morse() -> MorsePotential:
    return MorsePotential(epsilon=2.0, r0=2.21, rho0=4.0, rcut1=3.0, rcut2=4.0)


class Staircase(CalculatorPotential):
    """Energies rounded to 20 meV, and a force that ignores rotation."""

    def __call__(self, structures):
        energies, forces = super().__call__(structures)
        return 0.02 * np.round(energies / 0.02), [f + np.array([0.0, 0.0, 0.03]) for f in forces]


class TestGates:
    def test_a_good_model_passes_everything(self):
        gates = evaluate_gates(GOOD, "gaq", FP32)
        assert {name: gate.passed for name, gate in gates.items()} == dict.fromkeys(gates, True)
        assert len(gates) == 11
        assert summary({name: gate.to_dict() for name, gate in gates.items()}) == "11 of 11 gates measured, none failed"
        assert all(gate.enforced for gate in gates.values())
        assert gates["lee_against_naive"].value == 174.0
        assert gates["central_difference"].value == 0.0002
        assert gates["nve_drift_against_reference"].value == pytest.approx(0.004)
        assert gates["nve_drift_against_reference"].bound == pytest.approx(0.004 * math.sqrt(2))
        assert gates["file_size_ratio"].value == pytest.approx(4.444, abs=1e-3)
        assert failed_gates(gates) == []

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"force_mae_mev_per_angstrom": 10.21}, "force_mae_ratio"),
            ({"force_difference": {**DIFFERENCE, "rms_mev_per_angstrom": 3.02}}, "force_difference"),
            ({"energy_mae_mev_per_atom": math.nan}, "finite"),
            ({"central_difference_relative_error": {"0.1": math.inf, "0.01": 0.001}}, "finite"),
            ({"lee_mev_per_angstrom": 0.16}, "lee"),
            ({"lee_naive_ratio": 29.0}, "lee_against_naive"),
            ({"central_difference_relative_error": {0.01: 0.011}}, "central_difference"),
            ({"nve": {**GOOD["nve"], "drift_over_std_kinetic": 1.0}}, "nve_drift"),
            ({"nve": {**GOOD["nve"], "drift_mev_per_atom_per_ps": 0.0067}}, "nve_drift_against_reference"),
            ({"smoothness": {"largest_jump_mev": 1.1, "allowed_mev": 1.0}}, "bond_stretch"),
            ({"engine_error_ratio": 2.1}, "engine"),
            ({"file_bytes": 1_000_001}, "file_size_ratio"),
        ],
    )
    def test_each_gate_fails_alone(self, change, name):
        gates = evaluate_gates({**GOOD, **change}, "w8a16", FP32)
        assert [key for key, gate in gates.items() if gate.passed is False] == [name]
        assert failed_gates(gates) == [name]
        assert verdict(gates[name].to_dict()) == "fail"

    def test_bounds_by_preset_and_training(self):
        assert set(BOUNDS) == {"gaq", "w8a16", "w8", "w4a16", "w4", "w8a8", "w4a8", "naive_w8a8"}

        def bound(preset, training="ptq"):
            return evaluate_gates({**GOOD, "training": training}, preset, FP32)["force_mae_ratio"].bound

        assert (bound("w8"), bound("w8", "qat"), bound("w4"), bound("w4", "qat")) == (1.02, 1.0, 1.0, 1.0)
        assert (bound("w8a8", "qat"), bound("w4a8", "qat")) == (1.05, 1.05)
        sizes = {preset: evaluate_gates(GOOD, preset, FP32)["file_size_ratio"].bound for preset in BOUNDS}
        assert sizes == {name: 7.0 if name.startswith("w4") else 4.0 for name in BOUNDS}

    @pytest.mark.parametrize("preset", ["w8a8", "w4a8", "naive_w8a8"])
    def test_physics_of_the_8_bit_activation_presets_is_printed_only(self, preset):
        bad = {**GOOD, "lee_mev_per_angstrom": 6.5, "nve": {"stable": False}, "file_bytes": 500_000}
        gates = evaluate_gates(bad, preset, FP32)
        assert gates["lee"].passed is False
        assert gates["nve_drift"].passed is False
        assert not gates["lee"].enforced
        assert failed_gates(gates) == []
        assert gates["file_size_ratio"].enforced
        # These presets need training: after the fact their accuracy is printed, after training it counts.
        assert not gates["force_mae_ratio"].enforced
        trained = evaluate_gates({**bad, "training": "qat"}, preset, FP32)
        assert trained["force_mae_ratio"].enforced is (preset != "naive_w8a8")

    def test_unmeasured_is_neither_pass_nor_fail(self):
        gates = evaluate_gates({"lee_mev_per_angstrom": 0.01}, "gaq", None)
        assert gates["lee"].passed is True
        others = [gate for name, gate in gates.items() if name not in ("lee", "finite")]
        assert all(gate.passed is None and gate.note.startswith("not measured: ") for gate in others)
        assert failed_gates(gates) == []
        plain = {name: gate.to_dict() for name, gate in gates.items()}
        assert summary(plain) == "2 of 11 gates measured, none failed"
        assert set(unmeasured(plain)) == set(gates) - {"lee", "finite"}
        assert unmeasured(plain)["nve_drift"] == "needs an NVE run (a length above 0 ps)"
        assert not passes_all(plain)

    def test_broken_numbers_fail(self):
        gates = evaluate_gates(
            {**GOOD, "lee_mev_per_angstrom": float("nan"), "nve": {**GOOD["nve"], "stable": False}},
            "w8",
            FP32,
        )
        assert gates["lee"].passed is False
        assert gates["nve_drift"].value == math.inf
        assert gates["nve_drift"].passed is False
        assert "not stable" in gates["nve_drift"].note
        assert gates["finite"].note == "NaN or infinite: model.lee_mev_per_angstrom"
        assert failed_gates(gates) == ["finite", "lee", "nve_drift", "nve_drift_against_reference"]

    @pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_not_finite_never_passes(self, broken):
        """Each number of the metrics in turn, in either model."""

        def replaced(metrics, path):
            head, *rest = path
            return {**metrics, head: replaced(metrics[head], rest) if rest else broken}

        def numbers(metrics, path=()):
            for key, value in metrics.items():
                if isinstance(value, dict):
                    yield from numbers(value, (*path, key))
                elif isinstance(value, float):
                    yield (*path, key)

        for preset in ("gaq", "w8a8"):
            for path in numbers(GOOD):
                assert "finite" in failed_gates(evaluate_gates(replaced(GOOD, path), preset, FP32)), path
            for path in numbers(FP32):
                assert "finite" in failed_gates(evaluate_gates(GOOD, preset, replaced(FP32, path))), path
        assert failed_gates(evaluate_gates({"force_mae_mev_per_angstrom": broken}, "float")) == ["finite"]
        gate = evaluate_gates({**GOOD, "lee_naive_ratio": math.inf}, "gaq", FP32)["lee_against_naive"]
        assert gate.passed is False

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"'w2'.*naive_w8a8"):
            evaluate_gates(GOOD, "w2", FP32)
        with pytest.raises(ValueError, match="'ptq' or 'qat'"):
            evaluate_gates({**GOOD, "training": "magic"}, "w8", FP32)

    def test_the_kernels_of_models_that_round_features_are_printed(self):
        gates = evaluate_gates({**GOOD, "engine_error_ratio": 2.1, "rounds_features": True}, "gaq", FP32)
        assert gates["engine"].passed is False
        assert failed_gates(gates) == []

    def test_force_difference_with_labels(self):
        """0.201 of the float model's own error is what 1.02 allows; elsewhere the bound tells ruin only."""

        def gate(preset, training="ptq", error=15.0, **changes):
            metrics = {**GOOD, "training": training, "force_difference": {**DIFFERENCE, **changes}}
            reference = {**FP32, "force_rmse_mev_per_angstrom": error}
            return evaluate_gates(metrics, preset, reference)["force_difference"]

        assert gate("gaq").bound == pytest.approx(math.sqrt(1.02**2 - 1) * 15.0)
        assert math.hypot(15.0, gate("gaq").bound) == pytest.approx(1.02 * 15.0)
        bounds = (gate("w4").bound, gate("gaq", "qat").bound, gate("w8a8").bound)
        assert bounds == pytest.approx((200.0, 200.0, 205.0))
        assert gate("gaq", "qat", error=150.0).bound == pytest.approx(300.0)
        for preset in BOUNDS:
            ruined = gate(preset, rms_mev_per_angstrom=500.0)
            assert ruined.passed is False, preset
            assert ruined.enforced, preset

    @pytest.mark.parametrize("error", [None, 0.0, 0.05])
    def test_force_difference_without_labels(self, error):
        """Labels that are the float model's own output, as a simulation writes them, are none."""
        fp32 = {**FP32, "force_rmse_mev_per_angstrom": error, "force_mae_mev_per_angstrom": error}

        def gates(preset, difference, training="ptq"):
            metrics = {**GOOD, "training": training, "file_bytes": 500_000}
            metrics["force_difference"] = {**DIFFERENCE, "rms_mev_per_angstrom": difference}
            return evaluate_gates(metrics, preset, fp32)

        good = gates("gaq", 1.0)
        assert good["force_difference"].bound == pytest.approx(0.201 * LOWEST_FLOAT_ERROR * 1000.0, rel=1e-3)
        assert good["force_difference"].passed
        assert good["force_mae_ratio"].passed is None
        assert "RMS force of 1000 meV/Å" in good["force_difference"].note
        assert failed_gates(good) == []
        assert failed_gates(gates("gaq", 4.0)) == ["force_difference"]
        for preset in BOUNDS:
            for training in ("ptq", "qat"):
                assert failed_gates(gates(preset, 450.0, training)) == ["force_difference"]
        assert failed_gates(gates("w4", 100.0)) == []

    def test_what_nothing_can_measure_is_no_gate(self):
        metrics = {**GOOD, "not_applicable": ["engine", "bond_stretch"]}
        gates = evaluate_gates(metrics, "gaq", FP32)
        assert len(gates) == 9
        assert not {"engine", "bond_stretch"} & set(gates)

    def test_no_gates_of_a_float_model(self):
        assert evaluate_gates(FP32, "float") == {}

    @pytest.mark.parametrize(
        ("kinds", "ratio"),
        [
            (("model", "model"), 4_000_000 / 900_000),
            (("package", "package"), 4_000_000 / 900_000),
            (("compiled", "compiled"), 4_000_000 / 900_000),
            (("checkpoint", "checkpoint"), 5.0),
            (("package", "checkpoint"), 5.0),
            (("package of float weights", "package"), 5.0),
            (("compiled", "checkpoint"), None),
            (("compiled", "package"), None),
            (("checkpoint", "compiled"), None),
        ],
    )
    def test_sizes_of_like_with_like(self, kinds, ratio):
        metrics = {**GOOD, "file_kind": kinds[0], "weight_bytes": 200_000}
        reference = {**FP32, "file_kind": kinds[1], "weight_bytes": 1_000_000}
        gate = evaluate_gates(metrics, "gaq", reference)["file_size_ratio"]
        assert gate.value == ratio
        assert gate.bound == 4.0
        if ratio is None:
            assert gate.passed is None
            assert not gate.enforced
            assert verdict(gate.to_dict()) == "not comparable"
            assert "compiled by nequip-compile" in gate.note
        else:
            assert gate.passed
            assert ("weights" in gate.note) == (ratio == 5.0)

    def test_too_many_bits_in_a_checkpoint_fail(self):
        metrics = {**GOOD, "file_kind": "checkpoint", "weight_bytes": 300_000}
        gates = evaluate_gates(metrics, "gaq", {**FP32, "file_kind": "checkpoint", "weight_bytes": 1_000_000})
        assert failed_gates(gates) == ["file_size_ratio"]

    def test_gates_are_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            evaluate_gates(GOOD, "gaq", FP32)["lee"].passed = False  # type: ignore[misc]  # frozen


class TestTables:
    ROWS = (
        {"name": "FP32", "mae": 11.6, "bytes": 2_400_000, "ok": True},
        {"name": "w8|a16", "mae": 0.000123, "bytes": None, "ok": False},
    )

    def test_plain(self):
        text = format_table(self.ROWS, {"name": "model", "mae": "F MAE", "bytes": "bytes", "ok": "ok"})
        assert text == (
            "model      F MAE      bytes  ok\n"
            "------  --------  ---------  ---\n"
            "FP32        11.6  2,400,000  yes\n"
            "w8|a16  1.23e-04          -  no"
        )

    def test_markdown(self):
        assert markdown_table(self.ROWS, ["name", "mae"]) == (
            "| name | mae |\n| --- | ---: |\n| FP32 | 11.6 |\n| w8\\|a16 | 1.23e-04 |"
        )

    def test_digits_show_the_verdict(self):
        """Printed numbers compare as the numbers do: never "1.02 <= 1.02 FAIL"."""
        assert format_comparison(1.02004, 1.02, "<=") == ("1.02004", "1.02000")
        assert format_comparison(0.9, 1.0, "<") == ("0.9000", "1.000")
        assert format_comparison(math.nextafter(1.0, 2.0), 1.0, "<=")[0] == "1.0000000000000002"
        assert format_comparison(123456.0, 123455.9, "<=") == ("1.234560e+05", "1.234559e+05")
        assert format_comparison(None, 1.0, "<=") == ("not finite", "1.000")
        assert format_comparison(3, 0, "<=") == ("3", "0")
        rng = np.random.default_rng(0)
        for _ in range(3000):
            bound = float(10.0 ** rng.uniform(-8, 8))
            value = bound * (1.0 + float(rng.choice([-1, 0, 1]) * 10.0 ** rng.uniform(-17, 1)))
            for comparison, holds in COMPARE.items():
                texts = format_comparison(value, bound, comparison)
                printed = [float(text.replace(",", "")) for text in texts]
                assert holds(*printed) == holds(value, bound), (value, bound, comparison, texts)

    def test_only_what_was_measured_is_printed(self):
        gates = evaluate_gates({**GOOD, "force_mae_mev_per_angstrom": 10.2001, "nve": None}, "gaq", FP32)
        rows = {row["gate"]: row for row in gate_rows({name: gate.to_dict() for name, gate in gates.items()})}
        assert set(gates) - set(rows) == {"nve_drift", "nve_drift_against_reference"}
        row = rows["force_mae_ratio"]
        assert (row["value"], row["bound"], row["verdict"]) == ("1.02001", "<= 1.02000", "fail")
        assert [label for label, *_ in metric_rows({"file_bytes": 3, "force_mae_mev_per_angstrom": None})] == [
            "File size"
        ]

    def test_no_rows(self):
        assert format_table([], ["a", "b"]) == "a  b\n-  -"


class TestEnvironment:
    def test_versions(self):
        installed = versions()
        assert installed["numpy"] == np.__version__
        assert installed["python"].startswith("3.")
        assert {"torch", "ase"} <= set(installed)

    def test_hardware(self):
        machine = hardware()
        assert set(machine) == {"cpu", "instructions", "cores", "torch_threads", "gpu"}
        assert machine["cpu"]
        assert machine["cores"] >= 1

    def test_seconds_per_step_defeats_the_cache(self):
        class Counting(MorsePotential):
            calls = 0

            def calculate(self, *arguments, **options):
                Counting.calls += 1
                super().calculate(*arguments, **options)

        atoms = cluster()
        before = atoms.positions.copy()
        assert 0 < seconds_per_step(Counting(epsilon=2.0, r0=2.21, rho0=4.0), atoms, repeats=5, warmup=2) < 1
        assert Counting.calls == 7
        np.testing.assert_array_equal(atoms.positions, before)
        with pytest.raises(ValueError, match="repeats"):
            seconds_per_step(morse(), atoms, repeats=0)


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
            "left_out",
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

    def test_written_files(self, good_report, tmp_path):
        json_path, html_path = write_report(good_report, tmp_path / "deep" / "report")
        data = json.loads(json_path.read_text())
        assert set(data) == set(good_report) - {"figures"}
        assert data["model"]["file_bytes"] == 900
        assert data["gates"]["lee"] == good_report["gates"]["lee"]
        page = html_path.read_text()
        assert "http" not in page
        assert "<script" not in page
        assert page.count("<table>") == 2
        images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
        assert len(images) == 3
        assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
        assert page.count('class="pass">pass') == 11
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
        assert 'class="pass"' not in page

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

    def test_forces_that_vanish_pass_nothing(self, case):
        """Atoms out of each other's reach: a difference of zero to a force of zero is not measured."""
        subject, _ = case
        apart = [Atoms("P2", positions=[[0, 0, 0], [60.0 + n, 0, 0]]) for n in range(3)]
        report = measure_subject(subject("quantized.model", "gaq"), apart, subject("fp32.model"))
        assert report["gates"]["force_difference"]["passed"] is None
