"""What calibrated rounding needs of the second moments of a layer's inputs: damped, put in order, and factorised."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats.errors import NonFiniteError
from .cholesky import cholesky

_MOST_DAMPING = 1e6
"""No symmetric matrix of numbers fails to be positive definite with this share of its mean diagonal added."""


@dataclass(frozen=True)
class Factor:
    """H = L^T D L, for the damped moments H in units of their mean diagonal, columns in an order of their own.

    L is unit lower triangular and D diagonal. With E the error of the rounded weight W, error feedback adds up
    tr(E H E^T) = sum_j D_j |(E L^T)_j|^2 column by column. H is inverted nowhere.
    """

    order: torch.Tensor
    """Int64 (n,): the column of the weight at each place; whole scaling groups, strong ones first, sorted inside."""
    lower: torch.Tensor
    """Float32 (n, n): L."""
    pivots: torch.Tensor
    """Float32 (n,): D."""
    pull: torch.Tensor
    """Float32 (n, n): H, each row divided by its diagonal element: how an error at i moves the best value at j."""
    diagonal: torch.Tensor
    """Float32 (n,): the diagonal of H."""
    unit: torch.Tensor
    """Float32 (): the mean diagonal of the moments as they were given, or 1 where it is 0."""


def factorise(hessian: torch.Tensor, damping: float, group: int) -> Factor:
    """The factor of float32 (n, n) second moments E[x x^T], for scales of ``group`` consecutive columns.

    ``damping`` is the share of the mean diagonal that is added to the diagonal; ten times as much, and again, where
    the result is not positive definite in float32. NonFiniteError for moments that hold NaN or Inf.
    """
    unit = _mean(hessian.diagonal())
    order = activation_order(hessian.diagonal(), group)
    backwards = order.flip(0)
    flipped = hessian.index_select(0, backwards).index_select(1, backwards).div_(unit)
    flipped.diagonal().add_(damping)
    while True:
        found = cholesky(flipped)
        if found is not None:
            break
        if damping > _MOST_DAMPING:
            raise NonFiniteError("the second moments of the inputs hold NaN or Inf")
        flipped.diagonal().add_(9 * damping)
        damping *= 10
    lower = found.T.flip(0, 1)
    del found
    root = lower.diagonal().clone()
    lower.div_(root[:, None])
    pull = flipped.flip(0, 1)
    del flipped
    diagonal = pull.diagonal().clone()
    pull.div_(diagonal[:, None])
    return Factor(order, lower, root.square_(), pull, diagonal, unit)


def damped_diagonal(moments: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 (n,) damped diagonal in units of its mean before damping, and that unit."""
    unit = _mean(moments)
    return (moments / unit).add_(damping), unit


def activation_order(diagonal: torch.Tensor, group: int) -> torch.Tensor:
    """Int64 (n,): strong columns first, so that weak ones make up for them (GPTQ's ``act_order``).

    Whole groups of ``group`` columns move, because they share a scale, and are sorted inside.
    """
    groups = diagonal.view(-1, group)
    strongest = groups.sum(1).argsort(descending=True, stable=True)
    inside = groups[strongest].argsort(dim=1, descending=True, stable=True)
    return (strongest[:, None] * group + inside).view(-1)


def memory_of_factor(n: int) -> int:
    """Bytes that a factor takes while it is made: itself, the damped moments, and a solver's copy of them."""
    return 16 * n * n


def _mean(diagonal: torch.Tensor) -> torch.Tensor:
    mean = diagonal.mean()
    return torch.where(mean > 0, mean, 1.0)
