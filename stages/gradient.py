"""Gradient rounding, without data: an optimiser moves weights across rounding boundaries, for comparison and study.

Minimises ||U^T E V||, E the error of the *stored* weights, where U and V span the leading singular subspaces of the
weight. What is optimised is an offset per weight in units of the grid step at it; the loss and its gradient are taken
at the rounded weights, and the gradient is passed on to the offsets (straight-through: Bengio et al., arXiv 1308.3432).
Offsets start at 0, so the start is nearest rounding, and the weights that are nearest to a boundary cross it first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..formats.errors import UsageError, did_you_mean, shown
from ..formats.format import Format, Scales
from .counter import seed_of
from .methods import Problem, Rounded
from .optimizers import OPTIMIZERS
from .schedule import Pace, Schedule
from .subspace import check_rank, dominant_subspaces, memory_of_bases, product, project, rank_of


@dataclass(frozen=True)
class Gradient:
    """One loop for all optimisers, schedules and formats; the best of all stored weights that it saw is the result."""

    name: ClassVar[str] = "gradient"
    needs_moments: ClassVar[bool] = False

    optimizer: str = "adamw"
    """original, adamw, radam or prodigy (extra package)."""
    iterations: int = 500
    """Steps at most."""
    learning_rate: float | None = None
    """In grid steps per iteration; None: the optimiser's own (prodigy: a factor of the rate that it finds)."""
    reach: float = 0.5
    """Grid steps that an offset may have. 0.5: a weight is stored as one of its two neighbours on the grid."""
    penalty: float = 0.0
    """Weight of ||E||^2 beside the projected error."""
    schedule: str = "plateau"
    """plateau, adaptive or exponential; what follows are its options (see ``Schedule``)."""
    gamma: float = 0.99
    patience: int = 1
    factor: float = 0.95
    min_lr: float = 1e-4
    cooldown: int = 0
    threshold: float = 0.0
    threshold_mode: str = "rel"
    shape_influence: float = 1.0
    stop_loss: float = 5e-9
    """Stop when the loss is no more than this ..."""
    stop_lr: float = 1.01e-4
    """... or the learning rate ..."""
    stop_stall: int = 200
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
            if not 0 < value < math.inf:
                raise UsageError(f"gradient: {option} {value} must be a positive number")
        for option, value in (("stop_loss", self.stop_loss), ("stop_lr", self.stop_lr), ("stop_stall", self.stop_stall)):
            if not value >= 0:
                raise UsageError(f"gradient: {option} {value} must be 0 or a positive number")
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

    def memory(self, shape: tuple[int, int]) -> int:
        """Offsets, their gradient, grid steps, stored weights now and at their best, a temporary; optimiser; bases."""
        rank = rank_of(shape, self.top_p, self.min_k, self.max_k)
        held = 6 + OPTIMIZERS[self.optimizer].tensors
        return 4 * held * shape[0] * shape[1] + memory_of_bases(shape, rank)


class GradientSolver:
    """One matrix on its way."""

    def __init__(self, problem: Problem, options: Gradient) -> None:
        self.problem, self.options = problem, options
        self.shape = (problem.weight.shape[0], problem.weight.shape[1])
        rank = rank_of(self.shape, options.top_p, options.min_k, options.max_k)
        self.left, self.right = dominant_subspaces(problem.weight, rank, seed_of(problem.name))
        self.curvature = torch.outer(self.left.square().sum(1), self.right.square().sum(1))
        self.curvature.add_(options.penalty)

    def loss(self, values: torch.Tensor) -> float:
        error = values - self.problem.weight
        return float((self.projection(error).square().sum() + self.options.penalty * error.square().sum(1).sum()).sqrt())

    def projection(self, error: torch.Tensor) -> torch.Tensor:
        """U^T E V (k, k)."""
        return project((self.left, self.right), error)

    def solve(self, start: torch.Tensor) -> Rounded:
        problem, options = self.problem, self.options
        grid = grid_steps(problem.format, start, problem.scales)
        offset = torch.zeros_like(start)
        optimizer = OPTIMIZERS[options.optimizer].make([offset], options.rate)
        schedule, pace = options.pacing(), Pace(options.rate)
        values, best, least = start, start.clone(), math.inf
        for _ in range(options.iterations):
            error = values - problem.weight
            core = self.projection(error)
            loss = float((core.square().sum() + options.penalty * error.square().sum(1).sum()).sqrt())
            if not math.isfinite(loss):
                break
            if loss < least:
                least = loss
                best.copy_(values)
            pace = schedule.next(pace, loss, self.shape)
            if options.stops(pace, least):
                break
            gradient = product(self.left, product(core, self.right.T))
            own = torch.addcmul(problem.weight, offset, grid).sub_(values)
            gradient.addcmul_(own, self.curvature).add_(error, alpha=options.penalty).div_(loss)
            offset.grad = gradient.mul_(grid)
            for group in optimizer.param_groups:
                group["lr"] = pace.rate
            optimizer.step()
            offset.clamp_(-options.reach, options.reach)
            values = problem.format.snap_(torch.addcmul(problem.weight, offset, grid), problem.scales)
        else:
            if self.loss(values) < least:
                best.copy_(values)
        return Rounded(best, problem.scales)


def grid_steps(fmt: Format, values: torch.Tensor, scales: Scales) -> torch.Tensor:
    """Distance of each of the stored ``values`` (m, n) to the next larger magnitude on the grid; 0 where scales are."""
    multiplier = fmt.spread(scales.multiplier)
    codes = values.clone()
    fmt.shaped(codes).mul_(torch.where(multiplier > 0, multiplier.reciprocal(), 0.0))
    if fmt.element.mantissa:
        codes.copy_(fmt.element.binade(codes)).mul_(2.0**-fmt.element.mantissa)
    else:
        codes.fill_(1.0)
    fmt.shaped(codes).mul_(multiplier)
    return codes
