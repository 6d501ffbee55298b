"""Checksums that travel inside a file: one entry of its header says what every tensor, and the header itself, must be.

The header is laid out before any weight is read, so that it holds room for the digits: `reserve` makes it, and
`finished_head` fills it in when everything is written. The checksum of the header counts its own digits as zeros.

They find damage, not malice: XXH3 is no cryptographic hash, and whoever changes a file can change its entry too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checksums import DIGITS, Piece, checksum, covers
from .errors import CheckpointError, SinkError, shown
from .safetensors import parse_json
from .tensors import TensorRef, TensorSpec

KEY = "quantloom.checksums"
"""The entry in ``__metadata__``: JSON text."""
ALGORITHM = "xxh3_64"

_METADATA = "__metadata__"
_ZEROS = "0" * 16
_OPENING = f'{{"algorithm":"{ALGORITHM}","header":"'
_BEFORE = f'"{KEY}":{json.dumps(_OPENING)[:-1]}'.encode()
"""What stands before the header's own digits. Quotes within JSON strings are escaped: nothing else can look like it."""
_MOST_BYTES = 2**63


@dataclass(frozen=True)
class Manifest:
    """What a file says of its own bytes."""

    header: str
    """Checksum of length and JSON header, these 16 digits being zeros."""
    source: str
    """``Source.layout`` (sha256, hex) of the checkpoint that it was made from."""
    plan: str
    """Digest (sha256, hex) of the plan that wrote it; the files of one model share it."""
    tensors: Mapping[str, tuple[tuple[int | None, str], ...]]
    """Bytes and checksum of each piece, by tensor; None: all bytes of the tensor."""

    def pieces(self, ref: TensorRef) -> tuple[Piece, ...] | None:
        """The pieces of a tensor that is listed; None when they do not make up its bytes."""
        found, start = [], 0
        for nbytes, digits in self.tensors[ref.name]:
            found.append(Piece(ref.name, start, ref.nbytes if nbytes is None else nbytes, digits))
            start += found[-1].nbytes
        return tuple(found) if covers(found, ref.nbytes) else None


def reserve(specs: Iterable[TensorSpec], pieces: Mapping[str, int], source: str, plan: str) -> str:
    """The entry of a file with these tensors, digits zero; ``pieces``: of tensors that several tasks write, how many
    at most."""
    tensors = {
        spec.name: [[spec.nbytes, _ZEROS]] * pieces[spec.name] if pieces.get(spec.name, 1) > 1 else _ZEROS
        for spec in specs
    }
    return _text({"algorithm": ALGORITHM, "header": _ZEROS, "source": source, "plan": plan, "tensors": tensors})


def finished_head(head: bytes, sums: Mapping[str, Sequence[Piece]], where: str) -> bytes:
    """The head of the file ``where`` with the checksums of all its tensors, as long as the planned ``head``; that
    itself where it has no entry.

    SinkError for a tensor that was not written wholly.
    """
    table = json.loads(head[8:])
    entry = table.get(_METADATA, {}).get(KEY)
    if entry is None:
        return head
    values = json.loads(entry)
    for name, room in values["tensors"].items():
        begin, end = table[name]["data_offsets"]
        found = sorted(sums.get(name, ()), key=lambda piece: piece.start)
        most = len(room) if isinstance(room, list) else 1
        if not covers(found, end - begin) or len(found) > most:
            written = sum(piece.nbytes for piece in found)
            raise SinkError(
                f"{where}: tensor {shown(name)}: {written} of {end - begin} bytes were written, in {len(found)} "
                f"pieces of at most {most}: run again; where that does not help, please report it"
            )
        values["tensors"][name] = _stated(found)
    table[_METADATA][KEY] = _text(values)
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return seal(head[:8] + text.ljust(len(head) - 8))


def is_finished(head: bytes, planned: bytes) -> bool:
    """Whether a head is what ``finished_head`` makes of the planned one: sealed, of the same plan and source."""
    wanted = _entry(planned)
    if wanted is None:
        return head == planned
    found = _entry(head) if len(head) == len(planned) and seal(head) == head else None
    return found is not None and (found.plan, found.source) == (wanted.plan, wanted.source)


