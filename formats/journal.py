"""Files that change in place as one: a journal beside them holds what is to be done until all of it is done.

A journal gets its name once it is complete and on the device, before the first byte of a file changes; it goes when the
last one is on the device. Whoever finds one knows that the files may be between old and new: readers refuse them, and
`finish` does what is left. Old bytes are kept as well: a change that fails is taken back, and a file that is neither
old nor new is left alone.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError, SinkError
from .fileio import Reader, Writer, create_sparse, replace, sync_dir, sync_file
from .places import Place, is_file_name

ENDING = ".quantloom-edit"
"""A journal's name ends in this."""
NEW_ENDING = ".quantloom-new"
"""A file that takes the place of another one has this at the end of its name until then."""
_VERSION = 1


@dataclass(frozen=True)
class Patch:
    """Bytes of a file that change."""

    start: int
    """Offset in the file."""
    old: bytes
    new: bytes
    """As long as ``old``; longer at the end of a file, which then grows."""


@dataclass(frozen=True)
class Change:
    """What happens to one file: bytes of it change, or a new file that lies beside it takes its place."""

    name: str
    """File name, in the folder of the journal."""
    old_size: int
    new_size: int
    patches: tuple[Patch, ...] = ()
    """Empty: it is replaced by ``<name>.quantloom-new``."""


class UnfinishedEdit(CheckpointError):
    """A checkpoint whose change in place was interrupted, or still runs."""

    def __init__(self, journal: Path, name: str) -> None:
        super().__init__(
            f"{journal.with_name(name)}: an edit in place is not finished ({journal.name} lies beside it); if none is "
            f"running, finish it: quantloom edit --in-place {journal.with_name(name)}"
        )
        self.journal = journal


def new_name(path: Path) -> Path:
    """Where the file lies that takes the place of ``path``."""
    return path.with_name(path.name + NEW_ENDING)


def refuse_unfinished(files: Iterable[Place]) -> None:
    """UnfinishedEdit when a journal names one of these files; nothing edits objects in place."""
    real = [Path(os.path.realpath(path)) for path in files if isinstance(path, Path)]
    for folder in {path.parent for path in real}:
        names = {path.name for path in real if path.parent == folder}
        for journal in _journals(folder):
            for change in read_journal(journal):
                if change.name in names:
                    raise UnfinishedEdit(journal, change.name)


def carry_out(journal: Path, changes: Sequence[Change]) -> None:
    """Changes the files as one; new files lie beside them already, on the device.

    Raises SinkError, and whatever stops it, with all files as they were; or, once a new file took the place of an old
    one, SinkError with the journal left for ``finish``.
    """
    for change in changes:
        with Writer(journal.with_name(change.name)):  # what may not be written is refused before anything is begun
            pass
    draft = journal.with_name(journal.name + ".part")
    content = json.dumps({"version": _VERSION, "changes": [_to_dict(change) for change in changes]}).encode()
    create_sparse(draft, len(content), content)
    try:
        sync_file(draft)
        replace(draft, journal)
        sync_dir(journal.parent)
        _apply(journal, changes)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        if journal.exists():
            _take_back(journal, changes, error)
        raise
    _remove(journal)


def finish(journal: Path) -> list[str]:
    """Does what an interrupted change left to do; returns the names of its files.

    Raises CheckpointError, with everything left as it is, for a file that is neither the old nor the new one.
    """
    changes = read_journal(journal)
    for change in changes:
        _check_between(journal, change)
    _apply(journal, changes)
    _remove(journal)
    return [change.name for change in changes]


def read_journal(journal: Path) -> list[Change]:
    """Raises CheckpointError for a file that is no journal."""
    try:
        values = json.loads(journal.read_bytes())
        if values["version"] != _VERSION:
            raise ValueError(f"version {values['version']}")
        return [_from_dict(item) for item in values["changes"]]
    except OSError as error:
        raise CheckpointError(f"{journal}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{journal}: is no journal of an edit in place that is known here: {error}") from error


