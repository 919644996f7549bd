"""Process-wide state, and contexts that restore it even if a call raises.

The only lasting changes of this package are those that its hooks install when a framework is imported (see
`gaq_mace.hook.patches` and `gaq_nequip.hook.patches`).
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from gaq.third_party_warnings import hidden_in_commands

__all__ = ["check_device", "command_output", "default_dtype", "unchanged"]


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
    """Make `dtype` torch's default dtype within this context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def unchanged() -> Iterator[None]:
    """Restore, on exit, torch's default dtype and threads, random states, environment, sys.argv and logging.

    Of logging, the root's level and handlers are restored: frameworks add handlers when their commands are imported.
    """
    root = logging.getLogger()
    disabled, level, handlers = root.manager.disable, root.level, list(root.handlers)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    environment, arguments = dict(os.environ), list(sys.argv)
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002 (its state)
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
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
def command_output(level: int) -> Iterator[None]:
    """Send logs of `level` and above to the terminal within this context, without warnings of torch and e3nn.

    Their warnings about their own parts would hide the line that a user has to read.

    Args:
        level: a level of `logging`; messages below it are not logged at all.
    """
    root = logging.getLogger()
    disabled, root_level, handlers = root.manager.disable, root.level, list(root.handlers)
    with hidden_in_commands():
        logging.basicConfig(level=level, format="%(message)s")
        logging.disable(level - 1)
        try:
            yield
        finally:
            logging.disable(disabled)
            root.setLevel(root_level)
            root.handlers[:] = handlers
