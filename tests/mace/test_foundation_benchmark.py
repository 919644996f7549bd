"""The table of foundation shapes, in small: one row by the functions that make it, and shapes that all build."""

from __future__ import annotations

import sys
from pathlib import Path

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest

import gaq

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import foundation
from foundation_shapes import SHAPES, build, cells


def test_row(tmp_path: Path) -> None:
    """A model of the shape with 4 channels on a cell of 8 atoms: what the row says is what the files are."""
    folder = tmp_path / "MP-0_medium"
    folder.mkdir()
    foundation.make("MP-0 medium", folder, 1, channels=4, side=2)
    config = {"preset": "gaq", "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
    model = gaq.quantize(gaq.load(folder / "float.model"), cells("MP-0 medium", 1, 2), config, progress=False)
    gaq.save(model, folder / "gaq.model")
    measured = foundation.measure(folder, repeats=1)
    assert measured["fused"]
    assert measured["bytes"] == (folder / "gaq.model").stat().st_size < measured["float_bytes"]
    assert 0 < measured["relative_force_difference"] < 0.05
    for kind in ("stock", "ours"):
        assert all(measured[f"{kind}_{part}"]["s"] > 0 for part in ("load", "first_call", "step"))
    row = {"shape": "MP-0 medium", "quantize": {"s": 1.0, "peak_gib": 0.5}, **measured}
    printed = foundation.table([row])
    assert "yes |" in printed
    assert f"{measured['speed_up']:.2f}x" in printed
    refused = {"shape": "OMOL", "quantize": {"s": 1.0, "peak_gib": 0.5}, "reason": "gaq: it says why"}
    assert "no: gaq: it says why" in foundation.table([refused])


def test_process_is_measured(tmp_path: Path) -> None:
    """The peak is that of this process alone."""
    ballast = np.ones(2**27)  # 1 GiB in this process
    script = "x = bytearray(300 * 2**20); x[::4096] = b'1' * len(x[::4096]); print('done'); raise SystemExit(3)"
    result = foundation.run([sys.executable, "-c", script], tmp_path / "log")
    assert result["exit_code"] == 3
    assert 0.29 < result["peak_gib"] < 0.4
    assert foundation.last_line(tmp_path / "log") == "done"
    del ballast


@pytest.mark.parametrize("name", ["MPA/OMAT medium", "OFF large", "MH-1", "OMOL"])
def test_shapes(name: str) -> None:
    assert len(cells(name, 1)[0]) == 64
    model = build(SHAPES[name], channels=2)
    elements = set(cells(name, 1)[0].numbers)
    assert elements <= {int(number) for number in model.atomic_numbers}
