"""Process-wide state comes back, also where a call raises in the middle."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from process_state import differing, state

from gaq import process


class Stop(Exception):
    pass


def change_all() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 (its state)
    os.environ["ANOTHER"] = "1"
    os.environ["PATH"] = "changed"
    os.environ.pop("HOME", None)
    sys.argv.append("another")
    raise Stop


def change_output() -> None:
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger().setLevel(1)
    logging.disable(50)
    warnings.simplefilter("ignore")
    raise Stop


def change_nothing() -> None:
    assert torch.get_default_dtype() == torch.float64
    raise Stop


@pytest.mark.parametrize(
    ("context", "change"),
    [
        (process.default_dtype(torch.float64), change_nothing),
        (process.unchanged(), change_all),
        (process.command_output(logging.WARNING), change_output),
    ],
)
def test_contexts_that_raise(context: AbstractContextManager[None], change: Callable[[], None]) -> None:
    before = state()
    with pytest.raises(Stop), context:
        change()
    assert not differing(before, state())


def test_what_a_command_says() -> None:
    with process.command_output(logging.WARNING):
        assert not logging.getLogger("gaq").isEnabledFor(logging.INFO)
        assert logging.getLogger("gaq").isEnabledFor(logging.WARNING)
