"""Warnings of other packages that the user of a command, or the caller of a function here, can do nothing about.

Deprecations speak to developers: torch announces since 2.14 that ``torch.jit.script`` is deprecated, once a scripted
module, which e3nn makes dozens of. Commands hide them all; library functions hide only the known lines, and only while
they build a model. Warnings of this package begin with ``gaq:`` and are never hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["KNOWN", "hidden_in_commands", "known_hidden"]

#: Message (a regular expression) and category of the lines that MACE, NequIP and e3nn cause with every model they make.
KNOWN: tuple[tuple[str, type[Warning]], ...] = (
    (".*TorchScript type system", UserWarning),
    (".*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", UserWarning),
    (r".*torch\.jit", DeprecationWarning),
    (r".*torch\.jit", FutureWarning),
)


@contextmanager
def known_hidden() -> Iterator[None]:
    """Hide the lines of `KNOWN`; the filters are as before when the block is left."""
    with warnings.catch_warnings():
        for message, category in KNOWN:
            warnings.filterwarnings("ignore", message=message, category=category)
        yield


@contextmanager
def hidden_in_commands() -> Iterator[None]:
    """Hide the lines of `KNOWN` and every deprecation, whoever raises it. Also a decorator of a command's ``main``."""
    with known_hidden():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("default", message="gaq: ")
        yield
