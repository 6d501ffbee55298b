"""The output on disk: parts of their final size, then a commit that makes all of them real, or none.

Shards are written under ``<name>.part``. The commit syncs them, renames them, copies sidecar files and writes the index
last, so that whoever sees the index sees the whole model.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from ..formats.errors import PlanError, SinkError
from ..formats.fileio import Writer, create_sparse, free_bytes, replace, sync_dir, sync_file
from ..formats.shards import index_file, is_single_file
from ..stages.writing import PART_SUFFIX
from .plan import Plan
from .sizes import show_size

_SPARE_BYTES = 1 << 20
"""Left free beside the plan's bytes, for index and sidecar files."""


def check_output(plan: Plan) -> None:
    """Refuses, before any work, an output that exists, a folder that cannot be written, and a disk that is too small."""
    output = Path(plan.output.path)
    if not plan.output.overwrite:
        for path in _final_paths(plan):
            if path.exists():
                raise PlanError(f"{path}: exists already; pass --overwrite to replace it, or write somewhere else")
    if is_single_file(plan.output.path) and output.is_dir():
        raise PlanError(f"{output}: is a folder; name a file, or a folder without the ending .safetensors")
    if not is_single_file(plan.output.path) and output.is_file():
        raise PlanError(f"{output}: is a file; for one file as output, let the name end in .safetensors")
    folder = _folder(plan)
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free, needed = free_bytes(existing), plan.nbytes_out + _SPARE_BYTES
    if needed > free:
        raise PlanError(
            f"{folder}: the output needs {show_size(needed)}, but only {show_size(free)} are free there; "
            "free some space, or write to another disk"
        )


def prepare(plan: Plan) -> None:
    """Creates the parts, with headers and all tensors whose bytes are known already."""
    folder = _folder(plan)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SinkError(f"{folder}: cannot create the folder: {error.strerror}") from error
    for shard in plan.shards:
        create_sparse(shard.path + PART_SUFFIX, shard.size, shard.head)
    writers: dict[str, Writer] = {}
    with contextlib.ExitStack() as stack:
        for layer in plan.layers:
            slots = {slot.name: slot for slot in layer.slots}
            for spec, content in layer.constants:
                slot = slots[spec.name]
                if slot.path not in writers:
                    writers[slot.path] = stack.enter_context(Writer(slot.path + PART_SUFFIX))
                writers[slot.path].write(content, slot.start)


def commit(plan: Plan) -> None:
    """Makes the output real. Parts are synced before the first is renamed; the index comes last."""
    folder = _folder(plan)
    stale = _stale_shards(plan)
    for shard in plan.shards:
        sync_file(shard.path + PART_SUFFIX)
    index = index_file(plan.shards)
    old_index = _index_path(plan)
    if old_index is not None:
        old_index.unlink(missing_ok=True)
    for shard in plan.shards:
        replace(shard.path + PART_SUFFIX, shard.path)
    for path in stale:
        path.unlink(missing_ok=True)
    _copy_sidecars(plan)
    if index is not None:
        _write_whole(*index)
    sync_dir(folder)


def abort(plan: Plan) -> None:
    """Removes the parts; what was there before stays untouched."""
    for shard in plan.shards:
        with contextlib.suppress(OSError):
            Path(shard.path + PART_SUFFIX).unlink()
    if not is_single_file(plan.output.path):
        with contextlib.suppress(OSError):
            _folder(plan).rmdir()  # only when this run made it: a folder that holds anything stays


def _folder(plan: Plan) -> Path:
    output = Path(plan.output.path)
    return output.parent if is_single_file(plan.output.path) else output


def _final_paths(plan: Plan) -> list[Path]:
    index = index_file(plan.shards)
    return [Path(shard.path) for shard in plan.shards] + ([index[0]] if index else [])


def _index_path(plan: Plan) -> Path | None:
    """Where an index of an earlier output in this folder lies."""
    if is_single_file(plan.output.path) and plan.output.shard_bytes is None:
        return None
    found = sorted(_folder(plan).glob("*.safetensors.index.json")) if _folder(plan).is_dir() else []
    wanted = index_file(plan.shards)
    names = {wanted[0].name} if wanted else {path.name.replace(".safetensors", ".safetensors.index.json") for path in _final_paths(plan)}
    return next((path for path in found if path.name in names), None)


def _stale_shards(plan: Plan) -> list[Path]:
    """Shards that the index of the output being replaced names and the new one does not."""
    index = _index_path(plan)
    if index is None:
        return []
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return []
    ours = {Path(shard.path).name for shard in plan.shards}
    names = {name for name in shards if isinstance(name, str) and Path(name).name == name}
    return [index.with_name(name) for name in sorted(names - ours)]


def _copy_sidecars(plan: Plan) -> None:
    """Configuration and tokenizer of a source folder, for a folder output; a quantization that is gone is not declared."""
    if is_single_file(plan.output.path):
        return
    for path in plan.source.sidecars:
        target = _folder(plan) / path.name
        try:
            if path.name == "config.json" and plan.source.config and "quantization_config" in plan.source.config:
                config = {key: value for key, value in plan.source.config.items() if key != "quantization_config"}
                _write_whole(target, (json.dumps(config, indent=2) + "\n").encode())
            else:
                shutil.copyfile(path, target)
        except OSError as error:
            raise SinkError(f"{target}: cannot copy {path}: {error.strerror}") from error


def _write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        part.write_bytes(content)
    except OSError as error:
        raise SinkError(f"{part}: cannot write: {error.strerror}") from error
    sync_file(part)
    replace(part, path)
