"""How far stored weights are from the original ones, beside what plain rounding would have stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..formats.format import Format, Scales, Stats
from .cancelling import check_here
from .products import precise
from .statistics import Moments

Projection = Callable[[torch.Tensor], torch.Tensor]
"""U^T E V (k, k) of an error E (m, n)."""

ROWS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Weights that are compared at a time."""


@dataclass(frozen=True)
class Errors:
    """Relative errors of one layer; E is stored minus original weight."""

    weight: float
    """||E|| / ||W||."""
    projected: float | None = None
    """||U^T E V|| / ||W||, U and V spanning the dominant singular subspaces of W; None where nobody computed them."""
    output: float | None = None
    """sqrt(tr(E H E^T) / tr(W H W^T)), H = E[x x^T]; None without statistics."""


@dataclass(frozen=True)
class Quality:
    """What a rounding method brought to a layer."""

    stored: Errors
    nearest: Errors
    """With scales from the largest weight and rounding to nearest, in the same format (and rotation)."""
    kept_start: bool = False
    """Whether the method found nothing better than the rounding it started from."""


@dataclass(frozen=True)
class AdapterGain:
    """What an adapter brings to a layer; in a survey, what it could bring."""

    rank: int
    before: Errors
    """Of the stored weight alone. Output errors are known where there are statistics."""
    after: Errors
    """Of stored weight and adapter, as both are stored."""
    spectrum: tuple[float, ...] = ()
    """In a survey: the share of the squared error that each further rank removes, falling."""


def nearest_scales(fmt: Format, weight: torch.Tensor) -> Scales:
    """Scales from the largest weight of each group of float32 (m, n) rows: a whole tensor."""
    amax = fmt.amax(weight)
    whole = fmt.whole(Stats(amax.amax(), weight.reshape(-1)[:0]), False) if fmt.needs_stats else None
    return fmt.scales(amax, whole)


def row_ranges(weight: torch.Tensor, multiple: int) -> Iterator[slice]:
    """Ranges of whole tiles of rows, small enough for temporaries of their size."""
    step = max(1, ROWS[weight.device.type] // max(1, weight.shape[1] * multiple)) * multiple
    for start in range(0, weight.shape[0], step):
        check_here()
        yield slice(start, min(start + step, weight.shape[0]))


class Measure:
    """Relative errors of what may be stored for one float32 weight (m, n)."""

    def __init__(self, weight: torch.Tensor, moments: Moments | None, project: Projection | None) -> None:
        self.weight, self.project = weight, project
        self.hessian = None if moments is None else moments.hessian
        self.norm, self.energy = self._norm(weight), self._energy(weight)

    def errors(self, values: torch.Tensor, shift: torch.Tensor | None = None) -> Errors:
        """Errors of stored float32 weights (m, n); ``shift`` (m,) is what the mean output is off by, where moments are
        centred and do not know it."""
        error = values - self.weight
        projected = None if self.project is None else self._share(self._norm(self.project(error)), self.norm)
        energy = self._energy(error)
        if energy is not None and shift is not None:
            energy = torch.hypot(energy, shift.double().norm())
        return Errors(
            self._share(self._norm(error), self.norm), projected,
            None if energy is None or self.energy is None else self._share(energy, self.energy),
        )  # fmt: skip

    def nearest(self, fmt: Format) -> Errors:
        """Errors of plain rounding to a format."""
        return self.errors(fmt.snap_(self.weight.clone(), nearest_scales(fmt, self.weight)))

    @staticmethod
    def _norm(x: torch.Tensor) -> torch.Tensor:
        """Float64 (): Frobenius norm; squares of tiny weights do not vanish."""
        largest = x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
        return (x / largest).square_().sum(1).double().sum().sqrt() * largest

    def _energy(self, x: torch.Tensor) -> torch.Tensor | None:
        """Float64 (): sqrt(tr(X H X^T)); None without statistics."""
        if self.hessian is None:
            return None
        largest = x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for rows in row_ranges(x, 1):
            part = x[rows] / largest
            weighted = precise(part, self.hessian) if self.hessian.dim() == 2 else part * self.hessian
            total += weighted.mul_(part).sum(1).double().sum()
        return total.clamp(min=0).sqrt() * largest

    @staticmethod
    def _share(error: torch.Tensor, of: torch.Tensor) -> float:
        """error / of; 0 for 0 / 0."""
        return float(error / of) if float(of) else (0.0 if float(error) == 0 else float("inf"))
