"""A store of output tensors: created with everything that is known before work, closed with checksums, read back.

Two arrays of bytes lie beside those of the tensors: ``files`` holds, for each shard, its header and a list of its
tensors in the order of the plan, then configuration and tokenizer files; ``checksums`` what tasks wrote.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from .checksums import Piece, covers
from .errors import CheckpointError, shown
from .manifest import parse
from .objects import Objects
from .safetensors import parse_head, parse_json
from .shards import Shard
from .store_table import ShardEntry, SidecarEntry, Table, group_document, read_table, write_table
from .tensors import Slot, TensorRef, TensorSpec
from .zarr_store import (
    CHUNK_BYTES,
    METADATA,
    array_document,
    array_key,
    chunk_bytes,
    read_chunk,
    write_chunk,
)

_FILES, _CHECKSUMS = "files", "checksums"
_WRITERS = 16
"""Small objects that are written at a time: each waits for the store."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a store."""

    ref: TensorRef
    """Its name, dtype, shape, and first byte in its shard."""
    array: str
    """Key of its array."""
    chunk: int
    """Bytes of a chunk."""

    @property
    def count(self) -> int:
        """Number of its chunks."""
        return -(-self.ref.nbytes // self.chunk)


@dataclass(frozen=True)
class StoredShard:
    """One file of a store."""

    name: str
    head: bytes
    size: int
    metadata: Mapping[str, str]
    tensors: tuple[StoredTensor, ...]
    """In the order of their bytes."""
    planned: tuple[StoredTensor, ...]
    """In the order of the plan, which an index and other headers have."""


def table_of(plan: str, program: str, split: bool, shards: Sequence[Shard], chunks: Mapping[str, int],
             sidecars: Mapping[str, bytes]) -> tuple[Table, bytes]:  # fmt: skip
    """The table of an output, and the content of its array ``files``. ``chunks``: bytes of a chunk, by tensor."""
    entries, content = [], []
    for shard in shards:
        places = {slot.name: place for place, slot in enumerate(_by_bytes(shard))}
        rows = [[places[slot.name], chunks[slot.name]] for slot in shard.slots]
        sizes = json.dumps(rows, separators=(",", ":")).encode()
        entries.append(ShardEntry(shard.name, shard.size, len(shard.head), len(sizes)))
        content += [shard.head, sizes]
    files = tuple(SidecarEntry(name, len(data)) for name, data in sidecars.items())
    return Table(plan, program, split, tuple(entries), files), b"".join([*content, *sidecars.values()])


def describe_store(
    objects: Objects, files: bytes, shards: Sequence[Shard], chunks: Mapping[str, int], present: Collection[str] | None
) -> None:
    """Everything but the tensors' bytes, and but the table, whose presence says that all of this is there. Of the
    documents, those whose keys are ``present`` are not written again; without these keys, all are. ``files`` always is:
    it is small, and whoever assembles needs all of it."""

    def documents() -> Iterator[tuple[str, bytes]]:
        for number, shard in enumerate(shards, 1):
            yield f"{number}/{METADATA}", group_document({"file": shard.name})
            for slot in shard.slots:
                if slot.nbytes:
                    about = {"name": slot.name, "dtype": slot.dtype, "shape": list(slot.shape)}
                    key = f"{array_key(number, slot.start)}/{METADATA}"
                    yield key, array_document(slot.nbytes, chunks[slot.name], about)

    write_all(objects, ((key, content) for key, content in documents() if present is None or key not in present))
    _write_array(objects, _FILES, files)


def write_all(objects: Objects, contents: Iterable[tuple[str, bytes]]) -> None:
    """Many small objects, several at a time; SinkError of the first that fails."""
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="quantloom-store") as pool:
        for _ in pool.map(lambda item: objects.write(*item), contents):
            pass


def close_store(objects: Objects, table: Table, shards: Sequence[Shard], pieces: Mapping[str, Sequence[Piece]]) -> None:
    """Adds checksums, by tensor, and with them says that the store is complete."""
    lists = []
    for shard in shards:
        found = [sorted(pieces.get(slot.name, ()), key=lambda piece: piece.start) for slot in _by_bytes(shard)]
        rows = [[[piece.start, piece.nbytes, piece.checksum] for piece in own] for own in found]
        lists.append(json.dumps(rows, separators=(",", ":")).encode())
    _write_array(objects, _CHECKSUMS, b"".join(lists))
    write_table(objects, replace(table, checksums=tuple(map(len, lists))))


