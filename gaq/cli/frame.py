"""What every command of this package has around its work: streams, exit codes, one line for an error."""

from __future__ import annotations

import codecs
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib.util import find_spec

from gaq.home import home_or_stand_in
from gaq.third_party_warnings import hidden_in_commands
from gaq.untyped import Document

__all__ = ["DONE", "FAILED", "REFUSED", "STOPPED", "Work", "run", "without_framework"]

DONE, FAILED, REFUSED = 0, 1, 2
STOPPED, BROKEN_PIPE = 130, 141  # as shells report signals: 128 + SIGINT, 128 + SIGPIPE

Work = Callable[[], tuple[int, Document]]
"""What a command does; returns its exit code and its result as plain data."""

_ASCII = {"–": "-", "±": "+-", "×": "x", "²": "^2", "µ": "u", "‖": "|", "≤": "<=", "≥": ">="}  # noqa: RUF001


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Replace what a stream cannot encode by what looks like it; a handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = "".join(_ASCII.get(letter, letter) for letter in error.object[error.start : error.end])
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return plain.encode("ascii", "replace").decode("ascii"), error.end


codecs.register_error("gaq.ascii", _in_ascii)


@contextmanager
def _printable() -> Iterator[None]:
    """Let standard streams replace what they cannot encode within this context; units are in Å."""
    changed = []
    try:
        for stream in (sys.stdout, sys.stderr):
            errors = getattr(stream, "errors", None)
            if errors in ("strict", "backslashreplace") and hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="gaq.ascii")
                changed.append((stream, errors))
        yield
    finally:
        for stream, errors in changed:
            stream.reconfigure(errors=errors)


def run(name: str, work: Work, as_json: bool = False) -> int:
    """Run a command, print its error as one line, and return its exit code.

    Args:
        name: name of the command.
        work: what it does.
        as_json: print the result as JSON, and let nothing else come to stdout.
    """
    with hidden_in_commands(), _printable():
        try:
            with ExitStack() as stack:
                if as_json:
                    stack.enter_context(redirect_stdout(sys.stderr))
                stack.enter_context(home_or_stand_in())
                code, document = work()
            if as_json:
                from gaq.reporting.page import json_types

                print(json.dumps(json_types(document), indent=2, allow_nan=False))
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader, such as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return BROKEN_PIPE
        except (ValueError, TypeError, OSError) as error:
            print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
            return REFUSED
        except KeyboardInterrupt:
            print(f"{name}: stopped", file=sys.stderr)
            return STOPPED


def without_framework(name: str, framework: str) -> bool:
    """Print one line, and return True, if a command cannot run because its framework is not installed.

    Args:
        name: name of the command.
        framework: ``mace`` or ``nequip``.
    """
    from gaq.adapter import missing_framework

    if find_spec(framework) is not None:
        return False
    print(f"{name}: {missing_framework(framework)}", file=sys.stderr)
    return True
