"""The step of ``svdquant``: takes a low-rank part out of a weight before the rest is quantized (Li et al., SVDQuant,
arXiv 2411.05007). What remains has smaller outliers, but means nothing without that part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..formats.format import Format
from ..formats.registry import make_format
from .cancelling import cancellable
from .counter import seed_of
from .energies import Energies
from .inputs import Inputs
from .low_rank import Weighting, low_rank, memory_of_low_rank
from .quality import ROWS, nearest_scales, row_ranges
from .reading import row_chunks
from .scaling import refuse_nonfinite
from .work import Chunk, Environment, LayerPlan, Stream, Work

_ROUNDS = 4


@dataclass(frozen=True)
class TakeOut:
    """Streams W - L in place of W. L starts as the best low-rank part of W and is then, a few times, the best one of
    W - W' with W' a quick rounding of W - L; the best of them counts, by the error that quick rounding leaves."""

    format: tuple[str, str, int | None]
    """Arguments of ``make_format``."""
    rank: int
    inputs: Inputs | None = None
    """Statistics that errors are weighted with, in the basis of the rows that pass; None: all weights count alike."""
    name: str = "low rank"

    def run(self, work: Work) -> Work:
        upstream = work.stream
        assert upstream is not None
        held: list[torch.Tensor] = []

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            if not held:
                with cancellable(work.environment.run_id):
                    held.append(self._residual(work, upstream))
            row_bytes = held[0].shape[1] * 4
            for rows in row_chunks((start, stop), row_bytes, work.environment, make_format(*self.format).rows_multiple):
                yield Chunk(rows[0], held[0][slice(*rows)])

        work.stream = stream
        return work

    def _residual(self, work: Work, upstream: Stream) -> torch.Tensor:
        """Float32 (m, n): the weight without its low-rank part, or all of it where that does no good."""
        fmt, device = make_format(*self.format), torch.device(work.environment.device)
        rows, columns = work.plan.layer.weight.shape
        weight = torch.empty(rows, columns, dtype=torch.float32, device=device)
        for chunk in upstream(0, rows):
            weight[chunk.start : chunk.start + chunk.x.shape[0]] = chunk.x
        if not weight.isfinite().all():
            refuse_nonfinite(work)
        hessian = None
        if self.inputs is not None:
            moments = self.inputs.moments(fmt.columns(columns), device)
            hessian = moments.hessian[(slice(columns),) * moments.hessian.dim()]
        weighting = None if hessian is None else Weighting(hessian)
        best, least = weight, _loss(_lost(fmt, weight), hessian)
        target, seed = weight, seed_of(work.plan.layer.name)
        for _ in range(_ROUNDS):
            up, down, _ = low_rank(target, self.rank, seed, weighting)
            del target  # whatever is not needed goes before the next matrix of its size comes
            residual = torch.addmm(weight, up, down, alpha=-1)
            target = _lost(fmt, residual)
            loss = _loss(target, hessian)
            if loss < least:
                best, least = residual, loss
            del residual
            target.addmm_(up, down)  # the weight without what rounding stored
        return best

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Weight, what is left of it, the best so far, and what rounding takes; another one where columns are padded,
        and a range of rows as it is rounded; the statistics twice."""
        rows, columns = plan.layer.weight.shape
        width = make_format(*self.format).columns(columns)
        statistics = 8 * width**2 if self.inputs else 0
        held = (16 if width == columns else 20) * rows * width + 24 * min(rows * width, ROWS["cpu"])
        return held + statistics + memory_of_low_rank((rows, columns), self.rank)


def _lost(fmt: Format, x: torch.Tensor) -> torch.Tensor:
    """Float32 (m, n): what rounding to nearest takes from weights."""
    columns, width = x.shape[1], fmt.columns(x.shape[1])
    padded = x if width == columns else torch.nn.functional.pad(x, (0, width - columns))
    scales, lost = nearest_scales(fmt, padded), torch.empty_like(x)
    for rows in row_ranges(padded, fmt.rows_multiple):
        rounded = fmt.snap_(padded[rows].clone(), fmt.rows(scales, rows.start, rows.stop))
        torch.sub(x[rows], rounded[:, :columns], out=lost[rows])
    return lost


def _loss(error: torch.Tensor, hessian: torch.Tensor | None) -> float:
    energies = Energies(error.shape[1], hessian, error.device)
    energies.add(error)
    plain, weighted = energies.total()
    loss = plain if weighted is None else weighted
    return loss if math.isfinite(loss) else math.inf
