"""Headers of files that are to be written: built from names, dtypes and shapes, before any weight exists."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from json.encoder import encode_basestring
from typing import TYPE_CHECKING

from .errors import PlanError, did_you_mean, shown
from .safetensors import MAX_HEADER_BYTES, METADATA
from .tensors import DTYPE_BITS, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DATA_ALIGNMENT = 64
"""The data of a written file starts at a multiple of this many bytes."""


Texts = tuple[bytes | memoryview, ...]
"""``__metadata__`` as JSON in pieces; none where there is none."""


def nothing(_specs: Sequence[TensorSpec]) -> dict[str, str]:
    """No entries."""
    return {}


@dataclass(frozen=True)
class Metadata:
    """``__metadata__`` of the files of a model: entries that all have, and those of each, from the tensors in it."""

    common: bytes
    """As ``metadata_text`` has them: of 100,000 quantized layers they are megabytes, and held once."""
    own: Callable[[Sequence[TensorSpec]], Mapping[str, str]] = nothing

    def of(self, specs: Sequence[TensorSpec]) -> Texts:
        """Of the file with these tensors. What all have is one piece, which is not copied."""
        own = metadata_text(self.own(specs))
        if not own or not self.common:
            return tuple(text for text in (self.common, own) if text)
        return memoryview(self.common)[:-1], b",", memoryview(own)[1:]


def layout(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, list[int], int]:
    """Place tensors in one file: header bytes (length included), start of each spec in the given order, file size.

    Starts and size are in bytes from the beginning of the file. Wider dtypes come first, equal ones keep their order:
    as the data starts aligned, every tensor is then aligned to its element size without a hole, which the format
    forbids. Raises PlanError for what no reader would accept.
    """
    head, placed = _written(specs, Metadata(metadata_text(metadata)).of(specs))
    return head, [placed.length + position for position in placed.starts], placed.length + placed.size


def metadata_text(metadata: Mapping[str, str]) -> bytes:
    """``__metadata__`` as JSON, empty for none; PlanError for what is no text."""
    if not metadata:
        return b""
    return _encoded(json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class Placed:
    """Where tensors lie in one file."""

    starts: list[int]
    """Of each, in the given order, counted from the beginning of the data."""
    size: int
    """Bytes of the data."""
    length: int
    """Bytes of the header."""


def place(specs: Sequence[TensorSpec], metadata: Texts, keep: Callable[[bytes], int] = len) -> Placed:
    """What ``layout`` says but for the header itself, for metadata that is JSON already. ``keep`` is given the entry of
    each tensor, and says how long it is."""
    starts, position, tensors = [0] * len(specs), 0, 0
    seen, separator = {METADATA}, ""
    for index in sorted(range(len(specs)), key=lambda index: -DTYPE_BITS.get(specs[index].dtype, 0)):
        spec = specs[index]
        if spec.name in seen:
            raise PlanError(f"tensor {shown(spec.name)} would be written twice in one file, or has a reserved name")
        seen.add(spec.name)
        starts[index], end = position, position + _nbytes(spec)
        described = _described(spec.dtype, spec.shape)
        tensors += keep(_encoded(f"{separator}{encode_basestring(spec.name)}:{described}[{position},{end}]}}"))
        position, separator = end, ","
    return Placed(starts, position, _frame(metadata, tensors)[0])


def head_of(specs: Sequence[TensorSpec], metadata: Texts) -> bytes:
    """The header, length included."""
    return _written(specs, metadata)[0]


def _written(specs: Sequence[TensorSpec], metadata: Texts) -> tuple[bytes, Placed]:
    tensors = BytesIO()
    placed = place(specs, metadata, tensors.write)
    length, front, back = _frame(metadata, tensors.tell())
    return b"".join([(length - 8).to_bytes(8, "little"), *front, tensors.getbuffer(), back]), placed


def _frame(metadata: Texts, tensors: int) -> tuple[int, Texts, bytes]:
    """Bytes of a header whose entries of tensors have so many, and what stands before and behind these."""
    front: Texts = (b"{",)
    if metadata:
        front = (b'{"' + METADATA.encode() + b'":', *metadata, b"," if tensors else b"")
    length = sum(map(len, front)) + tensors + 1
    back = b"}" + b" " * (-(8 + length) % DATA_ALIGNMENT)
    length += len(back) - 1
    if length > MAX_HEADER_BYTES:
        raise PlanError(f"header of {length} bytes; readers accept {MAX_HEADER_BYTES}: write more shards")
    return 8 + length, front, back


@lru_cache(maxsize=4096)
def _described(dtype: str, shape: tuple[int, ...]) -> str:
    """The part of an entry that tensors of one kind share."""
    return f'{{"dtype":{encode_basestring(dtype)},"shape":[{",".join(map(str, shape))}],"data_offsets":'


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PlanError(f"tensor name or metadata {shown(error.object)} cannot be written as UTF-8") from error


def _nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor; PlanError for one that cannot be written."""
    bits = DTYPE_BITS.get(spec.dtype)
    if bits is None:
        hint = did_you_mean(spec.dtype, DTYPE_BITS)
        raise PlanError(f"tensor {shown(spec.name)}: unknown dtype {spec.dtype!r}{hint}")
    bits *= spec.numel
    if bits % 8:
        shape = list(spec.shape)
        raise PlanError(f"tensor {shown(spec.name)}: {spec.dtype} of shape {shape} is not a whole number of bytes")
    return bits // 8
