"""The home folder of a user, and what takes its place for one whom the system does not know."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gaq.caches import cached

__all__ = ["check_home", "home_or_stand_in", "temporary_folder"]

logger = logging.getLogger(__name__)


def _has_home() -> bool:
    """Whether HOME is set, or the system knows the user."""
    try:
        Path.home()
    except RuntimeError:
        return False
    return True


def check_home() -> None:
    """Refuse to import MACE or NequIP without a home: ASE and MACE look for files there when they are imported.

    Raises:
        OSError: saying what to set.
    """
    if not _has_home():
        raise OSError(
            "this user has no home (HOME is not set, and the system does not know the user), and ASE and MACE cannot "
            "be imported without one: set HOME to any folder."
        )


@contextmanager
def home_or_stand_in() -> Iterator[None]:
    """Let a folder in the system's temporary one be the home, within this context, of a user who has none.

    One line in the log says so.

    Raises:
        OSError: if that folder cannot be used.
    """
    if _has_home():
        yield
        return
    folder = temporary_folder()
    _say(folder)
    os.environ["HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("HOME", None)


@cached(most=1)
def _say(folder: Path) -> None:
    """Log the line, once in a process."""
    logger.warning(
        f"gaq: this user has no home (HOME is not set, and the system does not know the user): {folder} takes its "
        "place here. Other programs that import ASE or MACE need HOME."
    )


def temporary_folder() -> Path:
    """This user's folder in the system's temporary folder.

    Raises:
        OSError: if it cannot be made, or belongs to somebody else, whose files must not be used.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"gaq-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
        raise OSError(f"{folder} is not a folder of this user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{folder} can be written by others")
    return folder
