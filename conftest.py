"""What has to be said before anything imports torch or Triton, and torch's default dtype."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Tests run in as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from gaq import settings

if not torch.cuda.is_available():
    # Without a card Triton's kernels run through its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

TESTS = Path(__file__).parent / "tests"


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
