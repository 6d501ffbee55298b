"""``on_error="keep"``: an output is laid out again when layers failed, and what is finished is moved to its new place.

Layers that are kept take more bytes than quantized ones, so that everything behind them lies elsewhere. The finished
bytes wait under ``<name>.part.before`` and are copied; a run that is killed meanwhile finds them there, with a journal
that still describes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..formats import fileio
from ..formats.errors import SinkError, listed
from ..formats.tensors import TensorRef
from ..stages.reading import Copy
from ..stages.work import LayerPlan
from ..stages.writing import PART_SUFFIX, Write
from .commit import part
from .output_files import folder_of
from .part_files import create_parts, shards_of
from .plan import Plan, make_plan
from .session import Session
from .sizes import count, show_size

BEFORE_SUFFIX = PART_SUFFIX + ".before"


def put_back(plan: Plan) -> None:
    """Makes what waits the parts again."""
    for shard in shards_of(plan):
        before = Path(shard.path + BEFORE_SUFFIX)
        if os.path.lexists(before):
            fileio.replace(before, part(Path(shard.path)))


def lay_out_again(session: Session, failed: Mapping[str, str]) -> list[LayerPlan]:
    """The session's output with the ``failed`` layers (name: reason) kept as they are, and the layers that fill it:
    copies of what is finished, and what is new. SinkError where no layer is left, or the disk is too small."""
    old = session.plan
    words = {name: f"failed: {reason}" for name, reason in failed.items()}
    if failed.keys() >= {each.layer.name for each in old.quantized}:
        reasons = listed([f"{name}: {reason}" for name, reason in failed.items()], 1)
        raise SinkError(f"{old.output.path}: every layer failed; {reasons}")
    new = make_plan(old.recipe, replace(old.settled, kept={**old.settled.kept, **words}))
    free = fileio.free_bytes(folder_of(old))
    if new.nbytes_out > free:
        raise SinkError(
            f"{old.output.path}: keeping {count(len(failed), 'layer')} that failed means to lay the output out again, "
            f"which needs {show_size(new.nbytes_out)} beside what is there; {show_size(free)} are free: "
            "free space and run again"
        )
    session.close()
    for shard in shards_of(old):
        fileio.replace(part(Path(shard.path)), shard.path + BEFORE_SUFFIX)
    session.plan, session.failed, session.laid_out_again = new, words, True
    create_parts(new)
    before = {each.layer.name: each for each in old.layers}
    same = {each.layer.name for each in new.layers if _written(each) == _written(before[each.layer.name])}
    session.keep(same - failed.keys())
    return [_moved(before[each.layer.name], each) if each.layer.name in same else each for each in new.layers]


def _moved(old: LayerPlan, new: LayerPlan) -> LayerPlan:
    """The new plan of a layer, with a chain that copies what was written by the old one."""
    known = new.known
    refs = tuple(
        TensorRef(name, slot.dtype, slot.shape, slot.path + BEFORE_SUFFIX, slot.start)
        for name, slot in old.places.items() if name not in known
    )  # fmt: skip
    copied = replace(new.layer, tensors=refs)
    return replace(new, layer=copied, steps=(Copy(), Write()), parts=(), together=(), affinity="", inputs=None)


def _written(plan: LayerPlan) -> tuple[object, ...]:
    adapter = () if plan.adapter is None else (plan.adapter.method, plan.adapter.rank, plan.adapter.specs)
    return plan.format, plan.rounding, plan.outputs, plan.together, plan.constants, adapter
