"""Files that are whole or absent, however the process that writes them ends.

They are written in the system's temporary folder and take their names when they are finished. A process that is killed
at its work leaves nothing beside the output. From another file system a finished file is copied first, under a name
that ends in ``.part``: what a process leaves that is killed in these milliseconds goes when the output is next written.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["let_others_read", "put", "written_whole"]

STALE = 3600.0
"""Age in seconds from which on nobody is still copying."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Path at which a file is to be written; where the context ends without an exception, it becomes `path`.

    Both have the same name, because some writers go by its end. Other files in the same folder are dropped.

    Raises:
        OSError: if `path` cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="gaq-") as folder:
        part = Path(folder) / path.name
        yield part
        put(part, path)


def put(finished: Path, path: Path) -> None:
    """Move a finished file to its place at once, with its permissions; a file that is there is replaced.

    Raises:
        OSError: if `path` cannot be written.
    """
    _drop_stale(path)
    try:
        os.replace(finished, path)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        shutil.copy(finished, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def let_others_read(path: Path) -> None:
    """Give a file the permissions of any new file of this process; safetensors writes files for the owner alone.

    To ask for the process's umask would be to change it for a moment.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as own:
        probe = Path(own) / "probe"
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))


def _drop_stale(path: Path) -> None:
    """Drop what killed processes left of copies to `path`."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        if time.time() - left.stat().st_mtime > STALE:
            left.unlink(missing_ok=True)
