"""Rounding a block of columns one after another, each rounding moving the targets of the columns after it.

Both error feedback and coordinate descent are this cascade, with other targets and couplings; it is all that happens
column by column, so a GPU kernel that does the same replaces one function. Rows do not interact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..formats.elements import Element
from ..formats.reduce import tree_sum_
from .fused import kernels_for
from .scale_search import Scaling

WIDTH = 128
"""Columns in a block: what lies between blocks are matrix products."""

_STRIP = 32
"""Columns of a group, at most, among which targets move one by one; from strip to strip by matrix products."""


Steps = tuple[torch.Tensor, torch.Tensor]
"""What weights are multiplied by, and what their codes are: see ``Scaling.steps``."""


@dataclass(frozen=True)
class Choice:
    """Scales that are chosen when their group is reached: the group is rounded under every candidate."""

    ratios: torch.Tensor
    """Float32 (k,): candidate peaks, as shares of the largest target of the group."""
    cost: torch.Tensor
    """Float32 (b,): what a squared distance from the target costs in each column."""


def cascade_(target: torch.Tensor, moves: torch.Tensor, origin: torch.Tensor, coupling: torch.Tensor, element: Element,
             steps: Steps) -> None:  # fmt: skip
    """Rounds ``target`` (b, r) in place, and leaves in ``moves`` (b, r) what was rounded to, less ``origin`` (b, r).

    Column j is rounded to the grid value nearest to target_j - sum_{i<j} coupling_ji move_i; ``coupling`` (b, b) is
    read below its diagonal. ``steps`` (groups, r) belong to the block's columns, groups of equal width. All tensors
    are float32.
    """
    group = target.shape[0] // steps[0].shape[0]
    if (fused := kernels_for(target, "kernels_cascade")) is not None and fused.walks(target.shape[0], group):
        fused.cascade_(target, moves, origin, coupling, element, steps)
        return
    for part in _strips(target.shape[0], group, _STRIP):
        if part.start:
            target[part].addmm_(coupling[part, : part.start], moves[: part.start], alpha=-1)
        inverse, multiplier = (step[part.start // group] for step in steps)
        aims = target[part].mul_(inverse)
        _columns_(aims, origin[part] * inverse, coupling[part, part], element)
        torch.sub(aims.mul_(multiplier), origin[part], out=moves[part])


def choosing_cascade_(target: torch.Tensor, moves: torch.Tensor, origin: torch.Tensor, coupling: torch.Tensor,
                      scaling: Scaling, peak: torch.Tensor, choice: Choice) -> None:  # fmt: skip
    """``cascade_`` that chooses scales when it reaches their group, and leaves them in ``peak`` (groups, r)."""
    if (fused := kernels_for(target, "kernels_cascade")) is not None and fused.chooses(scaling.format):
        fused.choosing_cascade_(target, moves, origin, coupling, scaling, peak, choice)
        return
    group = target.shape[0] // peak.shape[0]
    for index, part in enumerate(_strips(target.shape[0], group, group)):
        if part.start:
            target[part].addmm_(coupling[part, : part.start], moves[: part.start], alpha=-1)
        here = Choice(choice.ratios, choice.cost[part])
        _choose_(target[part], origin[part], coupling[part, part], scaling, peak[index], here)
        torch.sub(target[part], origin[part], out=moves[part])


def _strips(count: int, group: int, width: int) -> Iterator[slice]:
    """Ranges of at most ``width`` columns, none of which crosses the edge of a group."""
    for first in range(0, count, group):
        for start in range(first, first + group, width):
            yield slice(start, min(start + width, first + group))


def _columns_(x: torch.Tensor, origin: torch.Tensor, coupling: torch.Tensor, element: Element,
              aims: torch.Tensor | None = None) -> None:  # fmt: skip
    """The cascade in a strip (b, r), in units of its scales; ``aims`` (b, r) receives what was rounded."""
    moves = torch.zeros_like(x)
    turned, spare = moves.T, torch.empty_like(x[0])
    columns = zip(x.unbind(), origin.unbind(), moves.unbind(), coupling.unbind(), strict=True)
    for j, (column, start, move, pulls) in enumerate(columns):
        column.addmv_(turned, pulls, alpha=-1)  # moves from here on are 0
        if aims is not None:
            aims[j] = column
        element.round_(column, spare)
        torch.sub(column, start, out=move)


def _choose_(target: torch.Tensor, origin: torch.Tensor, coupling: torch.Tensor, scaling: Scaling,
             peak: torch.Tensor, choice: Choice) -> None:  # fmt: skip
    """The cascade in one group (g, r) under every candidate scale, of which the cheapest is kept."""
    peaks = target.abs().amax(0) * choice.ratios[:, None]
    inverse, multiplier = scaling.steps(peaks)
    x = target[:, None] * inverse
    aims, flat = torch.empty_like(x), (x.shape[0], -1)
    _columns_(x.view(flat), (origin[:, None] * inverse).view(flat), coupling, scaling.format.element, aims.view(flat))
    costs = aims.sub_(x).square_().mul_(choice.cost[:, None, None])
    relative = multiplier / multiplier.amax(0)
    total = tree_sum_(costs.permute(1, 2, 0)).mul_(relative).mul_(relative)
    best = torch.where(multiplier > 0, total, torch.inf).argmin(0, keepdim=True)
    peak.copy_(peaks.gather(0, best)[0])
    chosen = x.gather(1, best[None].expand(x.shape[0], -1, -1))[:, 0]
    target.copy_(chosen.mul_(multiplier.gather(0, best)))
