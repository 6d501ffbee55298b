"""Bases of a weight's dominant singular subspaces, by matrix products alone."""

from __future__ import annotations

import torch

from ..formats.errors import UsageError
from .cholesky import cholesky
from .counter import signs
from .products import rough

_OVERSAMPLING = 16
_POWER_STEPS = 2


def rank_of(shape: tuple[int, int], top_p: float, min_k: int, max_k: int) -> int:
    """Dimensions that count: a share ``top_p`` of the smaller edge, within ``min_k`` and ``max_k``."""
    smaller = min(shape)
    return min(smaller, max_k, max(min_k, int(top_p * smaller)))


def dominant_subspaces(weight: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal float32 bases U (m, k) and V (n, k) of the leading singular subspaces, k = rank + 16 at most.

    Block power iteration with oversampling (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4). What uses
    the bases depends on the spaces only, so no singular value decomposition is needed.
    """
    k = min(rank + _OVERSAMPLING, *weight.shape)
    scaled = weight / weight.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)
    right = orthonormal(scaled.T @ signs((weight.shape[0], k), seed, weight.device), passes=1)
    for _ in range(_POWER_STEPS):
        left = orthonormal(scaled @ right, passes=1)
        right = orthonormal(scaled.T @ left, passes=1)
    return orthonormal(scaled @ right), orthonormal(right)


def orthonormal(x: torch.Tensor, passes: int = 2) -> torch.Tensor:
    """A basis (m, k) of the columns of float32 ``x`` (m, k), m >= k: orthonormal, after one pass only nearly so.

    CholeskyQR2 (Yamamoto et al., ETNA 44, 2015): products and the inverse of a small triangle, a fraction of the cost
    of Householder steps. Columns are scaled first. A matrix that is too close to singular goes to ``torch.linalg.qr``.
    """
    q: torch.Tensor = x / x.norm(dim=0).clamp(min=torch.finfo(x.dtype).tiny)
    unit = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    for _ in range(passes):
        factor = cholesky(q.T @ q)
        if factor is None:
            fallback: torch.Tensor = torch.linalg.qr(x)[0]
            return fallback
        q = q @ torch.linalg.solve_triangular(factor, unit, upper=False).T
    return q


def check_rank(top_p: float, min_k: int, max_k: int) -> None:
    """UsageError for options of ``rank_of`` that mean nothing."""
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p {top_p} must be above 0 and at most 1")
    if not 1 <= min_k <= max_k:
        raise UsageError(f"min_k {min_k} and max_k {max_k}: it must be 1 <= min_k <= max_k")


def memory_of_bases(shape: tuple[int, int], rank: int) -> int:
    """Bytes of both bases while they are computed, and of the scaled weight."""
    k = min(rank + _OVERSAMPLING, *shape)
    return 4 * (shape[0] * shape[1] + 4 * (shape[0] + shape[1]) * k + 4 * k * k)


def project(subspaces: tuple[torch.Tensor, torch.Tensor], error: torch.Tensor) -> torch.Tensor:
    """U^T E V (k, k) of an error E (m, n)."""
    left, right = subspaces
    return rough(rough(left.T, error), right)
