"""The journal of a run that writes to a store: numbered objects, as nothing is appended to one."""

from __future__ import annotations

from ..formats.errors import CheckpointError
from ..formats.objects import Objects

_FOLDER = "journal"
_MOST_BYTES = 256 << 20
"""A larger object is no part of a journal."""


class StoreLog:
    """Objects ``journal/00000001.jsonl`` and so on. Only the driver of a run appends."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._count: int | None = None

    @property
    def place(self) -> str:
        """Folder or URL."""
        return f"{self._objects.root}/{_FOLDER}"

    def read(self) -> bytes:
        """Raises CheckpointError when the store cannot be read."""
        keys = self._keys()
        contents = [self._objects.read(key, _MOST_BYTES) for key in keys]
        if None in contents:
            raise CheckpointError(f"{self.place}: {keys[contents.index(None)]} vanished: another run may be at work")
        return b"".join(content for content in contents if content is not None)

    def append(self, lines: bytes) -> None:
        """Raises SinkError when the store takes no object."""
        if self._count is None:
            keys = self._keys()
            self._count = int(keys[-1].rpartition("/")[2].partition(".")[0]) if keys else 0
        self._objects.write(f"{_FOLDER}/{self._count + 1:08d}.jsonl", lines)
        self._count += 1

    def remove(self) -> None:
        """Raises SinkError when an object stays. The first one, which says of what plan it is, goes last: a run that
        is killed meanwhile leaves a journal that can be read."""
        keys = self._keys()
        self._objects.remove(keys[:0:-1])
        self._objects.remove(keys[:1])
        self._count = 0

    def _keys(self) -> list[str]:
        found = [key for key in self._objects.find(_FOLDER) if key.endswith(".jsonl")]
        return sorted(key for key in found if key.rpartition("/")[2].partition(".")[0].isdecimal())
