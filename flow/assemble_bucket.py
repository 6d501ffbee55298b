"""An assembled model in a bucket: multipart uploads, which stay invisible until they are completed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..formats.errors import SinkError
from ..formats.objects import uploads
from ..formats.ranges import store_of
from ..formats.retries import patiently
from .assemble_targets import Out

_PART_BYTES = 16 << 20
"""Bytes of one request of a multipart upload ..."""
_MOST_PARTS = 9_000
"""... of which S3 takes 10,000."""


class BucketTarget:
    """Multipart uploads, which stay invisible until they are completed."""

    def __init__(self, root: str) -> None:
        self.root, self._store = root, store_of(root)
        self._fs = uploads(root)
        self._files: dict[str, Any] = {}

    def recover(self) -> None:
        """There is nothing: an object is replaced in one step."""

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
