"""Rounding that minimises tr(E H E^T), E = stored - original: error feedback, then coordinate descent.

Error feedback (LDLQ: Chee et al., QuIP, arXiv 2307.13304; the same as GPTQ, Frantar et al., arXiv 2210.17323) rounds
column after column of W + (what earlier errors ask of it). Coordinate descent (QuantEase, Behdin et al., arXiv
2309.01885) goes on from there: each weight in turn moves to the grid value that is best given all others.

Both keep to one block of columns at a time; blocks meet in matrix products. Nothing waits for the device.
"""

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
    """Rows of a weight while they are rounded: on their side, columns in the factor's order. Float32 throughout."""

    weight: torch.Tensor
    """(n, r), never written to."""
    values: torch.Tensor
    """(n, r): the weights as rounded."""
    error: torch.Tensor
    """(n, r): values - weight."""
    peak: torch.Tensor
    """(G, r): the scales, as in ``scale_search``."""

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Ranges of about WIDTH columns, whole groups or pieces of one group, and the view of their peaks."""
        n = self.weight.shape[0]
        group = n // self.peak.shape[0]
        width = WIDTH // group * group or WIDTH
        for first in range(0, n, max(group, width)):
            end = min(n, first + max(group, width))
            for start in range(first, end, width):
                stop = min(start + width, end)
                yield slice(start, stop), self.peak[start // group : -(-stop // group)]


def feed_back(weight: torch.Tensor, peak: torch.Tensor, factor: Factor, scaling: Scaling,
              choice: Choice | None = None) -> Panel:  # fmt: skip
    """Rounds (n, r) weights in one pass under scales of ``peak``, or into ``peak`` by ``choice`` (``cost``: (n,))."""
    panel = Panel(weight, torch.empty_like(weight), torch.empty_like(weight), peak)
    for part, here in panel.blocks():
        target = panel.values[part].copy_(weight[part])
        if part.start:
            target.addmm_(factor.lower[part, : part.start], panel.error[: part.start], alpha=-1)
        some = Choice(choice.ratios, choice.cost[part]) if choice else None
        panel.error[part] = cascade_(target, weight[part], factor.lower[part, part], scaling, here, some)
    return panel


def sweep_(panel: Panel, factor: Factor, scaling: Scaling) -> None:
    """Offers every weight of the panel its best value given all others, column by column; the loss never rises."""
    for part, here in panel.blocks():
        values = panel.values[part]
        target = torch.addmm(values, factor.pull[part], panel.error, alpha=-1)
        cascade_(target, values, factor.pull[part, part], scaling, here)
        values.copy_(target)
        torch.sub(target, panel.weight[part], out=panel.error[part])


def losses(error: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Float32 (r,) e H e^T of each row e of the error, which is given on its side (n, r), in the factor's order."""
    weighted = (factor.pull @ error).mul_(error).mul_(factor.diagonal[:, None])
    return tree_sum_(weighted.T).clone()  # lets go of the products
