"""The command ``gaq``: quantize, report, inspect, doctor; each has a module of its name with a function ``run``.

Exit codes: 0 done, 1 a gate failed, 2 bad input.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module

from gaq.cli import arguments as command_line
from gaq.third_party_warnings import hidden_in_commands

__all__ = ["main"]


@contextmanager
def _as_a_command() -> Iterator[None]:
    """Send logs to the terminal and set frameworks up within this context; leaving it restores the process."""
    from gaq.adapter import adapters
    from gaq.process import command_output, unchanged

    with ExitStack() as stack:
        stack.enter_context(command_output(logging.INFO))
        stack.enter_context(unchanged())
        for adapter in adapters().values():
            stack.enter_context(adapter.process_state())
        yield


@hidden_in_commands()
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command ``gaq``; returns the exit code."""
    arguments = command_line.parser().parse_args(argv)
    try:
        with _as_a_command():
            return int(import_module(f"gaq.cli.{arguments.command}").run(arguments))
    except (ValueError, TypeError, OSError) as error:
        print(f"gaq: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
