"""Checksums of stored pieces, read in streams by several threads: memory stays at a buffer for each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from ..formats.checksums import Piece, Summing, checksum
from ..formats.errors import CheckpointError
from ..formats.fileio import Reader
from .budget import cores

_BUFFER_BYTES = 1 << 20
_TASK_BYTES = 64 << 20
"""Pieces are put together into tasks of this many bytes; a larger one is a task by itself."""
_TELL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Stored:
    """A piece in a file."""

    path: str
    start: int
    """Offset of its first byte in the file."""
    piece: Piece


Difference = tuple[Stored, str, str]
"""A piece with another checksum, that checksum, and what went wrong if it could not be read."""


def sum_pieces(stored: Sequence[Stored], watch: Callable[[int, int], None] | None = None) -> list[Difference]:
    """The pieces that are not what their checksums say, in the order given; ``watch`` hears bytes done and all."""
    total, done, stop = sum(item.piece.nbytes for item in stored), [0], threading.Event()
    lock = threading.Lock()

    def advance(nbytes: int) -> None:
        with lock:
            done[0] += nbytes

    found: list[Difference] = []
    with ThreadPoolExecutor(cores(), thread_name_prefix="quantloom-sums") as pool:
        tasks = sorted(_tasks(stored), key=lambda task: -sum(item.piece.nbytes for item in task))
        waiting: set[Future[list[Difference]]] = {pool.submit(_sum_task, task, stop, advance) for task in tasks}
        try:
            while waiting:
                finished, waiting = wait(waiting, _TELL_SECONDS, FIRST_COMPLETED)
                for future in finished:
                    found += future.result()
                if watch is not None:
                    watch(done[0], total)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    place = {id(item): number for number, item in enumerate(stored)}
    return sorted(found, key=lambda difference: place[id(difference[0])])


def _tasks(stored: Sequence[Stored]) -> Iterator[list[Stored]]:
    task: list[Stored] = []
    size = 0
    for item in stored:
        if task and (size + item.piece.nbytes > _TASK_BYTES or item.path != task[0].path):
            yield task
            task, size = [], 0
        task.append(item)
        size += item.piece.nbytes
    if task:
        yield task


def _sum_task(task: Sequence[Stored], stop: threading.Event, advance: Callable[[int], None]) -> list[Difference]:
    """Pieces of one file."""
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    found: list[Difference] = []
    try:
        reader = Reader(task[0].path)
    except CheckpointError as error:
        return [(item, "", str(error)) for item in task]
    with reader:
        for item in task:
            sums, problem = Summing(), ""
            try:
                for first in range(0, item.piece.nbytes, _BUFFER_BYTES):
                    if stop.is_set():
                        return found
                    part = buffer[: min(_BUFFER_BYTES, item.piece.nbytes - first)]
                    reader.read_into(part, item.start + first)
                    sums.add(item.piece.name, first, part)
                    advance(len(part))
            except CheckpointError as error:
                problem = str(error)
            digits = "" if problem else next((piece.checksum for piece in sums.pieces()), checksum(b""))
            if digits != item.piece.checksum:
                found.append((item, digits, problem))
    return found
