"""Names and locks around a commit: one run at a time, and all files of an output change their names, or none."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..formats.errors import CheckpointError, NonFiniteError, PlanError, SinkError, UsageError
from ..formats.fileio import replace
from ..formats.source import Source
from ..formats.urls import is_url
from ..stages.writing import PART_SUFFIX

PREVIOUS_SUFFIX = ".previous"

_REFUSALS = (NonFiniteError, PlanError, UsageError)
"""What the same run would say again."""


class HalfwayError(SinkError):
    """Some files of an output have their names, others do not, and the system lets nobody change that now."""


_log = logging.getLogger(__name__)


def part(path: Path) -> Path:
    """Where a file is written before it has its name."""
    return path.with_name(path.name + PART_SUFFIX)


def previous(path: Path) -> Path:
    """Where the file that is replaced waits during a commit."""
    return path.with_name(path.name + PREVIOUS_SUFFIX)


@contextlib.contextmanager
def hold(paths: Sequence[Path]) -> Iterator[None]:
    """Keeps other runs out for the time of the block, by lock files that end with it; SinkError when one is inside."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.enter_context(_hold(path))
        yield


@contextlib.contextmanager
def _hold(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    taken = f"{path}: another run is writing this output; wait for it, or write somewhere else"
    try:
        if os.path.lexists(path) and (not stat.S_ISREG((status := path.lstat()).st_mode) or status.st_size > 4096):
            raise SinkError(f"{path}: stands where the lock of the output belongs and is none: move it away")
        lock = FileLock(path)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SinkError(taken) from error
    except NotImplementedError:
        _log.warning("%s: this file system has no locks; nothing keeps a second run out", path)
        yield
        return
    except OSError as error:
        raise SinkError(f"{path}: cannot lock the output: {error.strerror or error}") from error
    try:
        if not path.exists():  # removed by its last holder between our opening and locking it
            raise SinkError(taken)
        yield
        if os.name != "nt":
            path.unlink(missing_ok=True)  # while it is held, so that no lock of another run is removed
    except BaseException:
        if os.name != "nt":
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    finally:
        lock.release()
        if os.name == "nt":  # an open file cannot be removed there
            with contextlib.suppress(OSError):
                path.unlink()


def check_unchanged(source: Source) -> None:
    """CheckpointError when a file of the source is no longer what was opened: old and new bytes would be mixed."""
    for path, size, mtime in source.stamps:
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be looked at any more: {error.strerror or error}") from error
        if (status.st_size, status.st_mtime_ns) != (size, mtime):
            raise CheckpointError(
                f"{path} changed while it was converted (size {size} -> {status.st_size} bytes, "
                f"{'version' if is_url(path) else 'mtime'} {mtime} -> {status.st_mtime_ns}"
                f"{'' if is_url(path) else ' ns'}); nothing was written; convert again"
            )


def may_continue(error: BaseException, sources: Iterable[Source]) -> bool:
    """Whether what is finished helps a later run: the same one might go well, and its sources are what they were."""
    if isinstance(error, _REFUSALS):
        return False
    try:
        for source in sources:
            check_unchanged(source)
    except CheckpointError:
        return False
    return True


def exchange(paths: list[Path], stale: list[Path]) -> None:
    """Gives all parts their names in order and removes ``stale``; or puts back what was there, when one fails.

    HalfwayError when that fails, too.
    """
    if len(paths) == 1 and not stale:
        replace(part(paths[0]), paths[0])  # takes the place of an old file without a moment between
        return
    old = [path for path in [*reversed(paths), *stale] if os.path.lexists(path)]
    if kept := [previous(path) for path in old if os.path.lexists(previous(path))]:
        raise SinkError(f"{kept[0]}: appeared meanwhile and is not written over; nothing was changed; move it away")
    moved: list[Path] = []
    placed: list[Path] = []
    try:
        for path in old:
            replace(path, previous(path))
            moved.append(path)
        for path in paths:
            replace(part(path), path)
            placed.append(path)
    except BaseException as error:
        back = [(path, part(path)) for path in placed] + [(previous(path), path) for path in moved]
        if stuck := [at for at, to in back if not _moved(at, to)]:
            raise HalfwayError(f"{stuck[0]}: cannot be put back after: {error}") from error
        raise
    for path in moved:
        with contextlib.suppress(OSError):
            previous(path).unlink()


def _moved(at: Path, to: Path) -> bool:
    try:
        replace(at, to)
    except SinkError as error:
        _log.debug("%s", error)
        return False
    return True


def finish_exchange(paths: Sequence[Path], stale: Sequence[Path], overwrite: bool) -> None:
    """What ``exchange`` had begun when its process was killed: gives the remaining parts their names.

    Raises SinkError for a file that is neither there nor a part, and for one that somebody else put in its place.
    """
    for path in paths:
        if os.path.lexists(part(path)):
            if os.path.lexists(path) and not overwrite:
                raise SinkError(f"{path}: appeared after the conversion; move it away, or pass --overwrite")
            replace(part(path), path)
        elif not os.path.lexists(path):
            raise SinkError(
                f"{path}: is gone, and {part(path).name} too: the output of the earlier run is not whole; delete its "
                "journal to start over"
            )
    for path in stale:
        path.unlink()
