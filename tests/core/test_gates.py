"""Gates: which numbers pass, by preset and by what was measured."""

from __future__ import annotations

import dataclasses
import math

import pytest
from reports import DIFFERENCE, FP32, GOOD

from gaq.checks.accuracy import LOWEST_FLOAT_ERROR
from gaq.reporting import BOUNDS, evaluate_gates, failed_gates, summary, unmeasured
from gaq.reporting.gates import NOTHING, passes_all, verdict


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

    def test_free_flight_is_not_measured(self):
        free = {"drift_mev_per_atom_per_ps": None, "standard_error": None, "drift_over_std_kinetic": None}
        gates = evaluate_gates({**GOOD, "nve": {**free, "stable": True}}, "gaq", {**FP32, "nve": free})
        for name in ("nve_drift", "nve_drift_against_reference"):
            assert gates[name].note == f"not measured: {NOTHING}"
        broken = evaluate_gates({**GOOD, "nve": {**free, "stable": False}}, "gaq", {**FP32, "nve": free})
        assert failed_gates(broken) == ["nve_drift"]

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
            (("compiled", "compiled"), 5.0),
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
            assert ("weights" in gate.note or "constants" in gate.note) == (ratio == 5.0)

    def test_too_many_bits_in_a_checkpoint_fail(self):
        metrics = {**GOOD, "file_kind": "checkpoint", "weight_bytes": 300_000}
        gates = evaluate_gates(metrics, "gaq", {**FP32, "file_kind": "checkpoint", "weight_bytes": 1_000_000})
        assert failed_gates(gates) == ["file_size_ratio"]

    def test_gates_are_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            evaluate_gates(GOOD, "gaq", FP32)["lee"].passed = False  # type: ignore[misc]  # frozen
