"""The round step: weights to codes, and the error of what is stored, measured on a sample of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..formats.registry import make_format
from .reading import chunk_elements
from .work import Chunk, Environment, LayerPlan, Work

_SAMPLED = 64
"""One row in this many is decoded again to measure the error ..."""
_SAMPLED_ROWS = 64
"""... or more of them, until about this many rows are looked at."""


@dataclass(frozen=True)
class Round:
    """Rounds to the nearest code."""

    format: tuple[str, str, int | None]
    name: str = "round"

    def run(self, work: Work) -> Work:
        fmt = make_format(*self.format)
        upstream = work.stream
        assert upstream is not None
        stride = max(1, min(_SAMPLED, work.plan.rows // _SAMPLED_ROWS))
        error = torch.zeros((), dtype=torch.float64, device=work.environment.device)
        weight = torch.zeros_like(error)

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            for chunk in upstream(start, stop):
                assert chunk.scales is not None
                sampled = slice(-chunk.start % stride, None, stride)
                original = chunk.x[sampled].clone()
                chunk.codes = fmt.encode_(chunk.x, chunk.scales)
                if original.shape[0]:
                    multiplier = fmt.row_multipliers(chunk.scales.multiplier, sampled, chunk.x.shape[0])
                    decoded = fmt.decode(chunk.codes[sampled], multiplier)
                    error.add_(decoded.sub_(original).double().square_().sum())
                    weight.add_(original.double().square_().sum())
                yield chunk
            work.squared_error, work.squared_weight = float(error), float(weight)

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Codes, and integer work buffers as wide as the weights."""
        return chunk_elements(plan, environment) * 10
