"""The hook: a stock MACE learns `quantization` from torch's own import, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Starting a process that imports MACE takes seconds, so each does as much as it can.
PARSER = """
import contextlib, io, os, sys
import torch
from mace.tools import build_default_arg_parser
parser = build_default_arg_parser()
BASE = ["--name", "x", "--E0s", "average", "--model", "MACE"]
def get(*more):
    return parser.parse_args(BASE + list(more)).quantization
def refused(*more):
    with contextlib.redirect_stderr(io.StringIO()) as text:
        try:
            parser.parse_args(BASE + list(more))
        except SystemExit as stop:
            assert stop.code == 2, stop.code
            return text.getvalue()
    raise AssertionError(f"not refused: {more}")
"""


@pytest.mark.smoke
def test_parser_knows_quantization(python: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "preset.yml").write_text("quantization: w4a16\n")
    (tmp_path / "null.yml").write_text("quantization:\n")
    (tmp_path / "mapping.yml").write_text(
        "quantization:\n  preset: gaq\n  weights: {bits: 6}\n  overrides: {'readouts.*': null}\n"
    )
    (tmp_path / "bad.yml").write_text("quantization:\n  weights: {bitz: 8}\n")
    code = f"""{PARSER}
os.chdir({str(tmp_path)!r})
assert get() is None
assert get("--quantization", "w8") == "w8"
assert get("--config", "preset.yml") == "w4a16"
assert get("--config", "null.yml") is None
from gaq.config.parse import parse_config
config = parse_config(get("--config", "mapping.yml"))
assert config.weights.bits == 6 and config.overrides == {{"readouts.*": None}}
assert "--quantization" in parser.format_help()

error = refused("--quantization", "w8a15")
assert "argument --quantization" in error and "'w8a15' is not a preset" in error, error
error = refused("--config", "bad.yml")
assert "quantization.weights.bitz: unknown key" in error and "Did you mean 'bits'?" in error, error
error = refused("--quantization", "{{'vectors': {{'direction_bits': 99}}}}")
assert "quantization.vectors.direction_bits: 99 bits cannot be stored" in error, error

for option, reason in (
    (("--enable_cueq", "True"), "cuEquivariance replaces the modules to be quantized"),
    (("--only_cueq", "True"), "cuEquivariance replaces the modules to be quantized"),
    (("--enable_oeq", "True"), "OpenEquivariance replaces the modules to be quantized"),
    (("--lora", "True"), "rounding the two parts of a LoRA layer is not rounding their sum"),
    (("--model", "BOTNet"), "quantization does not support model: BOTNet"),
):
    assert reason in refused("--quantization", "gaq", *option), option
    assert get(*option) is None, "without the key MACE keeps the option"

os.environ["GAQ_QUANTIZATION"] = "w4"
assert get() == "w4"
assert get("--quantization", "w8") == "w8", "the command line wins over the environment"
os.environ["GAQ_QUANTIZATION"] = "w5a5"
assert "w5a5" in refused()
del os.environ["GAQ_QUANTIZATION"]

from mace.cli import run_train
for function in (run_train.get_params_options, run_train.create_error_table, run_train.tools.train):
    assert function.__code__.co_filename.endswith("hook/patches.py"), function
print("ALL")
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("ALL\n")


def test_exit_code_of_the_command(python: Callable[..., Any]) -> None:
    """As a shell sees it: one usage error of argparse, no traceback, nothing started."""
    code = "import sys, torch\nsys.argv[0] = 'mace_run_train'\nfrom mace.cli.run_train import main\nmain()"
    done = python(code, "--name", "x", GAQ_QUANTIZATION="w8a15")
    assert done.returncode == 2
    assert "argument --quantization" in done.stderr
    assert "quantization: 'w8a15' is not a preset" in done.stderr
    assert "Traceback" not in done.stderr


def test_switched_off_is_stock(python: Callable[..., Any]) -> None:
    """With torch's autoload off MACE is the original, until the hook is asked for."""
    code = f"""{PARSER}
import mace.cli.run_train as run_train
assert not hasattr(parser.parse_args(BASE), "quantization")
assert "unrecognized arguments: --quantization" in refused("--quantization", "gaq")
assert not [name for name in sys.modules if name.split(".")[0].startswith("gaq")]
assert not [f for f in sys.meta_path if type(f).__module__.startswith("gaq")]
names = ("get_params_options", "create_error_table")
stock = {{name: getattr(run_train, name) for name in names}}
assert all(f.__module__.startswith("mace.") and not hasattr(f, "__wrapped__") for f in stock.values())

from gaq_mace.hook.patches import ensure_installed
from gaq_mace.hook.status import is_installed
assert not is_installed()
ensure_installed()
ensure_installed()
assert is_installed()
import mace.tools
parser = mace.tools.build_default_arg_parser()
assert sum("--quantization" in action.option_strings for action in parser._actions) == 1
assert get("--quantization", "gaq") == "gaq"
for name in names:
    assert getattr(run_train, name).__wrapped__ is stock[name], name
assert run_train.tools.train.__code__.co_filename.endswith("hook/patches.py")
print("ALL")
"""
    done = python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("ALL\n")


@pytest.mark.smoke
def test_a_broken_hook_does_not_break_torch(python: Callable[..., Any]) -> None:
    code = """
import gaq_mace.hook.autoload as autoload
class Broken:
    def __init__(self):
        raise RuntimeError("broken on purpose")
autoload._Finder = Broken
autoload.isinstance = lambda *arguments: False
import torch
print(torch.ones(2).sum().item())
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "2.0\n"
    assert "gaq: the MACE hook could not be installed (broken on purpose); use gaq_mace_train." in done.stderr


@pytest.mark.smoke
def test_importing_torch_imports_nothing_else(python: Callable[..., Any]) -> None:
    code = """