def _entry(head: bytes) -> Manifest | None:
    try:
        return parse(json.loads(head[8:]).get(_METADATA, {}), "head")
    except (ValueError, AttributeError, RecursionError, CheckpointError):
        return None


def seal(head: bytes) -> bytes:
    """A head with its own checksum in its entry, if it has one that this module wrote."""
    begin = head.find(_BEFORE) + len(_BEFORE)
    if begin < len(_BEFORE):
        return head
    return head[:begin] + _own_checksum(head, begin).encode() + head[begin + len(_ZEROS) :]


def header_checksum(head: bytes) -> str:
    """The checksum of a head, its own digits being zeros; empty when they do not stand where this module puts them."""
    begin = head.find(_BEFORE) + len(_BEFORE)
    return "" if begin < len(_BEFORE) else _own_checksum(head, begin)


def resealed(head: bytes, before: bytes) -> bytes:
    """The head that takes the place of ``before``, sealed; after one that did not fit its checksum it shall not fit."""
    return seal(head) if seal(before) == before else head


def amended(metadata: Mapping[str, str], changed: Mapping[str, str], where: str) -> dict[str, str]:
    """``__metadata__`` with other checksums of whole tensors, where it has an entry; CheckpointError for a broken one.

    Its length stays, unless a tensor is new. The header's own checksum is for ``resealed``.
    """
    if KEY not in metadata:
        return dict(metadata)
    parse(metadata, where)
    values = json.loads(metadata[KEY])
    values["tensors"].update(changed)
    return {**metadata, KEY: _text(values)}


def parse(metadata: Mapping[str, str], where: str) -> Manifest | None:
    """The entry of a file that may be hostile; None when there is none. CheckpointError for a broken one."""
    text = metadata.get(KEY)
    if text is None:
        if moved := [key for key, value in metadata.items() if value.startswith(_OPENING)]:
            raise CheckpointError(f"{where}: header entry {shown(moved[0])} holds checksums, which belong to {KEY}")
        return None
    at = f"{where}: header entry {KEY}"
    values = parse_json(text.encode(errors="surrogatepass"), at)
    if not isinstance(values, dict):
        raise CheckpointError(f"{at}: is {shown(values)}, not an object")
    if values.get("algorithm") != ALGORITHM:
        raise CheckpointError(f"{at}: algorithm {shown(values.get('algorithm'))} is not known here, {ALGORITHM} is")
    digits, tensors = values.get("header"), values.get("tensors")
    if not _is_digits(digits):
        raise CheckpointError(f"{at}: 'header' is {shown(digits)}, not 16 hexadecimal digits")
    for key in ("source", "plan"):
        if not isinstance(values.get(key), str):
            raise CheckpointError(f"{at}: {key!r} is {shown(values.get(key))}, not a string")
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{at}: 'tensors' is {shown(tensors)}, not an object")
    pieces = {name: _pieces(value, f"{at}: tensor {shown(name)}") for name, value in tensors.items()}
    return Manifest(str(digits), values["source"], values["plan"], pieces)


def _own_checksum(head: bytes, begin: int) -> str:
    return checksum(head[:begin] + _ZEROS.encode() + head[begin + len(_ZEROS) :])


def _stated(pieces: Sequence[Piece]) -> Any:
    """JSON values of a tensor's pieces, in order."""
    if len(pieces) > 1:
        return [[piece.nbytes, piece.checksum] for piece in pieces]
    return pieces[0].checksum if pieces else checksum(b"")


def _pieces(value: Any, at: str) -> tuple[tuple[int | None, str], ...]:
    if _is_digits(value):
        return ((None, value),)
    pairs: list[Any] = value if isinstance(value, list) and value else [None]
    for pair in pairs:
        fits = isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and _is_digits(pair[1])
        if not fits or not 0 <= pair[0] < _MOST_BYTES:
            raise CheckpointError(f"{at}: {shown(value)} is neither 16 hexadecimal digits nor pairs of bytes, digits")
    return tuple((pair[0], pair[1]) for pair in pairs)


def _is_digits(value: Any) -> bool:
    return isinstance(value, str) and DIGITS.fullmatch(value) is not None


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False)
