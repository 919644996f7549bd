"""Progress: a line that updates in a terminal, whole lines in a file, and those seldom."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gaq import progress
from gaq.progress import Progress, explained, progress_over
from gaq.reporting.watched import watched

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets: its only entry, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_last_line", -progress.LOG_INTERVAL)
    return now


def test_a_file_gets_a_line_every_half_minute_at_most(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Two bars of ten minutes, one after the other; two seconds pass before the first line."""
    for description in ("first", "second"):
        for _ in progress_over(range(1000), 1000, description, "frame"):
            clock[0] += 0.6
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert 2 * 600 / progress.LOG_INTERVAL - 2 <= len(lines) <= 2 * 600 / progress.LOG_INTERVAL
    assert "\r" not in error
    assert lines[0] == "first: 4 of 1000 frames, 00:02 elapsed, 09:57 left"
    assert lines[-1].startswith("second: ")


def test_what_is_over_within_two_seconds_is_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress_over(range(19), 19, "short"):
        clock[0] += 0.1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("unit", "units"), [("batch", "batches"), ("epoch", "epochs"), ("step", "steps")])
def test_plurals_and_the_end(clock: list[float], capsys: pytest.CaptureFixture[str], unit: str, units: str) -> None:
    """The last unit has no line of its own: nothing is left."""
    for _ in progress_over(range(2), 2, "inputs of layers", unit):
        clock[0] += 31
    assert capsys.readouterr().err == f"inputs of layers: 1 of 2 {units}, 00:31 elapsed, 00:31 left\n"


def test_silence(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress_over(range(10), 10, "long", shown=False):
        clock[0] += 60
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.05)
    with Progress(40, "steps of it") as shown:
        for count in range(40):
            time.sleep(0.01)
            shown.note(f"error {count}")
            shown.advance()
    text = terminal.getvalue()
    assert text.count("\n") == 1
    assert text.count("\r") > 2
    assert "steps of it: 100%" in text
    assert "error 39" in text
    assert "<00:00" in text  # the remaining time


def test_work_that_cannot_be_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.05)
    with explained("loading, which takes long the first time"):
        time.sleep(0.2)
    with explained("nothing"):
        pass
    with explained("nothing", shown=False):
        time.sleep(0.1)
    time.sleep(0.1)
    assert capsys.readouterr().err == "loading, which takes long the first time\n"


def test_watched_potentials_give_the_same(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    class Potential:
        """Energy and forces from positions; a minute a piece."""

        def __call__(self, structures: Any) -> Any:
            clock[0] += 60
            return np.array([s.positions.sum() for s in structures]), [2 * s.positions for s in structures]

    from ase import Atoms

    rng = np.random.default_rng(0)
    structures = [Atoms(f"H{n}", rng.normal(size=(n, 3))) for n in (300, 200, 100, 600, 1)]
    plain, shown = Potential(), watched(Potential(), "errors", shown=True)
    energies, forces = plain(structures)
    capsys.readouterr()
    shown_energies, shown_forces = shown(structures)
    np.testing.assert_array_equal(shown_energies, energies)
    for one, other in zip(shown_forces, forces, strict=True):
        np.testing.assert_array_equal(one, other)
    assert capsys.readouterr().err.startswith("errors: 2 of 5 structures, 01:00 elapsed, 01:30 left\n")
    np.testing.assert_array_equal(shown.energies(structures), energies)  # type: ignore[attr-defined]
    assert watched(plain, "errors", shown=False) is plain


def test_progress_is_shown_by_one_helper() -> None:
    """tqdm by itself writes ten lines a second into a file."""
    folders = ("gaq", "gaq_mace", "gaq_nequip", "examples", "benchmarks", "tests", "tools")
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "import tqdm" in path.read_text(encoding="utf-8")
    }
    assert users - {Path(__file__).relative_to(ROOT).as_posix()} == {"gaq/progress.py"}


def test_data_of_the_quickstart(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred frames at a second each, on springs in place of quantum chemistry."""
    from ase.calculators.calculator import Calculator, all_changes

    monkeypatch.syspath_prepend(ROOT / "examples")
    import xtb_dataset

    molecule = xtb_dataset.trans_azobenzene()
    home = molecule.positions.copy()

    class Springs(Calculator):
        implemented_properties = ("energy", "forces")

        def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
            super().calculate(atoms, properties, system_changes)
            clock[0] += 1.0 / xtb_dataset.STEPS_BETWEEN_FRAMES
            moved = atoms.positions - home
            self.results = {"energy": 50.0 * float((moved**2).sum()), "forces": -100.0 * moved}

    molecule.calc = Springs()
    with Progress(100, "GFN2-xTB dynamics", "frame") as shown:
        frames = xtb_dataset.sample(molecule, 90, np.random.default_rng(0), shown, warm_up=10)
    assert len(frames) == 90
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 4
    assert all(line.startswith("GFN2-xTB dynamics: ") and line.endswith(" left") for line in lines)
