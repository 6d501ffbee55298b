"""Makes files of a store of output tensors: streams chunks in order, checks every one, and names the files at the end.

What comes out is byte for byte what the conversion would have written there itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..formats.checksums import Comparing, Piece
from ..formats.errors import CheckpointError, UsageError, shown
from ..formats.objects import objects_at
from ..formats.output_store import OutputStore, StoredTensor
from ..formats.shards import is_single_file, is_store
from ..formats.store_files import FileLayout, lay_out_files
from ..formats.store_table import Table
from ..formats.urls import hide, is_url
from .assemble_bucket import BucketTarget
from .assemble_folder import FolderTarget
from .assemble_targets import Out, Target, named_before
from .sizes import count, show_seconds, show_size

WORKERS = 8
"""Chunks that are read at a time."""
_PER_FILE = 4
"""Of these, as many as one file gets: it is written by one thread."""


@dataclass(frozen=True)
class Assembled:
    """What was made of a store."""

    store: str
    output: str
    files: tuple[str, ...]
    nbytes: int
    seconds: float

    def summary(self) -> str:
        """One line."""
        files = count(len(self.files), "file")
        return f"{self.output}: {files}, {show_size(self.nbytes)} in {show_seconds(self.seconds)}; all checksums fit"

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        return {"store": self.store, "output": self.output, "files": list(self.files), "bytes": self.nbytes,
                "seconds": self.seconds}  # fmt: skip


def assemble(store: str, output: str, *, overwrite: bool = False, workers: int = WORKERS) -> Assembled:
    """Writes the model in ``store`` to a .safetensors file, a folder, or under the prefix of a URL.

    Raises UsageError for a path that cannot be either, CheckpointError for a store that is incomplete or damaged,
    PlanError for an output that exists, SinkError when it cannot be written; nothing has a final name then.
    """
    began = time.perf_counter()
    if not is_store(store):
        raise UsageError(f"{store}: is no store: its name ends in .zarr")
    if is_store(output):
        raise UsageError(f"{output}: is a store; name a .safetensors file, a folder, or a URL prefix")
    if workers < 1:
        raise UsageError(f"{workers} workers: at least one is needed")
    source = OutputStore(objects_at(store))
    if source.table.checksums is None:
        raise CheckpointError(_lacking(source))
    target, single = _target(output)
    target.recover()
    files = lay_out_files(source, single)
    contents = [*source.sidecars()] if single is None else []
    if files.index is not None:
        contents.append(files.index)
    expected = {file.name: (file.size, file.head) for file in files.files}
    expected |= {name: (len(content), content) for name, content in contents}
    nbytes = sum(size for size, _ in expected.values())
    target.check(list(expected), nbytes)
    there = set() if overwrite else named_before(target, expected)
    with target.open():
        _write_files(source, [file for file in files.files if file.name not in there], target, workers)
        for name, content in contents:
            if name not in there:
                with target.file(name, len(content)) as out:
                    out.write(content)
        target.commit([name for name in expected if name not in there], overwrite)
    return Assembled(store, output, tuple(expected), nbytes, time.perf_counter() - began)


def _target(output: str) -> tuple[Target, str | None]:
    """Where files go, and the name of the file when it is one."""
    output = hide(output)
    if is_url(output):
        root, _, name = output.rstrip("/").rpartition("/") if is_single_file(output) else (output.rstrip("/"), "", "")
        return BucketTarget(root), name or None
    path = Path(output)
    if is_single_file(output):
        return FolderTarget(path.parent, alone=False), path.name
    return FolderTarget(path, alone=True), None


def _lacking(source: OutputStore) -> str:
    """Why a store cannot be assembled yet."""
    present = {key for key in source.objects.find() if "/c/" in key}
    table: Table = source.table
    lacking = total = 0
    for number in range(1, len(table.shards) + 1):
        for tensor in source.shard(number).tensors:
            total += 1
            lacking += any(f"{tensor.array}/c/{chunk}" not in present for chunk in range(tensor.count))
    return (
        f"{source.objects.root}: is not complete: {lacking} of {count(total, 'tensor')} lack bytes; run the conversion "
        "into this store again, and it goes on where it stopped"
    )


def _write_files(source: OutputStore, files: Sequence[FileLayout], target: Target, workers: int) -> None:
    lanes = max(1, min(len(files), workers // _PER_FILE))
    ahead = max(1, workers // lanes)
    with ThreadPoolExecutor(workers, thread_name_prefix="quantloom-read") as readers:

        def write(file: FileLayout) -> None:
            with target.file(file.name, file.size) as out:
                out.write(file.head)
                for tensor, pieces in file.tensors:
                    _copy(source, tensor, pieces, out, _ahead(source, tensor, readers, ahead))

        with ThreadPoolExecutor(lanes, thread_name_prefix="quantloom-assemble") as writers:
            running = [writers.submit(write, file) for file in files]
            try:
                for each in running:
                    each.result()
            except BaseException:
                for each in running:
                    each.cancel()
                raise


def _ahead(
    source: OutputStore, tensor: StoredTensor, readers: ThreadPoolExecutor, ahead: int
) -> Iterator[memoryview]:
    """The chunks of a tensor in order, some of them read before they are asked for."""
    waiting: deque[Future[memoryview]] = deque()
    for number in range(tensor.count):
        waiting.append(readers.submit(source.chunk, tensor, number))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _copy(
    source: OutputStore, tensor: StoredTensor, pieces: Sequence[Piece], out: Out, chunks: Iterator[memoryview]
) -> None:
    """Writes chunks; CheckpointError when they are not what tasks said they wrote."""
    comparing = Comparing(pieces)
    for chunk in chunks:
        out.write(chunk)
        try:
            comparing.add(chunk)
        except ValueError as error:
            where = f"{source.objects.root}/{tensor.array}: tensor {shown(tensor.ref.name)}"
            raise CheckpointError(f"{where}: {error}; convert again") from None
