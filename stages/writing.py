"""The last step of a chain: write bytes at their places, and take their checksums on the way."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from ..formats.checksums import Summing
from ..formats.fileio import Writer
from ..formats.tensors import Slot
from ..formats.zarr_store import ArrayWriter, in_store, writing_bytes
from .work import Environment, LayerPlan, Work

PART_SUFFIX = ".part"
"""A shard has this at the end of its name until it is complete."""


class Places(Protocol):
    """Where the bytes of slots go."""

    def write(self, slot: Slot, offset: int, content: memoryview) -> None:
        """Bytes of a slot from ``offset`` on; SinkError when they cannot be written."""

    def finish(self, sync: bool) -> None:
        """Everything was written; SinkError when something of it is not where it belongs. ``sync``: it shall be on the
        device, as nobody else can see to that."""


class _Files:
    """Parts of files of their final size."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._writers: dict[str, Writer] = {}

    def write(self, slot: Slot, offset: int, content: memoryview) -> None:
        if slot.path not in self._writers:
            self._writers[slot.path] = self._stack.enter_context(Writer(slot.path + PART_SUFFIX))
        self._writers[slot.path].write(content, slot.start + offset)

    def finish(self, sync: bool) -> None:
        for writer in self._writers.values() if sync else ():
            writer.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()


@dataclass(frozen=True)
class Write:
    """Pulls the stream through and writes every chunk at its offset."""

    name: str = "write"

    def run(self, work: Work) -> Work:
        slots, sums = work.plan.places, Summing()
        with _Files() as files:
            places: Places = ArrayWriter(work.plan.parts) if any(map(in_store, work.plan.slots)) else files
            for chunk in work.chunks():
                for name, offset, data in chunk.writes:
                    flat = data.reshape(-1).view(torch.uint8).numpy().data
                    sums.add(name, offset, flat)
                    places.write(slots[name], offset, flat)
            places.finish(work.environment.sync)
        work.pieces = sums.pieces()
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Nothing of its own for files; the chunks of arrays that are not full yet."""
        return writing_bytes(plan.slots, plan.parts)
