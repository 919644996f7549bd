"""Small MACE models with random weights, the same on every machine, and structures to run them on."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mace_models import build_model, diamond, few_bits, molecules

if find_spec("mace") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import mace  # noqa: F401  (before e3nn: it sets the loading flag that e3nn 0.4.4 needs)
    import torch

    pytest.register_assert_rewrite("mace_runs")
    from mace_runs import BASE, Run, execute, write_data

if TYPE_CHECKING:
    from ase import Atoms

ROOT = Path(__file__).parents[2]


def pytest_configure(config: pytest.Config) -> None:
    # e3nn 0.4.4 and TorchScript warn on every model that is built; none of it concerns this package.
    for line in (
        "ignore:.*TorchScript type system.*:UserWarning",
        "ignore:.*torch.jit.*:DeprecationWarning",
        "ignore:.*torch.jit.*:FutureWarning",
        "ignore:.*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.*:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def unchanged_globals() -> Iterator[None]:
    """MACE's calculator and commands set torch's default dtype; put it and the random state back."""
    dtype, state, threads = torch.get_default_dtype(), torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def structures() -> list[Atoms]:
    return molecules()


@pytest.fixture(scope="session")
def crystal() -> Atoms:
    return diamond()


@pytest.fixture(scope="session")
def float_model() -> Callable[..., Any]:
    """``float_model(variant, dtype)``: a fresh copy of a model with random weights."""
    made: dict[Any, Any] = {}

    def get(variant: str = "plain", dtype: Any = None, seed: int = 0) -> Any:
        key = (variant, dtype, seed)
        if key not in made:
            made[key] = build_model(variant, dtype, seed)
        return copy.deepcopy(made[key])

    return get


@pytest.fixture(scope="session")
def quantized(float_model: Callable[..., Any]) -> Callable[..., Any]:
    """``quantized(preset, variant, dtype, status)``: a fresh copy of a calibrated model."""
    import gaq

    made: dict[Any, Any] = {}

    def get(
        preset: str = "gaq", variant: str = "plain", dtype: Any = None, status: str = "converted", seed: int = 0
    ) -> Any:
        key = (preset, variant, dtype, seed)
        if key not in made:
            model = gaq.prepare(float_model(variant, dtype, seed), few_bits(preset))
            gaq.calibrate(model, [*molecules(), diamond()], progress=False)
            made[key] = model
        model = copy.deepcopy(made[key])
        return gaq.convert(model) if status == "converted" else model

    return get


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., Any]:
    """``evaluate(model, structures)``: energies (structures,) and forces, in float64 arrays."""
    import numpy as np

    from gaq_mace.evaluate import MACEPotential

    def get(model: Any, structures: Sequence[Atoms]) -> tuple[Any, Any]:
        energies, forces = MACEPotential(model)(structures)
        return np.asarray(energies, dtype=np.float64), np.concatenate(forces).astype(np.float64)

    return get


@pytest.fixture(scope="session")
def azobenzene() -> Path:
    """A trained float model; the test is skipped where it is not present."""
    path = ROOT / ".." / "shared" / "models" / "mace_azobenzene.model"
    if not path.is_file():
        pytest.skip("needs the trained azobenzene model")
    return path.resolve()


@pytest.fixture(scope="session")
def azobenzene_frames() -> list[Atoms]:
    """Structures of the molecule the trained model is for."""
    import ase.io

    path = ROOT / ".." / "shared" / "data" / "rmd17" / "azobenzene_test_01.xyz"
    if not path.is_file():
        pytest.skip("needs the azobenzene structures")
    return list(ase.io.read(path, index="::100"))


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
