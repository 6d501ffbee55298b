"""The best matrix of low rank for an error, in weights or in outputs, by matrix products.

Plain, the best approximation of E is U U^T E with U its leading left singular vectors. With second moments H = L L^T of
the inputs, ||(E - U B) L|| counts, and the same holds for E L: U are its leading left singular vectors, which are the
leading eigenvectors of E H E^T, and U^T E is the best B whatever L is (QERA, Zhang et al., arXiv 2410.06040). So
neither L nor an inverse is ever computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .cancelling import check_here
from .counter import signs
from .subspace import orthonormal

DAMPING = 0.01
"""Share of the mean diagonal of H that is added to its diagonal, so that inputs nobody saw count a little too."""

_OVERSAMPLING = 8
_POWER_STEPS = 6
_EXACT = 512
"""A matrix with a smaller edge is decomposed whole: that takes no longer than looking for its range."""


@dataclass(frozen=True)
class Weighting:
    """What the columns of an error count: the damped second moments H + d I of a layer's inputs."""

    hessian: torch.Tensor
    """Float32 (n, n), or (n,) where only the diagonal is known. Never written to."""
    damping: float = DAMPING

    @cached_property
    def added(self) -> torch.Tensor:
        """Float32 (): d. Above 0 for moments that are 0."""
        diagonal = self.hessian if self.hessian.dim() == 1 else self.hessian.diagonal()
        return diagonal.mean().mul(self.damping).clamp(min=torch.finfo(diagonal.dtype).tiny)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """(H + d I) x for float32 (n, k)."""
        h = self.hessian
        made = h[:, None] * x if h.dim() == 1 else h @ x
        return made.add_(x * self.added)


def low_rank(
    error: torch.Tensor, rank: int, seed: int, weighting: Weighting | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 up (m, rank) and down (rank, n), and float64 singular values of E, or of E L (all that were looked at,
    at least ``rank``, falling).

    ``error`` is float32 (m, n), ``rank`` at most its smaller edge. Randomised range finder with power steps (Halko,
    Martinsson and Tropp, arXiv 0909.4061), exact for matrices with an edge of at most 512. The product is the same
    whatever device and split of the work; magnitudes are shared out between the factors by powers of two, for dtypes
    narrower than float32.
    """
    basis = _range(error, rank, seed, weighting)
    projected = error.T @ basis
    double = projected.double()
    weighted = double if weighting is None else weighting.times(projected).double()
    gram = double.T @ weighted
    # On the CPU: LAPACK converges where cuSOLVER does not, for errors of lower rank than was asked for.
    energies, vectors = (x.to(gram.device) for x in torch.linalg.eigh(((gram + gram.T) / 2).cpu()))
    leading = vectors.flip(1)[:, :rank]
    up, down = (basis.double() @ leading).float(), (leading.T @ double.T).float()
    size = down.double().norm(dim=1).clamp(min=2.0**-120).sqrt()
    share = torch.exp2(size.log2().round()).float()
    return (up * share).contiguous(), (down / share[:, None]).contiguous(), energies.flip(0).clamp(min=0).sqrt()


def _range(error: torch.Tensor, rank: int, seed: int, weighting: Weighting | None) -> torch.Tensor:
    """Float32 (m, k): an orthonormal basis of about the range that the leading singular vectors span."""
    rows, columns = error.shape
    k, smaller = _width((rows, columns), rank), min(rows, columns)
    if k == rows:
        return torch.eye(rows, device=error.device)
    if k == smaller:
        whole: torch.Tensor = torch.linalg.qr(_scaled(error))[0]
        return whole
    left = orthonormal(_scaled(error @ signs((columns, k), seed, error.device)), passes=1)
    for step in range(_POWER_STEPS):
        check_here()
        right = error.T @ left
        if weighting is not None:
            right = weighting.times(right)
        left = orthonormal(_scaled(error @ _scaled(right)), passes=2 if step == _POWER_STEPS - 1 else 1)
    return left


def _width(shape: tuple[int, int], rank: int) -> int:
    """Columns of the basis."""
    smaller = min(shape)
    return smaller if smaller <= _EXACT else min(smaller, rank + _OVERSAMPLING)


def _scaled(x: torch.Tensor) -> torch.Tensor:
    """``x`` with a largest magnitude of 1: squares of tiny errors do not vanish."""
    return x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)


def operations_of_low_rank(shape: tuple[int, int], rank: int, weighted: bool) -> float:
    """Floating-point operations, roughly: products with the error, and with H, and orthonormal bases."""
    rows, columns = shape
    k = _width(shape, rank)
    steps = 0 if k == min(shape) else _POWER_STEPS
    products = 2.0 * rows * columns * k * (2 * steps + 2) + 4.0 * rows * k * k * (steps + 2)
    return products + (2.0 * columns**2 * k * (steps + 1) if weighted else 0.0)


def memory_of_low_rank(shape: tuple[int, int], rank: int) -> int:
    """Bytes beside the error: bases and their products in float32 and float64, and the decomposition of their Gram
    matrix."""
    k = _width(shape, rank)
    return 32 * k * sum(shape) + 40 * k * k
