"""The script that tests other versions: what it takes from pyproject.toml, and what it says."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("tomllib", reason="the script runs with Python 3.11 or newer, whatever it tests")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import check_versions

    return check_versions


def test_ends_are_those_of_the_project_file(tool: Any) -> None:
    settings = {
        "requires-python": ">=3.10",
        "classifiers": ["Programming Language :: Python :: 3.9", "Programming Language :: Python :: 3.13"],
        "dependencies": ["torch>=2.5", "numpy", "ase>=3.23"],
        "optional-dependencies": {
            "mace": ["mace-torch>=0.3.16,<0.4"],
            "nequip": ["nequip>=0.19.1,<0.20", "torch>=2.8"],
            "allegro": ["nequip-allegro>=0.8.3,<0.9"],
            "report": ["matplotlib>=3.9"],
        },
    }
    assert tool.lowest_python(settings) == "3.10"
    assert tool.highest_python(settings) == "3.13"
    assert tool.floors(settings, "mace") == ["ase==3.23", "mace-torch==0.3.16", "matplotlib==3.9", "torch==2.5"]
    assert "torch==2.8" in tool.floors(settings, "nequip")
    assert tool.floors(tool.project(), "nequip")


def test_what_cannot_be_made_is_not_tested(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--python", "3.99", "--framework", "mace"]) == 3
    assert "there is no Python 3.99 here" in capsys.readouterr().out
    assert tool.main(["--python", "3.99", "--framework", "mace", "--allow-untested"]) == 0


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        ("ERROR: Cannot install a and b because these package versions have conflicting dependencies.", "Broken"),
        ("WARNING: Retrying (Retry(total=4)) after connection broken\nERROR: No matching distribution", "Untested"),
        (None, "Untested"),
    ],
)
def test_a_conflict_is_broken_and_a_failed_download_is_not(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str | None, error: str
) -> None:
    """None: pip did not end in time."""

    def run(command: Any, log: Path, deadline: float, **environment: str) -> int | None:
        log.write_text(printed or "")
        return None if printed is None else 1

    monkeypatch.setattr(tool, "run", run)
    with pytest.raises(getattr(tool, error)):
        tool.pip(tmp_path / "bin" / "python", ["torch"], tmp_path / "log", time.monotonic() + 9)


def test_failures_are_named(tool: Any, tmp_path: Path) -> None:
    """Tests that fail or hang, run by the interpreter of these tests."""
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert 1 == 2, 'one'\n")
    arguments = ["-n", "0", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={tmp_path}", str(tmp_path)]
    python = Path(sys.executable)
    outcome, note, failures = tool.test(python, arguments, tmp_path / "log.log", time.monotonic() + 100)
    assert outcome == "broken"
    assert note.startswith("1 passed, 1 failed, 0 skipped")
    assert "test_it.test_b" in failures[0]
    assert "one" in failures[0]
    (tmp_path / "test_it.py").write_text("import time\ndef test_c(): time.sleep(600)\n")
    outcome, note, _ = tool.test(python, arguments, tmp_path / "log.log", time.monotonic())
    assert (outcome, note) == ("not tested", "the tests did not end in time")
    row = tool.Result("newest", "mace", "3.13", {"torch": "2.15.0"}, "broken", "1 failed", failures)
    lines = tool.table([row]).splitlines()
    assert lines[0].split()[:3] == ["environment", "python", "torch"]
    assert "2.15.0" in lines[1]
    assert lines[2].startswith("newest, mace: ")
