"""Index files: which shard holds which tensor, read as though an attacker wrote them."""

from __future__ import annotations

from pathlib import PureWindowsPath
from typing import Any

from .errors import CheckpointError
from .fileio import Reader
from .places import Place, order
from .safetensors import parse_json

_INDEX = ".safetensors.index.json"
_MAX_INDEX_BYTES = 100_000_000


def read_index(index: Place) -> dict[str, Any]:
    """An index, whose ``weight_map`` names files by tensor; CheckpointError for a broken one."""
    with Reader(index) as reader:
        if reader.size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{index}: index of {reader.size} bytes; at most {_MAX_INDEX_BYTES} are read")
        raw = bytearray(reader.size)
        reader.read_into(memoryview(raw), 0)
    table = parse_json(bytes(raw), f"{index}: index")
    table = table if isinstance(table, dict) else {}
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: index has no 'weight_map' object, which says where each tensor is")
    if bad := [name for name, shard in weight_map.items() if not isinstance(shard, str)]:
        raise CheckpointError(f"{index}: 'weight_map' gives tensor {bad[0]!r} a shard that is not a string")
    if not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' names no tensor")
    return table


def check_shard_name(index: Place, shard: str) -> None:
    """Refuse names that lead out of the folder on any system; links inside it are how download caches work."""
    odd = PureWindowsPath(shard).anchor or "\\" in shard or "\0" in shard
    if odd or not shard.strip("./") or ".." in shard.split("/"):
        raise CheckpointError(f"{index}: shard name {shard!r} is not a plain path inside the folder")


def index_of(folder: Place) -> Place | None:
    """The index that a folder is read through, if it has one."""
    found = [path for path in entries(folder) if path.name.endswith(_INDEX)]
    preferred = [path for path in found if path.name == "model" + _INDEX] or found
    return preferred[0] if len(preferred) == 1 else None


def entries(folder: Place) -> list[Place]:
    """What a folder holds, sorted, without hidden names (macOS puts ``._*.safetensors`` beside real ones)."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=order)
