"""The journal of a run: which plan it carries out, a line for each finished layer, and that files get their names.

Every line is JSON behind its own checksum. One that does not fit its checksum (the power went while it was written) is
as good as not there: its layer is done again. A line is written only after the bytes that it speaks of are on the
device. Nothing in a journal says where to write: places come from the plan alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import __version__
from ..formats.checksums import checksum
from ..formats.errors import CheckpointError, SinkError, shown
from ..formats.fileio import sync_dir
from ..stages.work import Receipt
from .plan import Plan
from .receipt_json import read_receipt, receipt_dict

SUFFIX = ".journal.jsonl"
_VERSION = 1
_MOST_BYTES = 1 << 30
"""A larger file is no journal."""


class Log(Protocol):
    """Where a journal is kept."""

    @property
    def place(self) -> str:
        """What messages call it."""

    def read(self) -> bytes:
        """All that was appended; empty when there is none."""

    def append(self, lines: bytes) -> None:
        """Adds whole lines; they are on the device when it returns. SinkError otherwise."""

    def remove(self) -> None:
        """Takes the journal away, if there is one."""


@dataclass(frozen=True)
class FileLog:
    """A journal beside the parts, on a file system."""

    path: Path

    @property
    def place(self) -> str:
        """Its path."""
        return str(self.path)

    def read(self) -> bytes:
        """Raises CheckpointError for what is no file, or cannot be read."""
        try:
            status = self.path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
                raise CheckpointError(f"{self.path}: stands where a journal belongs and is none: move it away")
            return self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read the journal: {error.strerror or error}") from error

    def append(self, lines: bytes) -> None:
        """Begins with a new line where the last one was cut short."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(self.path, flags, 0o666)
            with os.fdopen(descriptor, "r+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if end and not _ends_a_line(file, end):
                    lines = b"\n" + lines
                while lines:
                    lines = lines[file.write(lines) or 0 :]
                os.fsync(file.fileno())
        except OSError as error:
            raise SinkError(f"{self.path}: cannot write the journal: {error.strerror or error}") from error
        if end == 0:
            sync_dir(self.path.parent)

    def remove(self) -> None:
        """Raises SinkError when it stays."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise SinkError(f"{self.path}: cannot remove the journal: {error.strerror or error}") from error


def _ends_a_line(file: Any, end: int) -> bool:
    file.seek(end - 1)
    return bool(file.read(1) == b"\n")


@dataclass
class Record:
    """What a journal tells."""

    head: Mapping[str, Any]
    """Of the run: version, plan, recipe, source files."""
    receipts: list[Receipt] = field(default_factory=list)
    """Of finished layers and row ranges; of one that is there twice, the later one."""
    committing: Mapping[str, str] | None = None
    """Layers that were kept because they failed, with the reason, once all data was on the device and files began to
    get their names; None before that."""
    broken: int = 0
    """Lines that were cut short or damaged."""


def head_of(plan: Plan) -> dict[str, Any]:
    """The first line: what a later run must have in common with this one, in parts that messages can name."""
    output = plan.output
    shards = [*plan.shards, *([] if plan.adapter is None else [plan.adapter.shard])]
    heads = hashlib.sha256()
    for shard in shards:
        texts = [hashlib.sha256(text).hexdigest() for text in shard.texts]
        heads.update(repr((shard.size, texts, [(slot.name, slot.dtype, slot.shape) for slot in shard.slots])).encode())
    return {
        "journal": _VERSION, "version": __version__, "plan": plan.digest, "layout": plan.source.layout,
        "recipe": plan.recipe.identity(), "dialect": output.dialect, "shard_bytes": output.shard_bytes,
        "kept": dict(plan.settled.kept), "heads": heads.hexdigest(),
        "ranks": None if plan.settled.ranks is None else dict(plan.settled.ranks), "notes": list(plan.settled.notes),
        "source": [[str(path), size, mtime] for path, size, mtime in plan.source.stamps],
        "quantized": [] if plan.base is None else [[str(path), size, mtime] for path, size, mtime in plan.base.stamps],
    }  # fmt: skip


def lines_of(values: Iterable[Mapping[str, Any]]) -> bytes:
    """Lines as they are appended."""
    bodies = (json.dumps(value, separators=(",", ":")).encode() for value in values)
    return b"".join(b"%s %s\n" % (checksum(body).encode(), body) for body in bodies)


def finished_lines(receipts: Iterable[Receipt]) -> bytes:
    """One line for each receipt."""
    return lines_of({"done": receipt_dict(receipt)} for receipt in receipts)


def committing_line(kept: Mapping[str, str]) -> bytes:
    """All data is on the device; with ``kept`` the plan whose files get their names now can be made again."""
    return lines_of([{"commit": dict(kept)}])


def again_line(names: Iterable[str]) -> bytes:
    """What was said of these layers before does not count any more: they are about to be written again."""
    return lines_of([{"again": list(names)}])


def undone_line() -> bytes:
    """The commit failed, and every file is a part again."""
    return lines_of([{"commit": None}])


def read_record(log: Log) -> Record | None:
    """What the journal tells; None when there is none, or the power went while its first line was written.

    Raises CheckpointError for a file that is no journal, or one whose first line is damaged.
    """
    raw = log.read()
    values = [_value(line) for line in raw.splitlines() if line]
    if not any(value is not None for value in values) and len(values) <= 1 and len(raw) < 1 << 20:
        return None
    head = values[0]
    if head is None or "journal" not in head:
        raise CheckpointError(f"{log.place}: is no journal that can be read: its first line is damaged; {GIVE_UP}")
    if head["journal"] != _VERSION:
        theirs = f"a journal of version {shown(head['journal'])}, {_VERSION} is read here"
        raise CheckpointError(f"{log.place}: {theirs}; {GIVE_UP}")
    record = Record(head)
    receipts: dict[tuple[str, tuple[int, int]], Receipt] = {}
    for value in values[1:]:
        try:
            if value is not None and "commit" in value:
                kept = value["commit"]
                record.committing = None if kept is None else {str(name): str(why) for name, why in kept.items()}
                continue
            if value is not None and "again" in value:
                gone = set(value["again"])
                receipts = {key: receipt for key, receipt in receipts.items() if key[0] not in gone}
                continue
            receipt = read_receipt(value["done"] if value is not None else {})
            receipts[receipt.name, receipt.rows] = receipt
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
            record.broken += 1
    record.receipts = list(receipts.values())
    return record


GIVE_UP = "delete it and the *.part files beside it to start over"
"""The way out where a journal is of no use."""


def _value(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None where it is not what was written."""
    found, _, body = line.partition(b" ")
    if found.decode("ascii", "replace") != checksum(body):
        return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
