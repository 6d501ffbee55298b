"""The output on disk: parts of their final size, then a commit that makes all of them real, or none.

Everything is written under ``<name>.part`` first, and a journal beside the parts says which layers are finished. The
commit syncs the parts and renames them, the index last, so that whoever sees the index sees the whole model. Where
several files replace others, the old ones wait under ``<name>.previous`` until the last rename and come back when one
fails. What a run that fails, is stopped or killed had finished, the next one continues; a run that had finished
nothing removes its parts and the folders that it made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from ..formats.errors import QuantloomError, SinkError
from ..formats.fileio import Writer, sync_file
from ..formats.shards import index_file, is_store
from ..formats.source import Source
from ..stages.writing import PART_SUFFIX
from . import zarr_sink
from .checksums import finished_heads
from .commit import PREVIOUS_SUFFIX, HalfwayError, check_unchanged, exchange, finish_exchange, hold, may_continue, part
from .output_files import final_paths, folders_of, leftovers, locks_of, log_of, sidecars_of, stale_files
from .part_files import (
    PartSync,
    check_complete,
    create_parts,
    mend_parts,
    remove_parts,
    sidecar_content,
    sync_folders,
    write_part,
    wrong_parts,
)
from .plan import Plan, make_plan
from .resume import damaged, earlier_run, finished
from .run_journal import Record, again_line, committing_line, head_of, lines_of, undone_line
from .salvage import BEFORE_SUFFIX, put_back
from .session import Session
from .sizes import count


@contextlib.contextmanager
def open_sink(plan: Plan) -> Iterator[Session]:
    """Parts for the time of the block, and what an earlier run left of them: its end makes them the output.

    An exception leaves parts and journal, if a layer is finished and the source is what it was, and says so in a note.
    """
    if is_store(plan.output.path):
        with zarr_sink.open_sink(plan) as session:
            yield session
        return
    folders = _make_folders(plan)
    try:
        with hold(locks_of(plan)):
            session = _begin(plan)
            try:
                yield session
                session.close()
                _commit(session)
            except BaseException as error:
                _stop(session, error)
                raise
    except BaseException:
        for made in folders:
            with contextlib.suppress(OSError):
                made.rmdir()
        raise


def _begin(plan: Plan) -> Session:
    """The session of a new run, or of one that continues."""
    log = log_of(plan)
    record = earlier_run(plan, log)
    if record is not None:
        return _continue(plan, record)
    log.remove()
    try:
        for path in leftovers(plan, BEFORE_SUFFIX):  # of another run: a later one must not take them for its own
            _remove(path)
        create_parts(plan)
        log.append(lines_of([head_of(plan)]))
    except BaseException:
        remove_parts(plan)
        with contextlib.suppress(QuantloomError):
            log.remove()
        raise
    return Session(plan, log, PartSync(plan))


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise SinkError(f"{path}: left by an earlier run, cannot be removed: {error.strerror or error}") from error


def _continue(plan: Plan, record: Record) -> Session:
    log = log_of(plan)
    if record.committing is not None:
        kept = {**plan.settled.kept, **record.committing}
        final = make_plan(plan.recipe, replace(plan.settled, kept=kept)) if record.committing else plan
        check_complete(final)
        session = Session(final, log, PartSync(final), record.receipts)
        session.committing, session.failed = True, dict(record.committing)
        session.notes.append("an earlier run is finished: it was stopped while its files got their names")
        return session
    notes = []
    if record.broken:
        notes.append(f"{log.place}: {count(record.broken, 'line')} cut short or damaged: those layers are done again")
    put_back(plan)
    wrong = wrong_parts(plan)
    notes += [f"{what}: its layers are done again" for what in wrong.values()]
    done = finished(plan, record.receipts, wrong)
    if plan.recipe.run.verify and (bad := damaged(plan, done)):
        notes += [f"{problem}: done again" for problem in bad.values()]
        done = finished(plan, [receipt for receipt in done if receipt.name not in bad], ())
    names = {receipt.name for receipt in done}
    if again := {receipt.name for receipt in record.receipts} - names:  # before anything is written over
        log.append(again_line(sorted(again)))
    mend_parts(plan, wrong)
    session = Session(plan, log, PartSync(plan), done)
    session.notes += [f"an earlier run is continued: {session.standing}", *notes]
    return session


def _stop(session: Session, error: BaseException) -> None:
    """After an error or an interrupt: keeps what is finished, or removes all."""
    with contextlib.suppress(QuantloomError):
        session.close()
    if session.committing:
        error.add_note("all layers are finished, and their files get their names: run the same command again to finish")
        return
    if session.laid_out_again:
        remove_parts(session.plan)
        put_back(session.first_plan)
    plan = session.first_plan
    if session.journalled and may_continue(error, _sources(plan)):
        kept = f"{session.standing} and kept beside {session.log.place}"
        error.add_note(f"{kept}: run the same command again to continue, or delete that file to start over")
        return
    remove_parts(plan)
    with contextlib.suppress(QuantloomError):
        session.log.remove()


def _sources(plan: Plan) -> list[Source]:
    return [plan.source, *([] if plan.base is None else [plan.base])]


def _check_sources(plan: Plan) -> None:
    for source in _sources(plan):
        check_unchanged(source)


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


def _finish_heads(session: Session) -> None:
    """Headers with checksums, the adapter's with errors before and after too, and its configuration."""
    plan = session.plan
    for path, head in finished_heads(plan, session.receipts):
        with Writer(part(Path(path))) as writer:
            writer.write(head, 0)
    if plan.adapter is not None and plan.adapter.config is not None:
        write_part(plan.adapter.files[1], plan.adapter.config)


def _commit(session: Session) -> None:
    """Makes the output real: everything is on the device before the first name changes."""
    plan = session.plan
    paths = final_paths(plan)
    if session.committing:
        finish_exchange(paths, stale_files(plan), plan.output.overwrite)
    else:
        _complete(session)
        for path in paths:
            sync_file(part(path))
        _check_sources(plan)
        if not plan.output.overwrite and (found := [path for path in paths if os.path.lexists(path)]):
            raise SinkError(f"{found[0]}: appeared while the conversion ran; move it away, or write somewhere else")
        session.committing = True  # already: a line whose sync fails may be there after all
        try:
            session.log.append(committing_line(session.failed))
            exchange(paths, stale_files(plan))
        except HalfwayError:
            raise
        except BaseException:
            session.log.append(undone_line())
            session.committing = False
            raise
    sync_folders(plan)
    for ending in (PART_SUFFIX, PREVIOUS_SUFFIX, BEFORE_SUFFIX):  # of this run, or of others that were killed
        for path in leftovers(plan, ending):
            with contextlib.suppress(OSError):
                path.unlink()
    session.log.remove()


def _complete(session: Session) -> None:
    """What is known only now, and small files."""
    plan = session.plan
    _finish_heads(session)
    for source, target in sidecars_of(plan):
        write_part(target, sidecar_content(plan, source))
    if (index := index_file(plan.shards)) is not None:
        write_part(*index)
