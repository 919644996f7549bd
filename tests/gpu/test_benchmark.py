"""The benchmark script for cards from end to end, without one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mace") is None, reason="MACE is not installed")
def test_the_script_runs_without_a_card() -> None:
    left_out = ["--without", "w8", "stock compiled"]
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--sizes", "3", *left_out]
    before = sorted(SCRIPT.parent.glob("results/*"))
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    table = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    cells = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in table}
    for kind in ("stock eager", "engine fp32", "gaq"):
        assert float(cells[kind][1]) > 0.0
    assert cells["stock compiled"][1] == "left out"
    assert cells["cuEquivariance"][1] in ("not installed", "needs a card")
    assert any("contraction, backward" in kind for kind in cells)
    assert sorted(SCRIPT.parent.glob("results/*")) == before
