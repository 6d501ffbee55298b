"""An assembled model in a folder: parts that are synced and renamed; all files get their names, or none."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from ..formats.checksums import checksum
from ..formats.errors import CheckpointError, PlanError, SinkError, shown
from ..formats.fileio import Writer, create_sparse, free_bytes, replace, sync_dir, sync_file
from ..formats.objects import FolderObjects
from ..formats.places import is_file_name
from ..formats.safetensors import parse_json
from ..formats.shards import SUFFIX
from .assemble_targets import Out
from .commit import HalfwayError, exchange, hold, part, previous
from .sizes import show_size

_LOCK = ".quantloom.lock"
_MARKER = ".quantloom.replacing"
"""Names the files that are being replaced, while old ones wait under other names."""
_MARKER_BYTES = 64 << 20
_BEGINNING_BYTES = 1 << 20


class FolderTarget:
    """Parts that are synced and renamed."""

    def __init__(self, folder: Path, alone: bool) -> None:
        self.folder = folder
        self.alone = alone
        """Whether whoever reads the folder takes all its shards for one model."""
        self._parts: list[Path] = []
        self._marker = folder / _MARKER

    def recover(self) -> None:
        if os.path.lexists(self._marker):
            with hold([self.folder / _LOCK]):
                try:
                    self._recover()
                except OSError as error:
                    why = error.strerror or error
                    raise SinkError(f"{error.filename}: an assembly that was killed cannot be ended: {why}") from error

    def _recover(self) -> None:
        """All new files get their names, where all are there; else the old ones are put back."""
        new = self._marked()
        if all(any(_begins(at, *begin) for at in (part(path), path)) for path, begin in new.items()):
            for path, begin in new.items():
                if _begins(part(path), *begin):
                    replace(part(path), path)
                previous(path).unlink(missing_ok=True)
        else:
            for path, begin in new.items():
                if os.path.lexists(previous(path)):
                    replace(previous(path), path)
                elif _begins(path, *begin):
                    path.unlink()
        self._marker.unlink()
        sync_dir(self.folder)

    def _marked(self) -> dict[Path, tuple[int, str]]:
        """Files that were changing their names, with the size and beginning of the new ones; SinkError for what is no
        marker, or names files elsewhere."""
        try:
            content = FolderObjects(str(self.folder)).read(_MARKER, _MARKER_BYTES)
            found = parse_json(bytes(content or b""), _MARKER)
            return {self.folder / _named(name): (int(size), str(digits)) for name, size, digits in found}
        except (CheckpointError, ValueError, TypeError, OverflowError) as error:
            raise SinkError(
                f"{self._marker}: should say which files an earlier assembly was replacing, and cannot be read "
                f"({error}); look for *.part and *.previous there, and remove it"
            ) from error

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
            with hold([self.folder / _LOCK]):
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
        if len(paths) == 1 or not any(map(os.path.lexists, paths)):  # no old file waits under another name
            exchange(paths, [])
            sync_dir(self.folder)
            return
        self._mark(paths)
        try:
            exchange(paths, [])
        except HalfwayError:
            raise
        except BaseException:  # everything is as it was
            self._marker.unlink()
            raise
        self._marker.unlink()
        sync_dir(self.folder)

    def _mark(self, paths: Sequence[Path]) -> None:
        """Says, for whoever comes after a kill, which files are replaced, and how the new ones, all whole, begin."""
        waiting = part(self._marker)
        try:
            waiting.write_text(json.dumps([(path.name, *_beginning(part(path))) for path in paths]))
            sync_file(waiting)
        except OSError as error:
            raise SinkError(f"{waiting}: cannot be written: {error.strerror or error}") from error
        replace(waiting, self._marker)
        sync_dir(self.folder)


def _named(name: object) -> str:
    if not is_file_name(name):
        raise ValueError(f"{shown(name)} is no name of a file there")
    return str(name)


def _beginning(path: Path) -> tuple[int, str]:
    """Size of a file, and the checksum of its first megabyte: in files with tensors, of their finished header."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size, checksum(file.read(_BEGINNING_BYTES))


def _begins(path: Path, size: int, digits: str) -> bool:
    """Whether a regular file is there that is as large and begins so."""
    return path.is_file() and not path.is_symlink() and _beginning(path) == (size, digits)


class _FileOut:
    def __init__(self, writer: Writer) -> None:
        self._writer, self._end = writer, 0

    def write(self, content: bytes | memoryview) -> None:
        self._writer.write(content, self._end)
        self._end += len(content)
