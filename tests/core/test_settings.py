"""The variables ``GAQ_*``: every one has a place, a bad value is an error that helps, and they can be overridden."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError, fields
from importlib.util import find_spec
from pathlib import Path

import pytest
from nobody import as_nobody

from gaq import cli, settings
from gaq.settings import Settings, SettingsError

ROOT = Path(__file__).parents[2]
SOURCES = [path for package in ("gaq", "gaq_mace", "gaq_nequip") for path in (ROOT / package).rglob("*.py")]


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without our variables, not read yet."""
    for name in list(os.environ):
        if name.startswith("GAQ_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(settings, "_current", None)
    monkeypatch.setattr(settings, "_overridden", frozenset())
    return monkeypatch


def test_defaults() -> None:
    assert settings.read({}) == Settings()
    assert settings.read({"GAQ_SKIN": "", "GAQ_CACHE": "", "GAQ_LINEAR": ""}) == Settings()


def test_every_variable() -> None:
    environment = {
        "GAQ_CACHE": "/tmp/kernels",
        "GAQ_CUDA_GRAPHS": "20000",
        "GAQ_ENGINE": "0",
        "GAQ_KERNELS": "triton",
        "GAQ_LINEAR": "int8",
        "GAQ_QUANTIZATION": "w8",
        "GAQ_SKIN": "1.25",
    }
    assert set(environment) == {setting.variable for setting in settings.rows() if setting.problem is None}
    assert settings.read(environment) == Settings(
        cache=Path("/tmp/kernels"),
        cuda_graphs=20000,
        engine=False,
        kernels="triton",
        linear="int8",
        quantization="w8",
        skin=1.25,
    )


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("GAQ_CUDA_GRAPHS", "many", "a number of edges, or 0 to record no graphs"),
        ("GAQ_CUDA_GRAPHS", "-1", "a number of edges"),
        ("GAQ_ENGINE", "off", "1, or 0"),
        ("GAQ_KERNELS", "cuda", "auto, or triton"),
        ("GAQ_LINEAR", "int4", "int8, or float as if it were not set"),
        ("GAQ_SKIN", "wide", "a length in Å, such as 0.5"),
        ("GAQ_SKIN", "-1", "a length in Å"),
        ("GAQ_SKIN", "inf", "a length in Å"),
        ("GAQ_SKIN", "nan", "a length in Å"),
    ],
)
def test_bad_values(name: str, value: str, allowed: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}={value!r} .*{re.escape(allowed)}"):
        settings.read({name: value})


def test_they_are_read_once(unread: pytest.MonkeyPatch) -> None:
    unread.setenv("GAQ_SKIN", "0.5")
    assert settings.current().skin == 0.5
    unread.setenv("GAQ_SKIN", "wide")
    assert settings.current().skin == 0.5
    with pytest.raises(FrozenInstanceError):
        settings.current().skin = 1.0  # type: ignore[misc]  # frozen


def test_override(unread: pytest.MonkeyPatch) -> None:
    unread.setenv("GAQ_LINEAR", "int8")
    with settings.override(skin=0.0, engine=False) as changed:
        assert settings.current() is changed
        assert (changed.skin, changed.engine, changed.linear) == (0.0, False, "int8")
        with settings.override(skin=2.0):
            assert settings.current().skin == 2.0
        assert settings.current().skin == 0.0
    assert settings.current() == Settings(linear="int8")
    with pytest.raises(RuntimeError, match="stop"), settings.override(skin=0.0):
        raise RuntimeError("stop")
    assert settings.current() == Settings(linear="int8")
    with pytest.raises(SettingsError, match="GAQ_SKIN='-1'"), settings.override(skin=-1):
        pass
    with pytest.raises(TypeError, match="skn"), settings.override(skn=1):
        pass


def test_first_use_from_two_threads(unread: pytest.MonkeyPatch) -> None:
    received: list[Settings] = []
    threads = [threading.Thread(target=lambda: received.append(settings.current())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(received) == 8
    assert all(item is received[0] for item in received)


def test_unknown_variables(unread: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    unread.setenv("GAQ_SKINS", "1")
    with caplog.at_level(logging.WARNING):
        settings.current()
        settings.current()
    assert [record.message for record in caplog.records] == ["GAQ_SKINS: unknown, and ignored. Did you mean GAQ_SKIN?"]


def doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("GAQ_")}
    code = "import sys; from gaq.cli import main; sys.exit(main(['doctor']))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**keep, **environment}, capture_output=True, text=True, check=False)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    with settings.override(skin=0.25):
        assert cli.main(["doctor"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "GAQ_" in line}
    assert "0.25" in lines["GAQ_SKIN"]
    assert "set by the program" in lines["GAQ_SKIN"]


@pytest.mark.slow
def test_doctor_of_an_environment() -> None:
    done = doctor(GAQ_LINEAR="int8", GAQ_LINAER="int8")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip().startswith("GAQ_")}
    assert {setting.variable for setting in settings.rows()} | {"GAQ_LINAER"} == set(lines)
    assert "int8" in lines["GAQ_LINEAR"]
    assert "environment" in lines["GAQ_LINEAR"]
    assert "default" in lines["GAQ_ENGINE"]
    assert "unknown, and ignored. Did you mean GAQ_LINEAR?" in lines["GAQ_LINAER"]


@pytest.mark.slow
def test_doctor_of_a_user_without_a_home(tmp_path: Path) -> None:
    """ASE and MACE need one when they are imported: one line says so, and everything else is reported."""
    done = as_nobody(tmp_path, "gaq.cli:main", "doctor")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "home" in line)
    assert line.startswith("gaq: this user has no home")
    assert str(tmp_path / f"gaq-{os.getuid()}") in line
    assert "Traceback" not in done.stderr
    for name in ("mace", "nequip"):
        assert (re.search(rf"{name} +ready", done.stdout) is not None) == (find_spec(name) is not None)
    assert re.search("cpu +(ready|not here)", done.stdout)


def test_doctor_of_a_bad_value() -> None:
    done = doctor(GAQ_SKIN="wide")
    assert done.returncode == 2
    (line,) = (line for line in done.stdout.splitlines() if "GAQ_SKIN" in line)
    assert "wide" in line
    assert "not allowed; give a length in Å" in line
    assert done.stderr.splitlines()[-1].startswith("gaq: GAQ_SKIN='wide'")


def test_nothing_else_reads_them() -> None:
    """MACE's parser is told the name of one; all others are read here."""
    for path in SOURCES:
        text = path.read_text()
        if path.name != "settings.py":
            assert not re.search(r"(environ|getenv).*GAQ_", text), path


def test_the_documentation_lists_them() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    for setting in fields(Settings):
        assert f"`{setting.metadata['variable']}`" in text
