"""safetensors headers, read as though an attacker wrote them.

A file is 8 bytes of header length (little endian), that many bytes of JSON, then the data without holes. Everything
later trusts the offsets found here, so that each one is proven against the size of the file before it is handed on.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, did_you_mean, shown
from .fileio import Reader
from .tensors import DTYPE_BITS, TensorRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .places import Place

MAX_HEADER_BYTES = 100_000_000
"""Longest JSON header that is read or written; the safetensors library has the same limit."""

METADATA = "__metadata__"
_MAX_COUNT = 2**63
_PICKLE = "is a pickle, which can run code; convert it to safetensors first"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", _PICKLE),
    *((b"\x80" + bytes([protocol]), _PICKLE) for protocol in range(2, 6)),
    (b"GGUF", "is a GGUF file; quantloom reads safetensors"),
    (b"\x89HDF", "is an HDF5 file; quantloom reads safetensors"),
    *((start, "is a JSON file; give the folder or its *.safetensors.index.json") for start in (b'{"', b"{\n", b"{\r")),
    (b"version ", "is a Git LFS pointer and not the file itself; fetch it with 'git lfs pull'"),
    (b"<!DOCTYP", "is a web page and not the file itself; the download needs a login or another address"),
    (b"<html", "is a web page and not the file itself; the download needs a login or another address"),
)


@dataclass(frozen=True)
class Header:
    """What one safetensors file says about itself, checked."""

    path: str
    """The file."""
    refs: tuple[TensorRef, ...]
    """Every tensor, in the order of its bytes."""
    metadata: dict[str, str]
    """``__metadata__``, empty when the file has none."""
    digest: str
    """sha256 (hex) of the header bytes, the 8 bytes of length included."""


def read_header(path: str | Place) -> Header:
    """Read and check the header of one file; no weight byte is touched.

    Raises CheckpointError, naming file, tensor and the numbers that disagree, for everything that is not a well-formed
    safetensors file whose data fills the rest of the file exactly.
    """
    with Reader(path) as reader:
        return parse_head(str(path), _read_head(reader), reader.size)


def parse_head(where: str, head: bytes, size: int) -> Header:
    """The header of a file of ``size`` bytes that begins with ``head``, checked as `read_header` does."""
    table = parse_json(head[8:], f"{where}: header")
    if not isinstance(table, dict):
        raise CheckpointError(f"{where}: header is a JSON {type(table).__name__}, not an object")
    metadata = _check_metadata(where, table.pop(METADATA, {}))
    refs = [_check_tensor(where, name, info, len(head)) for name, info in table.items()]
    # Tensors without elements share their offset with a neighbour and have to come before it.
    refs.sort(key=lambda ref: (ref.start, ref.nbytes))
    _check_coverage(where, refs, len(head), size)
    return Header(where, tuple(refs), metadata, hashlib.sha256(head).hexdigest())


def parse_json(raw: bytes, where: str) -> Any:
    """Parse JSON that may be hostile: UTF-8 only, no duplicate key, no NaN, no number that float64 or text that UTF-8
    cannot hold.

    Raises CheckpointError that begins with ``where``.
    """
    try:
        hooks: Any = {"object_pairs_hook": _unique, "parse_constant": _no_constant, "parse_float": _finite}
        value = json.loads(raw.decode("utf-8"), **hooks)
        if b"\\u" in raw:
            # An escape can smuggle in half a surrogate pair, which fails much later, when the name is written.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise CheckpointError(f"{where}: broken JSON: nested too deep") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: broken JSON: {str(error)[:300]}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {shown(twice)}")
    return table


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{shown(digits)} is too large a number")
    return number


def _read_head(reader: Reader) -> bytes:
    start = bytearray(min(9, reader.size))
    reader.read_into(memoryview(start), 0)
    length, room = int.from_bytes(start[:8], "little"), reader.size - 8
    # The magic of a pickle is also the length of a 640-byte header, so that a plausible header is believed first.
    if start[8:] != b"{" or length > MAX_HEADER_BYTES:
        for magic, kind in _MAGIC:
            if start.startswith(magic):
                raise CheckpointError(f"{reader.path}: {kind}")
    if room < 0:
        raise CheckpointError(f"{reader.path}: {reader.size} bytes is too short for a safetensors file (8 at least)")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{reader.path}: header length {length} exceeds {MAX_HEADER_BYTES}: not a safetensors file, or damaged"
        )
    if length > room:
        raise CheckpointError(
            f"{reader.path}: header length {length} runs past the end of the file ({room} bytes follow it); "
            "the download is probably incomplete"
        )
    head = bytearray(8 + length)
    reader.read_into(memoryview(head), 0)
    if head[8:9] != b"{":
        raise CheckpointError(f"{reader.path}: header of {length} bytes does not begin with '{{': no safetensors file")
    return bytes(head)


def _check_metadata(where: str, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: {METADATA} is {shown(metadata)}, not an object of strings")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{where}: {METADATA} key {shown(key)} holds {shown(value)}, not a string")
    return metadata


def _check_tensor(where: str, name: str, info: Any, data_start: int) -> TensorRef:
    """One entry of the header, checked for itself."""
    try:
        dtype, shape, begin = _check_entry(info)
    except ValueError as error:
        raise CheckpointError(f"{where}: tensor {shown(name)}: {error}") from None
    return TensorRef(name, dtype, shape, where, data_start + begin)


def _check_entry(info: Any) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and begin (bytes, relative to the data); ValueError says what is wrong."""
    if not isinstance(info, dict):
        raise ValueError(f"entry is {shown(info)}, not an object")
    if missing := [key for key in ("dtype", "shape", "data_offsets") if key not in info]:
        raise ValueError(f"entry lacks {', '.join(missing)}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        hint = did_you_mean(dtype[:40], DTYPE_BITS) if isinstance(dtype, str) else ""
        raise ValueError(f"unknown dtype {shown(dtype)}{hint}")
    if not _is_counts(shape):
        raise ValueError(f"shape {shown(shape)} is not a list of non-negative integers")
    if not _is_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] < _MAX_COUNT:
        raise ValueError(f"data_offsets {shown(offsets)} is not [begin, end] with begin <= end < 2**63")
    elements = 1
    for length in shape:
        # A zero must not hide the absurd rest of a shape: its strides would overflow all the same.
        elements *= max(length, 1)
        if elements > _MAX_COUNT:
            raise ValueError(f"shape {shown(shape)} has more than 2**63 elements")
    bits = 0 if 0 in shape else elements * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{dtype} of shape {shown(shape)} takes {bits} bits, not a whole number of bytes")
    begin, end = offsets
    if bits // 8 != end - begin:
        raise ValueError(
            f"{dtype} of shape {shown(shape)} takes {bits // 8} bytes, but data_offsets {offsets} hold {end - begin}"
        )
    return sys.intern(dtype), _shared_shape(tuple(shape)), begin


@lru_cache(maxsize=4096)
def _shared_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One tuple for all tensors of a shape: a checkpoint of 100,000 tensors has a dozen."""
    return shape


def _check_coverage(where: str, refs: Sequence[TensorRef], data_start: int, size: int) -> None:
    """The tensors, sorted by offset, fill the file from ``data_start`` to ``size`` (bytes) without overlap or hole."""
    end, before = data_start, "header"
    for ref in refs:
        if ref.start != end:
            kind = "overlaps" if ref.start < end else "leaves a hole after"
            raise CheckpointError(
                f"{where}: tensor {shown(ref.name)} {kind} {shown(before)}: "
                f"it begins at byte {ref.start} of the file, where {end} was due"
            )
        end, before = ref.start + ref.nbytes, ref.name
    if end > size:
        raise CheckpointError(
            f"{where}: tensor {shown(before)} ends at byte {end}, beyond the file's {size} bytes: "
            "the file is truncated, fetch it again"
        )
    if end < size:
        raise CheckpointError(
            f"{where}: {size - end} trailing bytes: data ends with {shown(before)} at byte {end}, the file at {size}"
        )


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
