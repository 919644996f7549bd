"""Hides warnings of other packages that a user of this package cannot act on.

Deprecations are for developers: since 2.14 torch reports for each scripted module that ``torch.jit.script`` is
deprecated, and e3nn makes dozens of these modules. Commands hide all deprecations; library functions hide only the
known lines, and only while they build a model. Warnings of this package begin with ``gaq:`` and are never hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["KNOWN", "hidden_in_commands", "known_hidden"]

#: Message (a regular expression) and category of the warnings that MACE, NequIP and e3nn cause for every model.
KNOWN: tuple[tuple[str, type[Warning]], ...] = (
    (".*TorchScript type system", UserWarning),
    (".*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", UserWarning),
    (r".*torch\.jit", DeprecationWarning),
    (r".*torch\.jit", FutureWarning),
)


@contextmanager
def known_hidden() -> Iterator[None]:
    """Hide the warnings of `KNOWN`; leaving the context restores the filters."""
    with warnings.catch_warnings():
        for message, category in KNOWN:
            warnings.filterwarnings("ignore", message=message, category=category)
        yield


@contextmanager
def hidden_in_commands() -> Iterator[None]:
    """Hide the warnings of `KNOWN` and every deprecation. Also serves as decorator of a command's ``main``."""
    with known_hidden():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        # NequIP loads a checkpoint of averaged weights as if to train on; in a command nobody set a decay.
        warnings.filterwarnings("ignore", message="EMA decay parameter loaded from state dict", category=UserWarning)
        warnings.filterwarnings("default", message="gaq: ")
        yield
