"""Estimates of one input's moments, wherever they come from: a pass that was just made, a store, a norm's weights.

Estimates add up, weighted by the tokens that they saw, and H only ever moves as blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .histogram import BINS

Rows = Callable[[int, int], torch.Tensor]
"""Rows ``start`` to ``stop`` of E[x x^T], float32 (stop - start, n) on the CPU; its own memory or a view."""


@dataclass(frozen=True)
class Estimate:
    """What some tokens say of one input x of n channels. Its tensors are on the CPU."""

    tokens: int
    mean: torch.Tensor
    """Float64 (n,): E[x]."""
    diagonal: torch.Tensor
    """Float64 (n,): E[x^2]."""
    rows: Rows | None
    """E[x x^T]; None when only its diagonal is known."""
    histogram: torch.Tensor
    """Int64 (BINS,) of |x|; all zero for a prior."""
    amax: float | None
    """Largest |x|; None for a prior."""

    @property
    def width(self) -> int:
        """n"""
        return self.mean.shape[0]


def nothing(width: int, hessian: bool) -> Estimate:
    """The estimate of no token, which changes none that it is added to."""
    zeros = torch.zeros(width, dtype=torch.float64)
    rows = (lambda start, stop: torch.zeros(stop - start, width)) if hessian else None
    return Estimate(0, zeros, zeros, rows, torch.zeros(BINS, dtype=torch.int64), None)


def merged(estimates: Sequence[Estimate]) -> Estimate:
    """One estimate from several of the same input; with the diagonal only as soon as one of them has no more."""
    seen = [estimate for estimate in estimates if estimate.tokens]
    if len(seen) < 2:
        return (seen or list(estimates))[0]
    tokens = sum(estimate.tokens for estimate in seen)
    shares = [estimate.tokens / tokens for estimate in seen]
    parts = [estimate.rows for estimate in seen if estimate.rows is not None]

    def rows(start: int, stop: int) -> torch.Tensor:
        total = torch.zeros(stop - start, seen[0].width, dtype=torch.float64)
        for share, part in zip(shares, parts, strict=True):
            total.add_(part(start, stop), alpha=share)
        return total.float()

    return Estimate(
        tokens,
        _sum([share * estimate.mean for share, estimate in zip(shares, seen, strict=True)]),
        _sum([share * estimate.diagonal for share, estimate in zip(shares, seen, strict=True)]),
        rows if len(parts) == len(seen) else None,
        _sum([estimate.histogram for estimate in seen]),
        max((estimate.amax for estimate in seen if estimate.amax is not None), default=None),
    )


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).sum(0)
