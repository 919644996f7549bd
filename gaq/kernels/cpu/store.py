"""Folders of compiled kernels: which can be used, and how a finished library gets there whole.

A library lies in a folder of its own with its checksum, because a library that is cut off is not an error when it is
loaded but a bus error. The folder gets its name by one renaming, when it is complete. Where the cache folder cannot
be used (no permission, read-only, no programs may run from it, no home), one in the system's temporary folder
takes its place, and one line in the log says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from gaq import settings
from gaq.caches import cached
from gaq.home import temporary_folder
from gaq.progress import explained

__all__ = ["cache_folder", "folders", "obtain", "obtain_any", "writable_folder"]

logger = logging.getLogger(__name__)

Used = TypeVar("Used")

CHECKSUM = "sha256"
PART = ".part"
"""Suffix of folders that are not complete."""


def cache_folder() -> Path | None:
    """Folder in which compiled kernels should be kept; None for a user without a home."""
    chosen = settings.current().cache
    if chosen is not None:
        return chosen
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gaq"
    except RuntimeError:
        return None


def folders() -> Iterator[tuple[str, Callable[[], Path]]]:
    """Folders for compiled kernels in the order of preference: a name for messages, and a function that makes it."""

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    folder = cache_folder()
    if folder is not None:
        yield str(folder), lambda: make(folder)
    yield "the temporary folder", temporary_folder


def writable_folder(name: str) -> Path:
    """The first of the folders in which a subfolder can be written, and made; returns the subfolder.

    Raises:
        OSError: if there is none.
    """

    def make(folder: Path) -> Path:
        (folder / name).mkdir(exist_ok=True)
        _check_writable(folder / name)
        return folder / name

    return _first_usable(make)


def _check_writable(folder: Path) -> None:
    """Write into a folder: permissions alone do not tell whether one can.

    Raises:
        OSError: if it cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass


@cached(most=8)
def _say(message: str) -> None:
    """Log a message, once in a process."""
    logger.warning(message)


def _first_usable(use: Callable[[Path], Used]) -> Used:
    """Result of a function for the first folder for which it raises no OSError.

    Raises:
        OSError: if there is none; the message gives the reason of each.
    """
    problems = [] if cache_folder() is not None else ["this user has no home"]
    for name, make in folders():
        try:
            folder = make()
            result = use(folder)
        except OSError as error:
            problems.append(str(error) if name in str(error) else f"{name}: {error}")
            continue
        if problems:
            _say(
                f"gaq: compiled kernels are kept in {folder}, because the cache folder cannot be used "
                f"({'; '.join(problems)}). GAQ_CACHE names another."
            )
        return result
    raise OSError("; ".join(problems))


def obtain(name: str, file: str, build: Callable[[], Path], use: Callable[[Path], Used]) -> Used:
    """Use a library that is kept in one of the folders; where there is none, build it and keep it.

    Args:
        name: of the library's folder.
        file: name of the library's file.
        build: builds the library and returns its path. Called once at most.
        use: for example loads the library. Where it raises an OSError, the next folder is tried.

    Raises:
        OSError: if no folder can be used.
    """
    built: list[Path] = []

    def use_in(folder: Path) -> Used:
        place = folder / name
        if not _is_whole(place, file):
            _check_writable(folder)
            reason = f"compiling the C++ kernels into {folder}, once on this machine"
            with explained(reason, say=logger.info), _locked(folder):
                # Another process may have built it meanwhile.
                if not _is_whole(place, file):
                    if not built:
                        built.append(build())
                    _keep(built[0], place, file)
        return use(place / file)

    return _first_usable(use_in)


def obtain_any(prefix: str, file: str, use: Callable[[Path], Used]) -> Used:
    """Use any library whose name begins so; see `obtain`.

    Raises:
        OSError: if there is none.
    """

    def use_in(folder: Path) -> Used:
        for place in sorted(folder.glob(f"{prefix}-*")):
            if _is_whole(place, file):
                return use(place / file)
        raise FileNotFoundError(f"{folder} holds no library for this machine")

    return _first_usable(use_in)


def _is_whole(place: Path, file: str) -> bool:
    """Whether a library is there, complete and as it was written."""
    try:
        return (place / CHECKSUM).read_text() == _checksum(place / file)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time build libraries for a folder: the others would only compile the same.

    The lock ends with the process that holds it, however that ends.
    """
    with contextlib.ExitStack() as stack:
        # Some network file systems have no locks, and some systems no fcntl. Then each process builds its own library,
        # and the first one stays.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _keep(library: Path, place: Path, file: str) -> None:
    """Put a library into its place with its checksum; one that is there and damaged goes.

    Raises:
        OSError: if the folder cannot be written.
    """
    for left in place.parent.glob(f"*{PART}"):  # by processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    part = place.with_name(f"{place.name}-{os.getpid()}{PART}")
    part.mkdir()
    try:
        shutil.copyfile(library, part / file)
        (part / CHECKSUM).write_text(_checksum(part / file))
        if place.exists():
            logger.warning(f"gaq: {place} was damaged, and is built anew.")
            place.rename(part / "damaged")
            shutil.rmtree(part / "damaged", ignore_errors=True)
        part.rename(place)
    except OSError:
        # Without locks another process may have been first.
        if not _is_whole(place, file):
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
