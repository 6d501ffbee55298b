"""Output tensors as Zarr v3 arrays, for workers that share no disk: where each lies, and its bytes in whole chunks.

    <store>/<shard>/<start>/zarr.json   array of the bytes (uint8) of the tensor that begins at this byte of this shard
                            c/<n>       chunk n: its bytes, and their CRC-32C (the codec ``crc32c`` of Zarr)

Chunks are whole rows where a row is no larger, and those of row ranges that are tasks of their own never share one, so
that no two workers write the same object. Nothing is compressed: what a quantizer leaves is nearly
noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any

import google_crc32c
import numpy as np

from .checksums import Comparing, Piece
from .errors import CheckpointError, SinkError
from .objects import Objects, objects_at
from .shards import SUFFIX
from .tensors import Slot, TensorSpec

CHUNK_BYTES = 8 << 20
"""A chunk is at most as large: one object, one request."""
METADATA = "zarr.json"
_CRC_BYTES = 4
_TILE_ROWS = 128
"""Stored rows are padded to no more than a multiple of this."""

Parts = Sequence[tuple[int, int]]
"""Row ranges that are tasks of their own; empty for one task."""


def in_store(slot: Slot) -> bool:
    """Whether a slot lies in a store: its path ends in a shard's number, not in a file name."""
    return not slot.path.endswith(SUFFIX)


def array_key(shard: int | str, start: int) -> str:
    """Key of the array of a tensor: number of its shard, from 1 on, and the tensor's first byte in it."""
    return f"{shard}/{start}"