def _journals(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(ENDING))
    except OSError:  # a folder that may be entered but not listed
        return []


def _apply(journal: Path, changes: Sequence[Change]) -> None:
    """Every change, whether or not it was done before."""
    for change in changes:
        path = journal.with_name(change.name)
        if change.patches:
            with Writer(path) as writer:
                for patch in change.patches:
                    writer.write(patch.new, patch.start)
                writer.sync()
    for change in changes:
        path = journal.with_name(change.name)
        if not change.patches and new_name(path).exists():
            replace(new_name(path), path)
    sync_dir(journal.parent)


def _take_back(journal: Path, changes: Sequence[Change], error: BaseException) -> None:
    """Old bytes in every file, unless a new file took its place."""
    paths = {journal.with_name(change.name): change for change in changes}
    if any(not change.patches and not new_name(path).exists() for path, change in paths.items()):
        first = next(iter(paths))
        raise SinkError(
            f"{first}: the edit stopped half way ({error or type(error).__name__}); finish it: "
            f"quantloom edit --in-place {first}"
        ) from error
    for path, change in paths.items():
        if change.patches:
            with Writer(path) as writer:
                for patch in change.patches:
                    writer.write(patch.old, patch.start)
            _cut(path, change.old_size)
            sync_file(path)
    _remove(journal)


def _cut(path: Path, size: int) -> None:
    try:
        if path.stat().st_size > size:
            os.truncate(path, size)
    except OSError as error:
        raise SinkError(f"{path}: cannot be cut to {size} bytes: {error.strerror or error}") from error


def _remove(journal: Path) -> None:
    try:
        journal.unlink()
    except OSError as error:
        raise SinkError(f"{journal}: cannot be removed: {error.strerror or error}") from error
    sync_dir(journal.parent)


def _check_between(journal: Path, change: Change) -> None:
    """CheckpointError unless a file is the old or the new one, and every byte that changes one of both."""
    path = journal.with_name(change.name)
    with Reader(path) as reader:
        if change.patches:
            fits = change.old_size <= reader.size <= change.new_size
            fits = fits and all(_is_between(reader, patch) for patch in change.patches)
        else:
            fits = reader.size == (change.old_size if new_name(path).exists() else change.new_size)
    if not fits:
        raise CheckpointError(
            f"{path}: is neither the file that {journal.name} was made for nor what it becomes: it was replaced since. "
            f"Delete {journal} to keep it as it is"
        )


def _is_between(reader: Reader, patch: Patch) -> bool:
    content = bytearray(max(0, min(len(patch.new), reader.size - patch.start)))
    reader.read_into(memoryview(content), patch.start)
    pairs = zip(content, patch.old, patch.new, strict=False)  # what lies beyond the old end may be anything
    return all(byte in (old, new) for byte, old, new in pairs)


def _to_dict(change: Change) -> dict[str, object]:
    patches = [
        {"start": patch.start, "old": base64.b64encode(patch.old).decode(), "new": base64.b64encode(patch.new).decode()}
        for patch in change.patches
    ]
    return {"name": change.name, "old_size": change.old_size, "new_size": change.new_size, "patches": patches}


def _from_dict(values: dict[str, Any]) -> Change:
    patches = tuple(
        Patch(int(item["start"]), base64.b64decode(item["old"]), base64.b64decode(item["new"]))
        for item in values["patches"]
    )
    name, old_size, new_size = str(values["name"]), int(values["old_size"]), int(values["new_size"])
    if not is_file_name(name):
        raise ValueError(f"{name!r} is no file name")
    ends = [old_size, *(patch.start + len(patch.new) for patch in patches)]
    grown = sum(len(patch.new) for patch in patches)
    if patches and (min(patch.start for patch in patches) < 0 or not max(ends) == new_size <= old_size + grown):
        raise ValueError(f"changes of {name!r} do not lead from {old_size} to {new_size} bytes")
    return Change(name, old_size, new_size, patches)
