"""Rounding that minimises tr(E H E^T), E = stored - original: error feedback, then coordinate descent.

Error feedback (LDLQ: Chee et al., QuIP, arXiv 2307.13304; the same as GPTQ, Frantar et al., arXiv 2210.17323) rounds
column after column of W + (what earlier errors ask of it). Coordinate descent (QuantEase, Behdin et al., arXiv
2309.01885) goes on from there: each weight in turn moves to the grid value that is best given all others.

Both keep to one block of columns at a time; blocks meet in matrix products. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..formats.reduce import sums_
from .cancelling import check_here
from .cascade import WIDTH, Choice, cascade_, choosing_cascade_
from .factor import Factor
from .fused import kernels_for
from .products import Operand, precise
from .scale_search import Scaling

_RUN = 4
"""Blocks that get what lies outside them in one product: wide ones are what devices are fast at. Fused kernels take a
run as one block."""


@dataclass
class Panel:
    """Rows of a weight while they are rounded: on their side, columns in the factor's order. Float32 throughout."""

    weight: torch.Tensor
    """(n, r), never written to."""
    values: torch.Tensor
    """(n, r): the weights as rounded."""
    error: Operand
    """(n, r): values - weight."""
    peak: torch.Tensor
    """(G, r): the scales, as in ``scale_search``."""

    @classmethod
    def of(cls, weight: torch.Tensor, peak: torch.Tensor) -> Panel:
        """Before anything is rounded."""
        return cls(weight, torch.empty_like(weight), Operand(weight.shape, weight.device), peak)

    def blocks(self) -> Iterator[list[tuple[slice, slice]]]:
        """Runs of neighbouring blocks of columns: their ranges, and those of the groups that they lie in.

        A block has about WIDTH columns, whole groups or pieces of one group; with fused kernels, _RUN times as many.
        """
        n = self.weight.shape[0]
        group = n // self.peak.shape[0]
        fused = kernels_for(self.weight, "kernels_cascade") is not None
        most, run = (_RUN * WIDTH, 1) if fused else (WIDTH, _RUN)
        width = most // group * group or most
        blocks = []
        for first in range(0, n, max(group, width)):
            end = min(n, first + max(group, width))
            for start in range(first, end, width):
                stop = min(start + width, end)
                blocks.append((slice(start, stop), slice(start // group, -(-stop // group))))
        for first in range(0, len(blocks), run):
            check_here()
            yield blocks[first : first + run]


Cascade = Callable[[torch.Tensor, torch.Tensor, slice, slice], None]
"""Rounds the target of a block of columns (and of groups) in place, and leaves its moves."""


def feed_back(weight: torch.Tensor, peak: torch.Tensor, factor: Factor, scaling: Scaling) -> Panel:
    """Rounds (n, r) weights in one pass under scales of ``peak`` (G, r)."""
    steps = scaling.steps(peak)

    def cascade(target: torch.Tensor, moves: torch.Tensor, part: slice, groups: slice) -> None:
        here = steps[0][groups], steps[1][groups]
        cascade_(target, moves, weight[part], factor.lower[part, part], scaling.format.element, here)

    return _feed_back(Panel.of(weight, peak), factor, cascade)


def feed_back_choosing(weight: torch.Tensor, factor: Factor, scaling: Scaling, choice: Choice) -> Panel:
    """The same while scales are chosen group by group; ``choice.cost`` is (n,)."""
    panel = Panel.of(weight, weight.new_empty(weight.shape[0] // scaling.grouped, weight.shape[1]))

    def cascade(target: torch.Tensor, moves: torch.Tensor, part: slice, groups: slice) -> None:
        here, coupling = Choice(choice.ratios, choice.cost[part]), factor.lower[part, part]
        choosing_cascade_(target, moves, weight[part], coupling, scaling, panel.peak[groups], here)

    return _feed_back(panel, factor, cascade)


def _feed_back(panel: Panel, factor: Factor, cascade: Cascade) -> Panel:
    for run in panel.blocks():
        whole = _whole(run)
        target = panel.values[whole].copy_(panel.weight[whole])
        if whole.start:
            panel.error.subtract_from_(target, factor.lower[whole, : whole.start])
        panel.error.put(whole, _walk_(target, run, factor.lower, cascade))
    return panel


def sweep_(panel: Panel, factor: Factor, scaling: Scaling) -> None:
    """Offers every weight of the panel its best value given all others, column by column; the loss never rises."""
    steps = scaling.steps(panel.peak)

    def cascade(target: torch.Tensor, moves: torch.Tensor, part: slice, groups: slice) -> None:
        here = steps[0][groups], steps[1][groups]
        cascade_(target, moves, panel.values[part], factor.pull[part, part], scaling.format.element, here)

    for run in panel.blocks():
        whole = _whole(run)
        target = panel.values[whole].clone()
        panel.error.subtract_from_(target, factor.pull[whole])
        _walk_(target, run, factor.pull, cascade)
        panel.values[whole] = target
        panel.error.put(whole, target.sub_(panel.weight[whole]))


def _walk_(
    target: torch.Tensor, run: list[tuple[slice, slice]], coupling: torch.Tensor, cascade: Cascade
) -> torch.Tensor:
    """Rounds the targets of a run, block by block, in place; its moves."""
    moves, first = torch.empty_like(target), run[0][0].start
    for part, groups in run:
        here = slice(part.start - first, part.stop - first)
        if part.start > first:
            target[here].addmm_(coupling[part, first : part.start], moves[: here.start], alpha=-1)
        cascade(target[here], moves[here], part, groups)
    return moves


def _whole(run: list[tuple[slice, slice]]) -> slice:
    return slice(run[0][0].start, run[-1][0].stop)


def losses(error: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Float32 (r,) e H e^T of each row e of the error, which is given on its side (n, r), in the factor's order."""
    weighted = precise(factor.pull, error).mul_(error).mul_(factor.diagonal[:, None])
    return sums_(weighted.T).clone()  # lets go of the products
