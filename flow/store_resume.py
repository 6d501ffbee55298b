"""What an earlier run left in a store: which layers are still finished there, and what else has to be written again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..formats.checksums import Piece
from ..formats.objects import Objects
from ..formats.tensors import Slot
from ..formats.zarr_store import ArrayWriter, Parts, changed_chunk, missing_chunk
from ..stages.work import LayerPlan, Receipt
from .checksums import checksums_of
from .output_files import log_of
from .plan import Plan
from .resume import finished
from .run_journal import again_line


@dataclass(frozen=True)
class Look:
    """How the chunks of a store are looked at."""

    objects: Objects
    present: Collection[str] | None
    """Keys of all objects, which is all that is asked for; None: every chunk is read."""

    def wrong(self, slots: Sequence[Slot], parts: Parts, sums: Mapping[str, Sequence[Piece]]) -> str:
        """What is wrong with the first chunk of these tensors that is not as it should be; empty when all are."""
        if self.present is not None:
            return missing_chunk(slots, parts, self.present)
        found = (changed_chunk(self.objects, slot, parts, sums.get(slot.name, ())) for slot in slots)
        return next(filter(None, found), "")


def still_finished(plan: Plan, receipts: Sequence[Receipt], look: Look) -> tuple[list[Receipt], list[str]]:
    """Receipts of layers whose chunks are all as they should be, and notes on what is wrong with others: these stop
    counting in the journal before any of their bytes is written over."""
    done = finished(plan, receipts, ())
    names = {receipt.name for receipt in done}
    layers = [layer for layer in plan.layers if layer.layer.name in names]
    sums = checksums_of(layers, done)
    problems = {layer.layer.name: look.wrong(layer.slots, layer.parts, sums) for layer in layers}
    bad = {name: problem for name, problem in problems.items() if problem}
    again = {name for layer in layers for name in _solved_with(layer) if _solved_with(layer) & bad.keys()}
    if gone := {receipt.name for receipt in receipts} - (names - again):
        log_of(plan).append(again_line(sorted(gone)))
    kept = [receipt for receipt in done if receipt.name not in again]
    return kept, [f"{name}: {problem}: done again" for name, problem in bad.items()]


def write_constants(layers: Iterable[LayerPlan], look: Look) -> None:
    """Tensors that are known before work, but for those that lie there as they should."""
    for layer in layers:
        slots, sums = layer.places, checksums_of([layer], ())
        for name, content in layer.known.items():
            if look.wrong([slots[name]], layer.parts, sums):
                writer = ArrayWriter(layer.parts)
                writer.write(slots[name], 0, memoryview(content))
                writer.finish()


def _solved_with(layer: LayerPlan) -> set[str]:
    return {layer.layer.name, *(name for name, _ in layer.together)}
