"""Where files of a checkpoint lie: a path of this machine, or a URL with the same interface, as far as it is needed.

``pathlib`` makes one slash of the two in a URL and knows no listings of stores; `universal_pathlib` has both, but its
paths show the query of a signed URL, take it for a part of the name, and leave retries to each library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TypeAlias

from . import urls
from .errors import SinkError
from .ranges import Facts, store_of

_MAX_BYTES = 100_000_000


def is_file_name(name: object) -> bool:
    """Whether what a file says names another one beside it: no folder, and no way elsewhere."""
    return isinstance(name, str) and "\0" not in name and name not in ("", ".", "..") and Path(name).name == name


@dataclass(frozen=True)
class RemoteStatus:
    """As much of ``os.stat_result`` as files and objects have in common."""

    st_size: int
    st_mtime_ns: int
    """For an object a number made of its entity tag and its time of change."""


@dataclass(frozen=True, order=True)
class RemotePath:
    """A URL with the methods of ``pathlib.Path`` that checkpoints are opened by. They raise OSError, as those do."""

    url: str
    """What ``urls.hide`` made: it may be shown."""
    listed: Facts | None = field(default=None, compare=False, repr=False)
    """What the listing said in which it was found."""

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return urls.name_of(self.url)

    @property
    def parent(self) -> RemotePath:
        return RemotePath(urls.parent(self.url))

    @property
    def has_listing(self) -> bool:
        """Whether its store can say what lies in a folder."""
        return not urls.is_http(self.url)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(urls.child(self.url, name))

    def absolute(self) -> RemotePath:
        return self

    def resolve(self) -> RemotePath:
        return self

    def is_symlink(self) -> bool:
        return False

    def look(self) -> Facts:
        """What the store says now, or said when it listed the folder."""
        return self.listed or store_of(self.url).look(self.url)

    def stat(self) -> RemoteStatus:
        facts = self.look()
        return RemoteStatus(facts.size, facts.version)

    def exists(self) -> bool:
        try:
            self.look()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """False without a question where there are no folders."""
        try:
            return self.has_listing and self.look().is_folder
        except FileNotFoundError:
            return False

    def is_file(self) -> bool:
        try:
            return not self.look().is_folder
        except FileNotFoundError:
            return False

    def iterdir(self) -> Iterator[RemotePath]:
        for name, facts in store_of(self.url).entries(self.url):
            yield RemotePath(urls.child(self.url, name), facts)

    def glob(self, pattern: str = "") -> Iterator[RemotePath]:
        """What fits a pattern in this folder, or the one that the URL itself is."""
        where = urls.child(self.url, pattern) if pattern else self.url
        yield from map(RemotePath, store_of(where).matches(where))

    def read_bytes(self) -> bytes:
        """A whole small file; OSError for one of more than 100 MB."""
        size = store_of(self.url).look(self.url).size
        if size > _MAX_BYTES:
            raise OSError(None, f"{size} bytes; at most {_MAX_BYTES} are read as a whole", self.url)
        view = memoryview(bytearray(size))
        return bytes(view[: store_of(self.url).fetch(self.url, 0, view)]) if size else b""


Place: TypeAlias = Path | RemotePath


def place(where: str | Path | RemotePath) -> Place:
    """The path or the URL that a text means; UsageError for a URL that is refused (`urls.hide`)."""
    if isinstance(where, RemotePath):
        return where
    if isinstance(where, str) and urls.is_url(where):
        url = urls.hide(where)
        urls.whole(where)  # refuses a query that was hidden only now: messages would show it
        return RemotePath(url)
    return Path(where)


def exists(path: Place) -> bool:
    """Whether something is there; a broken link counts, to be refused by its name."""
    return os.path.lexists(path) if isinstance(path, Path) else path.exists()


def order(path: Place) -> tuple[bool, PurePath, str]:
    """A key to sort by: paths as they sort, and URLs behind them as text."""
    return (False, path, "") if isinstance(path, Path) else (True, PurePath(), path.url)


def real(path: Place) -> str:
    """The same text for every spelling of a path, through links too."""
    return os.path.realpath(path) if isinstance(path, Path) else path.url


def same_file(a: str | Place, b: str | Place) -> bool:
    """Whether two paths lead to one file, through links too; URLs, and paths that do not exist yet, are compared as
    text."""
    if urls.is_url(a) or urls.is_url(b):
        return str(a) == str(b)
    a, b = str(a), str(b)
    try:
        return Path(a).samefile(b)
    except FileNotFoundError:
        return os.path.normcase(os.path.realpath(a)) == os.path.normcase(os.path.realpath(b))
    except OSError as error:
        raise SinkError(f"{a}: cannot be compared with {b}: {error.strerror or error}") from error