class OutputStore:
    """A store that was created; CheckpointError for what lies, is missing or damaged."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        table = read_table(objects)
        if table is None:
            raise CheckpointError(f"{objects.root}: there is no store of a conversion")
        self.table = table

    def shard(self, number: int) -> StoredShard:
        """Shard ``number``, from 1 on."""
        entry, where = self.table.shards[number - 1], f"{self.objects.root}: {self.table.shards[number - 1].name}"
        before = sum(other.head + other.chunks for other in self.table.shards[: number - 1])
        head = self._files(before, entry.head)
        if int.from_bytes(head[:8], "little") != len(head) - 8 or head[8:9] != b"{":
            raise CheckpointError(f"{where}: header of {len(head)} bytes does not begin as one")
        header = parse_head(where, head, entry.size)
        rows = parse_json(self._files(before + entry.head, entry.chunks), where)
        found: dict[int, StoredTensor] = {}
        try:
            for place, size in rows:
                ref = header.refs[_within(place, 0, len(header.refs) - 1)]
                found[place] = StoredTensor(ref, array_key(number, ref.start), _within(size, 1, CHUNK_BYTES))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: its list of tensors is none: {error}") from None
        if len(found) != len(header.refs):
            raise CheckpointError(f"{where}: {len(header.refs)} tensors, {len(found)} in its list")
        room = parse(header.metadata, where)
        if room is not None and not room.tensors.keys() <= {ref.name for ref in header.refs}:
            raise CheckpointError(f"{where}: has room for checksums of tensors that it does not hold")
        tensors = tuple(found[place] for place in range(len(found)))
        return StoredShard(entry.name, head, entry.size, header.metadata, tensors, tuple(found.values()))

    def pieces(self, number: int, shard: StoredShard) -> list[list[Piece]]:
        """Of a complete store, the checksums of every tensor of a shard, in order."""
        assert self.table.checksums is not None
        where, lengths = f"{self.objects.root}: checksums of {shard.name}", self.table.checksums
        text = _read_array(self.objects, _CHECKSUMS, sum(lengths), sum(lengths[: number - 1]), lengths[number - 1])
        rows = parse_json(text, where)
        if not isinstance(rows, list) or len(rows) != len(shard.tensors):
            raise CheckpointError(f"{where}: not one list for each of {len(shard.tensors)} tensors")
        found = []
        for tensor, own in zip(shard.tensors, rows, strict=True):
            try:
                pieces = [Piece(tensor.ref.name, start, nbytes, checksum) for start, nbytes, checksum in own]
                whole = covers(pieces, tensor.ref.nbytes)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{where}: {shown(tensor.ref.name)}: {error}") from None
            if not whole:
                name, nbytes = shown(tensor.ref.name), tensor.ref.nbytes
                raise CheckpointError(f"{where}: do not make up the {nbytes} bytes of {name}")
            found.append(pieces)
        return found

    def sidecars(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of configuration and tokenizer files."""
        place = sum(shard.head + shard.chunks for shard in self.table.shards)
        for file in self.table.sidecars:
            yield file.name, self._files(place, file.nbytes)
            place += file.nbytes

    def chunk(self, tensor: StoredTensor, number: int) -> memoryview:
        """A chunk of a tensor; CheckpointError names both."""
        try:
            whole = read_chunk(self.objects, tensor.array, number, tensor.chunk)
        except CheckpointError as error:
            what = f"chunk {number} of {tensor.count} of tensor {shown(tensor.ref.name)}"
            raise CheckpointError(f"{self.objects.root}/{tensor.array}: {what} {error}; convert again") from error
        return whole[: tensor.ref.nbytes - number * tensor.chunk]

    def _files(self, start: int, nbytes: int) -> bytes:
        return _read_array(self.objects, _FILES, self.table.files_bytes, start, nbytes)


def _by_bytes(shard: Shard) -> list[Slot]:
    """Slots as a header has them that is read."""
    return sorted(shard.slots, key=lambda slot: (slot.start, slot.nbytes))


def _within(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{shown(value)} is no number from {least} to {most}")
    return value


def _write_array(objects: Objects, key: str, content: bytes) -> None:
    if not content:
        return
    size = chunk_bytes(TensorSpec(key, "U8", (len(content),)))
    objects.write(f"{key}/{METADATA}", array_document(len(content), size, {}))
    for number in range(-(-len(content) // size)):
        whole = bytearray(size + 4)
        piece = content[number * size : (number + 1) * size]
        whole[: len(piece)] = piece
        write_chunk(objects, key, number, whole)


def _read_array(objects: Objects, key: str, total: int, start: int, nbytes: int) -> bytes:
    """Bytes of an array that has ``total``; CheckpointError when a chunk is missing or damaged."""
    if not nbytes:
        return b""
    size = chunk_bytes(TensorSpec(key, "U8", (total,)))
    first, last = start // size, (start + nbytes - 1) // size
    try:
        content = b"".join(read_chunk(objects, key, number, size) for number in range(first, last + 1))
    except CheckpointError as error:
        raise CheckpointError(f"{objects.root}/{key}: a chunk {error}; convert again") from error
    return content[start - first * size :][:nbytes]
