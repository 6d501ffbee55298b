"""The output in a Zarr store: arrays before work, checksums after it; what a run that stopped wrote stays for the next.

Workers write chunks of their own, wherever they run, and share nothing but the store. It is no model yet:
``quantloom assemble`` makes one of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .. import __version__
from ..formats.checksums import Piece, covers
from ..formats.errors import CheckpointError, PlanError, QuantloomError, SinkError, listed
from ..formats.objects import Objects, objects_at
from ..formats.output_store import close_store, describe_store, table_of
from ..formats.shards import STORE_SUFFIX
from ..formats.store_table import Table, is_own, read_table, write_table
from ..formats.urls import is_url
from ..formats.zarr_store import chunk_bytes
from ..stages.work import Receipt
from .checksums import checksums_of
from .commit import check_unchanged, hold, may_continue
from .output_files import log_of
from .part_files import sidecar_content
from .plan import Plan
from .resume import differences, earlier_run, peek
from .run_journal import head_of, lines_of, read_record
from .session import Session
from .sizes import show_size
from .store_resume import Look, still_finished, write_constants


def check_output(plan: Plan) -> None:
    """Refuses, before any work, a place that cannot be a store, or is one of another plan."""
    where = plan.output.path
    if plan.adapter is not None:
        raise PlanError(
            f"{where}: no adapter goes into a store: convert without one, and make it from the assembled model with "
            "`quantloom extract-lora`"
        )
    if plan.recipe.run.on_error == "keep":
        raise PlanError(f"{where}: --on-error keep would lay a store out again, which is not done: use stop")
    objects = objects_at(where)
    if not is_url(objects.root):
        _check_folder(plan, Path(objects.root), objects)
    _check_existing(plan, objects)
    peek(plan, log_of(plan))


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
    done = _is_complete(plan, found)
    if plan.output.overwrite and done:
        return found
    if found.plan != plan.digest:
        way = "pass --overwrite to replace it" if done else "convert as that run did to continue it, or delete it"
        raise PlanError(
            f"{root}: is the store of another plan ({found.plan[:12]}, this one is {plan.digest[:12]}): "
            f"{_other(plan)}; {way}, or write somewhere else"
        )
    if done:
        raise PlanError(
            f"{root}: exists already and is complete: `quantloom assemble {root} OUT` makes files of it; pass "
            "--overwrite to replace it, or write somewhere else"
        )
    return found


def _is_complete(plan: Plan, found: Table) -> bool:
    """Whether nothing is left to do: of a run that was killed while it ended, the journal is still there."""
    return found.checksums is not None and (found.plan != plan.digest or not log_of(plan).read())


def _other(plan: Plan) -> str:
    """What the journal in a store of another plan says of it; one that is complete has none."""
    record = read_record(log_of(plan))
    if record is None:
        return "another source, recipe or version"
    return listed(differences(record.head, head_of(plan)), 4, "; ")


@contextlib.contextmanager
def open_sink(plan: Plan) -> Iterator[Session]:
    """A store for the time of the block, and what an earlier run left in it; its end makes it complete.

    An exception leaves what is finished, if something is and the same run might go well, and says so in a note.
    """
    objects = objects_at(plan.output.path)
    locks = [] if is_url(objects.root) else [Path(f"{objects.root}.lock")]
    for lock in locks:
        lock.parent.mkdir(parents=True, exist_ok=True)
    with hold(locks):
        table, session = _begin(plan, objects)
        try:
            yield session
            session.close()
            check_unchanged(plan.source)
            objects.sweep()
            close_store(objects, table, plan.shards, _checksums(plan, session.receipts))
            session.log.remove()
        except BaseException as error:
            _stop(session, objects, error)
            raise


def _begin(plan: Plan, objects: Objects) -> tuple[Table, Session]:
    sidecars = {path.name: sidecar_content(plan, path) for path in plan.source.sidecars}
    chunks = {slot.name: chunk_bytes(slot, layer.parts) for layer in plan.layers for slot in layer.slots}
    split = plan.output.shard_bytes is not None
    table, files = table_of(plan.digest, __version__, split, plan.shards, chunks, sidecars)
    found, log = _check_existing(plan, objects), log_of(plan)
    if found is None or not _is_complete(plan, found):
        if found is not None and not found.same_output(table):
            raise PlanError(f"{objects.root}: its table is not that of this plan; delete it, or write somewhere else")
        record = earlier_run(plan, log)
        if found is not None and record is not None:
            look = Look(objects, None if plan.recipe.run.verify else set(objects.find()))
            kept, bad = still_finished(plan, record.receipts, look)
            describe_store(objects, files, plan.shards, chunks, look.present)
            write_constants(plan.layers, look)
            session = Session(plan, log, _are_durable, kept)
            session.notes += [f"an earlier run is continued: {session.standing}", *bad]
            return table, session
    objects.remove(key for key in objects.find() if is_own(key))
    describe_store(objects, files, plan.shards, chunks, ())
    write_constants(plan.layers, Look(objects, ()))
    log.append(lines_of([head_of(plan)]))
    write_table(objects, table)
    return table, Session(plan, log, _are_durable)


def _are_durable(_receipts: Iterable[Receipt]) -> None:
    """Every object is, once it is written."""


def _stop(session: Session, objects: Objects, error: BaseException) -> None:
    """After an error or an interrupt: keeps what is finished, or removes all."""
    with contextlib.suppress(QuantloomError):
        session.close()
    plan = session.plan
    if session.journalled and may_continue(error, [plan.source]):
        kept = f"{session.standing} and kept in {objects.root}"
        error.add_note(f"{kept}: run the same command again to continue, or delete it to start over")
        return
    with contextlib.suppress(QuantloomError):
        objects.remove(key for key in objects.find() if is_own(key))


def _checksums(plan: Plan, receipts: Sequence[Receipt]) -> dict[str, list[Piece]]:
    """Of every tensor; SinkError when some of its bytes were not reported."""
    pieces = checksums_of(plan.layers, receipts)
    for shard in plan.shards:
        for slot in shard.slots:
            if not covers(pieces.get(slot.name, ()), slot.nbytes):
                raise SinkError(f"{plan.output.path}: {slot.name}: not all of its {slot.nbytes} bytes were written")
    return pieces
