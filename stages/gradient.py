"""Gradient rounding, without data: an optimiser moves weights across rounding boundaries, for comparison and study.

Minimises ||U^T E V|| over the stored weights W + E, where U and V span the leading singular subspaces of W.

What an optimiser moves is an offset per weight, in units of the grid step there: so one learning rate serves all
formats. Stored is the grid value nearest to the weight with its offset. Offsets start at 0, which is nearest rounding,
and weights close to the boundary between two values cross it first. The loss is that of the stored weights. So is its
gradient (straight-through: Bengio et al., arXiv 1308.3432), but for a weight's own share: taken where the weight is,
not where it is stored, it vanishes at the weight's optimum. Without that, weights whose optimum lies between two values
swing over the boundary for ever, many at once, and nothing improves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..formats.errors import UsageError, did_you_mean, shown
from ..formats.format import Format, Scales, inverse_of
from .cancelling import check_here
from .counter import seed_of
from .methods import Problem, Rounded
from .optimizers import OPTIMIZERS
from .products import rough
from .schedule import Pace, Schedule
from .subspace import check_rank, dominant_subspaces, memory_of_bases, project, rank_of

_LARGEST = 1e30
"""Of options: products of what is larger leave float32."""


@dataclass(frozen=True)
class Gradient:
    """One loop for all optimisers, schedules and formats; the best of all stored weights that it saw is the result."""

    name: ClassVar[str] = "gradient"
    needs_moments: ClassVar[bool] = False

    optimizer: str = "original"
    """original (least time and memory of the four, with as good results), adamw, radam or prodigy (extra package)."""
    iterations: int = 100
    """Steps at most."""
    learning_rate: float | None = None
    """In grid steps per iteration, roughly; by default the optimiser's own (prodigy: a factor of what it finds)."""
    reach: float = 0.5
    """Grid steps that an offset may have. 0.5: a weight is stored as one of its two neighbours on the grid."""
    penalty: float = 0.0
    """Weight of ||E||^2 beside ||U^T E V||^2. 0: the projected error alone, at the cost of the error as a whole."""
    schedule: str = "plateau"
    """How the learning rate goes: plateau, adaptive or exponential."""
    gamma: float = 0.99
    """exponential: what the rate is multiplied by at each step."""
    patience: int = 1
    """plateau: steps without a better loss before the rate falls ..."""
    factor: float = 0.95
    """... by this factor ..."""
    min_lr: float = 1e-4
    """... but not below this ..."""
    cooldown: int = 0
    """... with so many steps of rest after it."""
    threshold: float = 0.0
    """plateau: by how much a loss must be better to count ..."""
    threshold_mode: str = "rel"
    """... as a share of the best (rel) or as a number (abs)."""
    shape_influence: float = 1.0
    """plateau: how far elongated matrices soften the factor, from 0 to 1."""
    stop_loss: float = 5e-9
    """Stop when the loss, as a share of ||W||, is no more than this ..."""
    stop_lr: float = 1.01e-4
    """... or the learning rate ..."""
    stop_stall: int = 50
    """... or after more steps than this without a better loss."""
    top_p: float = 0.2
    """Share of the singular directions that count ..."""
    min_k: int = 256
    """... but at least this many ..."""
    max_k: int = 1280
    """... and at most this many."""

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"unknown optimizer {shown(self.optimizer)}{did_you_mean(self.optimizer, OPTIMIZERS)}")
        if self.iterations < 1:
            raise UsageError(f"gradient: {self.iterations} iterations; at least one is needed")
        for option, value in (("learning_rate", self.rate), ("reach", self.reach)):
            if not 0 < value <= _LARGEST:
                raise UsageError(f"gradient: {option} {value} must be a positive number, at most {_LARGEST:g}")
        for option, value in (
            ("stop_loss", self.stop_loss), ("stop_lr", self.stop_lr), ("stop_stall", self.stop_stall),
            ("penalty", self.penalty),
        ):  # fmt: skip
            if not 0 <= value <= _LARGEST:
                raise UsageError(f"gradient: {option} {value} must be 0 or a positive number, at most {_LARGEST:g}")
        check_rank(self.top_p, self.min_k, self.max_k)
        self.pacing()

    @property
    def rate(self) -> float:
        """Learning rate at the start."""
        return OPTIMIZERS[self.optimizer].rate if self.learning_rate is None else self.learning_rate

    def pacing(self) -> Schedule:
        """The schedule that the options describe; UsageError for options that mean nothing."""
        return Schedule(
            self.schedule, self.gamma, self.patience, self.factor, self.min_lr, self.cooldown, self.threshold,
            self.threshold_mode, self.shape_influence, OPTIMIZERS[self.optimizer].grace,
        )  # fmt: skip

    def stops(self, pace: Pace, least: float) -> bool:
        """Whether any of the three criteria for an early end holds; ``least`` is the least loss so far."""
        return least <= self.stop_loss or pace.rate <= self.stop_lr or pace.stall > self.stop_stall

    def solver(self, problem: Problem) -> GradientSolver:
        """Finds the subspaces."""
        return GradientSolver(problem, self)

    def operations(self, shape: tuple[int, int]) -> float:
        """Four products by a basis an iteration, and some fifty operations a weight."""
        rank = rank_of(shape, self.top_p, self.min_k, self.max_k)
        return shape[0] * shape[1] * (8.0 * rank + 50.0) * self.iterations

    def memory(self, shape: tuple[int, int], device: str) -> int:
        """Offsets, their gradient, grid steps, values, errors, the best values, temporaries; optimiser; bases."""
        rank = rank_of(shape, self.top_p, self.min_k, self.max_k)
        held = 8 + OPTIMIZERS[self.optimizer].tensors
        return 4 * held * shape[0] * shape[1] + memory_of_bases(shape, rank)


