"""Rounding that minimises tr(E H E^T): error feedback in one pass over the columns, then coordinate descent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..formats.reduce import tree_sum_
from .cascade import WIDTH, Choice, cascade_
from .factor import Factor
from .scale_search import Scaling


@dataclass
class Panel:
    """Rows of a weight on their side, columns in the factor's order, while they are rounded. Float32 throughout."""

    weight: torch.Tensor
    """(n, r)."""
    values: torch.Tensor
    """(n, r): the weights as rounded."""
    error: torch.Tensor
    """(n, r): values - weight."""
    peak: torch.Tensor
    """(groups, r): see ``scale_search``."""


def blocks(n: int, group: int) -> Iterator[slice]:
    """Ranges of about WIDTH columns: whole groups, or pieces of one group where a group is larger."""
    width = WIDTH // group * group or WIDTH
    for first in range(0, n, max(group, width)):
        end = min(n, first + max(group, width))
        for start in range(first, end, width):
            yield slice(start, min(start + width, end))


def peaks_of(panel: Panel, part: slice) -> torch.Tensor:
    """The view of the peaks that belong to a block of columns."""
    group = panel.weight.shape[0] // panel.peak.shape[0]
    return panel.peak[part.start // group : -(-part.stop // group)]


def feed_back(weight: torch.Tensor, peak: torch.Tensor, factor: Factor, scaling: Scaling,
              choice: Choice | None = None) -> Panel:
    panel = Panel(weight, torch.empty_like(weight), torch.empty_like(weight), peak)
    for part in blocks(weight.shape[0], weight.shape[0] // peak.shape[0]):
        target = weight[part].clone()
        if part.start:
            target.addmm_(factor.lower[part, : part.start], panel.error[: part.start], alpha=-1)
        here = Choice(choice.ratios, choice.cost[part]) if choice else None
        panel.error[part] = cascade_(target, weight[part], factor.lower[part, part], scaling, peaks_of(panel, part), here)
        panel.values[part] = target
    return panel


def sweep_(panel: Panel, factor: Factor, scaling: Scaling) -> None:
    for part in blocks(panel.weight.shape[0], panel.weight.shape[0] // panel.peak.shape[0]):
        values = panel.values[part]
        target = torch.addmm(values, factor.pull[part], panel.error, alpha=-1)
        cascade_(target, values, factor.pull[part, part], scaling, peaks_of(panel, part))
        panel.values[part] = target
        torch.sub(target, panel.weight[part], out=panel.error[part])


def losses(error: torch.Tensor, factor: Factor) -> torch.Tensor:
    """(r,) tr(E H E^T) by rows"""
    x = (factor.pull @ error).mul_(error).mul_(factor.diagonal[:, None])
    return tree_sum_(x.T)