def chunk_bytes(spec: TensorSpec, parts: Parts = ()) -> int:
    """Bytes of one chunk; the last one of a tensor may be cut short."""
    if not spec.nbytes:
        return 1
    step = math.gcd(*_stored_steps(spec, parts)) if parts else 0
    if step:  # every range begins with a chunk
        most = CHUNK_BYTES // spec.row_bytes
        return _largest_divisor(step, most) * spec.row_bytes if most else _largest_divisor(spec.row_bytes, CHUNK_BYTES)
    count = -(-spec.nbytes // CHUNK_BYTES)
    rows = spec.shape[0] if spec.shape else 1
    if rows < count or spec.nbytes % rows:
        return -(-spec.nbytes // count)
    return min(-(-rows // count), CHUNK_BYTES // spec.row_bytes) * spec.row_bytes


def chunk_length(nbytes: int, chunk: int, number: int) -> int:
    """Bytes of a tensor in its chunk ``number``."""
    return min(chunk, nbytes - number * chunk)


def _stored_steps(spec: TensorSpec, parts: Parts) -> list[int]:
    """Stored rows of one row range, in every way in which the tensor's rows can stand for those of the weight: one for
    one (padded, or not), or one for a block of them. Empty for a tensor that one task writes, such as a scalar."""
    step, rows = parts[0][1] - parts[0][0], parts[-1][1]
    stored = spec.shape[0] if spec.shape else 1
    if rows <= stored <= -(-rows // _TILE_ROWS) * _TILE_ROWS:
        return [step]
    blocks = range(max(2, -(-rows // stored)), step + 1) if 1 < stored < rows else ()
    return [step // block for block in blocks if step % block == 0 and -(-rows // block) == stored]


def _largest_divisor(number: int, most: int) -> int:
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return max(each for found in small for each in (found, number // found) if each <= most)


@cache
def _template() -> str:
    """Metadata of an array, as the package writes it."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.core.buffer import default_buffer_prototype

    array: Any = zarr.create_array(
        store={}, shape=(1,), chunks=(1,), dtype="uint8", fill_value=0, compressors=[Crc32cCodec()], zarr_format=3
    )
    return bytes(array.metadata.to_buffer_dict(default_buffer_prototype())[METADATA].to_bytes()).decode()


def array_document(nbytes: int, chunk: int, attributes: dict[str, Any]) -> bytes:
    """The ``zarr.json`` of an array of so many bytes."""
    document = json.loads(_template())
    document["shape"], document["attributes"] = [nbytes], attributes
    document["chunk_grid"]["configuration"]["chunk_shape"] = [chunk]
    return json.dumps(document).encode()


def write_chunk(objects: Objects, array: str, number: int, content: bytearray) -> None:
    """``content`` is a whole chunk and room for its checksum, which is filled in."""
    body = np.frombuffer(content, dtype=np.uint8)[:-_CRC_BYTES]
    content[-_CRC_BYTES:] = google_crc32c.value(body).to_bytes(_CRC_BYTES, "little")
    objects.write(f"{array}/c/{number}", content)


def read_chunk(objects: Objects, array: str, number: int, chunk: int) -> memoryview:
    """A whole chunk, padding included. CheckpointError when it is missing or not what was written."""
    content = objects.read(f"{array}/c/{number}", chunk + _CRC_BYTES)
    if content is None:
        raise CheckpointError("is missing")
    if len(content) != chunk + _CRC_BYTES:
        raise CheckpointError(f"has {len(content)} bytes, {chunk + _CRC_BYTES} belong there")
    body = np.frombuffer(content, dtype=np.uint8)[:-_CRC_BYTES]
    if google_crc32c.value(body) != int.from_bytes(content[-_CRC_BYTES:], "little"):
        raise CheckpointError("is not what was written (CRC-32C)")
    return memoryview(content)[:-_CRC_BYTES]


class ArrayWriter:
    """The bytes of one task's tensors, in any order; a chunk is written when the last of its bytes is there."""

    def __init__(self, parts: Parts = ()) -> None:
        self._parts = parts
        self._objects: dict[str, Objects] = {}
        self._sizes: dict[tuple[str, int], int] = {}
        self._open: dict[tuple[str, int, int], tuple[bytearray, int]] = {}

    def write(self, slot: Slot, offset: int, content: memoryview) -> None:
        """Bytes of a tensor from ``offset`` on. SinkError when an object cannot be written."""
        place = slot.path, slot.start
        if place not in self._sizes:
            self._sizes[place] = chunk_bytes(slot, self._parts)
        size = self._sizes[place]
        while len(content):
            number, within = divmod(offset, size)
            piece = content[: size - within]
            started = self._open.pop((*place, number), None)
            whole, filled = (bytearray(size + _CRC_BYTES), 0) if started is None else started
            whole[within : within + len(piece)] = piece
            filled += len(piece)
            if filled < chunk_length(slot.nbytes, size, number):
                self._open[(*place, number)] = whole, filled
            else:
                root, _, shard = slot.path.rpartition("/")
                write_chunk(self._at(root), array_key(shard, slot.start), number, whole)
            offset, content = offset + len(piece), content[len(piece) :]

    def finish(self, _sync: bool = True) -> None:
        """SinkError when a chunk has not got all its bytes: another task would write it too. Objects are durable."""
        for (path, start, number), (whole, filled) in self._open.items():
            have = f"{filled} of {len(whole) - _CRC_BYTES} bytes"
            raise SinkError(f"{path}/{start}: chunk {number} has {have} at the end of its task: please report this")

    def _at(self, root: str) -> Objects:
        if root not in self._objects:
            self._objects[root] = objects_at(root)
        return self._objects[root]


def missing_chunk(slots: Sequence[Slot], parts: Parts, present: Collection[str]) -> str:
    """The first chunk of these tensors that is not among the keys ``present``, in words; empty when all are there."""
    for slot in slots:
        for number in range(_count(slot, parts)):
            if f"{_array_of(slot)}/c/{number}" not in present:
                return f"chunk {number} of {slot.name} is missing"
    return ""


def changed_chunk(objects: Objects, slot: Slot, parts: Parts, pieces: Iterable[Piece]) -> str:
    """The first chunk of a tensor that is not what was written, by its own checksum or those of the ``pieces`` that
    make up the tensor, in words; empty when all are."""
    size, comparing = chunk_bytes(slot, parts), Comparing(sorted(pieces, key=lambda piece: piece.start))
    for number in range(_count(slot, parts)):
        try:
            whole = read_chunk(objects, _array_of(slot), number, size)
            comparing.add(whole[: chunk_length(slot.nbytes, size, number)])
        except (CheckpointError, ValueError) as error:
            return f"chunk {number} of {slot.name}: {error}"
    return ""


def _array_of(slot: Slot) -> str:
    return array_key(slot.path.rpartition("/")[2], slot.start)


def _count(slot: Slot, parts: Parts) -> int:
    return -(-slot.nbytes // chunk_bytes(slot, parts))


def writing_bytes(slots: Sequence[Slot], parts: Parts) -> int:
    """Memory of an `ArrayWriter` for these slots: a chunk of each, and what a client holds to send the largest."""
    sizes = [min(chunk_bytes(slot, parts), slot.nbytes) for slot in slots if in_store(slot)]
    return sum(sizes) + 2 * max(sizes, default=0)