class GradientSolver:
    """One matrix on its way."""

    def __init__(self, problem: Problem, options: Gradient) -> None:
        self.problem, self.options = problem, options
        self.shape = (problem.weight.shape[0], problem.weight.shape[1])
        rank = rank_of(self.shape, options.top_p, options.min_k, options.max_k)
        self.subspaces = dominant_subspaces(problem.weight, rank, seed_of(problem.name))
        self.size = max(float(problem.weight.norm()), torch.finfo(torch.float32).tiny)

    def loss(self, values: torch.Tensor) -> float:
        return self._loss(error := values - self.problem.weight, self.projection(error))

    def projection(self, error: torch.Tensor) -> torch.Tensor:
        """U^T E V (k, k)."""
        return project(self.subspaces, error)

    def _loss(self, error: torch.Tensor, core: torch.Tensor) -> float:
        """Relative to ||W||; ``core`` is the projection."""
        squares = core.square().sum()
        if self.options.penalty:
            squares += self.options.penalty * error.square().sum(1).sum()
        return float(squares.sqrt_()) / self.size

    def solve(self, start: torch.Tensor) -> Rounded:
        problem, options = self.problem, self.options
        grid = grid_steps(problem.format, start, problem.scales)
        usual = max(float(grid.mean()), torch.finfo(torch.float32).tiny)
        grid.masked_fill_(grid == 0, usual)
        offset, values, error, best = torch.zeros_like(start), start.clone(), torch.empty_like(start), start.clone()
        optimizer = OPTIMIZERS[options.optimizer].make([offset], options.rate)
        schedule, pace, least = options.pacing(), Pace(options.rate), math.inf
        for turn in range(options.iterations + 1):
            check_here()
            core = self.projection(torch.sub(values, problem.weight, out=error))
            loss = self._loss(error, core)
            if not math.isfinite(loss):
                break
            if loss < least:
                least = loss
                best.copy_(values)
            pace = schedule.next(pace, loss, self.shape)
            if turn == options.iterations or options.stops(pace, least):
                break
            optimizer.zero_grad()  # frees it
            offset.grad = self._gradient(core, offset * grid, error)
            # In the metric of weights, not of offsets: a step of the gradient moves weights alike, fine grid or coarse.
            offset.grad.div_(grid).mul_(usual * math.sqrt(offset.numel()) / (loss * self.size))
            for group in optimizer.param_groups:
                group["lr"] = pace.rate
            optimizer.step()
            offset.clamp_(-options.reach, options.reach)
            torch.addcmul(problem.weight, offset, grid, out=values)
            problem.format.snap_(values, problem.scales)
        return Rounded(best, problem.scales)

    def _gradient(self, core: torch.Tensor, moved: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """Half the gradient of the squared objective in every weight W + ``moved``, when all others are as stored.

        That of the stored weights, U core V^T, is what the parabola of a weight has at its stored value; its curvature
        leads from there to the weight itself. Destroys ``moved``.
        """
        left, right = self.subspaces
        gradient = rough(left, rough(core, right.T))
        if self.options.penalty:
            gradient.add_(moved, alpha=self.options.penalty)
        return gradient.add_(moved.sub_(error).mul_(left.square().sum(1)[:, None]).mul_(right.square().sum(1)))


def grid_steps(fmt: Format, values: torch.Tensor, scales: Scales) -> torch.Tensor:
    """Float32 (m, n): width of the grid's steps at stored ``values``, in the power of two of each; 0 where the scale
    is."""
    multiplier = fmt.spread(scales.multiplier)
    steps = values.clone()
    shaped = fmt.shaped(steps)
    if fmt.element.mantissa:
        shaped.mul_(inverse_of(multiplier))
        steps.copy_(fmt.element.binade(steps)).mul_(2.0**-fmt.element.mantissa)
    else:
        steps.fill_(1.0)
    shaped.mul_(multiplier)
    return steps
