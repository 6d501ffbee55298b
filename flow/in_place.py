"""Edits of a checkpoint where it lies: as few bytes as possible, all files as one, whatever stops it.

Where a file has room, only the bytes that change are written; else a new file is written beside it and takes its place.
Either way a journal (`formats.journal`) makes it one change.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..formats.comfy import HEADER_KEY, MARKER
from ..formats.errors import PlanError, SinkError, printable
from ..formats.fileio import Reader, Writer, create_sparse, free_bytes, sync_file
from ..formats.journal import ENDING, Change, Patch, UnfinishedEdit, carry_out, finish, new_name
from ..formats.layers import PACKED, WEIGHT, group_layers
from ..formats.refit import Rebuilt, index_patches, patches, rebuilt
from ..formats.safetensors import Header, read_header
from ..formats.shards import SUFFIX, stem_of
from ..formats.source import Source, index_of, open_source, read_index
from ..stages.edit import Edit
from ..stages.marker_edits import MarkerEdits
from ..stages.stage import Context
from .commit import check_unchanged, hold
from .sizes import count, show_size

_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class FileEdit:
    """What happens to one file."""

    path: str
    anew: bool
    """Whether a new file takes its place: the header or a marker had no room."""
    nbytes: int
    """Bytes that are written."""

    def words(self, dry_run: bool) -> str:
        """In a sentence."""
        how = "written anew, as the changes do not fit in place" if self.anew else "edited in place"
        return f"{self.path}: {'would be ' if dry_run else ''}{how}, {show_size(self.nbytes)}"


@dataclass(frozen=True)
class EditReport:
    """What an edit in place did, or would do."""

    model: str
    dry_run: bool
    """Whether nothing was written."""
    files: tuple[FileEdit, ...]
    """Those that change."""
    changed: dict[str, int]
    """Number of layers by what happens to them."""
    finished: tuple[str, ...] = ()
    """Files of an interrupted edit that was finished first."""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"finished the interrupted edit of {name}" for name in self.finished]
        lines += [file.words(self.dry_run) for file in self.files]
        lines += [f"{count(number, 'layer')}: {what}" for what, number in self.changed.items()]
        lines += [f"note     {note}" for note in self.notes] + [f"warning  {text}" for text in self.warnings]
        return "\n".join(map(printable, lines))


def edit_in_place(model: str, stage: Edit | None, dry_run: bool = False) -> EditReport:
    """Edits a checkpoint where it lies; an interrupted edit of it is finished first, with ``stage`` None that alone.

    Raises what ``Edit.edits`` raises, PlanError for files that cannot be edited in place, SinkError, with the files as
    they were, when writing fails.
    """
    finished = () if dry_run else _finish(model)
    if stage is None:
        return EditReport(model, dry_run, (), {}, finished)
    source = open_source(model)
    _refuse_places(source)
    context = Context(source)
    edits = stage.edits(group_layers(source), context)
    jobs = _jobs(source, edits)
    if jobs and not dry_run:
        with hold(_locks(source.files[0].parent, stem_of(source.files), several=len(source.files) > 1)):
            check_unchanged(source)
            _carry_out(jobs, source)
    files = tuple(FileEdit(header.path, isinstance(job, Rebuilt), _written(job)) for header, job in jobs)
    changed = dict(Counter(edits.changes.values()).most_common())
    return EditReport(model, dry_run, files, changed, finished, tuple(context.notes), tuple(context.warnings))


Job = tuple[Header, list[Patch] | Rebuilt]
"""A file, and what happens to it."""


def _finish(model: str) -> tuple[str, ...]:
    try:
        open_source(model)
    except UnfinishedEdit as error:
        stem = error.journal.name.removesuffix(ENDING).removesuffix(SUFFIX)
        with hold(_locks(error.journal.parent, stem, several=True)):
            return tuple(finish(error.journal))
    return ()


def _locks(folder: Path, stem: str, several: bool) -> list[Path]:
    """Those of conversions that write the same files."""
    return [*([folder / ".quantloom.lock"] if several else []), folder / f"{stem}{SUFFIX}.lock"]


def _refuse_places(source: Source) -> None:
    for path in source.files:
        if path.is_symlink():
            raise PlanError(f"{path}: is a link to {os.path.realpath(path)}; edit that file, or write to another one")
    if len({path.parent for path in source.files}) > 1:
        raise PlanError(f"{source.root}: its files lie in several folders; name an output instead of --in-place")


def _jobs(source: Source, edits: MarkerEdits) -> list[Job]:
    """Every file that changes."""
    headers = [read_header(path.absolute()) for path in source.files]
    with_entry = [header for header in headers if HEADER_KEY in header.metadata]
    if edits.header is not None and len({header.metadata[HEADER_KEY] for header in with_entry}) > 1:
        raise PlanError(
            f"{source.root}: the {HEADER_KEY} entries of its files differ; name an output instead of --in-place"
        )
    jobs: list[Job] = []
    for header in headers:
        markers = {layer: entry for layer, entry in edits.markers.items() if _home(layer, source) == header.path}
        metadata = header.metadata
        if edits.header is not None and header in (with_entry or headers[:1]):
            metadata = {**metadata, HEADER_KEY: edits.header}
        if markers or metadata != header.metadata:
            found = patches(header, markers, metadata)
            job = rebuilt(header, markers, metadata) if found is None else found
            if job:
                jobs.append((header, job))
    return jobs


def _home(layer: str, source: Source) -> str:
    """The file of a layer's marker; of its weight, where it has none yet."""
    return next(source.refs[layer + part].path for part in (MARKER, WEIGHT, PACKED) if layer + part in source.refs)


