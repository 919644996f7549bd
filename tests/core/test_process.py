"""Process-wide state comes back, also where a call raises in the middle."""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

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


def run_threads(*functions: Callable[[], object]) -> None:
    """Run functions in a thread each; the first exception is raised here, and threads that wait for ever fail."""
    errors: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_threads_that_need_other_dtypes_take_turns() -> None:
    """Also where contexts are nested, and where code changes the dtype itself."""

    def rely_on(dtype: torch.dtype, other: torch.dtype) -> None:
        for _ in range(50):
            with process.default_dtype(dtype):
                time.sleep(0)
                assert torch.get_default_dtype() == dtype
                with process.default_dtype(other):
                    time.sleep(0)
                    assert torch.get_default_dtype() == other
                    with process.default_dtype(other):
                        assert torch.get_default_dtype() == other
                assert torch.get_default_dtype() == dtype

    def change() -> None:
        for _ in range(50):
            with process.dtype_restored(), process.alone():
                for dtype in (torch.float64, torch.float32, torch.float64):
                    torch.set_default_dtype(dtype)
                    time.sleep(0)
                    assert torch.get_default_dtype() == dtype
                    with process.default_dtype(torch.float32):
                        assert torch.get_default_dtype() == torch.float32
                    assert torch.get_default_dtype() == dtype

    first, second = torch.float32, torch.float64
    before = torch.get_default_dtype()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        run_threads(
            *(lambda: rely_on(first, second), lambda: rely_on(second, first)),
            *(lambda: rely_on(first, first), change, change),
        )
    finally:
        sys.setswitchinterval(interval)
    assert torch.get_default_dtype() == before


def test_threads_that_need_the_same_dtype_run_at_once() -> None:
    barrier = threading.Barrier(3)

    def run() -> None:
        with process.default_dtype(torch.float64):
            barrier.wait(10)

    run_threads(run, run, run)


def test_a_thread_that_must_be_alone_gets_its_turn() -> None:
    """Others that begin again and again do not keep it waiting."""
    done = threading.Event()

    def again_and_again() -> None:
        while not done.is_set():
            with process.default_dtype(torch.float64):
                time.sleep(0.002)

    def be_alone() -> None:
        time.sleep(0.05)
        try:
            with process.alone():
                pass
        finally:
            done.set()

    run_threads(again_and_again, again_and_again, again_and_again, be_alone)


def test_what_code_that_is_alone_sets_stays() -> None:
    before = torch.get_default_dtype()
    other = torch.float64 if before == torch.float32 else torch.float32
    with process.alone():
        torch.set_default_dtype(other)
    assert torch.get_default_dtype() == other
    with process.default_dtype(before), process.unchanged(), process.alone():
        torch.set_default_dtype(other)
    assert torch.get_default_dtype() == other


def test_the_last_of_several_threads_restores() -> None:
    events: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        events.append("set")
        yield
        events.append("restored")

    together = process.Together(context)
    barrier = threading.Barrier(2)

    def run() -> None:
        with together(), together():
            barrier.wait(10)
            assert events == ["set"]
            barrier.wait(10)

    run_threads(run, run)
    assert events == ["set", "restored"]
