"""Objects under keys, in a folder of this machine or in a bucket: whole writes that are durable when they return.

A key is a relative path with ``/``. An object appears whole or not at all; who writes it twice writes the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from .errors import CheckpointError, SinkError, because
from .fileio import Reader, free_bytes, sync_dir
from .ranges import store_of
from .retries import patiently
from .urls import hide, is_url

_MANY = 1000
"""Objects that are deleted by one request."""
_numbers = itertools.count()
_WAITING = re.compile(r"\..+\.[0-9]+-[0-9]+\.part")
"""Name of a file that is being written."""


class Objects(Protocol):
    """The objects of one store."""

    root: str
    """Folder or URL, without a slash at its end."""

    def read(self, key: str, most: int) -> bytes | bytearray | None:
        """The object, or None when there is none. CheckpointError when it has more than ``most`` bytes or the store
        fails."""

    def write(self, key: str, content: bytes | bytearray | memoryview) -> None:
        """Creates or replaces the object; SinkError when that fails."""

    def find(self, folder: str = "") -> Iterator[str]:
        """Every key there is, or those in a folder; CheckpointError when the store fails."""

    def remove(self, keys: Iterable[str]) -> None:
        """Deletes these objects, whether they exist or not; SinkError when that fails."""

    def sweep(self) -> None:
        """Removes what writers left half written that were killed; nobody may be writing."""

    def free(self) -> int | None:
        """Bytes that may still be written; None where nobody can tell."""


def uploads(url: str) -> Any:
    """A file system of fsspec for files that appear when they are committed: not shared, in a transaction, and with
    its own retries, as a part of an upload cannot be repeated from outside. UsageError as for `objects_at`."""
    store_of(url)
    from fsspec.core import url_to_fs

    fs, _ = url_to_fs(url, skip_instance_cache=True)
    fs.start_transaction()
    return fs


def objects_at(root: str) -> Objects:
    """The objects of a folder or URL. UsageError for a URL with credentials, or whose package is not installed."""
    root = hide(root.rstrip("/") or root)
    return BucketObjects(root) if is_url(root) else FolderObjects(root)


class FolderObjects:
    """Files of a folder; each is written under another name first, synced, and renamed."""

    def __init__(self, root: str) -> None:
        self.root = root

    def read(self, key: str, most: int) -> bytes | bytearray | None:
        path = self._path(key)
        if not os.path.lexists(path):
            return None
        with Reader(path) as reader:
            _refuse_long(str(path), reader.size, most)
            content = bytearray(reader.size)
            reader.read_into(memoryview(content), 0)
        return content

    def write(self, key: str, content: bytes | bytearray | memoryview) -> None:
        path = self._path(key)
        waiting = path.with_name(f".{path.name}.{os.getpid()}-{next(_numbers)}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(waiting, "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                waiting.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    waiting.unlink()
                raise
            sync_dir(path.parent)
        except OSError as error:
            full = "; the disk filled up: free space and run again" if error.errno == errno.ENOSPC else ""
            raise SinkError(f"{path}: cannot be written: {error.strerror or error}{full}") from error

    def find(self, folder: str = "") -> Iterator[str]:
        top = self._path(folder) if folder else Path(self.root)

        def failed(error: OSError) -> None:
            raise CheckpointError(f"{error.filename}: cannot be looked at: {error.strerror}") from error

        for place, _folders, names in os.walk(top, onerror=failed if os.path.lexists(top) else None):
            inner = Path(place).relative_to(self.root)
            yield from ((inner / name).as_posix() for name in names)

    def remove(self, keys: Iterable[str]) -> None:
        folders = set()
        for key in keys:
            path = self._path(key)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise SinkError(f"{path}: cannot be removed: {error.strerror or error}") from error
            folders |= {parent for parent in path.parents if Path(self.root) in (parent, *parent.parents)}
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            with contextlib.suppress(OSError):  # something of somebody else lies in it
                folder.rmdir()

    def sweep(self) -> None:
        self.remove([key for key in self.find() if _WAITING.fullmatch(key.rpartition("/")[2])])

    def free(self) -> int | None:
        return free_bytes(self.root)

    def _path(self, key: str) -> Path:
        return Path(self.root, *key.split("/"))


class BucketObjects:
    """Objects of a bucket or any other place that fsspec writes to."""

    def __init__(self, root: str) -> None:
        self.root, self._store = root, store_of(root)

    def read(self, key: str, most: int) -> bytes | bytearray | None:
        url = f"{self.root}/{key}"
        content = bytearray(most + 1)
        try:
            count = self._store.fetch(url, 0, memoryview(content))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{url}: cannot be read: {error.strerror or error}") from error
        _refuse_long(url, count, most)
        del content[count:]
        return content

    def write(self, key: str, content: bytes | bytearray | memoryview) -> None:
        url, whole = f"{self.root}/{key}", bytes(content)
        path = self._store.fs._strip_protocol(url)
        try:
            patiently(url, lambda: self._store.fs.pipe_file(path, whole))
        except OSError as error:
            raise because(SinkError(f"{url}: cannot be written: {error.strerror or error}"), error) from error

    def find(self, folder: str = "") -> Iterator[str]:
        fs = self._store.fs
        path = fs._strip_protocol(self.root)
        place = f"{path}/{folder}" if folder else path

        def find() -> list[str]:
            fs.invalidate_cache()
            found: list[str] = fs.find(place)
            return found

        try:
            found = patiently(self.root, find)
        except FileNotFoundError:
            return
        except OSError as error:
            raise CheckpointError(f"{self.root}: cannot be listed: {error.strerror or error}") from error
        yield from (name[len(path) :].lstrip("/") for name in found if name.startswith(path))

    def remove(self, keys: Iterable[str]) -> None:
        fs = self._store.fs
        for some in _batches(keys, _MANY):
            paths = [fs._strip_protocol(f"{self.root}/{key}") for key in some]

            def delete(paths: list[str] = paths) -> None:
                with contextlib.suppress(FileNotFoundError):
                    fs.rm(paths)

            try:
                patiently(self.root, delete)
            except OSError as error:
                raise SinkError(f"{self.root}: cannot be emptied: {error.strerror or error}") from error

    def sweep(self) -> None:
        """There is nothing: an upload that does not end leaves no object."""

    def free(self) -> int | None:
        return None


def _refuse_long(where: str, size: int, most: int) -> None:
    if size > most:
        raise CheckpointError(f"{where}: has more than the {most} bytes that belong there: something else wrote it")


def _batches(keys: Iterable[str], many: int) -> Iterator[list[str]]:
    rest = iter(keys)
    while some := list(itertools.islice(rest, many)):
        yield some