def _written(job: list[Patch] | Rebuilt) -> int:
    return job.size if isinstance(job, Rebuilt) else sum(len(patch.new) for patch in job)


def _carry_out(jobs: list[Job], source: Source) -> None:
    folder = source.files[0].absolute().parent
    needed, free = sum(job.size for _, job in jobs if isinstance(job, Rebuilt)), free_bytes(folder)
    if needed > free:
        raise PlanError(
            f"{folder}: the changes do not fit in place, and a new file needs {show_size(needed)}, but only "
            f"{show_size(free)} are free there; free some space, or write to another disk"
        )
    sizes = {str(path.absolute()): size for path, size, _ in source.stamps}
    try:
        changes = [_change(header, job, sizes[header.path]) for header, job in jobs]
        changes += _index_changes(source, jobs, changes)
        carry_out(folder / f"{stem_of(source.files)}{SUFFIX}{ENDING}", changes)
    except BaseException:
        if not (folder / f"{stem_of(source.files)}{SUFFIX}{ENDING}").exists():
            for header, _ in jobs:
                with contextlib.suppress(OSError):
                    new_name(Path(header.path)).unlink(missing_ok=True)
        raise


def _change(header: Header, job: list[Patch] | Rebuilt, size: int) -> Change:
    name = Path(header.path).name
    if isinstance(job, Rebuilt):
        _write_anew(Path(header.path), job)
        return Change(name, size, job.size)
    grown = max([size, *(patch.start + len(patch.new) for patch in job)])
    return Change(name, size, grown, tuple(job))


def _index_changes(source: Source, jobs: list[Job], changes: list[Change]) -> list[Change]:
    """The index tells how many bytes all tensors have, and where each lies: markers grow, and new ones come."""
    index = index_of(source.root)
    if index is None or not set(read_index(index)["weight_map"]) & source.refs.keys():
        return []
    gained = 0
    placed: dict[str, str] = {}
    for (header, job), change in zip(jobs, changes, strict=True):
        gained += change.new_size - change.old_size
        if isinstance(job, Rebuilt):
            gained -= len(job.head) - min([change.old_size, *(ref.start for ref in header.refs)])
            name = Path(header.path).name
            placed |= {tensor: name for tensor in job.names if tensor not in source.refs}
    old = index.read_bytes()
    found = index_patches(old, gained, placed)
    size = max([len(old), *(patch.start + len(patch.new) for patch in found)])
    return [Change(index.name, len(old), size, tuple(found))] if found else []


def _write_anew(path: Path, job: Rebuilt) -> None:
    """The new file beside the old one, complete and on the device."""
    new = new_name(path)
    create_sparse(new, job.size, job.head)
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with Reader(path) as reader, Writer(new) as writer:
        for ref, start in job.copied:
            for first in range(0, ref.nbytes, _CHUNK_BYTES):
                part = buffer[: min(_CHUNK_BYTES, ref.nbytes - first)]
                reader.read_into(part, ref.start + first)
                writer.write(part, start + first)
        for start, content in job.written:
            writer.write(content, start)
    try:
        shutil.copymode(path, new)
    except OSError as error:
        raise SinkError(f"{new}: cannot be given the rights of {path}: {error.strerror or error}") from error
    sync_file(new)
