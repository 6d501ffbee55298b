"""The output on disk: parts of their final size, then a commit that makes all of them real, or none.

Everything is written under ``<name>.part`` first. The commit syncs the parts and renames them, the index last, so that
whoever sees the index sees the whole model. Where several files replace others, the old ones wait under
``<name>.previous`` until the last rename and come back when one fails. A run that fails or is stopped removes its parts
and the folders that it made.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from ..formats.errors import PlanError, SinkError
from ..formats.fileio import Writer, create_sparse, free_bytes, sync_dir, sync_file
from ..formats.shards import SUFFIX, index_file, is_single_file, is_store
from ..stages.work import Receipt
from ..stages.writing import PART_SUFFIX
from . import zarr_sink
from .checksums import finished_heads
from .commit import PREVIOUS_SUFFIX, check_unchanged, exchange, hold, part
from .output_files import (
    final_paths,
    folder_of,
    folders_of,
    leftovers,
    locks_of,
    sidecar_content,
    sidecars_of,
    stale_files,
)
from .plan import Plan
from .sizes import show_size

_SPARE_BYTES = 1 << 20
"""Left free beside the plan's bytes, for the index and the file system's own needs."""


def check_output(plan: Plan) -> None:
    """Refuses, before any work, an output that exists, a place that cannot be one, and a disk that is too small."""
    if is_store(plan.output.path):
        zarr_sink.check_output(plan)
        return
    output = Path(plan.output.path)
    try:
        _check_kind(plan, output)
        _check_existing(plan, output)
        folder = folder_of(plan)
        free, needed = free_bytes(folder), plan.nbytes_out + _sidecar_bytes(plan) + _SPARE_BYTES
        needed += 0 if plan.adapter is None else plan.adapter.nbytes  # counted here wherever it lies
    except OSError as error:
        raise SinkError(f"{error.filename or output}: cannot be looked at: {error.strerror or error}") from error
    if needed > free:
        raise PlanError(
            f"{folder}: the output needs {show_size(needed)}, but only {show_size(free)} are free there; "
            "free some space, or write to another disk"
        )


@contextlib.contextmanager
def open_sink(plan: Plan, receipts: Sequence[Receipt] = ()) -> Iterator[None]:
    """Parts for the time of the block: its end makes them the output, an exception removes them.

    ``receipts`` are looked at when the block ends: headers tell checksums, and what an adapter brought.
    """
    if is_store(plan.output.path):
        with zarr_sink.open_sink(plan, receipts):
            yield
        return
    folders = _make_folders(plan)
    try:
        with hold(locks_of(plan)):
            try:
                _create_parts(plan)
                yield
                _finish_heads(plan, receipts)
                _commit(plan)
            except BaseException:
                for path in final_paths(plan):
                    with contextlib.suppress(OSError):
                        if stat.S_ISREG(part(path).lstat().st_mode):  # what else stood there was refused, and stays
                            part(path).unlink()
                raise
    except BaseException:
        for made in folders:
            with contextlib.suppress(OSError):
                made.rmdir()
        raise


_OTHER_ENDINGS = (".safetensor", ".sft", ".st", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx")


def _check_kind(plan: Plan, output: Path) -> None:
    for place in {place for folder in folders_of(plan) for place in (folder, *folder.parents)}:
        if place.is_symlink() and not place.exists():
            raise PlanError(f"{place}: is a link to {os.readlink(place)}, which does not exist")
    if output.suffix.lower() in (*_OTHER_ENDINGS, SUFFIX) and output.suffix != SUFFIX and not output.is_dir():
        raise PlanError(f"{output}: a file ends in {SUFFIX}, and a folder must not look like a file; rename it")
    if is_single_file(plan.output.path) and output.is_dir():
        raise PlanError(f"{output}: is a folder; name a file, or a folder without the ending {SUFFIX}")
    if not is_single_file(plan.output.path) and output.is_file():
        raise PlanError(f"{output}: is a file; for one file as output, let the name end in {SUFFIX}")
    for path in final_paths(plan):
        if path.is_dir():
            raise PlanError(f"{path}: is a folder where a file of the output belongs; write somewhere else")


def _check_existing(plan: Plan, output: Path) -> None:
    """A file that would be replaced needs ``overwrite``; one that would mix with the output is refused."""
    if waiting := leftovers(plan, PREVIOUS_SUFFIX):
        old, name = waiting[0], waiting[0].name.removesuffix(PREVIOUS_SUFFIX)
        held = "a new one is there already" if os.path.lexists(old.with_name(name)) else f"{name} is missing"
        raise PlanError(
            f"{old}: left by a run that was stopped while it replaced {name} ({held}); rename it back to {name}, or "
            "delete it"
        )
    if not plan.output.overwrite:
        existing = [path for path in [*final_paths(plan), *stale_files(plan)] if os.path.lexists(path)]
        if existing:
            raise PlanError(f"{existing[0]}: exists already; pass --overwrite to replace it, or write somewhere else")
    if is_single_file(plan.output.path) or not output.is_dir():
        return
    known = {path.name for path in [*final_paths(plan), *stale_files(plan)]}
    if others := sorted(path.name for path in output.glob(f"*{SUFFIX}") if path.name not in known):
        raise PlanError(
            f"{output}: holds {others[0]}, which whoever reads this folder would take for a part of the model; "
            "write to an empty folder"
        )


def _make_folders(plan: Plan) -> list[Path]:
    """Creates the folders of output and adapter; returns what had to be made, innermost first."""
    missing: list[Path] = []
    for folder in folders_of(plan):
        try:
            new = list(takewhile(lambda place: not place.exists(), (folder, *folder.parents)))
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            for place in missing:
                with contextlib.suppress(OSError):
                    place.rmdir()
            raise SinkError(f"{folder}: cannot create the folder: {error.strerror}") from error
        missing = [*new, *missing]
    return missing


def _create_parts(plan: Plan) -> None:
    """Shards with their headers and all tensors whose bytes are known already."""
    for shard in (*plan.shards, *([] if plan.adapter is None else [plan.adapter.shard])):
        create_sparse(part(Path(shard.path)), shard.size, shard.head)
    known: dict[str, list[tuple[int, bytes]]] = {}
    for layer in plan.layers:
        slots = {slot.name: slot for slot in layer.slots}
        for spec, content in layer.constants:
            known.setdefault(slots[spec.name].path, []).append((slots[spec.name].start, content))
        if layer.adapter is not None and layer.adapter.tensors is not None:
            own = {slot.name: slot for slot in layer.adapter.slots}
            for spec, content in layer.adapter.tensors.constants:
                known.setdefault(own[spec.name].path, []).append((own[spec.name].start, content))
    for path, contents in known.items():  # one file at a time: there may be more shards than descriptors
        with Writer(path + PART_SUFFIX) as writer:
            for start, content in contents:
                writer.write(content, start)


def _finish_heads(plan: Plan, receipts: Sequence[Receipt]) -> None:
    """Headers with checksums, the adapter's with errors before and after too, and its configuration."""
    for path, head in finished_heads(plan, receipts):
        with Writer(part(Path(path))) as writer:
            writer.write(head, 0)
    if plan.adapter is not None and plan.adapter.config is not None:
        _write_part(plan.adapter.files[1], plan.adapter.config)


def _commit(plan: Plan) -> None:
    """Makes the output real: everything is on the device before the first name changes."""
    for source, target in sidecars_of(plan):
        _write_part(target, sidecar_content(plan, source))
    if (index := index_file(plan.shards)) is not None:
        _write_part(*index)
    paths = final_paths(plan)
    for path in paths:
        sync_file(part(path))
    check_unchanged(plan.source)
    if plan.base is not None:
        check_unchanged(plan.base)
    if not plan.output.overwrite and (found := [path for path in paths if os.path.lexists(path)]):
        raise SinkError(f"{found[0]}: appeared while the conversion ran; nothing was written; write somewhere else")
    exchange(paths, stale_files(plan))
    for path in leftovers(plan, PART_SUFFIX):  # of a run that was killed
        with contextlib.suppress(OSError):
            path.unlink()
    for folder in folders_of(plan):
        sync_dir(folder)


def _sidecar_bytes(plan: Plan) -> int:
    return sum(source.stat().st_size for source, _ in sidecars_of(plan))


def _write_part(path: Path, content: bytes) -> None:
    create_sparse(part(path), len(content), content)
