"""What an earlier run left of the same plan: whether it may be continued, and which layers are finished."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..formats.checksums import Piece, covers
from ..formats.errors import PlanError, listed, shown
from ..stages.work import LayerPlan, Receipt
from .commit import part
from .piece_sums import Stored, sum_pieces
from .plan import Plan
from .run_journal import GIVE_UP, Log, Record, head_of, read_record
from .settled import Settled
from .sizes import count


def earlier_run(plan: Plan, log: Log) -> Record | None:
    """What a run of this plan left; None where there is nothing, or ``resume`` is ``never``.

    Raises PlanError for a journal of another plan, which is never touched, and when ``resume`` is ``require`` and there
    is none.
    """
    record = read_record(log)
    mode = plan.recipe.run.resume
    if record is None:
        if mode == "require":
            raise PlanError(f"{plan.output.path}: there is nothing to continue: {log.place} is not there")
        return None
    different = differences(record.head, head_of(plan))
    if different and record.committing is not None:
        raise PlanError(
            f"{log.place}: a run that was stopped while its files got their names is of another conversion: "
            f"{listed(different, 4, '; ')}. Convert as that run did to finish it, or rename its *.part files yourself, "
            "each to its name without .part, and delete the journal"
        )
    if different:
        finished = count(len({receipt.name for receipt in record.receipts}), "finished layer")
        raise PlanError(
            f"{log.place}: a run that was stopped left {finished} here, but of another conversion: "
            f"{listed(different, 4, '; ')}. Convert as that run did to continue it, write somewhere else, or {GIVE_UP}"
        )
    return None if mode == "never" else record


def peek(plan: Plan, log: Log) -> Record | None:
    """The same without refusing: None for a journal of another plan, which may be that of a run that goes on."""
    record = read_record(log)
    never = plan.recipe.run.resume == "never"
    return None if record is None or never or differences(record.head, head_of(plan)) else record


def settled_before(plan: Plan, log: Log) -> Settled | None:
    """What the run that is continued had found out about weights before it began: nothing is read again for it.

    None where there is no such run; equal sources and recipes always find the same.
    """
    record = read_record(log)
    if record is None or plan.recipe.run.resume == "never":
        return None
    now = head_of(plan)
    head = {**record.head, **{name: now[name] for name in ("kept", "plan", "heads")}}
    return None if differences(head, now) else _settled(record.head)


def _settled(head: Mapping[str, Any]) -> Settled | None:
    """None for what is not as ``head_of`` writes it."""
    try:
        kept = {str(name): str(why) for name, why in head["kept"].items()}
        ranks = None if head["ranks"] is None else {str(name): int(rank) for name, rank in head["ranks"].items()}
        return None if min((ranks or {"": 0}).values()) < 0 else Settled(kept, ranks, tuple(map(str, head["notes"])))
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError):
        return None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two runs differ, in words: (before) -> (now)."""
    found = []
    if before.get("version") != now["version"]:
        found.append(f"quantloom {shown(before.get('version'))} -> {now['version']}")
    for what in ("source", "quantized"):
        found += _changed_files(before.get(what), now[what])
    if not found and before.get("layout") != now["layout"]:
        found.append("headers of the source changed")
    found += _changed_stages(before.get("recipe"), now["recipe"])
    for name, words in (("dialect", "dialect"), ("shard_bytes", "shard size"), ("kept", "layers kept for NaN or Inf")):
        if before.get(name) != now[name]:
            found.append(f"{words} {shown(before.get(name))} -> {shown(now[name])}")
    if not found and (before.get("plan"), before.get("heads")) != (now["plan"], now["heads"]):
        found.append("files of the output would be laid out in another way")
    return found


