"""The GPU benchmark script from end to end, without a GPU."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def printed(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", *arguments]
    before = sorted(SCRIPT.parent.glob("results/*"))
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert sorted(SCRIPT.parent.glob("results/*")) == before
    return done.stdout


def table_of(text: str) -> dict[str, list[str]]:
    """Cells of each row of the printed table, by the first cell."""
    table = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in table}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mace") is None, reason="MACE is not installed")
def test_the_script_runs_without_a_gpu() -> None:
    cells = table_of(printed("--sizes", "3", "--without", "w8", "stock compiled"))
    for kind in ("stock eager", "engine fp32", "gaq"):
        assert float(cells[kind][1]) > 0.0
    assert cells["stock compiled"][1] == "left out"
    assert cells["cuEquivariance"][1] in ("not installed", "needs a card")
    assert any("contraction, backward" in kind for kind in cells)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nequip") is None, reason="NequIP is not installed")
def test_the_row_of_nequips_compiled_file_is_not_the_eager_model() -> None:
    text = printed("--framework", "nequip", "--without", "w8", "gaq", "engine fp32")
    rows = [ast.literal_eval(line) for line in text.splitlines() if line.startswith("{'kind'")]
    compiled = [row for row in rows if row["kind"] == "stock compiled"]
    assert [row["atoms"] for row in compiled] == [3, 6]
    differences = [row["largest_force_difference_to_stock_ev_per_angstrom"] for row in compiled]
    # Not zero: the compiled file sums in another order, the same code would not.
    assert 0.0 < max(differences) < 1e-3
