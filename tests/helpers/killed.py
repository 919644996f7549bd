"""Whole commands that are killed while they work: what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Killed", "kill"]

CODE = "import sys; from importlib import import_module as m; sys.exit(getattr(m(sys.argv.pop(1)), sys.argv.pop(1))())"
PATIENCE = 300.0


@dataclass(frozen=True)
class Killed:
    """What is left of a command.

    Attributes:
        code: its exit code; negative for a signal, 0 or 1 if it had ended before.
        beside: names in the folder of its output, which is also the one it was started in.
        temporary: names in its temporary folder.
    """

    code: int
    beside: list[str]
    temporary: list[str]


def kill(
    folder: Path,
    entry: tuple[str, str],
    arguments: Sequence[object],
    number: signal.Signals,
    moment: float | Callable[[Path], bool],
) -> Killed:
    """Start a command, send it a signal at a moment, and wait for its end.

    Args:
        folder: for its output and its temporary files, in the folders ``output`` and ``temporary``; made if missing.
        entry: module and function of the command.
        arguments: of the command.
        number: the signal.
        moment: seconds after the start, or a test of the temporary folder that is asked until it holds.
    """
    output, temporary = folder / "output", folder / "temporary"
    output.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CODE, *entry, *map(str, arguments)],
        cwd=output,
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    start = time.monotonic()
    while process.poll() is None and time.monotonic() - start < PATIENCE:
        if moment(temporary) if callable(moment) else time.monotonic() - start >= moment:
            process.send_signal(number)
            break
        time.sleep(0.002)
    code = process.wait(PATIENCE)
    return Killed(code, *(sorted(path.name for path in place.iterdir()) for place in (output, temporary)))
