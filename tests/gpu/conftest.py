"""The GPU kernels: tested on a GPU if there is one, otherwise through Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from gaq import settings

# The frameworks are not installed together; a line at the end of a run says which one is missing.
collect_ignore = [
    name
    for name, framework in (("test_mace_engine.py", "mace"), ("test_nequip_fused.py", "nequip"))
    if find_spec(framework) is None
]
REASON = None
if find_spec("triton") is None:
    REASON = "Triton is not installed: pip install '.[gpu]'"
elif not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    REASON = "without a GPU Triton has to interpret: run pytest from the root of the repository"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", autouse=True)
def _gpu_kernels() -> Iterator[None]:
    if REASON is not None:
        pytest.skip(REASON)
    with settings.override(kernels="triton"):
        yield
