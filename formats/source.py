"""A checkpoint as one flat table of tensors, from a file, folder, index, glob or list; only headers are read.

What is found is checked across files as `safetensors.read_header` checks one: a tensor that is stored twice, missing
from the shard that an index names, or outside the folder is refused here, before any plan is made from it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError
from .fileio import Reader
from .hints import PICKLES, found_instead, near
from .journal import refuse_unfinished
from .manifest import KEY
from .safetensors import Header, parse_json, read_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .tensors import TensorRef

_log = logging.getLogger(__name__)

_INDEX = ".safetensors.index.json"
_WEIGHTS = (*PICKLES, ".gguf", ".onnx", ".h5", ".msgpack", ".safetensors")
_SIDECARS = (".json", ".txt", ".model", ".jinja", ".py", ".md")
_MAX_SIDECAR_BYTES = 64_000_000
_MAX_INDEX_BYTES = 100_000_000
# Headers wait for the disk or the network, not for the processor.
_HEADER_THREADS = 16


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: where everything lies, and nothing of what it holds."""

    refs: dict[str, TensorRef]
    """Every tensor by its key: files in sorted order, bytes in order within a file."""
    metadata: dict[str, str]
    """``__metadata__`` of all files; where they disagree, the first file's word."""
    files: tuple[Path, ...]
    """The safetensors files, sorted."""
    sidecars: tuple[Path, ...]
    """Small files of a source folder that belong to the model: configuration, tokenizer, code. Empty without one."""
    config: dict[str, Any] | None
    """``config.json`` beside the weights; None when it is absent or no JSON object."""
    root: Path
    """Folder of the checkpoint; of its first file, where files of several folders were given."""
    fingerprint: str
    """sha256 (hex) over name, size, mtime and header of every file: another value, another checkpoint."""
    layout: str
    """sha256 (hex) over size and header of every file: the same wherever and whenever the files were put down."""
    stamps: tuple[tuple[Path, int, int], ...]
    """Every file with its bytes and mtime (ns) when it was opened: what a later look must find again."""
    takes_all: bool = False
    """Whether every safetensors file directly in ``root`` belongs to it: a folder without an index."""

    @property
    def place(self) -> Path:
        """What messages call it: its file, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.root

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self.refs.values())


def open_source(where: str | Path | Sequence[str | Path]) -> Source:
    """Open a .safetensors file, a folder, an ``*.index.json``, a glob pattern or a list of files.

    A folder is read through its index when it has one (``model.safetensors.index.json`` before others), so that stray
    copies beside it do no harm; otherwise every safetensors file directly in it counts.

    Raises CheckpointError for whatever is not one complete, unambiguous checkpoint.
    """
    try:
        return _open(where)
    except OSError as error:
        # Every look at a name can fail: a parent that may not be entered, a name too long, a network drive gone.
        raise CheckpointError(f"{error.filename or where}: cannot be read: {error.strerror or error}") from error


def _open(where: str | Path | Sequence[str | Path]) -> Source:
    if not isinstance(where, str | Path):
        return _open_list([Path(item) for item in where])
    if not str(where):
        raise CheckpointError("the path of the checkpoint is empty")
    path = Path(where)
    if path.is_dir():
        index = index_of(path)
        if index:
            return _open_index(index)
        return replace(_read(_shards_of(path), path, _sidecars(path)), takes_all=True)
    if path.name.lower().endswith(".index.json") and path.is_file():
        return _open_index(path)
    # A file may have brackets in its own name, so that a pattern is only what is no file.
    if os.path.lexists(path):
        return _read([path], path.parent, ())
    if glob.has_magic(str(where)):
        return _open_glob(str(where))
    raise CheckpointError(f"{path}: does not exist{near(path)}")


def _open_list(paths: list[Path]) -> Source:
    if not paths:
        raise CheckpointError("no file was given: the list of checkpoint files is empty")
    for path in paths:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder; a list holds files only, give a folder alone")
        if not os.path.lexists(path):
            raise CheckpointError(f"{path}: does not exist{near(path)}")
    return _read(paths, min(paths).parent, ())


def _open_glob(pattern: str) -> Source:
    # Path.glob refuses absolute patterns and finds hidden files.
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    files = [path for path in matches if path.name.endswith(".safetensors") and not path.is_dir()]
    if not files:
        raise CheckpointError(f"{pattern}: no safetensors file matches this pattern; {found_instead(matches)}")
    return _read(files, min(files).parent, ())


def _open_index(index: Path) -> Source:
    """Open the shards that an index names, and hold it to its word."""
    weight_map, root = read_index(index)["weight_map"], index.parent
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        _check_shard_name(index, shard)
    if missing := [shard for shard in shards if not (root / shard).is_file()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}; "
            "the download is probably incomplete"
        )
    source = _read([root / shard for shard in shards], root, _sidecars(root))
    paths = {shard: str((root / shard).absolute()) for shard in shards}
    for name, shard in weight_map.items():
        ref = source.refs.get(name)
        if ref is None or ref.path != paths[shard]:
            found = "no shard has it" if ref is None else f"it is in {Path(ref.path).name}"
            raise CheckpointError(f"{index}: tensor {name!r} is missing from shard {shard}: {found}")
    if unlisted := [name for name in source.refs if name not in weight_map]:
        _log.warning("%s lacks %d tensors of its shards, %r first; they are read", index, len(unlisted), unlisted[0])
    return source


def read_index(index: Path) -> dict[str, Any]:
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


def _check_shard_name(index: Path, shard: str) -> None:
    """Refuse names that lead out of the folder on any system; links inside it are how download caches work."""
    odd = PureWindowsPath(shard).anchor or "\\" in shard or "\0" in shard
    if odd or not shard.strip("./") or ".." in shard.split("/"):
        raise CheckpointError(f"{index}: shard name {shard!r} is not a plain path inside the folder")


def index_of(folder: Path) -> Path | None:
    """The index that a folder is read through, if it has one."""
    found = [path for path in _entries(folder) if path.name.endswith(_INDEX)]
    preferred = [path for path in found if path.name == "model" + _INDEX] or found
    return preferred[0] if len(preferred) == 1 else None


def _shards_of(folder: Path) -> list[Path]:
    entries = _entries(folder)
    # Broken links stay in, to be refused by name: left out, a part of the model would go missing in silence.
    files = [path for path in entries if path.name.endswith(".safetensors") and not path.is_dir()]
    if not files:
        inside = sorted({path.parent.name for path in islice(folder.glob("*/*.safetensors"), 100)})
        hint = f"; sub-folders that hold some: {', '.join(inside)}" if inside else ""
        raise CheckpointError(f"{folder}: no safetensors file in this folder; {found_instead(entries)}{hint}")
    return [path for path in files if not path.name.startswith("adapter_")] or files


def _sidecars(folder: Path) -> tuple[Path, ...]:
    return tuple(
        path
        for path in _entries(folder)
        if (path.name.endswith(_SIDECARS) or path.name.startswith(("tokenizer", "merges")))
        and not path.name.endswith((".index.json", *_WEIGHTS))
        and path.is_file()
        and path.stat().st_size <= _MAX_SIDECAR_BYTES
    )


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden names (macOS puts ``._*.safetensors`` beside real ones)."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _read(paths: Iterable[Path], root: Path, sidecars: tuple[Path, ...]) -> Source:
    """Read every header and join them; each file counts once, however often and by whatever spelling it is given."""
    files = tuple(sorted({os.path.realpath(path): path for path in sorted(paths, reverse=True)}.values()))
    refuse_unfinished(files)
    with ThreadPoolExecutor(max_workers=min(_HEADER_THREADS, len(files))) as pool:
        opened = list(pool.map(_read_one, files))
    refs: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    for header, _ in opened:
        for ref in header.refs:
            if (first := refs.setdefault(ref.name, ref)) is not ref:
                raise CheckpointError(
                    f"tensor {ref.name!r} is in two files, {first.path} and {ref.path}; "
                    "give one file, the index, or a pattern that picks one set of shards"
                )
        if any(metadata.get(key, value) != value for key, value in header.metadata.items() if key != KEY):
            _log.warning("%s: __metadata__ disagrees with an earlier file, which is kept", header.path)
        metadata = header.metadata | metadata
    stamps = [stamp for _, stamp in opened]
    fingerprint = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    layout = hashlib.sha256(json.dumps([[size, digest] for _, size, _, digest in stamps]).encode()).hexdigest()
    seen = tuple((path, size, mtime) for path, (_, size, mtime, _) in zip(files, stamps, strict=True))
    return Source(refs, metadata, files, sidecars, _config(root), root, fingerprint, layout, seen)


def _read_one(path: Path) -> tuple[Header, tuple[str, int, int, str]]:
    """A file's header, and what tells it from another version of itself: name, bytes, mtime (ns), header digest."""
    header = read_header(path.absolute())  # workers may stand in another folder
    status = path.stat()
    return header, (path.name, status.st_size, status.st_mtime_ns, header.digest)


def _config(root: Path) -> dict[str, Any] | None:
    path = root / "config.json"
    try:
        if path.stat().st_size > _MAX_SIDECAR_BYTES:
            return None
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None
