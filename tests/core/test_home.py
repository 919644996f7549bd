"""Users without a home: a stand-in within commands, one line elsewhere."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest

from gaq import home
from gaq.home import check_home, home_or_stand_in


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user whom the system does not know, with HOME not set."""
    of_the_system = Path.home

    def known() -> Path:
        if "HOME" not in os.environ:
            raise RuntimeError("Could not determine home directory.")
        return of_the_system()

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(Path, "home", known)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("nobody")
def test_a_stand_in_for_the_length_of_a_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def leave() -> None:
        with home_or_stand_in():
            assert Path.home().parent == tmp_path
            assert Path.home().stat().st_mode & 0o077 == 0
            raise KeyboardInterrupt

    home._say.cache_clear()  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        leave()
    assert "HOME" not in os.environ
    (line,) = (record.message for record in caplog.records if record.levelno >= logging.WARNING)
    assert line.startswith("gaq: this user has no home")


@pytest.mark.usefixtures("nobody")
def test_from_python_one_line_says_what_to_set() -> None:
    with pytest.raises(OSError, match=r"this user has no home .* set HOME to any folder"):
        check_home()


def test_a_home_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with home_or_stand_in():
        assert Path.home() == tmp_path
    assert os.environ["HOME"] == str(tmp_path)
    assert not caplog.records
