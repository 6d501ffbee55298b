"""Where an assembled model goes: files of a folder, or objects of a bucket; all of them get their names, or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from ..formats.errors import PlanError, SinkError
from ..formats.fileio import Writer, create_sparse, free_bytes, sync_dir, sync_file
from ..formats.objects import uploads
from ..formats.ranges import store_of
from ..formats.retries import patiently
from ..formats.shards import SUFFIX
from .commit import exchange, hold, part
from .sizes import show_size

_PART_BYTES = 16 << 20
"""Bytes of one request of a multipart upload ..."""
_MOST_PARTS = 9_000
"""... of which S3 takes 10,000."""


class Out(Protocol):
    """A file that is written from its beginning to its end."""

    def write(self, content: bytes | memoryview) -> None:
        """SinkError when it cannot be written."""


class Target(Protocol):
    """The place of files that become real together."""

    def check(self, names: Sequence[str], nbytes: int) -> None:
        """PlanError for a place that cannot have files of these names, or no room for so many bytes."""

    def look(self, name: str, count: int) -> tuple[int, bytes] | None:
        """Size of a file and its first ``count`` bytes; None when nothing is there."""

    def where(self, name: str) -> str:
        """Path or URL of a file."""

    def open(self) -> contextlib.AbstractContextManager[None]:
        """Keeps others out for the time of the block; what has no name at its end is removed."""

    def file(self, name: str, size: int) -> contextlib.AbstractContextManager[Out]:
        """A new file, without its name. Several threads may write one each."""

    def commit(self, names: Sequence[str], overwrite: bool) -> None:
        """Gives the files their names, in this order."""


def named_before(target: Target, expected: Mapping[str, tuple[int, bytes]]) -> set[str]:
    """Files that an assembly had given their names when it was killed, of all that belong to an output: size and
    first bytes of each, which for files with tensors are all checksums.

    PlanError when the output is complete, or something else stands in its place.
    """
    found = {name: target.look(name, len(begin)) for name, (_, begin) in expected.items()}
    there = [name for name, what in found.items() if what is not None]
    if len(there) == len(expected) or any(found[name] != expected[name] for name in there):
        first = target.where(there[0])
        raise PlanError(f"{first}: exists already; pass --overwrite to replace it, or write somewhere else")
    return set(there)


class FolderTarget:
    """Parts that are synced and renamed."""

    def __init__(self, folder: Path, alone: bool) -> None:
        self.folder = folder
        self.alone = alone
        """Whether whoever reads the folder takes all its shards for one model."""
        self._parts: list[Path] = []

    def look(self, name: str, count: int) -> tuple[int, bytes] | None:
        path = self.folder / name
        try:
            if not path.is_file():  # a link to nothing, a pipe: in the way, and like no file
                return (-1, b"") if os.path.lexists(path) else None
            with path.open("rb") as file:
                return os.fstat(file.fileno()).st_size, file.read(count)
        except OSError as error:
            raise SinkError(f"{path}: cannot be looked at: {error.strerror or error}") from error

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def check(self, names: Sequence[str], nbytes: int) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise PlanError(f"{self.folder}: is a file; for one file as output, let the name end in {SUFFIX}")
        for path in (self.folder / name for name in names):
            if path.is_dir():
                raise PlanError(f"{path}: is a folder where a file of the output belongs; write somewhere else")
        others = sorted(path.name for path in self.folder.glob(f"*{SUFFIX}") if path.name not in names)
        if self.alone and others:
            raise PlanError(
                f"{self.folder}: holds {others[0]}, which whoever reads this folder would take for a part of the "
                "model; write to an empty folder"
            )
        if nbytes > (free := free_bytes(self.folder)):
            raise PlanError(
                f"{self.folder}: the output needs {show_size(nbytes)}, but only {show_size(free)} are free there; free "
                "some space, or write to another disk"
            )

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        missing = list(takewhile(lambda place: not place.exists(), (self.folder, *self.folder.parents)))
        try:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SinkError(f"{self.folder}: cannot create the folder: {error.strerror or error}") from error
            with hold([self.folder / ".quantloom.lock"]):
                yield
        except BaseException:
            for place in [*self._parts, *missing]:
                with contextlib.suppress(OSError):
                    place.rmdir() if place in missing else place.unlink()
            raise

    @contextlib.contextmanager
    def file(self, name: str, size: int) -> Iterator[Out]:
        path = part(self.folder / name)
        self._parts.append(path)
        create_sparse(path, size, b"")
        with Writer(path) as writer:
            yield _FileOut(writer)

    def commit(self, names: Sequence[str], overwrite: bool) -> None:
        paths = [self.folder / name for name in names]
        for path in paths:
            sync_file(part(path))
        if not overwrite and (found := [path for path in paths if os.path.lexists(path)]):
            raise SinkError(f"{found[0]}: appeared meanwhile; nothing was written; write somewhere else")
        exchange(paths, [])
        sync_dir(self.folder)


class _FileOut:
    def __init__(self, writer: Writer) -> None:
        self._writer, self._end = writer, 0

    def write(self, content: bytes | memoryview) -> None:
        self._writer.write(content, self._end)
        self._end += len(content)


class BucketTarget:
    """Multipart uploads, which stay invisible until they are completed."""

    def __init__(self, root: str) -> None:
        self.root, self._store = root, store_of(root)
        self._fs = uploads(root)
        self._files: dict[str, Any] = {}

    def check(self, names: Sequence[str], nbytes: int) -> None:
        """A bucket takes every name, and nobody can tell its room."""

    def look(self, name: str, count: int) -> tuple[int, bytes] | None:
        content = bytearray(count)
        try:
            size = self._store.look(self.where(name)).size
            got = self._store.fetch(self.where(name), 0, memoryview(content)) if count and size else 0
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SinkError(f"{self.where(name)}: cannot be looked at: {error.strerror or error}") from error
        return size, bytes(content[:got])

    def where(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for file in self._files.values():
                with contextlib.suppress(OSError, AttributeError):
                    file.discard()
                    file.closed = True  # or the end of the object would send what is left
            raise

    @contextlib.contextmanager
    def file(self, name: str, size: int) -> Iterator[Out]:
        url = f"{self.root}/{name}"
        block = max(_PART_BYTES, -(-size // _MOST_PARTS))
        file = _known(url, lambda: self._fs.open(url, "wb", block_size=block))
        self._files[name] = file
        yield _ObjectOut(url, file)
        _known(url, file.close)

    def commit(self, names: Sequence[str], overwrite: bool) -> None:
        if not overwrite and (found := [name for name in names if self.look(name, 0) is not None]):
            raise SinkError(f"{self.where(found[0])}: appeared meanwhile; nothing was written; write somewhere else")
        done = []
        try:
            for name in names:
                _known(f"{self.root}/{name}", self._files[name].commit)
                done.append(name)
                del self._files[name]
        except BaseException:
            for name in () if overwrite else done:
                with contextlib.suppress(OSError):
                    self._fs.rm_file(self._fs._strip_protocol(f"{self.root}/{name}"))
            raise


class _ObjectOut:
    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def write(self, content: bytes | memoryview) -> None:
        _known(self._url, lambda: self._file.write(content))


def _known(url: str, call: Any) -> Any:
    """The result of a call of fsspec, with its errors in clean words."""
    try:
        return patiently(url, call, attempts=1)
    except OSError as error:
        raise SinkError(f"{url}: cannot be written: {error.strerror or error}") from error
