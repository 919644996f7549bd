"""What has to be said before anything imports torch or Triton, what every test finds and leaves, and the frameworks."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Tests run in as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from gaq import settings

if not torch.cuda.is_available():
    # Without a GPU Triton's kernels run through its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

pytest.register_assert_rewrite("physics")
TESTS = Path(__file__).parent / "tests"
FRAMEWORKS = {"MACE": "mace", "NequIP": "nequip", "Allegro": "allegro"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which frameworks were not tested: their tests are not collected, and so not among the skipped ones."""
    absent = [name for name, module in FRAMEWORKS.items() if find_spec(module) is None]
    for name in absent:
        extra = FRAMEWORKS[name]
        terminalreporter.write_line(
            f"NOT TESTED: {name} is not installed here (pip install '.[{extra},dev]')", yellow=True
        )


@pytest.fixture(scope="module", autouse=True)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    """NequIP makes float64 torch's default, once in a process; what does without it is tested as in a process of its
    own."""
    here: Path = request.path
    if here.parent not in (TESTS / "core", TESTS / "gpu") or here.name == "test_nequip_fused.py":
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def setting() -> Iterator[Callable[..., Any]]:
    """``setting(skin=0.5)``: settings of the package until the test is over."""
    with ExitStack() as stack:
        yield lambda **values: stack.enter_context(settings.override(**values))


@pytest.fixture(autouse=True)
def unchanged_globals() -> Iterator[None]:
    """One thread; and the default dtype and the random state, which commands and calculators set, as they were."""
    dtype, state, threads = torch.get_default_dtype(), torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def structures() -> list[Any]:
    """Four small molecules."""
    from small import molecules

    return molecules()


@pytest.fixture(scope="session")
def crystal() -> Any:
    """A cell smaller than the cutoff."""
    from small import diamond

    return diamond()


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., Any]:
    """``evaluate(model, structures)``: energies (structures,) and forces, in float64 arrays."""
    from models import evaluate

    return evaluate
