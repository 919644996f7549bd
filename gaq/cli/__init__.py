"""The command ``gaq``: quantize, report, inspect, doctor; each has a module of its name with a function ``run``.

`gaq.cli.frame` has what surrounds the work of every command, `gaq.cli.arguments` its arguments, `gaq.cli.inputs` the
checks of what the user gave.

Exit codes: 0 done, 1 a gate failed, 2 bad input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module

from gaq import __version__
from gaq.cli import arguments as command_line
from gaq.cli import frame
from gaq.untyped import Document

__all__ = ["main"]


@contextmanager
def _as_a_command() -> Iterator[None]:
    """Send logs to the terminal and set frameworks up within this context; leaving it restores the process."""
    from gaq.adapter import adapters
    from gaq.process import command_output, unchanged
    from gaq.progress import explained

    with ExitStack() as stack:
        stack.enter_context(command_output(logging.INFO))
        stack.enter_context(unchanged())
        with explained("importing MACE or NequIP; from a network drive the first time takes long", after=10.0):
            installed = adapters().values()
        for adapter in installed:
            stack.enter_context(adapter.process_state())
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command ``gaq``; returns the exit code."""
    arguments = command_line.parser().parse_args(argv)

    def work() -> tuple[int, Document]:
        with _as_a_command():
            code, result = import_module(f"gaq.cli.{arguments.command}").run(arguments)
        return code, {"gaq": __version__, **result}

    return frame.run("gaq", work, arguments.json)