import sys, torch
print(*sorted(n for n in sys.modules if n.split(".")[0] in ("gaq", "gaq_mace", "mace", "e3nn", "ase")))
print(sum(type(finder).__module__ == "gaq_mace.hook.autoload" for finder in sys.meta_path))
"""
    done = python(code)
    assert done.stdout == "gaq_mace gaq_mace.hook gaq_mace.hook.autoload gaq_mace.names\n1\n"
    assert done.stderr == ""


MOVED = """
import sys
from gaq_mace.hook import patches
stock_apply = patches.apply
def apply(module):
    # As a later MACE might have it.
    if module.__name__ == "mace.tools.train":
        module.take_epoch = module.train_one_epoch
        del module.train_one_epoch
    stock_apply(module)
patches.apply = apply
"""
ADVICE = (
    "has moved what gaq patches: mace.tools.train.train_one_epoch is missing. "
    'Supported is mace-torch>=0.3.16,<0.4: pip install "mace-torch>=0.3.16,<0.4"'
)


@pytest.mark.slow
def test_moved_target_stops_the_key_only(python: Callable[..., Any]) -> None:
    """A MACE that has moved a function still imports and parses; the key and the doctor name the function."""
    code = f"""{MOVED}{PARSER}
from importlib.metadata import version
import mace.cli.run_train as run_train
assert run_train.tools.train.__module__ == "mace.tools.train", "a module is patched whole or not at all"
assert run_train.create_error_table.__code__.co_filename.endswith("hook/patches.py")
assert get() is None
error = refused("--quantization", "gaq")
assert "mace-torch " + version("mace-torch") in error and {ADVICE!r} in " ".join(error.split()), error
from gaq.cli import main
assert main(["doctor"]) == 0
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  mace training"))
    assert "NOT active" in line
    assert ADVICE in line


def _module(name: str, **functions: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(functions)
    return module


def _moved_modules() -> list[tuple[ModuleType, str]]:
    def renamed(args: Any, network: Any) -> None: ...

    def config(model: Any) -> None: ...

    class WithoutBatches:
        pass

    return [
        (
            _module("mace.tools.scripts_utils", get_params_options=renamed, extract_config_mace_model=config),
            "mace.tools.scripts_utils.get_params_options has no parameter model",
        ),
        (
            _module("mace.tools.scripts_utils", get_params_options=renamed),
            "mace.tools.scripts_utils.extract_config_mace_model is missing",
        ),
        (_module("mace.tools.tables_utils"), "mace.tools.tables_utils.create_error_table is missing"),
        (_module("mace.tools.arg_parser"), "mace.tools.arg_parser.build_default_arg_parser is missing"),
        (_module("mace.cli.run_train", run=3), "mace.cli.run_train.run is missing"),
        (_module("mace.modules.models"), "mace.modules.models.MACE.__setstate__ is missing"),
        (
            _module("mace.calculators.mace", MACECalculator=WithoutBatches),
            "mace.calculators.mace.MACECalculator._atoms_to_batch is missing",
        ),
    ]


@pytest.mark.parametrize(("module", "problem"), _moved_modules(), ids=lambda value: str(value)[-40:])
def test_a_module_without_its_target_stays_as_it_is(module: ModuleType, problem: str) -> None:
    from gaq_mace.hook import patches, targets

    before = dict(vars(module))
    patches.apply(module)
    assert vars(module) == before
    assert problem in targets.problems_in(module)
    assert problem in targets.advice(targets.problems_in(module))


def test_parameters_of_any_name_are_enough() -> None:
    from gaq_mace.hook import targets

    assert targets.problems_in(_module("mace.tools.tables_utils", create_error_table=lambda **options: None)) == []


def test_installed_mace_has_all_targets() -> None:
    """The patched modules as well: a replacement has the signature of its original."""
    from gaq_mace.hook import patches, targets
    from gaq_mace.names import TARGETS

    assert {target.module for target in targets.TARGETS} == set(TARGETS)
    assert targets.problems() == []
    patches.ensure_installed()
    assert targets.problems() == []


def test_training_without_the_parser_is_announced(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Where MACE's parser cannot be taught the key, the training command says so before MACE refuses the key."""
    import mace.cli.run_train as run_train
    import mace.tools.arg_parser as arg_parser

    from gaq_mace.hook import patches
    from gaq_mace.names import PATCHED

    monkeypatch.delattr(arg_parser, "build_default_arg_parser")
    monkeypatch.setattr(run_train, "run", run_train.run)
    monkeypatch.setattr(run_train, PATCHED, False, raising=False)
    patches.apply(run_train)
    error = capsys.readouterr().err
    assert "the key `quantization` is not known" in error
    assert "mace.tools.arg_parser.build_default_arg_parser is missing" in error


def test_supported_versions_are_those_of_the_package() -> None:
    from gaq_mace.hook.targets import SUPPORTED_MACE

    assert f'mace = ["{SUPPORTED_MACE}"]' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


@pytest.mark.slow
def test_a_failing_patch_does_not_break_mace(python: Callable[..., Any]) -> None:
    code = """
from gaq_mace.hook import patches
def broken(module):
    raise RuntimeError("broken on purpose")
patches._PATCHES["mace.tools.train"] = broken
import mace.tools
print(mace.tools.train.__module__)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("mace.tools.train\n")
    assert "gaq: mace.tools.train could not be patched (broken on purpose); see `gaq doctor`." in done.stderr
