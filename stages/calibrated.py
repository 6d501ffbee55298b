"""Calibrated rounding: the least error of a layer's outputs on the inputs that its statistics describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..formats.errors import NonFiniteError, UsageError
from .factor import Factor, factorise, memory_of_factor
from .feedback_solver import DiagonalSolver, FeedbackSolver, memory_of_rows, solve_together
from .methods import Problem, Rounded
from .statistics import Moments

_DAMPING, _ENOUGH, _MOST = 0.05, 1024, 8.0
"""Damping, the tokens from which on it is enough, and how many times more is used for the fewest."""


@dataclass(frozen=True)
class Calibrated:
    """Minimises tr(E Hd E^T), where H = E[x x^T], Hd = H + damping * mean(diag H) * I: error feedback, then sweeps.

    Group scales (MXFP8, NVFP4) are chosen when error feedback reaches their group; others before it, by the same
    costs of columns, where INT8 may clip if that lowers the loss. With no more than the diagonal of H, columns cannot
    make up for each other: what is left, and exactly optimal for such an H, is a search for scales weighted by it.

    The error of the weights themselves grows: what the inputs do not excite is free to move.
    """

    name: ClassVar[str] = "calibrated"
    needs_moments: ClassVar[bool] = True

    damping: float | None = None
    """Share of the mean of diag H that is added to the diagonal; by default 0.05, and more for less than 1024 tokens,
    up to 0.4. Statistics of other inputs than those to come deserve 0.2."""
    sweeps: int = 3
    """Passes of coordinate descent."""

    def __post_init__(self) -> None:
        if self.damping is not None and not 0 < self.damping <= 1e6:
            raise UsageError(f"calibrated: damping {self.damping} must be a positive number, at most 1e6")
        if not 0 <= self.sweeps <= 1000:
            raise UsageError(f"calibrated: {self.sweeps} sweeps; from 0 to 1000 make sense")

    def damping_for(self, moments: Moments) -> float:
        """The damping of these statistics."""
        if self.damping is not None:
            return self.damping
        return _DAMPING * min(_MOST, max(1.0, _ENOUGH / max(1, moments.tokens)))

    def factor(self, moments: Moments, group: int) -> Factor:
        """What depends on the inputs alone; layers that have them in common get the same one."""
        damping = self.damping_for(moments)
        factor: Factor = moments.derived((damping, group), lambda: factorise(moments.hessian, damping, group))
        return factor

    def solver(self, problem: Problem) -> FeedbackSolver | DiagonalSolver:
        """Factorises the moments, unless a layer before has."""
        moments = problem.moments
        assert moments is not None
        if moments.hessian.dim() == 1:
            return DiagonalSolver(problem, self.damping_for(moments))
        try:
            factor = self.factor(moments, problem.format.block_size or 1)
        except NonFiniteError as error:
            raise NonFiniteError(f"{problem.name}: {error}; calibrate again") from error
        return FeedbackSolver(problem, factor, self.sweeps)

    def solve_together(self, solvers: Sequence[FeedbackSolver | DiagonalSolver]) -> list[Rounded]:
        """Layers that share inputs, such as q, k and v: what is launched for few rows costs as much as for many."""
        return solve_together(solvers)

    def operations(self, shape: tuple[int, int]) -> float:
        """A factor, and products of all rows with the moments: one for feedback, two a sweep, four to measure."""
        rows, columns = shape
        return columns**3 / 3.0 + rows * columns**2 * (5.0 + 2.0 * self.sweeps)

    def memory(self, shape: tuple[int, int], device: str) -> int:
        """The factor, and the rows that are worked on at a time."""
        return memory_of_factor(shape[1]) + memory_of_rows(shape, device)
