"""A remote file behind the same interface as a local one: positional reads, any number of threads, read ahead.

A store answers one request in tens of milliseconds, whatever it brings, and a conversion reads about a megabyte at a
time. Who is going to read a range from one end to the other says so: then blocks are fetched before they are asked for,
several at a time. What was not announced is fetched exactly as it is read, so that nothing comes over the wire twice.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property

from .errors import CheckpointError
from .fileio import Reader
from .places import Place
from .ranges import store_of

BLOCK_BYTES = 8 << 20
"""Bytes of a request."""
BLOCKS_AHEAD = 3
"""Blocks of an announced range that are held at a time: the one that is read, and those that come in."""
_CONNECTIONS = 32


def ahead_bytes(nbytes: int) -> int:
    """What reading ``nbytes`` from one end to the other holds at most."""
    return min(nbytes, BLOCKS_AHEAD * BLOCK_BYTES)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="quantloom-remote")


class RemoteReader(Reader):
    """A `Reader` of what lies behind a URL. Whether it exists is found out at its first use: rows need no size."""

    def __init__(self, path: str | Place) -> None:
        self.path = str(path)
        self._file = self._remote = _RemoteFile(self.path)  # type: ignore[assignment]

    @cached_property
    def size(self) -> int:  # type: ignore[override]
        """Bytes of the object when this was first asked for."""
        try:
            facts = self._remote.store.look(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot open for reading: {error.strerror}") from error
        if facts.is_folder:
            raise CheckpointError(f"{self.path}: cannot be read as a file: it is a folder")
        return facts.size

    def announce(self, start: int, stop: int) -> None:
        """Bytes [start, stop) will be read from one end to the other, and may be fetched ahead."""
        if stop > start:
            self._remote.announced.append(_Announced(self._remote, start, stop))


class _RemoteFile:
    """Reads raise OSError with words that are safe to show."""

    def __init__(self, url: str) -> None:
        self.url, self.store = url, store_of(url)
        self.announced: list[_Announced] = []

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fills ``view``, or the beginning of it; 0 at the end of the file."""
        for announced in self.announced:
            if announced.start <= offset < announced.stop:
                return announced.read_into(view, offset)
        return self.fetch(view[:BLOCK_BYTES], offset)

    def fetch(self, view: memoryview, offset: int) -> int:
        return self.store.fetch(self.url, offset, view)

    def close(self) -> None:
        for announced in self.announced:
            announced.drop()
        self.announced.clear()


class _Announced:
    """A range, and the blocks of it that are here or on their way."""

    def __init__(self, file: _RemoteFile, start: int, stop: int) -> None:
        self._file, self.start, self.stop = file, start, stop
        self._blocks: dict[int, Future[memoryview]] = {}
        self._lock = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        number, within = divmod(offset - self.start, BLOCK_BYTES)
        block = self._block(number).result()[within:]
        count = min(len(view), len(block))
        view[:count] = block[:count]
        return count

    def _block(self, number: int) -> Future[memoryview]:
        with self._lock:
            last = (self.stop - self.start - 1) // BLOCK_BYTES
            wanted = range(number, min(number + BLOCKS_AHEAD, last + 1))
            for other in [other for other in self._blocks if other not in wanted]:
                self._blocks.pop(other).cancel()
            for other in wanted:
                if other not in self._blocks:
                    self._blocks[other] = _pool().submit(self._fetch, other)
            return self._blocks[number]

    def _fetch(self, number: int) -> memoryview:
        first = self.start + number * BLOCK_BYTES
        view = memoryview(bytearray(min(BLOCK_BYTES, self.stop - first)))
        return view[: self._file.fetch(view, first)]

    def drop(self) -> None:
        with self._lock:
            for block in self._blocks.values():
                block.cancel()
            self._blocks.clear()
