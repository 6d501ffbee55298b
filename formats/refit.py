"""Other marker tensors and header entries in a file that exists: which bytes change, or how a new file would lie.

JSON may be followed by blanks, so that a shorter marker keeps the bytes of its tensor and a shorter header those of the
header. A longer marker needs no new file where only one-byte dtypes follow it and the header still has room: files that
the safetensors library wrote end in their markers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from .checksums import checksum
from .comfy import HEADER_KEY, MARKER, marker_tensor
from .fileio import Reader
from .heads import layout
from .journal import Patch
from .manifest import amended, resealed
from .markers import Entry
from .safetensors import Header
from .tensors import DTYPE_BITS, TensorRef, TensorSpec

MOST_MOVED = 16 << 20
"""Bytes at the end of a file that move at most, to let markers grow."""

_METADATA = "__metadata__"


@dataclass(frozen=True)
class Rebuilt:
    """A file that is written anew."""

    head: bytes
    """Length and JSON header."""
    size: int
    """Bytes of the whole file."""
    copied: tuple[tuple[TensorRef, int], ...]
    """Stored tensors that stay as they are, and where each begins in the new file."""
    written: tuple[tuple[int, bytes], ...]
    """Begin and content of the markers."""
    names: tuple[str, ...] = ()
    """Of all tensors."""


def patches(header: Header, markers: Mapping[str, Entry], metadata: Mapping[str, str]) -> list[Patch] | None:
    """What changes in a file with these markers (by layer) and ``__metadata__``; None: it needs a new file."""
    own = {ref.name for ref in header.refs}
    moved = _moved(header, markers)
    if moved is None or any(layer + MARKER not in own for layer in markers):
        return None
    with Reader(header.path) as reader:
        old = _read(reader, 0, min([reader.size, *(ref.start for ref in header.refs)]))
        sums = {ref.name: checksum(text) for ref, _, text in moved if text is not None}
        head = _head(old, moved, amended(metadata, sums, header.path))
        if head is None:
            return None
        found = [Patch(0, old, resealed(head, old))]
        for ref, start, text in moved:
            if text is not None or start != ref.start:
                new = _read(reader, ref.start, ref.nbytes) if text is None else text
                found.append(Patch(start, _read(reader, start, max(0, min(len(new), reader.size - start))), new))
    return [patch for patch in map(_trimmed, found) if patch.new]


def rebuilt(header: Header, markers: Mapping[str, Entry], metadata: Mapping[str, str]) -> Rebuilt:
    """The file anew, with these markers (by layer; new ones come last) and ``__metadata__``."""
    made = {spec.name: (spec, text) for spec, text in (marker_tensor(*item) for item in markers.items())}
    kept = [ref for ref in header.refs if ref.name not in made]
    specs: list[TensorSpec] = [made[ref.name][0] if ref.name in made else ref for ref in header.refs]
    specs += [spec for name, (spec, _) in made.items() if name not in {ref.name for ref in header.refs}]
    sums = {name: checksum(text) for name, (_, text) in made.items()}
    head, starts, size = layout(specs, amended(metadata, sums, header.path))
    with Reader(header.path) as reader:
        head = resealed(head, _read(reader, 0, min([reader.size, *(ref.start for ref in header.refs)])))
    begin = {spec.name: start for spec, start in zip(specs, starts, strict=True)}
    copied = tuple((ref, begin[ref.name]) for ref in kept)
    return Rebuilt(head, size, copied, tuple((begin[name], text) for name, (_, text) in made.items()), tuple(begin))


def index_patches(old: bytes, gained: int, placed: Mapping[str, str]) -> list[Patch]:
    """What changes in an index, when its files have so many bytes more and these tensors (file names by name)."""
    table = json.loads(old)
    total = table.get("metadata", {}).get("total_size") if isinstance(table.get("metadata"), dict) else None
    if isinstance(total, int):
        table["metadata"]["total_size"] = total + gained
    table["weight_map"].update(placed)
    if table == json.loads(old):
        return []
    text = (json.dumps(table, indent=2) + "\n").encode()
    return [_trimmed(Patch(0, old, text.ljust(len(old))))]


Moved = list[tuple[TensorRef, int, bytes | None]]
"""Every stored tensor, its new begin, and its new bytes where it is a marker that changes."""


def _moved(header: Header, markers: Mapping[str, Entry]) -> Moved | None:
    """Where tensors lie once markers have their new bytes; None: too much would move, or lose its alignment."""
    result: Moved = []
    shift = moving = 0
    for ref in header.refs:
        layer = ref.name.removesuffix(MARKER)
        text = _fitting(markers[layer], ref.nbytes) if ref.name.endswith(MARKER) and layer in markers else None
        if shift:
            moving += ref.nbytes
            if DTYPE_BITS[ref.dtype] != 8 or moving > MOST_MOVED:
                return None
        result.append((ref, ref.start + shift, text))
        shift += max(0, len(text or b"") - ref.nbytes)
    return result


def _fitting(entry: Entry, room: int) -> bytes:
    """A marker's JSON in so many bytes, without blanks between tokens if need be; in its usual form if it is longer."""
    texts = (json.dumps(entry).encode(), json.dumps(entry, separators=(",", ":")).encode())
    fitting = next((text for text in texts if len(text) <= room), None)
    return texts[0] if fitting is None else fitting.ljust(room)


def _head(old: bytes, moved: Moved, metadata: Mapping[str, str]) -> bytes | None:
    """The header in the same number of bytes, tensors in their old order; None when it does not fit."""
    table = json.loads(old[8:])
    table.pop(_METADATA, None)
    for ref, start, text in moved:
        length = ref.nbytes if text is None else len(text)
        shape = table[ref.name]["shape"] if text is None else [length]
        offsets = [start - len(old), start - len(old) + length]
        table[ref.name] = {**table[ref.name], "shape": shape, "data_offsets": offsets}
    for values in (dict(metadata), _compact(metadata)):
        content = {_METADATA: values, **table} if values else table
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= len(old) - 8:
            return old[:8] + text.ljust(len(old) - 8)
    return None


def _compact(metadata: Mapping[str, str]) -> dict[str, str]:
    """The descriptions of layers without blanks between tokens."""
    entry = metadata.get(HEADER_KEY)
    shorter = {} if entry is None else {HEADER_KEY: json.dumps(json.loads(entry), separators=(",", ":"))}
    return {**metadata, **shorter}


def _trimmed(patch: Patch) -> Patch:
    """Without the bytes at its begin that stay, nor, where the length stays, those at its end."""
    start = _common(patch.old, patch.new)
    old, new = patch.old[start:], patch.new[start:]
    if len(old) == len(new):
        stop = len(old) - _common(old[::-1], new[::-1])
        old, new = old[:stop], new[:stop]
    return Patch(patch.start + start, old, new)


def _common(one: bytes, other: bytes) -> int:
    """How many bytes at the begin are the same."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(index for index in range(length) if one[index] != other[index])


def _read(reader: Reader, start: int, length: int) -> bytes:
    content = bytearray(length)
    reader.read_into(memoryview(content), start)
    return bytes(content)
