"""Small MACE models, and runs of MACE's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trained
from mace_models import build_model, write_trained_model

if find_spec("mace") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import mace  # noqa: F401  (before e3nn: it sets the loading flag that e3nn 0.4.4 needs)

    pytest.register_assert_rewrite("mace_runs")
    from mace_runs import BASE, Run, execute, write_data

if TYPE_CHECKING:
    from ase import Atoms


def pytest_configure(config: pytest.Config) -> None:
    # e3nn 0.4.4 and TorchScript warn on every model that is built; none of it concerns this package.
    for line in (
        "ignore:.*TorchScript type system.*:UserWarning",
        "ignore:.*torch.jit.*:DeprecationWarning",
        "ignore:.*torch.jit.*:FutureWarning",
        "ignore:.*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.*:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def models() -> Any:
    from models import Models

    return Models(build_model)


@pytest.fixture(scope="session")
def float_model(models: Any) -> Callable[..., Any]:
    """``float_model(variant, dtype, seed=0)``: a fresh copy of a model with random weights."""
    get: Callable[..., Any] = models.float_model
    return get


@pytest.fixture(scope="session")
def quantized(models: Any) -> Callable[..., Any]:
    """``quantized(preset, variant, dtype, status, seed=0)``: a fresh copy of a calibrated model."""
    get: Callable[..., Any] = models.quantized
    return get


@pytest.fixture(scope="session")
def trained_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model trained on ethanol, as `mace_run_train` writes it; not to be written to."""
    return write_trained_model(tmp_path_factory.mktemp("trained") / "trained.model")


@pytest.fixture(scope="session")
def trained_frames() -> list[Atoms]:
    """Structures of the molecule that the trained model is for."""
    return trained.ethanol()


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python(code, *arguments, **environment)``: a fresh interpreter, output as text."""

    def run(code: str, *arguments: str, cwd: Any = None, **environment: str) -> subprocess.CompletedProcess[str]:
        keep = {k: v for k, v in os.environ.items() if k not in ("GAQ_QUANTIZATION", "TORCH_DEVICE_BACKEND_AUTOLOAD")}
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
            env={**keep, "OMP_NUM_THREADS": "1", **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """A function that trains in a temporary folder: settings as keywords, null removes one."""
    write_data(tmp_path)

    def run(environment: dict[str, str] | None = None, **changes: Any) -> Run:
        return execute(tmp_path, {**BASE, **changes}, **(environment or {}))

    return run


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without the key."""
    folder = tmp_path_factory.mktemp("stock")
    write_data(folder)
    run = execute(folder, BASE)
    assert run.code == 0, run.log[-3000:]
    return run
