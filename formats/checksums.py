"""Checksums of written bytes: one XXH3 (64 bits) for every run of bytes that was written in order.

Most tensors are written by one task from beginning to end and have one piece. One that several tasks write, each its
rows, has a piece for each: XXH3 of a whole cannot be made from those of its parts, and nothing is read again for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from .record import Record

DIGITS = re.compile("[0-9a-f]{16}")
"""A checksum, as it is written."""


@dataclass(frozen=True, slots=True)
class Piece(Record):
    """Some bytes of one output tensor, and their checksum."""

    name: str
    """Of the tensor's slot."""
    start: int
    """Offset of its first byte within the tensor."""
    nbytes: int
    checksum: str
    """XXH3, 64 bits, as 16 hexadecimal digits."""


def checksum(content: bytes | bytearray | memoryview) -> str:
    """XXH3 (64 bits) of bytes, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(content)


class Summing:
    """Checksums of what is written, in whatever order: bytes that follow each other become one piece."""

    def __init__(self) -> None:
        self._done: list[Piece] = []
        self._open: dict[str, tuple[int, int, xxhash.xxh3_64]] = {}

    def add(self, name: str, offset: int, content: memoryview) -> None:
        """Counts ``content``, written at ``offset`` (bytes) of the tensor ``name``."""
        start, end, running = self._open.get(name) or (offset, offset, xxhash.xxh3_64())
        if end != offset:
            self._done.append(Piece(name, start, end - start, running.hexdigest()))
            start, running = offset, xxhash.xxh3_64()
        running.update(content)
        self._open[name] = (start, offset + len(content), running)

    def pieces(self) -> tuple[Piece, ...]:
        """All that was counted."""
        last = [Piece(name, start, end - start, run.hexdigest()) for name, (start, end, run) in self._open.items()]
        return (*self._done, *last)


class Comparing:
    """Compares bytes that come in order with the pieces that make them up, by their checksums."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._left = iter([piece for piece in pieces if piece.nbytes])
        self._room = 0
        self._next()

    def add(self, content: memoryview) -> None:
        """Raises ValueError when the bytes of a piece are not what its checksum says."""
        while len(content):
            if self._piece is None:
                raise ValueError(f"{len(content)} bytes too many")
            taken = content[: self._room]
            self._running.update(taken)
            self._room, content = self._room - len(taken), content[len(taken) :]
            if not self._room:
                if (found := self._running.hexdigest()) != self._piece.checksum:
                    place = f"bytes {self._piece.start} to {self._piece.start + self._piece.nbytes}"
                    raise ValueError(f"{place} have the checksum {found}, {self._piece.checksum} was written")
                self._next()

    def _next(self) -> None:
        self._piece, self._running = next(self._left, None), xxhash.xxh3_64()
        self._room = self._piece.nbytes if self._piece else 0


def covers(pieces: Iterable[Piece], nbytes: int) -> bool:
    """Whether pieces of one tensor make up all its bytes, each once."""
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if piece.start != end or piece.nbytes < 0:
            return False
        end += piece.nbytes
    return end == nbytes
