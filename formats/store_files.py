"""The files that a store becomes: as they are in it, or one file of all its shards."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .checksums import Piece
from .heads import Metadata, layout
from .manifest import KEY, finished_head
from .output_store import OutputStore, StoredShard, StoredTensor
from .shards import SUFFIX, Shard, index_file
from .tensors import Slot


@dataclass(frozen=True)
class FileLayout:
    """One file: its head, and the tensors behind it."""

    name: str
    head: bytes
    size: int
    tensors: tuple[tuple[StoredTensor, Sequence[Piece]], ...]
    """In the order of their bytes, with the checksums of what was written of them."""


@dataclass(frozen=True)
class Files:
    """All files with tensors, and the index."""

    files: tuple[FileLayout, ...]
    index: tuple[str, bytes] | None


def lay_out_files(store: OutputStore, single: str | None) -> Files:
    """What the conversion would have written to a folder, or to the file ``single``.

    Raises CheckpointError for a store that lies. Such a file is one, unless a size of shards was asked for.
    """
    shards = [store.shard(number) for number in range(1, len(store.table.shards) + 1)]
    pieces = [store.pieces(number, shard) for number, shard in enumerate(shards, 1)]
    if single is not None and not store.table.split and len(shards) > 1:
        return Files((_joined(shards, pieces, single),), None)
    names = [shard.name for shard in shards]
    if single is not None:
        names = [single.removesuffix(SUFFIX) + _ending(shard.name) for shard in shards] if len(shards) > 1 else [single]
    files, named = [], []
    for name, shard, own in zip(names, shards, pieces, strict=True):
        tensors = tuple(zip(shard.tensors, own, strict=True))
        named.append(_named(shard, name))
        files.append(FileLayout(name, finished_head(shard.head, _sums(tensors), name), shard.size, tensors))
    index = index_file(named)
    return Files(tuple(files), None if index is None else (index[0].name, index[1]))


def _ending(name: str) -> str:
    found = re.search(r"-\d{5}-of-\d{5}\.safetensors$", name)
    return found[0] if found else f"-{name}"


def _joined(shards: Sequence[StoredShard], pieces: Sequence[Sequence[Sequence[Piece]]], name: str) -> FileLayout:
    """One file of all tensors."""
    own = {tensor.array: found for shard, lists in zip(shards, pieces, strict=True)
           for tensor, found in zip(shard.tensors, lists, strict=True)}  # fmt: skip
    tensors = [tensor for shard in shards for tensor in shard.planned]
    head, starts, size = layout([tensor.ref for tensor in tensors], _joined_metadata(shards))
    order = sorted(range(len(tensors)), key=lambda index: (starts[index], tensors[index].ref.nbytes))
    ordered = tuple((tensors[index], own[tensors[index].array]) for index in order)
    return FileLayout(name, finished_head(head, _sums(ordered), name), size, ordered)


def _joined_metadata(shards: Sequence[StoredShard]) -> dict[str, str]:
    """``__metadata__`` of one file: that of a shard, but for the room for checksums, which is that of all."""
    metadata = dict(shards[0].metadata)
    if all(KEY in shard.metadata for shard in shards):
        entries = [json.loads(shard.metadata[KEY]) for shard in shards]
        rooms = {name: room for entry in entries for name, room in entry["tensors"].items()}
        metadata[KEY] = json.dumps({**entries[0], "tensors": rooms}, separators=(",", ":"), ensure_ascii=False)
    return metadata


def _sums(tensors: Sequence[tuple[StoredTensor, Sequence[Piece]]]) -> dict[str, Sequence[Piece]]:
    return {tensor.ref.name: own for tensor, own in tensors}


def _named(shard: StoredShard, name: str) -> Shard:
    """A shard under its final name."""
    refs = [tensor.ref for tensor in shard.planned]
    slots = tuple(Slot(ref.name, ref.dtype, ref.shape, name, ref.start) for ref in refs)
    return Shard(name, shard.size, slots, Metadata(b""))
