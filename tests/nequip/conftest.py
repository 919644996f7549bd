"""Small NequIP and Allegro models, and runs of NequIP's commands."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import nequip_runs
import pytest
from nequip_models import build_model, with_key
from nequip_runs import Run

if find_spec("nequip") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "ignore:.*TorchScript type system.*:UserWarning",
        "ignore:.*torch.jit.*:DeprecationWarning",
        "ignore:.*torch.jit.*:FutureWarning",
        "ignore:Found `per_type_energy.*:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def nequip_globals() -> Iterator[None]:
    """NequIP's own settings, float64 as torch's default among them, for the tests below this folder only."""
    from nequip.utils.global_state import set_global_state

    before = torch.get_default_dtype()
    set_global_state()
    torch.set_default_dtype(torch.float64)  # NequIP does it once only, which may have been for other tests
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def models() -> Any:
    from models import Models

    return Models(build_model, "float32")


@pytest.fixture(scope="session")
def float_model(models: Any) -> Callable[..., Any]:
    """``float_model(variant, dtype)``: a fresh copy of a model with random weights."""
    get: Callable[..., Any] = models.float_model
    return get


@pytest.fixture(scope="session")
def quantized(models: Any) -> Callable[..., Any]:
    """``quantized(preset, variant, dtype, status)``: a fresh copy of a calibrated model."""
    from gaq_nequip.freeze import freeze

    def get(preset: str = "gaq", variant: str = "plain", dtype: str = "float32", status: str = "converted") -> Any:
        model = models.quantized(preset, variant, dtype, status)
        return freeze(model) if status == "frozen" else model

    return get


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``command(name, *arguments, cwd=...)``: a console script of this environment, output as text."""
    return nequip_runs.command


@pytest.fixture(scope="session")
def train() -> Callable[..., Run]:
    """``train(folder, changes, *overrides)``: stock `nequip-train` on a tiny data set, in a folder of its own."""
    return nequip_runs.train


@pytest.fixture(scope="session")
def trained(train: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with ``quantization: gaq`` whose checkpoint other tests package and compile; not to be written to."""
    run = train(tmp_path_factory.mktemp("trained"), with_key("gaq"))
    assert run.code == 0, run.text
    return run


@pytest.fixture(scope="session")
def trained_float(train: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run in float."""
    run = train(tmp_path_factory.mktemp("float"))
    assert run.code == 0, run.text
    return run
