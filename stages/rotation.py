"""The rotate step: Hadamard rotation of rows before they are scaled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..formats.rotation import rotate_
from .reading import as_float32, chunk_elements
from .work import Chunk, Environment, LayerPlan, Work


@dataclass(frozen=True)
class Rotate:
    """Rotates every ``group`` consecutive columns by the regular Hadamard matrix of that order."""

    group: int
    name: str = "rotate"

    def run(self, work: Work) -> Work:
        upstream = work.stream
        assert upstream is not None

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            for chunk in upstream(start, stop):
                chunk.x = rotate_(as_float32(chunk.x, chunk.x.shape[1]), self.group)
                yield chunk

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """The sums and the four new quarters of every pass."""
        return chunk_elements(plan, environment) * 8
