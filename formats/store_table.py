"""What a store of output tensors says of itself, in its group's attributes; read as though an attacker wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import PureWindowsPath
from typing import Any

from .errors import CheckpointError, shown
from .objects import Objects
from .safetensors import MAX_HEADER_BYTES, parse_json
from .shards import SUFFIX
from .zarr_store import METADATA

ENTRY = "quantloom_output"
"""Key in the attributes of the group."""
_VERSION = 1
_MAX_TABLE_BYTES = 64_000_000
_MAX_SIDECAR_BYTES = 64_000_000
_MAX_BYTES = 1 << 62
_OWN_KEY = re.compile(r"zarr\.json|(files|checksums|journal|[1-9]\d{0,8})/.+|(.*/)?\.[^/]*\.(part|probe)")
"""Keys of everything that a run puts into a store."""


@dataclass(frozen=True)
class ShardEntry:
    """One file that will be."""

    name: str
    size: int
    """Bytes of the whole file."""
    head: int
    """Bytes of its length and header ..."""
    chunks: int
    """... and of the JSON list of its tensors, [place among its bytes, bytes of a chunk]; both are in ``files``."""


@dataclass(frozen=True)
class SidecarEntry:
    """A configuration or tokenizer file."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Table:
    """All files of an output, and how far it is."""

    plan: str
    """Digest of the plan."""
    program: str
    """Version of quantloom that writes it."""
    split: bool
    """Whether a size of shards was asked for: a single file becomes shards beside each other, too."""
    shards: tuple[ShardEntry, ...]
    sidecars: tuple[SidecarEntry, ...]
    checksums: tuple[int, ...] | None = None
    """Bytes of each shard's list in the array ``checksums``; None until everything is written."""

    @property
    def files_bytes(self) -> int:
        """Bytes of the array ``files``."""
        return sum(shard.head + shard.chunks for shard in self.shards) + sum(file.nbytes for file in self.sidecars)

    def same_output(self, other: Table) -> bool:
        """Whether both are of one plan and say the same of every file."""
        return replace(self, checksums=None) == replace(other, checksums=None)


def is_own(key: str) -> bool:
    """Whether a key of a store's folder may be something that a run wrote there."""
    return _OWN_KEY.fullmatch(key) is not None


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """The ``zarr.json`` of a group (Zarr v3)."""
    return json.dumps({"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}).encode()


def write_table(objects: Objects, table: Table) -> None:
    objects.write(METADATA, group_document({ENTRY: {"version": _VERSION, **asdict(table)}}))


def read_table(objects: Objects) -> Table | None:
    """None where no Zarr group is. CheckpointError for one that is no store of this program, or lies about itself."""
    where = f"{objects.root}/{METADATA}"
    content = objects.read(METADATA, _MAX_TABLE_BYTES)
    if content is None:
        return None
    document = parse_json(bytes(content), where)
    try:
        values = document["attributes"][ENTRY]
    except (TypeError, KeyError, IndexError):
        raise CheckpointError(f"{objects.root}: is a Zarr store, but none of a conversion") from None
    if not isinstance(values, dict) or values.get("version") != _VERSION:
        found = shown(values.get("version")) if isinstance(values, dict) else shown(values)
        raise CheckpointError(f"{where}: version {found} of a store, this program reads {_VERSION}")
    try:
        return _table(values)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _table(values: dict[str, Any]) -> Table:
    """ValueError, KeyError or TypeError for what is none."""
    shards = tuple(
        ShardEntry(_name(item["name"]), _count(item, "size"), _count(item, "head", MAX_HEADER_BYTES + 8),
                   _count(item, "chunks", _MAX_TABLE_BYTES))
        for item in _list(values, "shards")
    )  # fmt: skip
    sidecars = tuple(
        SidecarEntry(_name(item["name"]), _count(item, "nbytes", _MAX_SIDECAR_BYTES))
        for item in _list(values, "sidecars")
    )
    names = [name.lower() for name in (*(shard.name for shard in shards), *(file.name for file in sidecars))]
    if not shards or len(set(names)) < len(names):
        raise ValueError("names no shard, or a file twice")
    if wrong := [shard.name for shard in shards if not shard.name.endswith(SUFFIX)]:
        raise ValueError(f"shard {shown(wrong[0])} does not end in {SUFFIX}")
    reserved = (SUFFIX, ".index.json", ".part", ".previous", ".lock")
    if wrong := [file.name for file in sidecars if file.name.lower().endswith(reserved)]:
        raise ValueError(f"{shown(wrong[0])} is no file that lies beside a model")
    plan, program, split = values["plan"], values["program"], values["split"]
    if not isinstance(plan, str) or not isinstance(program, str) or not isinstance(split, bool):
        raise ValueError("plan, program or split is of another type")
    checksums = None
    if values.get("checksums") is not None:
        checksums = tuple(_number(count, "checksums", _MAX_TABLE_BYTES) for count in _list(values, "checksums"))
        if len(checksums) != len(shards):
            raise ValueError(f"has checksums of {len(checksums)} shards, and {len(shards)} shards")
    return Table(plan, program, split, shards, sidecars, checksums)


def _list(values: dict[str, Any], key: str) -> list[Any]:
    found = values[key]
    if not isinstance(found, list):
        raise ValueError(f"{key} is no list")
    return found


def _count(values: dict[str, Any], key: str, most: int = _MAX_BYTES) -> int:
    return _number(values[key], key, most)


def _number(value: Any, what: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{what} is {shown(value)}, no number of bytes up to {most}")
    return value


def _name(value: Any) -> str:
    """A plain file name that means the same everywhere; ValueError for one that leads elsewhere."""
    plain = isinstance(value, str) and value not in ("", ".", "..") and not re.search(r'[\x00-\x1f/\\:*?"<>|]', value)
    if not plain or len(value.encode()) > 240 or PureWindowsPath(value).is_reserved() or value.startswith("."):
        raise ValueError(f"{shown(value)} is no name of a file beside others")
    assert isinstance(value, str)
    return value
