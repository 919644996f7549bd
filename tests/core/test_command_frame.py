"""What all commands share: version, help, completion, streams, exit codes, checks of what the user gave."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gaq import __version__
from gaq.cli import frame, inputs, main
from gaq.cli.arguments import parser
from gaq.process import check_device

MISSING = {
    "mace": ("gaq_mace.commands", "create_lammps_model", "gaq_mace_create_lammps_model"),
    "nequip": ("gaq_nequip.deploy.cli", "main", "nequip-deploy"),
}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a call prints that ends by itself with exit code 0."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code
    return capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"gaq {__version__}\n"


@pytest.mark.parametrize("command", ["quantize", "report", "inspect", "doctor"])
def test_help_has_the_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(printed(capsys, command, "--help").split())
    assert "exit codes: 0 done;" in text
    assert "2 bad input" in text
    assert ("1 a gate failed" in text) == (command in ("quantize", "report"))
    assert "--json" in text


def test_completion_without_its_library(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", "bash"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "gaq: --print-completion needs shtab: pip install 'gaq[completion]'\n"


def test_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The library gets the parser, with the arguments that are paths marked as it documents."""
    files = {"bash": "_shtab_compgen_files"}

    def complete(made: Any, shell: str) -> str:
        (commands,) = (
            action for action in made._actions if hasattr(action, "choices") and "report" in (action.choices or ())
        )
        paths = [action.dest for action in commands.choices["report"]._actions if getattr(action, "complete", None)]
        return f"{shell}: {' '.join(paths)}"

    monkeypatch.setitem(sys.modules, "shtab", SimpleNamespace(complete=complete, FILE=files))
    assert printed(capsys, "--print-completion", "zsh") == "zsh: model data output reference\n"


def test_completion_by_shtab_itself(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="needs shtab: pip install '.[completion]'")
    script = printed(capsys, "--print-completion", "bash")
    for word in ("quantize", "--calibration", "_shtab_compgen_files"):
        assert word in script


@pytest.mark.parametrize("framework", [name for name in MISSING if find_spec(name) is None])
def test_commands_of_a_framework_that_is_not_here(framework: str) -> None:
    """One line, whatever the arguments, and no traceback of imports."""
    module, function, name = MISSING[framework]
    calls = [(module, function, name)]
    if framework == "mace":
        calls.append((module, "train", "gaq_mace_train"))
    for module, function, name in calls:
        for arguments in (["--help"], ["x"]):
            code = f"import sys; from {module} import {function}; sys.exit({function}())"
            done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
            assert done.returncode == 2, done.stderr
            assert done.stdout == ""
            (line,) = done.stderr.splitlines()
            assert line.startswith(f"{name}: ")
            assert f"is not installed here: pip install 'gaq[{framework}]'" in line


def test_units_on_a_stream_of_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)

    def work() -> tuple[int, dict[str, Any]]:
        print("0.15 meV/Å ± 2 µeV, 1 \u2013 2, 研")
        return 0, {}

    assert frame.run("gaq", work) == 0
    stream.flush()
    assert raw.getvalue() == b"0.15 meV/A +- 2 ueV, 1 - 2, ?\n"
    assert stream.errors == "strict"


def test_json_alone_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """Not what a framework prints, and numbers that JSON lacks are null."""

    def work() -> tuple[int, dict[str, Any]]:
        print("a framework says hello")
        return 1, {"value": float("nan"), "unit": "meV/Å", "path": (1, 2)}

    assert frame.run("gaq", work, as_json=True) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"value": None, "unit": "meV/Å", "path": [1, 2]}
    assert out.isascii()
    assert err == "a framework says hello\n"


def test_doctor_as_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gaq.cli", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert list(result) == ["gaq", "versions", "hardware", "adapters", "hooks", "settings", "kernels"]
    assert result["gaq"] == __version__
    assert set(result["adapters"]) == {"mace", "nequip"}
    assert set(result["kernels"]) == {"reference", "cpu", "cuda"}
    assert result["settings"]["GAQ_ENGINE"]["value"] == "1"


def test_a_reader_that_has_enough() -> None:
    """As in ``gaq inspect MODEL | head``: silence."""
    code = "from gaq.cli import frame; import sys; sys.exit(frame.run('gaq', lambda: (print('x' * 9999999), ({}))))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert error == ""


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> tuple[int, dict[str, Any]]:
        raise ValueError("wrong\n  in two lines")

    assert frame.run("gaq", work, as_json=True) == 2
    assert capsys.readouterr() == ("", "gaq: wrong in two lines\n")

    def stopped() -> tuple[int, dict[str, Any]]:
        raise KeyboardInterrupt

    assert frame.run("gaq", stopped) == 130
    assert capsys.readouterr().err == "gaq: stopped\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_numbers_that_would_switch_a_check_off(value: float) -> None:
    with pytest.raises(inputs.InputError, match=r"--tolerance \S+: give a force difference, a finite number"):
        inputs.number_of_at_least("--tolerance", value, 0.0, "a force difference")
    inputs.number_of_at_least("--tolerance", 0.0, 0.0, "a force difference")


def test_folders_in_which_nothing_can_be_written(tmp_path: Path) -> None:
    inputs.check_output_folder("--output", str(tmp_path / "new" / "deeper"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(inputs.InputError, match="is a file"):
            inputs.check_output_folder("--output", str(tmp_path / name))
    with pytest.raises(inputs.InputError, match=r"--output no/out\.model: the folder no does not exist"):
        inputs.checked_output("--output", "no/out.model", "in.model")
    if os.path.isdir("/proc/self"):  # where not even root can write
        for check in (
            lambda: inputs.checked_output("-o", "/proc/out.model", "in.model"),
            lambda: inputs.check_output_folder("-o", "/proc/out"),
        ):
            with pytest.raises(inputs.InputError, match="nothing can be written in the folder /proc"):
                check()


def test_devices() -> None:
    check_device("cpu")
    for device, words in (
        ("abacus", "not known to torch"),
        ("meta", "nothing can be computed"),
        ("cuda:99", "use cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            check_device(device)


def test_every_command_has_a_module() -> None:
    (commands,) = (action for action in parser()._actions if action.dest == "command")
    assert commands.choices is not None
    for name in commands.choices:
        assert find_spec(f"gaq.cli.{name}") is not None
