"""Learning-rate schedules of gradient rounding: one value with three kinds, and the state that it steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from ..formats.errors import UsageError, did_you_mean, shown

SCHEDULES = ("plateau", "adaptive", "exponential")
THRESHOLD_MODES = ("rel", "abs")

GROWTH = (
    (0, 1.25), (50, 1.375), (75, 1.5), (100, 1.75), (125, 2.0), (150, 2.25), (200, 2.5), (250, 2.75), (300, 3.0),
)  # fmt: skip
"""``adaptive``, on improvement: (steps without one before it, factor)."""

DECAY = (
    (0, 0.95, 9e-8), (26, 0.97, 8e-8), (51, 0.985, 7e-8), (76, 0.9875, 6e-8), (101, 0.98875, 5e-8),
    (151, 0.99, 4e-8), (201, 0.99125, 3e-8), (251, 0.9925, 2e-8), (301, 0.995, 5e-9),
)  # fmt: skip
"""``adaptive``, otherwise: (steps without improvement, factor, lowest rate)."""

HIGHEST = 100.0
"""``adaptive`` raises the rate no further."""


@dataclass(frozen=True)
class Pace:
    """Where a schedule stands."""

    rate: float
    """Learning rate of the next step."""
    best: float = math.inf
    """Least loss, as far as losses that improve by less than the threshold do not count."""
    stall: int = 0
    """Losses since then."""
    bad: int = 0
    """Of those, losses that count towards ``patience``."""
    rest: int = 0
    """Losses that will not, after a reduction."""
    seen: int = 0
    """Losses in all."""


@dataclass(frozen=True)
class Schedule:
    """How the learning rate follows the loss."""

    kind: str = "plateau"
    """``plateau``, ``adaptive`` or ``exponential``."""
    gamma: float = 0.99
    """``exponential``: factor of every step."""
    patience: int = 1
    """``plateau``: losses without improvement that lower the rate."""
    factor: float = 0.95
    """``plateau``: what they multiply it by."""
    min_lr: float = 1e-8
    """``plateau`` and ``exponential`` go no lower."""
    cooldown: int = 0
    """``plateau``: losses after a reduction that do not count."""
    threshold: float = 0.0
    """What a loss must be lower by to be an improvement ..."""
    threshold_mode: str = "rel"
    """... as a share of the best one (``rel``), or as a number (``abs``)."""
    shape_influence: float = 1.0
    """``plateau``: from 0 (the factor as it is) to 1 (lower the longer the matrix)."""
    grace: int = 0
    """``plateau``: first losses that do not count."""

    def __post_init__(self) -> None:
        for option, value, known in (
            ("schedule", self.kind, SCHEDULES), ("threshold_mode", self.threshold_mode, THRESHOLD_MODES),
        ):  # fmt: skip
            if value not in known:
                raise UsageError(f"unknown {option} {shown(value)}{did_you_mean(str(value), known)}")
        for option, share in (("gamma", self.gamma), ("factor", self.factor)):
            if not 0 < share <= 1:
                raise UsageError(f"{option} {share} must be above 0 and at most 1")
        for option, number in (
            ("cooldown", self.cooldown), ("threshold", self.threshold), ("min_lr", self.min_lr), ("grace", self.grace),
        ):  # fmt: skip
            if not 0 <= number < math.inf:
                raise UsageError(f"{option} {number} must be 0 or a positive number")
        if self.patience < 1:
            raise UsageError(f"patience {self.patience} must be at least 1")
        if not 0 <= self.shape_influence <= 1:
            raise UsageError(f"shape_influence {self.shape_influence} must be between 0 and 1")

    def next(self, pace: Pace, loss: float, shape: tuple[int, int]) -> Pace:
        """The pace after ``loss`` (not NaN) of an (m, n) matrix. The first loss is the start's: it changes no rate."""
        better = loss < self._bar(pace.best)
        best, stall = (loss, 0) if better else (pace.best, pace.stall + 1)
        seen = pace.seen + 1
        if pace.seen == 0:
            return Pace(pace.rate, best, stall, seen=seen)
        if self.kind == "plateau":
            return self._plateau(Pace(pace.rate, best, stall, pace.bad, pace.rest, seen), shape)
        if self.kind == "exponential":
            rate = max(pace.rate * self.gamma, min(self.min_lr, pace.rate))
        else:
            rate = _grown(pace, shape) if better else _decayed(pace.rate, stall, shape)
        return Pace(rate, best, stall, seen=seen)

    def shaped_factor(self, shape: tuple[int, int]) -> float:
        """``plateau``: f + (f^sqrt(longer edge / shorter edge) - f) * influence."""
        steep = math.pow(self.factor, math.sqrt(max(shape) / min(shape)))
        return self.factor + (steep - self.factor) * self.shape_influence

    def _bar(self, best: float) -> float:
        """What a loss must be below."""
        if math.isinf(best):
            return best
        return best * (1 - self.threshold) if self.threshold_mode == "rel" else best - self.threshold

    def _plateau(self, pace: Pace, shape: tuple[int, int]) -> Pace:
        """As torch's ReduceLROnPlateau, but for a patience that is reached rather than exceeded."""
        rate, bad, rest = pace.rate, pace.bad, pace.rest
        if pace.stall == 0 or pace.seen <= self.grace:
            bad, rest = 0, max(0, rest - 1)
        elif rest:
            bad, rest = 0, rest - 1
        else:
            bad += 1
        if bad >= self.patience:
            rate = max(rate * self.shaped_factor(shape), min(self.min_lr, rate))
            bad, rest = 0, self.cooldown
        return Pace(rate, pace.best, pace.stall, bad, rest, pace.seen)


def shape_multiplier(shape: tuple[int, int]) -> float:
    """What factors of ``adaptive`` are multiplied by: a little below 1 for square matrices, above 1 for long ones.

    Square: gamma(m^(1/3) / m + 1), the gamma function; tall: 100^(m / n^2); wide: 10^(n / m^2). Grows without bound
    for narrow matrices (100 for 4096 x 64; infinite where it leaves float64), so what it multiplies is bounded.
    """
    m, n = shape
    if m == n:
        return math.gamma(m ** (1 / 3) / m + 1)
    exponent = 2 * m / n**2 if m > n else n / m**2
    return math.inf if exponent > 300 else 10.0**exponent


def _grown(pace: Pace, shape: tuple[int, int]) -> float:
    """The rate after an improvement: by no more than the highest tier."""
    factor = GROWTH[bisect_right(GROWTH, (pace.stall, math.inf)) - 1][1]
    return min(pace.rate * min(factor * shape_multiplier(shape), GROWTH[-1][1]), max(HIGHEST, pace.rate))


def _decayed(rate: float, stall: int, shape: tuple[int, int]) -> float:
    """The rate without improvement: lower by at least the gentlest tier."""
    _, factor, lowest = DECAY[bisect_right(DECAY, (stall, math.inf, math.inf)) - 1]
    return max(rate * min(factor * shape_multiplier(shape), DECAY[-1][1]), min(lowest, rate))
