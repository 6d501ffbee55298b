"""The output in a Zarr store: arrays before work, checksums after it; what a run that stopped wrote stays for the next.

Workers write chunks of their own, wherever they run, and share nothing but the store. It is no model yet:
``quantloom assemble`` makes one of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import __version__
from ..formats.checksums import Piece, covers
from ..formats.errors import CheckpointError, PlanError, SinkError
from ..formats.objects import Objects, objects_at
from ..formats.output_store import close_store, create_store, table_of
from ..formats.shards import STORE_SUFFIX
from ..formats.store_table import Table, is_own, read_table, write_table
from ..formats.urls import is_url
from ..formats.zarr_store import ArrayWriter, chunk_bytes
from ..stages.work import Receipt
from .checksums import checksums_of
from .commit import check_unchanged, hold
from .output_files import sidecar_content
from .plan import Plan
from .sizes import show_size


def check_output(plan: Plan) -> None:
    """Refuses, before any work, a place that cannot be a store, or is one of another plan."""
    if plan.adapter is not None:
        raise PlanError(
            f"{plan.output.path}: no adapter goes into a store: convert without one, and make it from the assembled "
            "model with `quantloom extract-lora`"
        )
    objects = objects_at(plan.output.path)
    if not is_url(objects.root):
        _check_folder(plan, Path(objects.root), objects)
    _check_existing(plan, objects)


def _check_folder(plan: Plan, root: Path, objects: Objects) -> None:
    if root.exists() and not root.is_dir():
        raise PlanError(f"{root}: is a file; a name that ends in {STORE_SUFFIX} is a store, which is a folder")
    free = objects.free()
    if free is not None and plan.nbytes_out > free:
        raise PlanError(
            f"{root}: the output needs {show_size(plan.nbytes_out)}, but only {show_size(free)} are free there; free "
            "some space, or write to another disk"
        )


def _check_existing(plan: Plan, objects: Objects) -> Table | None:
    """The table of a store that this run goes on with or replaces; PlanError for what is in the way."""
    root = objects.root
    try:
        found = read_table(objects)
    except CheckpointError as error:
        raise PlanError(f"{error}; write somewhere else") from error
    if found is None:
        if foreign := next((key for key in objects.find() if not is_own(key)), None):
            raise PlanError(f"{root}: holds {foreign}, which is no part of a store; write somewhere else")
        return None
    if plan.output.overwrite:
        return found
    if found.plan != plan.digest:
        raise PlanError(
            f"{root}: is the store of another plan ({found.plan[:12]}, this one is {plan.digest[:12]}): another "
            "source, recipe or version; pass --overwrite to replace it, or write somewhere else"
        )
    if found.checksums is not None:
        raise PlanError(
            f"{root}: exists already and is complete: `quantloom assemble {root} OUT` makes files of it; pass "
            "--overwrite to replace it, or write somewhere else"
        )
    return found


@contextlib.contextmanager
def open_sink(plan: Plan, receipts: Sequence[Receipt] = ()) -> Iterator[None]:
    """A store for the time of the block, whose end makes it complete. Nothing is removed when the block fails."""
    objects = objects_at(plan.output.path)
    locks = [] if is_url(objects.root) else [Path(f"{objects.root}.lock")]
    for lock in locks:
        lock.parent.mkdir(parents=True, exist_ok=True)
    with hold(locks):
        table = _prepare(plan, objects)
        yield
        check_unchanged(plan.source)
        close_store(objects, table, plan.shards, _checksums(plan, receipts))


def _prepare(plan: Plan, objects: Objects) -> Table:
    """Everything that is known before work; nothing is to be done where the same run was here before."""
    sidecars = {path.name: sidecar_content(plan, path) for path in plan.source.sidecars}
    chunks = {
        slot.name: chunk_bytes(slot, layer.parts) for layer in plan.layers for slot in layer.slots
    }  # fmt: skip
    table, files = table_of(
        plan.digest, __version__, plan.output.shard_bytes is not None, plan.shards, chunks, sidecars
    )
    found = _check_existing(plan, objects)
    if found is not None and found.checksums is None and found.same_output(table):
        return table
    if found is not None and not plan.output.overwrite:
        raise PlanError(f"{objects.root}: its table is not that of this plan; pass --overwrite to replace it")
    objects.remove(key for key in objects.find() if is_own(key))
    create_store(objects, table, files, plan.shards, chunks)
    for layer in plan.layers:
        if layer.constants:
            slots, writer = {slot.name: slot for slot in layer.slots}, ArrayWriter(layer.parts)
            for spec, content in layer.constants:
                writer.write(slots[spec.name], 0, memoryview(content))
            writer.finish()
    write_table(objects, table)
    return table


def _checksums(plan: Plan, receipts: Sequence[Receipt]) -> dict[str, list[Piece]]:
    """Of every tensor; SinkError when some of its bytes were not reported."""
    pieces = checksums_of(plan.layers, receipts)
    for shard in plan.shards:
        for slot in shard.slots:
            if not covers(pieces.get(slot.name, ()), slot.nbytes):
                raise SinkError(f"{plan.output.path}: {slot.name}: not all of its {slot.nbytes} bytes were written")
    return pieces
