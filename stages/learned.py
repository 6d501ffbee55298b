"""Learned rounding, without data: moves the error out of the weight's dominant singular subspaces.

Minimises f(E) = ||U^T E V||^2 + penalty ||E||^2 over the stored weights W + E, where U and V span the leading singular
subspaces of W. It is a proxy: it helps outputs where activations lie in those subspaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..formats.errors import UsageError
from .cancelling import check_here
from .counter import seed_of
from .flips import Parabolas, flip
from .methods import Problem, Rounded
from .products import rough
from .subspace import check_rank, dominant_subspaces, memory_of_bases, project, rank_of

_PENALTY = {"nvfp4": 1.0, "int8": 4.0}
"""Default penalty by format, 0.85 for others. A smaller one lowers the projected error further, and raises the error
itself by more than that is worth; INT8 starts at its optimum and has the most to lose."""

_FIRST_SHARE, _LAST_SHARE = 0.7, 0.01
"""Share of the improving weights that move in the first round, and what is left of it in the last."""


@dataclass(frozen=True)
class Learned:
    """Rounds of simultaneous moves, each weight to the grid value that is best for it alone.

    A move's gain is exact for one weight; that all move at once is what the shrinking share corrects (annealing). A
    round that raises the objective is taken back, so the result is never worse than the start.
    """

    name: ClassVar[str] = "learned"
    needs_moments: ClassVar[bool] = False

    penalty: float | None = None
    """Weight of ||E||^2 beside the projected error; by default 1 for nvfp4, 4 for int8, 0.85 for others."""
    top_p: float = 0.2
    """Share of the singular directions that count ..."""
    min_k: int = 256
    """... but at least this many ..."""
    max_k: int = 1280
    """... and at most this many."""
    rounds: int = 8
    """Times that weights are offered a move."""

    def __post_init__(self) -> None:
        check_rank(self.top_p, self.min_k, self.max_k)
        if self.penalty is not None and not 1e-6 <= self.penalty <= 1e6:
            raise UsageError(f"learned: penalty {self.penalty} must be a number from 1e-6 to 1e6")
        if not 1 <= self.rounds <= 1000:
            raise UsageError(f"learned: {self.rounds} rounds; from 1 to 1000 make sense")

    def solver(self, problem: Problem) -> LearnedSolver:
        """Finds the subspaces."""
        return LearnedSolver(problem, self)

    def operations(self, shape: tuple[int, int]) -> float:
        """Four products by a basis a round, six before, and some fifty operations a weight and round."""
        rank = rank_of(shape, self.top_p, self.min_k, self.max_k)
        return shape[0] * shape[1] * (rank * (8.0 * self.rounds + 12) + 50.0 * self.rounds)

    def memory(self, shape: tuple[int, int], device: str) -> int:
        """The error now and at its best, the gradient, a temporary of products; bases."""
        rank = rank_of(shape, self.top_p, self.min_k, self.max_k)
        return 16 * shape[0] * shape[1] + memory_of_bases(shape, rank)


class LearnedSolver:
    """One matrix on its way."""

    def __init__(self, problem: Problem, options: Learned) -> None:
        self.problem, self.rounds = problem, options.rounds
        self.penalty = options.penalty or _PENALTY.get(problem.format.name, 0.85)
        shape = (problem.weight.shape[0], problem.weight.shape[1])
        rank = rank_of(shape, options.top_p, options.min_k, options.max_k)
        self.seed = seed_of(problem.name)
        self.subspaces = dominant_subspaces(problem.weight, rank, self.seed)

    def loss(self, values: torch.Tensor) -> float:
        error = values - self.problem.weight
        return float(self.projection(error).square().sum() + self.penalty * error.square().sum(1).sum())

    def projection(self, error: torch.Tensor) -> torch.Tensor:
        """U^T E V (k, k)."""
        return project(self.subspaces, error)

    def solve(self, start: torch.Tensor) -> Rounded:
        problem = self.problem
        left, right = self.subspaces
        parabolas = Parabolas(left.square().sum(1), right.square().sum(1), self.penalty)
        error = start - problem.weight
        best, best_core, least, damping = error.clone(), None, float("inf"), 1.0
        for turn in range(self.rounds + 1):
            check_here()
            core = self.projection(error)
            value = float(core.square().sum() + self.penalty * error.square().sum(1).sum())
            if best_core is None or value < least:
                least, best_core = value, core
                best.copy_(error)
            else:
                error.copy_(best)
                damping *= 0.5
            if turn == self.rounds:
                break
            share = damping * _FIRST_SHARE * (1 - turn / self.rounds) + _LAST_SHARE
            gradient = rough(left, rough(best_core, right.T))
            flip(problem, error, gradient, parabolas, (share, self.seed, turn + 1))
        values = problem.format.snap_(best.add_(problem.weight), problem.scales)
        return Rounded(values, problem.scales)
