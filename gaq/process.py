"""State that a whole process shares, and contexts that put it back, also where a call raises.

What this package changes for good is what its hooks install when a framework is imported (see `gaq_mace.hook.patches` and
`gaq_nequip.hook.patches`), and nothing else.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["command_output", "default_dtype", "unchanged"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within this context `dtype` is what torch makes new tensors of."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def unchanged() -> Iterator[None]:
    """Put back, afterwards: torch's default dtype and threads, random numbers, environment, sys.argv and logging.

    Of logging the root's level and handlers, to which hosts add theirs as their commands are imported.
    """
    root = logging.getLogger()
    disabled, level, handlers = root.manager.disable, root.level, list(root.handlers)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    environment, arguments = dict(os.environ), list(sys.argv)
    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (its state)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
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
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002
        torch.set_rng_state(tensor)
        if devices:
            torch.cuda.set_rng_state_all(devices)


@contextmanager
def command_output(level: int) -> Iterator[None]:
    """Within this context the logs of `level` and above go to the terminal, without what torch says about itself.

    Warnings of torch and e3nn about their own parts would bury the one line a user has to read.

    Args:
        level: of `logging`; what is below it is not logged at all.
    """
    root = logging.getLogger()
    disabled, own_level, handlers = root.manager.disable, root.level, list(root.handlers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TorchScript type system", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        logging.basicConfig(level=level, format="%(message)s")
        logging.disable(level - 1)
        try:
            yield
        finally:
            logging.disable(disabled)
            root.setLevel(own_level)
            root.handlers[:] = handlers