def _changed_files(before: Any, now: Sequence[Sequence[Any]]) -> list[str]:
    """Files of the source that are not what they were."""
    try:
        old = {str(path): (size, mtime) for path, size, mtime in before}
    except (TypeError, ValueError):
        return ["its source files cannot be read from the journal"]
    found = []
    for path, size, mtime in now:
        was = old.pop(path, None)
        if was is None:
            found.append(f"{path} was not a source")
        elif was[0] != size:
            found.append(f"{path} has {size} bytes, had {was[0]}")
        elif was[1] != mtime:
            found.append(f"{path} was written meanwhile (mtime {was[1]} -> {mtime} ns)")
    return found + [f"{path} is no source any more" for path in old]


def _changed_stages(before: Any, now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Options of stages that are not what they were."""
    try:
        old = {stage["stage"]: stage for stage in before}
    except (TypeError, KeyError):
        return ["its recipe cannot be read from the journal"]
    new = {stage["stage"]: stage for stage in now}
    found = [f"the stage {verb} is gone" for verb in old if verb not in new]
    for verb, stage in new.items():
        if verb not in old:
            found.append(f"the stage {verb} is new")
            continue
        names = sorted({*stage, *old[verb]})
        found += [
            f"{verb} {name} {shown(old[verb].get(name))} -> {shown(stage.get(name))}"
            for name in names if old[verb].get(name) != stage.get(name)
        ]  # fmt: skip
    return found


def finished(plan: Plan, receipts: Iterable[Receipt], gone: Iterable[str]) -> list[Receipt]:
    """Receipts of layers that are finished: all of their bytes, and of those that are solved in one with them, lie in
    files that are there. ``gone``: final paths of files that are not."""
    missing = {str(Path(path).absolute()) for path in gone}  # as slots have them
    by_layer: dict[str, dict[tuple[int, int], Receipt]] = defaultdict(dict)
    for receipt in receipts:
        by_layer[receipt.name][receipt.rows] = receipt
    whole: dict[str, list[Receipt]] = {}
    for layer in plan.layers:
        found = by_layer.get(layer.layer.name, {})
        ranges = layer.parts or ((0, layer.rows),)
        if all(rows in found for rows in ranges):
            mine = [found[rows] for rows in ranges]
            if _is_complete(layer, mine) and missing.isdisjoint(slot.path for slot in layer.places.values()):
                whole[layer.layer.name] = mine
    for layer in plan.layers:
        if any(name not in whole for name, _ in layer.together):
            whole.pop(layer.layer.name, None)
    return [receipt for mine in whole.values() for receipt in mine]


def left_over(plan: Plan, done: Iterable[Receipt]) -> list[LayerPlan]:
    """Layers that are not finished."""
    names = {receipt.name for receipt in done}
    return [layer for layer in plan.layers if layer.layer.name not in names]


def _is_complete(layer: LayerPlan, receipts: Sequence[Receipt]) -> bool:
    """Whether the pieces of all tasks make up every tensor whose bytes were not known before."""
    known = layer.known
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for receipt in receipts:
        for piece in receipt.pieces:
            pieces[piece.name].append(piece)
    slots = layer.places
    written = all(covers(pieces[name], slot.nbytes) for name, slot in slots.items() if name not in known)
    return written and pieces.keys() <= slots.keys()


def damaged(plan: Plan, done: Sequence[Receipt]) -> dict[str, str]:
    """Reads the parts of finished layers again: by layer, what is not as its checksum says."""
    places = {layer.layer.name: layer.places for layer in plan.layers}
    stored, owners = [], {}
    for receipt in done:
        for piece in receipt.pieces:
            slot = places[receipt.name][piece.name]
            stored.append(Stored(str(part(Path(slot.path))), slot.start + piece.start, piece))
            owners[id(stored[-1])] = receipt.name, slot.name
    bad = {}
    for item, found, problem in sum_pieces(stored):
        layer, name = owners[id(item)]
        where = f"bytes {item.start} to {item.start + item.piece.nbytes} of {item.path}"
        bad[layer] = problem or f"{name}: {where} have the checksum {found}, {item.piece.checksum} was written"
    return bad
