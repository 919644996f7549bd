"""Tables of reports, as text and as Markdown."""

from __future__ import annotations

import math

import numpy as np
from reports import FP32, GOOD

from gaq.reporting import evaluate_gates, format_table, gate_rows, markdown_table
from gaq.reporting.gates import COMPARE
from gaq.reporting.tables import format_comparison, metric_rows


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
