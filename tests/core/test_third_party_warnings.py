"""Commands print no warning that their users can do nothing about, and leave a library user's filters alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest

from gaq import cli
from gaq.third_party_warnings import hidden_in_commands, known_hidden

# As torch 2.13 and 2.15 word them.
SCRIPT = "`torch.jit.script` is deprecated. Please switch to `torch.compile` or `torch.export`."
TYPES = "The TorchScript type system doesn't support instance-level annotations on empty non-base types in `__init__`."
OTHERS = (
    (SCRIPT, DeprecationWarning),
    (SCRIPT, FutureWarning),
    (SCRIPT.replace("script", "load"), FutureWarning),
    (TYPES, UserWarning),
)
NEWS = ("`torch.anything` is deprecated.", FutureWarning)
OURS = ("gaq: the key `x` is deprecated; write `y`.", FutureWarning)
ACTION = ("the disk is nearly full", UserWarning)


def shown(function: Callable[[], None]) -> list[str]:
    """Messages that reach the user when every warning is on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        function()
    return [str(warning.message) for warning in caught]


def announce() -> None:
    for message, category in (*OTHERS, NEWS, OURS, ACTION):
        warnings.warn(message, category, stacklevel=1)


def test_a_command_shows_what_can_be_acted_on() -> None:
    assert shown(hidden_in_commands()(announce)) == [OURS[0], ACTION[0]]


def test_a_function_hides_the_known_lines_only() -> None:
    assert shown(known_hidden()(announce)) == [NEWS[0], OURS[0], ACTION[0]]


def test_the_command_leaves_the_filters_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(warnings.filters)
    assert cli.main(["report", "no.model", "--data", "no.xyz", "-o", "out"]) == 2
    assert warnings.filters == before
    assert "no.model" in capsys.readouterr().err
