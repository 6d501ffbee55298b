"""Where every output tensor lies: one file, shards of a wanted size with an index, or a store that becomes either."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .heads import Metadata, Texts, head_of, place
from .places import Place
from .tensors import Slot, TensorSpec
from .urls import is_url

DEFAULT_SHARD_BYTES = 5_000_000_000
SUFFIX = ".safetensors"
STORE_SUFFIX = ".zarr"


@dataclass(frozen=True)
class Shard:
    """One output file."""

    path: str
    size: int
    """Bytes of the whole file."""
    slots: tuple[Slot, ...]
    metadata: Metadata
    """``__metadata__``, which the files of a model share but for entries of their own."""

    @property
    def name(self) -> str:
        """File name."""
        return self.path.replace("\\", "/").rpartition("/")[2]

    @property
    def texts(self) -> Texts:
        """``__metadata__`` as JSON, in pieces; made when asked for."""
        return self.metadata.of(self.slots)

    @property
    def head(self) -> bytes:
        """Length and JSON header, padded: made when asked for, as the heads of many shards are longer than the rest of
        a plan."""
        return head_of(self.slots, self.texts)


def is_single_file(output: str) -> bool:
    """Whether an output path names a file and not a folder."""
    return output.endswith(SUFFIX)


def is_store(output: str) -> bool:
    """Whether an output path names a Zarr store and not a file or folder."""
    return output.rstrip("/\\").endswith(STORE_SUFFIX)


def lay_out(
    groups: Sequence[Sequence[TensorSpec]], output: str, shard_bytes: int | None,
    metadata: Metadata, stem: str = "model",
) -> list[Shard]:  # fmt: skip
    """Shards of at most ``shard_bytes`` (None: a file is one, a folder is split at 5 GB); a group is never split.

    ``metadata`` is ``__metadata__`` of each file. ``stem`` is the file name in a folder, as in
    ``model-00001-of-00002.safetensors``. A store has the shards of a folder (`zarr_store` says where).
    """
    path = Path(output)
    if is_single_file(output):
        folder, stem = path.parent, path.name.removesuffix(SUFFIX)
    else:
        folder, shard_bytes = path, shard_bytes or DEFAULT_SHARD_BYTES
    bins: list[list[TensorSpec]] = [[]]
    used = 0
    for group in groups:
        size = sum(spec.nbytes for spec in group)
        if shard_bytes and bins[-1] and used + size > shard_bytes:
            bins.append([])
            used = 0
        bins[-1].extend(group)
        used += size
    names = [f"{stem}{SUFFIX}"]
    if len(bins) > 1:
        names = [f"{stem}-{number:05d}-of-{len(bins):05d}{SUFFIX}" for number in range(1, len(bins) + 1)]
    if is_store(output):
        root = output.rstrip("/\\")
        whole = root if is_url(root) else path.absolute().as_posix()  # workers of a cluster stand elsewhere
        places = [(f"{root}/{name}", f"{whole}/{number}") for number, name in enumerate(names, 1)]
    else:
        places = [(str(folder / name), str((folder / name).absolute())) for name in names]
    return [_shard(*names, specs, metadata) for names, specs in zip(places, bins, strict=True)]


def _shard(path: str, full: str, specs: Sequence[TensorSpec], metadata: Metadata) -> Shard:
    placed = place(specs, metadata.of(specs))
    begin = placed.length
    slots = tuple(
        Slot(spec.name, spec.dtype, spec.shape, full, begin + start)
        for spec, start in zip(specs, placed.starts, strict=True)
    )
    return Shard(path, begin + placed.size, slots, metadata)


def index_path(shards: Sequence[Shard]) -> Path | None:
    """Path of the index of several shards; None for one, or none at all."""
    if len(shards) < 2:
        return None
    first = Path(shards[0].path)
    return first.with_name(re.sub(r"-\d{5}-of-\d{5}\.safetensors$", "", first.name) + f"{SUFFIX}.index.json")


def index_file(shards: Sequence[Shard]) -> tuple[Path, bytes] | None:
    """Path and content of the index of several shards; None for one, or none at all."""
    if (path := index_path(shards)) is None:
        return None
    weight_map = {slot.name: Path(slot.path).name for shard in shards for slot in shard.slots}
    total = sum(slot.nbytes for shard in shards for slot in shard.slots)
    content = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    return path, content.encode()


def stem_of(files: Sequence[Place]) -> str:
    """The file name that a folder's shards share, as clients look for it: ``model``, ``diffusion_pytorch_model``."""
    stems = {re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", path.name) for path in files}
    return stems.pop() if len(stems) == 1 else "model"
