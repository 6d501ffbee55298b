"""A checkpoint as one flat table of tensors, from a file, folder, index, glob, list or URL; only headers are read.

What is found is checked across files as `safetensors.read_header` checks one: a tensor that is stored twice, missing
from the shard that an index names, or outside the folder is refused here, before any plan is made from it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError
from .hints import PICKLES, found_instead, near, refuse_store
from .index import check_shard_name, entries, index_of, read_index
from .journal import refuse_unfinished
from .manifest import KEY
from .places import Place, RemotePath, exists, order, place, real
from .safetensors import Header, read_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .tensors import TensorRef

_log = logging.getLogger(__name__)

_WEIGHTS = (*PICKLES, ".gguf", ".onnx", ".h5", ".msgpack", ".safetensors")
_SIDECARS = (".json", ".txt", ".model", ".jinja", ".py", ".md")
_MAX_SIDECAR_BYTES = 64_000_000
# Headers wait for the disk or the network, not for the processor.
_HEADER_THREADS = 16


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: where everything lies, and nothing of what it holds."""

    refs: dict[str, TensorRef]
    """Every tensor by its key: files in sorted order, bytes in order within a file."""
    metadata: dict[str, str]
    """``__metadata__`` of all files; where they disagree, the first file's word."""
    files: tuple[Place, ...]
    """The safetensors files, sorted."""
    sidecars: tuple[Place, ...]
    """Small files of a source folder that belong to the model: configuration, tokenizer, code. Empty without one."""
    config: dict[str, Any] | None
    """``config.json`` beside the weights; None when it is absent or no JSON object."""
    root: Place
    """Folder of the checkpoint; of its first file, where files of several folders were given."""
    fingerprint: str
    """sha256 (hex) over name, size, mtime and header of every file: another value, another checkpoint."""
    layout: str
    """sha256 (hex) over size and header of every file: the same wherever and whenever the files were put down."""
    stamps: tuple[tuple[Place, int, int], ...]
    """Every file with its bytes and mtime (ns; of an object, a number made of its entity tag and its time of change)
    when it was opened: what a later look must find again."""
    takes_all: bool = False
    """Whether every safetensors file directly in ``root`` belongs to it: a folder without an index."""

    @property
    def place(self) -> Place:
        """What messages call it: its file, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.root

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self.refs.values())


def open_source(where: str | Path | Sequence[str | Path]) -> Source:
    """Open a .safetensors file, a folder, an ``*.index.json``, a glob pattern or a list of files; each may be a URL.

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
        return _open_list([place(item) for item in where])
    if not str(where):
        raise CheckpointError("the path of the checkpoint is empty")
    refuse_store(str(where))
    path = place(where)
    if path.is_dir():
        index = index_of(path)
        if index:
            return _open_index(index)
        return replace(_read(_shards_of(path), path, _sidecars(path)), takes_all=True)
    if path.name.lower().endswith(".index.json") and path.is_file():
        return _open_index(path)
    # A file may have brackets in its own name, so that a pattern is only what is no file.
    if exists(path):
        return _read([path], path.parent, ())
    if glob.has_magic(str(path)):
        return _open_glob(path)
    raise CheckpointError(f"{path}: does not exist{near(path)}")


def _open_list(paths: list[Place]) -> Source:
    if not paths:
        raise CheckpointError("no file was given: the list of checkpoint files is empty")
    for path in paths:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder; a list holds files only, give a folder alone")
        if not exists(path):
            raise CheckpointError(f"{path}: does not exist{near(path)}")
    return _read(paths, min(paths, key=order).parent, ())


def _open_glob(pattern: Place) -> Source:
    matches: list[Place]
    if isinstance(pattern, RemotePath):
        matches = list(pattern.glob())
    else:  # Path.glob refuses absolute patterns and finds hidden files
        matches = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
    files = [path for path in matches if path.name.endswith(".safetensors") and not path.is_dir()]
    if not files:
        raise CheckpointError(f"{pattern}: no safetensors file matches this pattern; {found_instead(matches)}")
    return _read(files, min(files, key=order).parent, ())


def _open_index(index: Place) -> Source:
    """Open the shards that an index names, and hold it to its word."""
    weight_map, root = read_index(index)["weight_map"], index.parent
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        check_shard_name(index, shard)
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
            found = "no shard has it" if ref is None else f"it is in {place(ref.path).name}"
            raise CheckpointError(f"{index}: tensor {name!r} is missing from shard {shard}: {found}")
    if unlisted := [name for name in source.refs if name not in weight_map]:
        _log.warning("%s lacks %d tensors of its shards, %r first; they are read", index, len(unlisted), unlisted[0])
    return source


def _shards_of(folder: Place) -> list[Place]:
    found = entries(folder)
    # Broken links stay in, to be refused by name: left out, a part of the model would go missing in silence.
    files = [path for path in found if path.name.endswith(".safetensors") and not path.is_dir()]
    if not files:
        deeper: Iterable[Place] = folder.glob("*/*.safetensors")
        inside = sorted({path.parent.name for path in islice(deeper, 100)})
        hint = f"; sub-folders that hold some: {', '.join(inside)}" if inside else ""
        raise CheckpointError(f"{folder}: no safetensors file in this folder; {found_instead(found)}{hint}")
    return [path for path in files if not path.name.startswith("adapter_")] or files


def _sidecars(folder: Place) -> tuple[Place, ...]:
    return tuple(
        path
        for path in entries(folder)
        if (path.name.endswith(_SIDECARS) or path.name.startswith(("tokenizer", "merges")))
        and not path.name.endswith((".index.json", *_WEIGHTS))
        and path.is_file()
        and path.stat().st_size <= _MAX_SIDECAR_BYTES
    )


def _read(paths: Iterable[Place], root: Place, sidecars: tuple[Place, ...]) -> Source:
    """Read every header and join them; each file counts once, however often and by whatever spelling it is given."""
    spelled = {real(path): path for path in sorted(paths, key=order, reverse=True)}
    files = tuple(sorted(spelled.values(), key=order))
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


def _read_one(path: Place) -> tuple[Header, tuple[str, int, int, str]]:
    """A file's header, and what tells it from another version of itself: name, bytes, mtime (ns), header digest."""
    header = read_header(path.absolute())  # workers may stand in another folder
    status = path.stat()
    return header, (path.name, status.st_size, status.st_mtime_ns, header.digest)


def _config(root: Place) -> dict[str, Any] | None:
    path = root / "config.json"
    try:
        if path.stat().st_size > _MAX_SIDECAR_BYTES:
            return None
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None
