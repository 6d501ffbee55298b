"""One round of simultaneous moves on the grid: every weight is offered the value that minimises its own parabola."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats.scratch import tiles
from .counter import uniform
from .fused import kernels_for
from .methods import Problem


@dataclass(frozen=True)
class Parabolas:
    """Curvature of the objective in each weight: C = outer(rows, columns) + penalty."""

    rows: torch.Tensor
    """Float32 (m,)."""
    columns: torch.Tensor
    """Float32 (n,)."""
    penalty: float


def flip(problem: Problem, error: torch.Tensor, gradient: torch.Tensor, parabolas: Parabolas,
         draw: tuple[float, int, int]) -> None:  # fmt: skip
    """Moves, in place, a share of those weights whose own objective a move lowers.

    With G = gradient + penalty E, a weight's objective changes by (2 G + C d) d for a step d; its best step on the grid
    leads to the value nearest to W + E - G / C. Zeros stay: padding, pruned weights, rows without a scale of their own.
    ``draw`` is the share, the seed and the number of the round.
    """
    if (fused := kernels_for(error)) is not None:
        fused.flip(problem, error, gradient, parabolas, draw)
        return
    fmt, (share, seed, turn) = problem.format, draw
    multiple = fmt.rows_multiple
    for part in tiles(error.view(error.shape[0] // multiple, multiple, -1)):
        rows = slice(part.start * multiple, part.stop * multiple)
        now = error[rows]
        curvature = parabolas.rows[rows, None] * parabolas.columns + parabolas.penalty
        slope = torch.add(gradient[rows], now, alpha=parabolas.penalty)
        stored = now + problem.weight[rows]
        wanted = (stored - slope / curvature).contiguous()
        step = fmt.snap_(wanted, fmt.rows(problem.scales, rows.start, rows.stop)).sub_(stored)
        gain = curvature.mul_(step).add_(slope, alpha=2.0).mul_(step)
        chosen = uniform((step.shape[0], step.shape[1]), (seed, turn), error.device, rows.start) < share
        now.add_(step.mul_(chosen.logical_and_(gain < 0).logical_and_(problem.weight[rows] != 0)))
