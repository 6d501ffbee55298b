"""The last step of a chain: write bytes at their places, and take their checksums on the way."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..formats.checksums import Summing
from ..formats.fileio import Writer
from .work import ADAPTER, Environment, LayerPlan, Work

PART_SUFFIX = ".part"
"""A shard has this at the end of its name until it is complete."""


@dataclass(frozen=True)
class Write:
    """Pulls the stream through and writes every chunk at its offset."""

    name: str = "write"

    def run(self, work: Work) -> Work:
        slots = {slot.name: slot for slot in work.plan.slots}
        if work.plan.adapter is not None:
            slots |= {ADAPTER + slot.name: slot for slot in work.plan.adapter.slots}
        sums = Summing()
        with ExitStack() as stack:
            writers: dict[str, Writer] = {}
            for chunk in work.chunks():
                for name, offset, data in chunk.writes:
                    slot = slots[name]
                    if slot.path not in writers:
                        writers[slot.path] = stack.enter_context(Writer(slot.path + PART_SUFFIX))
                    flat = data.reshape(-1).view(torch.uint8).numpy().data
                    sums.add(name, offset, flat)
                    writers[slot.path].write(flat, slot.start + offset)
            for writer in writers.values() if work.environment.sync else ():
                writer.sync()
        work.pieces = sums.pieces()
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Nothing of its own."""
        return 0
