"""Process-wide state, and contexts that restore it even if a call raises.

Threads share that state. Those that need the same default dtype run at once, and others take turns (`default_dtype`,
`alone`); what several threads need at once is set by the first and restored by the last (`Together`).

The only lasting changes of this package are those that its hooks install when a framework is imported (see
`gaq_mace.hook.patches` and `gaq_nequip.hook.patches`).
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import numpy as np
import torch

from gaq.third_party_warnings import hidden_in_commands

__all__ = ["Together", "alone", "check_device", "command_output", "default_dtype", "dtype_restored", "unchanged"]


Need = torch.dtype | None
"""Default dtype on which a thread relies; None where it has to be the only one."""


class _Turns:
    """Which threads rely on torch's default dtype, and on which: it is the same for the whole process.

    Threads that wait do so in the order in which they came, and rely on nothing meanwhile: an outer context begins
    again when the inner one ends. So they cannot wait for each other in a circle.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._needs: dict[int, Need] = {}
        self._queue: list[list[Need]] = []
        # The default dtype while no thread relies on one; None while that is so.
        self._process_dtype: Need = None
        # Contexts of `restored` that have not ended, and the default dtype that all of them restore.
        self._restoring, self._restored = 0, torch.get_default_dtype()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore, on exit, the default dtype of this thread's context, or where it relies on none, of the process.

        Between a change in one thread and its end there, another may come: it restores what the first one found.
        """
        inside = threading.get_ident() in self._needs
        with self._changed:
            dtype = torch.get_default_dtype() if inside or self._process_dtype is None else self._process_dtype
            if not inside:
                if self._restoring < 1:
                    self._restoring, self._restored = 0, dtype
                self._restoring += 1
                dtype = self._restored
        try:
            yield
        finally:
            if threading.get_ident() in self._needs:
                torch.set_default_dtype(dtype)
            else:
                with self.turn(None):
                    torch.set_default_dtype(dtype)
            if not inside:
                with self._changed:
                    self._restoring -= 1

    @contextmanager
    def turn(self, need: Need) -> Iterator[None]:
        """Wait until all other threads that rely on a default dtype rely on this one; None: until there are none."""
        thread = threading.get_ident()
        outer = [self._needs[thread]] if thread in self._needs else []
        if outer in ([None], [need]):
            before = torch.get_default_dtype()
            if need is not None:
                torch.set_default_dtype(need)
            try:
                yield
            finally:
                if need is not None:
                    torch.set_default_dtype(before)
            return
        self._end(thread)
        self._begin(thread, need)
        try:
            yield
        finally:
            self._end(thread)
            for earlier in outer:
                self._begin(thread, earlier)

    def _begin(self, thread: int, need: Need) -> None:
        place = [need]

        def is_next() -> bool:
            earlier = self._queue[: next(i for i, other in enumerate(self._queue) if other is place)]
            others = [*self._needs.values(), *(other[0] for other in earlier)]
            return all(need is not None and other == need for other in others)

        with self._changed:
            self._queue.append(place)
            try:
                self._changed.wait_for(is_next)
            finally:
                self._queue[:] = [other for other in self._queue if other is not place]
                self._changed.notify_all()
            if not self._needs:
                self._process_dtype = torch.get_default_dtype()
            self._needs[thread] = need
            if need is not None:
                torch.set_default_dtype(need)

    def _end(self, thread: int) -> None:
        with self._changed:
            if thread not in self._needs:
                return
            need = self._needs.pop(thread)
            if not self._needs:
                if need is not None and self._process_dtype is not None:
                    torch.set_default_dtype(self._process_dtype)
                self._process_dtype = None
            self._changed.notify_all()


_turns = _Turns()
if hasattr(os, "register_at_fork"):
    # The threads of the parent do not exist in its child.
    os.register_at_fork(after_in_child=_turns.__init__)  # type: ignore[misc]  # again, on purpose


def check_device(device: str) -> None:
    """Refuse a device on which nothing can be computed here.

    Raises:
        ValueError: if torch does not know the device, or finds none of its kind or number.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known to torch; use cpu or cuda.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this torch finds no CUDA device; use cpu.")
    try:
        usable = bool(torch.zeros(1, device=device).cpu() == 0)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r}: nothing can be computed on it here ({reason}); use cpu.") from error
    assert usable


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make `dtype` torch's default dtype within this context. Threads that need another one wait."""
    with _turns.turn(dtype):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Context of code that changes torch's default dtype itself: no other thread relies on one. The change stays."""
    with _turns.turn(None):
        yield


@contextmanager
def dtype_restored() -> Iterator[None]:
    """Restore torch's default dtype on exit; other threads do not wait in between."""
    with _turns.restored():
        yield


class Together:
    """A context that is entered once for all threads that are in it: by the first, and left by the last.

    Args:
        make: makes the context.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make, self._lock, self._inside, self._stack = make, threading.RLock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._stack.enter_context(self._make())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._stack.close()


@contextmanager
def unchanged() -> Iterator[None]:
    """Restore, on exit, torch's default dtype and threads, random states, environment, sys.argv and logging.

    Of logging, the root's level and handlers are restored: frameworks add handlers when their commands are imported.
    """
    root = logging.getLogger()
    disabled, level, handlers = root.manager.disable, root.level, list(root.handlers)
    threads = torch.get_num_threads()
    environment, arguments = dict(os.environ), list(sys.argv)
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002 (its state)
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with _turns.restored():
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
        sys.argv[:] = arguments
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        if device_states:
            torch.cuda.set_rng_state_all(device_states)


@contextmanager
def _terminated_by_an_exception() -> Iterator[None]:
    """Let SIGTERM, by which schedulers end a job, leave contexts as Ctrl-C does, so that temporary files go."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextmanager
def command_output(level: int) -> Iterator[None]:
    """Send logs of `level` and above to the terminal within this context, without warnings of torch and e3nn.

    Their warnings about their own parts would hide the line that a user has to read.

    Args:
        level: a level of `logging`; messages below it are not logged at all.
    """
    root = logging.getLogger()
    disabled, root_level, handlers = root.manager.disable, root.level, list(root.handlers)
    with hidden_in_commands(), _terminated_by_an_exception():
        logging.basicConfig(level=level, format="%(message)s")
        logging.disable(level - 1)
        try:
            yield
        finally:
            logging.disable(disabled)
            root.setLevel(root_level)
            root.handlers[:] = handlers
