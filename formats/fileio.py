"""Positional I/O, sync, rename, sparse files and free space: the only module that knows operating systems apart.

Where ``os.preadv`` and ``os.pwrite`` exist, threads share one descriptor without a lock, because no call moves a file
position. Elsewhere (Windows), or with ``QUANTLOOM_PORTABLE_IO=1``, a lock and a seek give the same results. Reading
raises CheckpointError and writing SinkError, always with the path and the system's own reason.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Self

from .errors import CheckpointError, SinkError, because
from .urls import is_url

if TYPE_CHECKING:
    from types import TracebackType

    from .places import Place

PORTABLE = os.environ.get("QUANTLOOM_PORTABLE_IO") == "1" or not (hasattr(os, "preadv") and hasattr(os, "pwrite"))
"""True: lock and seek instead of positional calls, no directory sync. Read each time a file is opened."""

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_MAX_CALL = 1 << 30  # macOS answers EINVAL to a single call above 2 GiB, and Linux cuts it short

# What a file system says when it has no sync for directories (CIFS, FUSE); a real failure is EIO or ENOSPC.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS}


class _SeekingFile:
    """Offsets through seek under a lock; works everywhere."""

    def __init__(self, path: str, mode: str) -> None:
        self._file = FileIO(path, mode)
        self._lock = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(view) or 0

    def write(self, view: memoryview, offset: int) -> int:
        with self._lock:
            self._file.seek(offset)
            return self._file.write(view) or 0

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _PositionalFile(_SeekingFile):
    """Offsets in the call itself; no lock."""

    def read_into(self, view: memoryview, offset: int) -> int:
        return os.preadv(self._file.fileno(), [view], offset)

    def write(self, view: memoryview, offset: int) -> int:
        return os.pwrite(self._file.fileno(), view, offset)


def _open(path: str, mode: str) -> _SeekingFile:
    return _SeekingFile(path, mode) if PORTABLE else _PositionalFile(path, mode)


class Reader:
    """A file open for positional reads from any number of threads; for a URL this makes a `RemoteReader`. 
    CheckpointError when the path does not exist, cannot be read or is no regular file (a pipe would block).
    """

    def __new__(cls, path: str | Place) -> Self:
        if cls is Reader and is_url(path):
            from .remote import RemoteReader as cls  # type: ignore[assignment]
        return super().__new__(cls)

    def __init__(self, path: str | Place) -> None:
        self.path = str(path)
        try:
            status = Path(self.path).stat()
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise CheckpointError(f"{self.path}: cannot be read as a file: it is {kind}")
            self._file = _open(self.path, "r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot open for reading: {_reason(error)}") from error
        self.size = status.st_size
        """Bytes of the file when it was opened."""

    def announce(self, start: int, stop: int) -> None:
        """Bytes [start, stop) will be read from one end to the other: nothing that a local disk has to know."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole of ``buffer`` (contiguous, any item type) with the bytes from ``offset`` (bytes) on.

        Raises CheckpointError when the file ends early or the system cannot read it.
        """
        view, done = _flat(buffer), 0
        while done < len(view):
            try:
                count = self._file.read_into(view[done : done + _MAX_CALL], offset + done)
            except OSError as error:
                what = f"{self.path}: cannot read {len(view)} bytes at offset {offset}: {_reason(error)}"
                raise because(CheckpointError(what), error) from error
            if count <= 0:
                raise CheckpointError(
                    f"{self.path}: file is truncated: wanted {len(view)} bytes at offset {offset}, got {done}; "
                    "it was cut short or is being rewritten: fetch it again"
                )
            done += count

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Writer:
    """An existing file open for positional writes from any number of threads; SinkError when it cannot be opened."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            self._file = _open(self.path, "r+")
        except (OSError, ValueError) as error:
            raise _sink_error(self.path, "cannot open for writing", error) from error

    def write(self, buffer: bytes | bytearray | memoryview, offset: int) -> None:
        """Write the whole of ``buffer`` (contiguous, any item type) at ``offset`` (bytes).

        Raises SinkError with the system's reason; a full disk is said in plain words.
        """
        view, done = _flat(buffer), 0
        while done < len(view):
            try:
                count = self._file.write(view[done : done + _MAX_CALL], offset + done)
                if count <= 0:
                    raise OSError(errno.EIO, "the system took no byte and gave no reason")
            except OSError as error:
                action = f"cannot write {len(view)} bytes at offset {offset}"
                raise _sink_error(self.path, action, error, wanted=len(view) - done) from error
            done += count

    def sync(self) -> None:
        """Wait until what was written is on the device; SinkError when the device says it is not."""
        try:
            self._file.sync()
        except OSError as error:
            raise _sink_error(self.path, "cannot sync to disk", error) from error

    def close(self) -> None:
        """Close; SinkError when the system reports a late write error (network file systems do)."""
        try:
            self._file.close()
        except OSError as error:
            raise _sink_error(self.path, "cannot close", error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def create_sparse(path: str | Path, size: int, head: bytes) -> None:
    """Create ``path`` anew, ``size`` bytes long, starting with ``head``; the rest reads as zeros. No link is followed.

    Blocks are taken from the disk only as they are written: check `free_bytes` first. SinkError leaves nothing behind.
    """
    if len(head) > size:
        raise ValueError(f"head of {len(head)} bytes in a file of {size} bytes")
    try:
        if os.path.lexists(path):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise SinkError(f"{path}: stands in the way and is not a regular file: remove it, or write elsewhere")
            Path(path).unlink()
        file = FileIO(str(path), "x", opener=lambda name, flags: os.open(name, flags | _NO_FOLLOW, 0o666))
    except (OSError, ValueError) as error:
        raise _sink_error(path, "cannot create", error) from error
    try:
        with file:
            file.truncate(size)
        with Writer(path) as writer:
            writer.write(head, 0)
    except (OSError, SinkError) as error:
        Path(path).unlink(missing_ok=True)
        if isinstance(error, SinkError):
            raise
        raise _sink_error(path, f"cannot create with {size} bytes", error, wanted=size) from error


def sync_file(path: str | Path) -> None:
    """Wait until a file's bytes are on the device, whoever wrote them; SinkError otherwise."""
    with Writer(path) as writer:  # Windows refuses to sync a descriptor that is open for reading only
        writer.sync()


def sync_dir(path: str | Path) -> None:
    """Make renames within a folder survive a power cut; does nothing where the system has no such call."""
    if PORTABLE:
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise _sink_error(path, "cannot sync the folder", error) from error


def replace(src: str | Path, dst: str | Path) -> None:
    """Rename in one step, over ``dst`` if it exists; SinkError leaves both as they were."""
    try:
        Path(src).replace(dst)
    except OSError as error:
        raise _sink_error(dst, f"cannot take the place of {src}", error) from error


def free_bytes(folder: str | Path) -> int:
    """Bytes that this user may still write in ``folder``, or in the nearest parent that exists."""
    place = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
    try:
        return shutil.disk_usage(place).free
    except OSError as error:
        raise _sink_error(folder, "cannot tell the free space", error) from error


def _flat(buffer: bytes | bytearray | memoryview) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # cast refuses a shape with a zero in it


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _sink_error(path: str | Path, action: str, error: Exception, wanted: int = 0) -> SinkError:
    hint = ""
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        need = f" ({wanted} more bytes were wanted)" if wanted else ""
        hint = f"; the disk filled up{need}: free space and run again"
    elif code == errno.EFBIG:
        hint = "; this file system holds no file as large: write to another one, or in smaller shards"
    return because(SinkError(f"{path}: {action}: {_reason(error)}{hint}"), error)
