"""The files of an output while they are parts: created in their final size, filled with what is known, removed."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from ..formats.errors import CheckpointError, SinkError
from ..formats.fileio import Reader, Writer, create_sparse, sync_dir, sync_file
from ..formats.manifest import is_finished
from ..formats.places import Place
from ..formats.shards import Shard
from ..stages.work import Receipt
from .commit import part
from .output_files import final_paths, folders_of
from .plan import Plan


def shards_of(plan: Plan) -> tuple[Shard, ...]:
    """Every safetensors file of the output, the adapter's too."""
    return (*plan.shards, *([] if plan.adapter is None else [plan.adapter.shard]))


def create_parts(plan: Plan) -> None:
    """Shards with their headers and all tensors whose bytes are known already."""
    for shard in shards_of(plan):
        create_sparse(part(Path(shard.path)), shard.size, shard.head)
    _fill(plan)
    sync_folders(plan)


def wrong_parts(plan: Plan) -> dict[str, str]:
    """Parts of an earlier run that are not its own any more: by final path, what is wrong. Changes nothing."""
    wrong = {}
    for shard in shards_of(plan):
        path = part(Path(shard.path))
        try:
            status = path.lstat()
        except FileNotFoundError:
            wrong[shard.path] = f"{path} is missing"
            continue
        if not stat.S_ISREG(status.st_mode):
            wrong[shard.path] = f"{path} is no regular file"
        elif status.st_size != shard.size:
            wrong[shard.path] = f"{path} has {status.st_size} bytes instead of {shard.size}"
        elif (head := _start(path, len(planned := shard.head))) != planned and not is_finished(head, planned):
            wrong[shard.path] = f"{path} does not begin with the header that this conversion writes"
    return wrong


def mend_parts(plan: Plan, wrong: Collection[str]) -> None:
    """Creates the parts of these final paths anew. Heads, and what is known without any work, are written to the others
    again: nothing says that it had reached the device before the power went."""
    for shard in shards_of(plan):
        path = part(Path(shard.path))
        if shard.path in wrong:
            create_sparse(path, shard.size, shard.head)
            continue
        with Writer(path) as writer:
            writer.write(shard.head, 0)
    _fill(plan)
    sync_folders(plan)


def check_complete(plan: Plan) -> None:
    """SinkError unless every safetensors file that is there, a part or under its name already, has the size and the
    finished head of this plan: its journal says so, but parts may have been deleted or exchanged since."""
    for shard in shards_of(plan):
        path = Path(shard.path)
        place = part(path) if os.path.lexists(part(path)) else path
        if not os.path.lexists(place):
            continue  # whether it can be missing is for the exchange to say
        size = place.lstat().st_size
        if size != shard.size:
            problem = f"has {size} bytes instead of {shard.size}"
        elif not is_finished(_start(place, len(planned := shard.head)), planned):
            problem = "does not begin with the finished header of this conversion"
        else:
            continue
        way = "delete its journal and the *.part files beside it to start over"
        raise SinkError(f"{place}: {problem}: the output of the earlier run is not whole; {way}")


def _start(path: Path, length: int) -> bytes:
    found = bytearray(length)
    with Reader(path) as reader:
        reader.read_into(memoryview(found), 0)
    return bytes(found)


def remove_parts(plan: Plan) -> None:
    """As far as that is possible."""
    for path in final_paths(plan):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(part(path).lstat().st_mode):  # what else stood there was refused, and stays
                part(path).unlink()


class PartSync:
    """Makes the bytes of finished layers survive a power cut."""

    def __init__(self, plan: Plan) -> None:
        self._paths = {plan.layer.name: {slot.path for slot in plan.places.values()} for plan in plan.layers}

    def __call__(self, receipts: Iterable[Receipt]) -> None:
        """Raises SinkError for a file that cannot be synced."""
        for path in sorted(set().union(*(self._paths[receipt.name] for receipt in receipts))):
            sync_file(part(Path(path)))


def write_part(path: Path, content: bytes) -> None:
    """A small file, whole."""
    create_sparse(part(path), len(content), content)


def sidecar_content(plan: Plan, path: Place) -> bytes:
    """The file as it is; a quantization that is gone is not declared in the configuration."""
    config = plan.source.config
    if path.name == "config.json" and config and "quantization_config" in config and not plan.verbatim:
        kept = {key: value for key, value in config.items() if key != "quantization_config"}
        return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _fill(plan: Plan) -> None:
    """Writes what is known already into the parts."""
    known: dict[str, list[tuple[int, bytes]]] = {}
    for layer in plan.layers:
        contents = layer.known
        slots = layer.places if contents else {}
        for name, content in contents.items():
            known.setdefault(slots[name].path, []).append((slots[name].start, content))
    for path in known:  # one file at a time: there may be more shards than descriptors
        with Writer(part(Path(path))) as writer:
            for start, content in known[path]:
                writer.write(content, start)


def sync_folders(plan: Plan) -> None:
    """Makes names in the output's folders survive a power cut."""
    for folder in folders_of(plan):
        sync_dir(folder)
