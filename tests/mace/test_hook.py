"""The hook: a stock MACE learns `quantization` from torch's own import, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

PARSER = """
import torch
from mace.tools import build_default_arg_parser
parser = build_default_arg_parser()
import sys
"""


def parse(python: Callable[..., Any], *arguments: str, check: str = "", **environment: str) -> Any:
    code = PARSER + (
        "args = parser.parse_args(['--name', 'x', '--E0s', 'average', '--model', 'MACE', *sys.argv[1:]])\n"
        f"print('VALUE', repr(getattr(args, 'quantization', 'no such key')))\n{check}"
    )
    return python(code, *arguments, **environment)


def test_parser_knows_quantization(python: Callable[..., Any], tmp_path: Any) -> None:
    """One process for all that is accepted: starting one takes seconds."""
    (tmp_path / "preset.yml").write_text("name: y\nquantization: w4a16\n")
    (tmp_path / "mapping.yml").write_text(
        "name: y\nquantization:\n  preset: gaq\n  weights: {bits: 6}\n  overrides: {'readouts.*': null}\n"
    )
    (tmp_path / "null.yml").write_text("name: y\nquantization:\n")
    check = (
        "from gaq.config import parse_config\n"
        "base = ['--name', 'x', '--E0s', 'average']\n"
        "def get(*more): return parser.parse_args(base + list(more)).quantization\n"
        "assert get() is None\n"
        "assert get('--quantization', 'w8') == 'w8'\n"
        f"assert get('--config', {str(tmp_path / 'preset.yml')!r}) == 'w4a16'\n"
        f"assert get('--config', {str(tmp_path / 'null.yml')!r}) is None\n"
        f"config = parse_config(get('--config', {str(tmp_path / 'mapping.yml')!r}))\n"
        "assert config.weights.bits == 6 and config.overrides == {'readouts.*': None}\n"
        "assert '--quantization' in parser.format_help()\n"
        "from mace.cli import run_train\n"
        "assert 'gaq_mace' in run_train.get_params_options.__wrapped__.__globals__['__name__'] or "
        "run_train.get_params_options.__code__.co_filename.endswith('_patches.py')\n"
        "print('ALL')"
    )
    done = parse(python, "--quantization", "gaq", check=check)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "VALUE 'gaq'" in done.stdout
    assert "ALL" in done.stdout


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("w8a15", ("quantization", "w8a15", "not a preset")),
        ("{'weights': {'bitz': 8}}", ("quantization.weights.bitz", "unknown key", "Did you mean 'bits'?")),
    ],
)
def test_bad_values(python: Callable[..., Any], value: str, words: tuple[str, ...]) -> None:
    done = parse(python, "--quantization", value)
    assert done.returncode == 2
    assert "argument --quantization" in done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--enable_cueq", "True"), "cuEquivariance replaces the modules"),
        (("--lora", "True"), "LoRA"),
        (("--model", "BOTNet"), "does not support model: BOTNet"),
    ],
)
def test_refused_combinations(python: Callable[..., Any], arguments: tuple[str, ...], reason: str) -> None:
    done = parse(python, "--quantization", "gaq", *arguments)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_environment_variable(python: Callable[..., Any]) -> None:
    done = parse(python, GAQ_QUANTIZATION="w4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "VALUE 'w4'" in done.stdout
    done = parse(python, GAQ_QUANTIZATION="w5a5")
    assert done.returncode == 2
    assert "w5a5" in done.stderr


def test_switched_off_is_stock(python: Callable[..., Any]) -> None:
    done = parse(python, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "VALUE 'no such key'" in done.stdout
    done = parse(python, "--quantization", "gaq", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 2
    assert "unrecognized arguments: --quantization" in done.stderr


def test_late_installation(python: Callable[..., Any]) -> None:
    """With torch's autoload switched off, loading a model or asking for it installs the hook all the same."""
    code = (
        "import mace.tools, mace.cli.run_train\n"
        "from gaq_mace._patches import ensure_installed, is_installed\n"
        "assert not is_installed()\n"
        "ensure_installed(); ensure_installed()\n"
        "assert is_installed()\n"
        "parser = mace.tools.build_default_arg_parser()\n"
        "assert sum('--quantization' in a.option_strings for a in parser._actions) == 1\n"
        "assert mace.cli.run_train.get_params_options.__code__.co_filename.endswith('_patches.py')\n"
        "assert mace.cli.run_train.tools.train.__code__.co_filename.endswith('_patches.py')\n"
    )
    done = python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_broken_hook_does_not_break_torch(python: Callable[..., Any]) -> None:
    code = (
        "import sys\n"
        "import gaq_mace._autoload as autoload\n"
        "class Broken:\n"
        "    def __init__(self): raise RuntimeError('broken on purpose')\n"
        "autoload._Finder = Broken\n"
        "autoload.sys = type('S', (), {'meta_path': [], 'stderr': sys.stderr})\n"
        "import builtins\n"
        "before = builtins.isinstance\n"
        "autoload.isinstance = lambda *a: False\n"
        "import torch\n"
        "print(torch.ones(2).sum().item())\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "2.0"
    assert "the MACE hook could not be installed (broken on purpose)" in done.stderr


def test_importing_torch_imports_nothing_else(python: Callable[..., Any]) -> None:
    code = (
        "import sys, torch\n"
        "names = sorted(n for n in sys.modules if n.split('.')[0] in ('gaq', 'gaq_mace', 'mace', 'e3nn', 'ase'))\n"
        "print(*names)\n"
        "print(sum(type(f).__module__ == 'gaq_mace._autoload' for f in sys.meta_path))"
    )
    done = python(code)
    names, finders = done.stdout.strip().splitlines()
    assert names.split() == ["gaq_mace", "gaq_mace._autoload"]
    assert finders == "1"
    assert done.stderr == ""
