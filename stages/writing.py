"""Last steps of a chain: cast decoded weights to a plain dtype, and write bytes at their places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..formats.fileio import Writer
from ..formats.tensors import torch_dtype
from .reading import chunk_elements
from .work import ADAPTER, Chunk, Environment, LayerPlan, Work

PART_SUFFIX = ".part"
"""A shard has this at the end of its name until it is complete."""


@dataclass(frozen=True)
class Cast:
    """Float32 rows to the dtype of a plain weight."""

    output: str
    """Name of the output tensor."""
    dtype: str
    """safetensors dtype."""
    name: str = "cast"

    def run(self, work: Work) -> Work:
        upstream = work.stream
        assert upstream is not None
        dtype = torch_dtype(self.dtype)

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            for chunk in upstream(start, stop):
                rows = chunk.x.to(dtype).contiguous().cpu()
                offset = chunk.start * rows.shape[1] * rows.element_size()
                chunk.writes = [(self.output, offset, rows)]
                yield chunk

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """The rows in their new dtype."""
        return chunk_elements(plan, environment) * 4


@dataclass(frozen=True)
class Write:
    """Pulls the stream through and writes every chunk at its offset."""

    name: str = "write"

    def run(self, work: Work) -> Work:
        slots = {slot.name: slot for slot in work.plan.slots}
        if work.plan.adapter is not None:
            slots |= {ADAPTER + slot.name: slot for slot in work.plan.adapter.slots}
        with ExitStack() as stack:
            writers: dict[str, Writer] = {}
            for chunk in work.chunks():
                for name, offset, data in chunk.writes:
                    slot = slots[name]
                    if slot.path not in writers:
                        writers[slot.path] = stack.enter_context(Writer(slot.path + PART_SUFFIX))
                    flat = data.reshape(-1).view(torch.uint8).numpy()
                    writers[slot.path].write(flat.data, slot.start + offset)
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Nothing of its own."""
        return 0
