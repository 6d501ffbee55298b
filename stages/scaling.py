"""The scale step: the scale of the whole tensor, where the format has one, then scales of each range of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..formats.errors import NonFiniteError
from ..formats.format import SAMPLE_SIZE, Stats
from ..formats.registry import make_format
from .reading import as_float32, chunk_elements
from .work import Chunk, Environment, LayerPlan, Work

_SAMPLE_RANGES = 64

LARGEST_WEIGHT = 2.0**127
"""Weights from here on are refused like infinities: rounding up the largest of them would leave float32."""


@dataclass(frozen=True)
class Scale:
    """Computes scales: from the largest weight (``nearest``), or by search (``mse``)."""

    format: tuple[str, str, int | None]
    """Arguments of ``make_format``."""
    search: bool
    name: str = "scale"

    @property
    def needs_stats(self) -> bool:
        """Whether the amax of the whole tensor must be known first."""
        return make_format(*self.format).needs_stats

    def run(self, work: Work) -> Work:
        fmt = make_format(*self.format)
        upstream = work.stream
        assert upstream is not None
        if fmt.needs_stats and work.whole is None:
            work.whole = self.combine(work, [self.amax(work, (0, work.plan.rows))])
        whole = None
        if work.whole is not None:
            whole = torch.tensor(work.whole, dtype=torch.float32, device=work.environment.device)

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            for chunk in upstream(start, stop):
                chunk.x = as_float32(chunk.x, fmt.columns(chunk.x.shape[1]))
                amax = torch.zeros((), device=chunk.x.device) if fmt.scaling == "tensor" else fmt.amax(chunk.x)
                if not (amax < LARGEST_WEIGHT).all():
                    refuse_nonfinite(work)
                searching = self.search and fmt.searches and fmt.scaling != "tensor"
                chunk.scales = fmt.search(chunk.x, amax, whole) if searching else fmt.scales(amax, whole)
                yield chunk

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """The float32 rows, and three more such buffers while candidates are tried."""
        return chunk_elements(plan, environment) * (16 if self.search else 8)

    def amax(self, work: Work, rows: tuple[int, int]) -> float:
        """Largest magnitude of a range of rows; NonFiniteError when one is NaN or Inf."""
        assert work.stream is not None
        largest = torch.zeros((), device=work.environment.device)
        for chunk in work.stream(*rows):
            low, high = torch.aminmax(chunk.x)
            largest = torch.maximum(largest, torch.maximum(-low, high).float())
        if not largest < LARGEST_WEIGHT:
            refuse_nonfinite(work)
        return float(largest)

    def combine(self, work: Work, amaxes: list[float]) -> float:
        """The whole-tensor scale from the amax of all row ranges; a search looks at a sample of rows itself."""
        fmt = make_format(*self.format)
        searching = self.search and fmt.searches
        amax = torch.tensor(max(amaxes), dtype=torch.float32, device=work.environment.device)
        sample = self._sample(work) if searching and fmt.scaling == "tensor" else amax[None][:0]
        return float(fmt.whole(Stats(amax, sample), searching))

    @staticmethod
    def _sample(work: Work) -> torch.Tensor:
        """About SAMPLE_SIZE weights: evenly spaced ranges of rows, the same however the tensor is split into tasks."""
        assert work.stream is not None
        rows, columns = work.plan.layer.weight.shape
        wanted = -(-SAMPLE_SIZE // max(1, columns))
        ranges = min(_SAMPLE_RANGES, wanted)
        length = -(-wanted // ranges)
        stride = max(length, -(-rows // ranges))
        pieces = [
            chunk.x.float().reshape(-1).clone()
            for first in range(0, rows, stride)
            for chunk in work.stream(first, min(first + length, rows))
        ]
        return torch.cat(pieces)


def count_nonfinite(work: Work) -> tuple[int, tuple[int, int] | None]:
    """How many weights of the whole layer are NaN, Inf or too large, and the row and column of the first."""
    assert work.stream is not None
    count, first = 0, None
    for chunk in work.stream(0, work.plan.rows):
        # A float64 beyond float32's range is infinite as soon as it is scaled.
        x = chunk.x.float() if chunk.x.dtype == torch.float64 else chunk.x
        bad = ~(x.abs() < LARGEST_WEIGHT)
        if bad.any():
            count += int(bad.sum())
            row, column = (int(index) for index in bad.nonzero()[0])
            first = first or (chunk.start + row, column)
    return count, first


def refuse_nonfinite(work: Work) -> None:
    """Raises NonFiniteError with the count and the first position."""
    layer = work.plan.layer
    fresh = Work(work.plan, work.rows, work.environment)
    count, first = count_nonfinite(work.plan.steps[0].run(fresh))
    total = layer.weight.numel
    where = f"the first at {list(first)}" if first else "position unknown"
    raise NonFiniteError(
        f"{layer.tensors[0].path}: {layer.weight.name}: {count} of {total} weights are NaN or Inf, {where}; "
        "repair the checkpoint; `quantloom convert --nonfinite keep` leaves such layers unquantized"
    )
