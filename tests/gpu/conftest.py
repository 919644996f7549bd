"""The kernels for cards: on one where there is one, else through Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

REASON = None
if find_spec("triton") is None:
    REASON = "Triton is not installed"
elif not torch.cuda.is_available():
    # Triton asks for it as it is imported. No other test runs Triton's kernels without a card.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        REASON = "triton was imported before it was told to interpret: run `pytest tests/gpu` by itself"
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", autouse=True)
def _kernels_for_cards() -> Iterator[None]:
    if REASON is not None:
        pytest.skip(REASON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAQ_KERNELS", "triton")
        yield
