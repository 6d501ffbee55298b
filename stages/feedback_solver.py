"""Solvers of calibrated rounding: a matrix in ranges of rows, each turned, rounded and put back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from ..formats.format import Scales
from ..formats.reduce import tree_sum_
from .cascade import Choice
from .error_feedback import Panel, feed_back, feed_back_choosing, losses, sweep_
from .factor import Factor, damped_diagonal
from .methods import Problem, Rounded
from .scale_search import Scaling

_PANEL = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Weights in a range of rows: 64 MiB, on a GPU 256, for each of the buffers that are as large."""

_BUFFERS = 8
"""Of them at most at a time: weights, values and errors of two alternatives, the best of both, temporaries."""

_CHOICE = 1024
"""Elements a row, at most, while candidate scales of a group are compared."""


def memory_of_rows(shape: tuple[int, int], device: str) -> int:
    """Bytes for a range of rows of an (m, n) matrix."""
    rows = min(shape[0], max(1, _PANEL[device.partition(":")[0]] // shape[1]))
    return 4 * rows * (_BUFFERS * shape[1] + _CHOICE) + 16 * shape[0]


class _Solver(ABC):
    """What both solvers share: ranges of rows, and where their columns and scales lie."""

    projection: ClassVar[None] = None
    """Subspaces of the weight play no part."""

    def __init__(self, problem: Problem, order: torch.Tensor, unit: torch.Tensor) -> None:
        self.problem, self.order, self.unit = problem, order, unit
        fmt = problem.format
        self.whole = None if fmt.scaling == "tensor" else problem.whole
        """What the rows share beside their own scales: the scale of the tensor, of NVFP4 and hybrid MXFP8."""

    def loss(self, values: torch.Tensor) -> float:
        """tr(E Hd E^T), E = values - weight, whatever the magnitude of the weights."""
        weight = self.problem.weight
        largest = weight.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)
        errors = (self.turned((values[rows] - weight[rows]).div_(largest)) for rows in self.ranges())
        relative = tree_sum_(torch.cat([self.losses(error) for error in errors]))
        return float(relative) * float(self.unit) * float(largest) ** 2

    def solve(self, start: torch.Tensor) -> Rounded:
        """Values and scales; ``start`` plays no part."""
        return solve_together([self])[0]

    def ranges(self) -> Iterator[slice]:
        """Rows that are worked on at a time: whole tiles."""
        return _ranges(self.problem, self.problem.weight)

    def turned(self, rows: torch.Tensor) -> torch.Tensor:
        """Contiguous (n, r): rows on their side, columns in order."""
        return rows.T.index_select(0, self.order)

    def search_tensor(self, importance: torch.Tensor, ratios: tuple[float, ...]) -> torch.Tensor:
        """Float32 (): the peak of the least weighted squared error of the whole tensor.

        A sample will not do: what decides is the few large weights.
        """
        weight = self.problem.weight
        peaks = weight.abs().amax() * torch.tensor(ratios, device=weight.device)
        found = []
        for rows in self.ranges():
            x = self.turned(weight[rows])
            everywhere = peaks[:, None, None].expand(-1, 1, x.shape[1]).contiguous()
            found.append(Scaling(self.problem.format, None).errors(x, everywhere, importance)[:, 0])
        return peaks.take(tree_sum_(torch.cat(found, 1)).argmin())

    @abstractmethod
    def losses(self, error: torch.Tensor) -> torch.Tensor:
        """(r,) e Hd e^T of each row of an error (n, r), in units of the mean diagonal."""

    @abstractmethod
    def tensor_peak(self) -> torch.Tensor:
        """Float32 (): for scaling ``tensor``."""

    @abstractmethod
    def round(
        self, x: torch.Tensor, peak: torch.Tensor | None, scaling: Scaling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rounded weights (n, r) and their peaks (G, r), which may be given."""

    def stored(self, peak: torch.Tensor) -> Scales:
        """Scales of the whole matrix, of its peaks (G, m) with groups in the solver's order."""
        groups = self.order.view(peak.shape[0], -1)[:, 0] // (self.order.shape[0] // peak.shape[0])
        if peak.shape[0] > 1:
            peak = torch.empty_like(peak).index_copy_(0, groups, peak)
        return Scaling(self.problem.format, self.whole).stored(peak)


def solve_together(solvers: Sequence[_Solver]) -> list[Rounded]:
    """Values and scales of matrices that have inputs and format in common, solved as one with all their rows.

    Rows do not interact, and what is launched for few costs as much as for many.
    """
    first, weights = solvers[0], [solver.problem.weight for solver in solvers]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    values, peaks = torch.empty_like(weight), []
    shared = whole = None
    if first.problem.format.scaling == "tensor":
        shared = torch.cat([solver.tensor_peak().expand(1, len(solver.problem.weight)) for solver in solvers], 1)
    elif first.whole is not None:
        wholes = ((solver.whole, len(solver.problem.weight)) for solver in solvers)
        whole = torch.cat([one.expand(rows) for one, rows in wholes if one is not None])
    for rows in _ranges(first.problem, weight):
        x = first.turned(weight[rows])
        scaling = Scaling(first.problem.format, None if whole is None else whole[rows])
        rounded, peak = first.round(x, None if shared is None else shared[:, rows], scaling)
        values[rows].T.index_copy_(0, first.order, rounded)
        peaks.append(peak)
    lengths = [len(weight) for weight in weights]
    parts = zip(solvers, values.split(lengths), torch.cat(peaks, 1).split(lengths, 1), strict=True)
    return [Rounded(part, solver.stored(peak)) for solver, part, peak in parts]


def _ranges(problem: Problem, weight: torch.Tensor) -> Iterator[slice]:
    m, n = weight.shape
    multiple = problem.format.rows_multiple
    step = max(1, _PANEL[weight.device.type] // problem.split // (n * multiple)) * multiple
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


class FeedbackSolver(_Solver):
    """Error feedback and sweeps of coordinate descent."""

    def __init__(self, problem: Problem, factor: Factor, sweeps: int) -> None:
        super().__init__(problem, factor.order, factor.unit)
        self.factor, self.sweeps = factor, sweeps
        fmt = problem.format
        self.alternatives = [(fmt.ratios, factor.pivots)]
        """Ways to search scales: candidates and importance of columns. A pivot is what an error costs that later
        columns make up for; for clipping the square root of the diagonal is the better guess in some layers."""
        if fmt.clips:
            self.alternatives += [(fmt.clips, factor.pivots), (fmt.clips, factor.diagonal.sqrt())]

    def losses(self, error: torch.Tensor) -> torch.Tensor:
        return losses(error, self.factor)

    def tensor_peak(self) -> torch.Tensor:
        weight = self.problem.weight
        peaks = torch.stack([self.search_tensor(importance, ratios) for ratios, importance in self.alternatives])
        if len(peaks) == 1:
            return peaks[0]
        found = []
        for rows in self.ranges():
            x = self.turned(weight[rows])
            found.append(torch.stack([self.losses(self.tried(x, peak).error.x) for peak in peaks.unbind()]))
        return peaks.take(tree_sum_(torch.cat(found, 1)).argmin())

    def tried(self, x: torch.Tensor, peak: torch.Tensor) -> Panel:
        """Rounded under one peak () for all, as far as it takes to tell peaks apart: one sweep."""
        scaling = Scaling(self.problem.format, None)
        panel = feed_back(x, peak.expand(1, x.shape[1]), self.factor, scaling)
        if self.sweeps:
            sweep_(panel, self.factor, scaling)
        return panel

    def round(
        self, x: torch.Tensor, peak: torch.Tensor | None, scaling: Scaling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        panel = self.first(x, scaling) if peak is None else feed_back(x, peak, self.factor, scaling)
        for _ in range(self.sweeps):
            sweep_(panel, self.factor, scaling)
        return panel.values, panel.peak

    def first(self, x: torch.Tensor, scaling: Scaling) -> Panel:
        """Rounded by error feedback alone, under the best of the alternatives for each set of rows with one scale."""
        factor, fmt = self.factor, self.problem.format
        if scaling.local:
            choice = Choice(torch.tensor(fmt.ratios, device=x.device), factor.pivots)
            return feed_back_choosing(x, factor, scaling, choice)
        best: Panel | None = None
        for ratios, importance in self.alternatives:
            panel = feed_back(x, scaling.search(x, importance, ratios), factor, scaling)
            if len(self.alternatives) == 1:
                return panel
            loss = scaling.total(self.losses(panel.error.x)[None])
            if best is None:
                best, least = panel, loss
                continue
            better = loss < least
            least = torch.where(better, loss, least)
            for old, new in ((best.values, panel.values), (best.peak, panel.peak)):
                torch.where(better, new, old, out=old)
            best.error.put(slice(None), torch.where(better, panel.error.x, best.error.x))
        assert best is not None
        return best


class DiagonalSolver(_Solver):
    """Scales searched with the diagonal of H as weights; rounding to nearest is optimal then."""

    def __init__(self, problem: Problem, damping: float) -> None:
        assert problem.moments is not None
        self.diagonal, unit = damped_diagonal(problem.moments.hessian, damping)
        super().__init__(problem, torch.arange(len(self.diagonal), device=unit.device), unit)
        self.ratios = problem.format.ratios + problem.format.clips

    def losses(self, error: torch.Tensor) -> torch.Tensor:
        return tree_sum_(error.square().mul_(self.diagonal[:, None]).T).clone()

    def tensor_peak(self) -> torch.Tensor:
        return self.search_tensor(self.diagonal, self.ratios)

    def round(
        self, x: torch.Tensor, peak: torch.Tensor | None, scaling: Scaling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if peak is None:
            peak = scaling.search(x, self.diagonal, self.ratios)
        return scaling.round(x, peak), peak
