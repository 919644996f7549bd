"""The tables of docs/physics.md hold what the result files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gaq.checks.uses import USES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/physics.md").read_text(encoding="utf-8")
RESULT: dict[str, Any] = json.loads((ROOT / "benchmarks/results/uses.json").read_text())


def rows(first: str, page: str = PAGE) -> dict[str, list[str]]:
    """Cells after the first of each row of the table whose heading begins with that word, by the first."""
    lines = page.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        table[cells[0]] = cells[1:]
    return table


def test_matrix() -> None:
    presets = ("w8", "gaq", "w4a16")
    expected = {entry["use"]: [entry[preset] for preset in presets] for entry in RESULT["good_for"]}
    assert rows("good for") == expected
    # README has the uses that are measured.
    measured = {use: cells for use, cells in expected.items() if "not measured" not in cells}
    assert rows("good for", (ROOT / "README.md").read_text(encoding="utf-8")) == measured


def test_each_system() -> None:
    found = rows("model")
    assert set(found) == {f"{row['system']} `{row['preset']}`" for row in RESULT["rows"]}
    for row in RESULT["rows"]:
        measures = row["measures"]
        values = [f"{measures['optimisation_steps']} ({measures['reference_optimisation_steps']})"]
        for name, scale, digits in (
            ("bond_length_change_angstrom", 1e3, 4),
            ("mean_frequency_shift_per_cm", 1, 2),
            ("worst_frequency_shift_per_cm", 1, 2),
            ("profile_error_mev", 1, 2),
        ):
            values.append(f"{scale * measures[name]:.{digits}f}")
        assert found[f"{row['system']} `{row['preset']}`"] == values


def test_uses_and_bounds() -> None:
    """The page has every use, and the result was judged by the present bounds."""
    assert list(rows("use")) == list(USES)
    for use, criteria in RESULT["criteria"].items():
        assert [(c["measure"], c["bound"]) for c in criteria] == [(c.measure, c.bound) for c in USES[use]]
    epochs, error = re.search(r"(\d+) epochs on EMT and has a force error of ([\d.]+) meV/Å", PAGE).groups()  # type: ignore[union-attr]
    training = RESULT["training_of_copper"]
    assert (int(epochs), error) == (training["epochs"], f"{training['force_mae_mev_per_angstrom']:.1f}")


def test_nanosecond() -> None:
    runs = json.loads((ROOT / "benchmarks/results/nanosecond.json").read_text())["rows"]
    found = rows("run")
    for run in (run for run in runs if run["system"] == "azobenzene"):
        drift = f"{run['drift_mev_per_atom_per_ps']:.5f} ± {run['standard_error']:.5f}"
        name = f"azobenzene `{run['preset']}`, seed {run['seed']}"
        assert found[name] == [f"{run['ps']:.0f}", drift, f"{run['temperature_k']:.1f}"]
