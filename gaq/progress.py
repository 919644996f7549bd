"""Progress of what takes long: a line that updates in a terminal, a line now and then in a file or a job's log.

tqdm counts and estimates. It writes its updating line into files too, ten times a second; there `Progress` writes
whole lines of its own, seldom.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

__all__ = ["LOG_INTERVAL", "SHOWN_AFTER", "Progress", "explained", "progress_over"]

SHOWN_AFTER = 2.0
"""Seconds from which on work is worth a line."""

LOG_INTERVAL = 30.0
"""Least seconds between two lines of progress in a file, whatever they are about."""

_FORMAT = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} elapsed, {remaining} left{postfix}"
_last_line = -LOG_INTERVAL

Item = TypeVar("Item")


class Progress:
    """Shows on stderr how much of some work is done, and how long the rest will take.

    Args:
        total: how many units there are.
        description: what is done.
        unit: what is counted, in the singular.
        shown: False for silence.
        stays: whether the line stays in the terminal when the work is over.
    """

    def __init__(
        self, total: int, description: str, unit: str = "step", shown: bool = True, stays: bool = True
    ) -> None:
        from tqdm.auto import tqdm

        self.total = total
        self.description = description
        self.unit = unit
        self._done = 0
        self._note = ""
        self._start = time.monotonic()
        live = shown and (sys.stderr.isatty() or any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__))
        self._writes_lines = shown and not live
        self._bar = (
            tqdm(total=total, desc=description, unit=unit, leave=stays, delay=SHOWN_AFTER, file=sys.stderr)
            if live
            else None
        )

    def advance(self, count: int = 1) -> None:
        """Count units that are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._writes_lines:
            self._write_line()

    def note(self, text: str) -> None:
        """Set what stands at the end of the line."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write_line(self) -> None:
        global _last_line
        from tqdm import tqdm

        now = time.monotonic()
        if now - self._start < SHOWN_AFTER or now - _last_line < LOG_INTERVAL or self._done >= self.total:
            return
        _last_line = now
        line = tqdm.format_meter(
            self._done,
            self.total,
            now - self._start,
            prefix=self.description,
            unit=self.unit + ("es" if self.unit.endswith("tch") else "s"),
            bar_format=_FORMAT,
            postfix=self._note or None,
        )
        print(line, file=sys.stderr, flush=True)


def progress_over(
    items: Iterable[Item], total: int, description: str, unit: str = "step", shown: bool = True
) -> Iterator[Item]:
    """Yield the items, and show a `Progress` that advances when the next one is asked for."""
    with Progress(total, description, unit, shown) as progress:
        for item in items:
            yield item
            progress.advance()


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def explained(
    text: str, shown: bool = True, after: float | None = None, say: Callable[[str], object] | None = None
) -> Iterator[None]:
    """Say in a line what is done that cannot be counted, if it takes long.

    Args:
        text: what is done, and why it takes long.
        shown: False for silence.
        after: seconds from which on it does; by default `SHOWN_AFTER`.
        say: takes the line, such as ``logger.info`` where no command is run; by default it goes to stderr.
    """
    timer = threading.Timer(SHOWN_AFTER if after is None else after, say or _print, (text,))
    timer.daemon = True
    if shown:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
