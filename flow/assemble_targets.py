"""Where an assembled model goes: what an assembly asks of the place, which is a folder or a bucket."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from ..formats.errors import PlanError


class Out(Protocol):
    """A file that is written from its beginning to its end."""

    def write(self, content: bytes | memoryview) -> None:
        """SinkError when it cannot be written."""


class Target(Protocol):
    """The place of files that become real together."""

    def recover(self) -> None:
        """Brings to its end what an assembly that was killed had begun, where that left files under other names."""

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
