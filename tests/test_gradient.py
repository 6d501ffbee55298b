"""Gradient rounding: never worse than its start, on what is stored; schedules against sequences computed by hand."""

from __future__ import annotations

import math
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from numerics import one_thread, quantize, whole_of
from torch.utils._python_dispatch import TorchDispatchMode

from quantloom.formats.errors import UsageError
from quantloom.formats.registry import make_format
from quantloom.stages.gradient import Gradient, GradientSolver, grid_steps
from quantloom.stages.methods import Problem
from quantloom.stages.optimizers import OPTIMIZERS
from quantloom.stages.schedule import DECAY, GROWTH, Pace, Schedule, shape_multiplier

__all__ = ["one_thread"]

FORMATS = [
    ("fp8", "tensor", None), ("fp8", "row", None), ("fp8", "block", 16), ("fp8_e5m2", "tensor", None),
    ("int8", "tensor", None), ("int8", "row", None), ("int8", "block", 16),
    ("mxfp8", None, None), ("nvfp4", None, None),
]  # fmt: skip
SMALL = {"min_k": 8, "max_k": 24, "iterations": 40}
SQUARE = (64, 64)


def layer(m: int = 64, n: int = 96, seed: int = 0) -> torch.Tensor:
    """A few strong directions, and noise."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(m, 6, generator=generator) @ torch.randn(6, n, generator=generator)
    return (strong + torch.randn(m, n, generator=generator)) * 0.02


def problem(key: tuple[str, str | None, int | None], weight: torch.Tensor | None = None, name: str = "a") -> Problem:
    fmt = make_format(*key)
    weight = layer() if weight is None else weight
    whole = whole_of(fmt, weight, search=True)
    return Problem(name, weight, fmt, quantize(fmt, weight, search=True).scales, whole)


def start_of(given: Problem) -> torch.Tensor:
    return given.format.snap_(given.weight.clone(), given.scales)


def solve(given: Problem, **options: Any) -> tuple[GradientSolver, torch.Tensor, torch.Tensor]:
    solver = Gradient(**{**SMALL, **options}).solver(given)
    start = start_of(given)
    return solver, start, solver.solve(start.clone()).values


@pytest.mark.parametrize("key", FORMATS, ids=str)
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_optimizer_lowers_the_stored_loss(key: tuple[str, str | None, int | None], optimizer: str) -> None:
    given = problem(key)
    before = given.weight.clone()
    solver, start, values = solve(given, optimizer=optimizer, iterations=100)
    assert solver.loss(values) < 0.9 * solver.loss(start)
    assert (values != start).float().mean() > 0.005, "hardly a code changed"
    assert given.format.snap_(values.clone(), given.scales).equal(values), "codes cannot express it"
    codes = given.format.encode_(values.clone(), given.scales)
    assert codes.shape[0] == 64
    assert given.weight.equal(before), "the problem was written to"


@pytest.mark.parametrize("key", FORMATS, ids=str)
def test_half_a_step_leads_to_a_neighbour_on_the_grid(key: tuple[str, str | None, int | None]) -> None:
    given = problem(key)
    _, start, values = solve(given, optimizer="adamw", learning_rate=5.0, schedule="exponential", gamma=1.0)
    steps = grid_steps(given.format, torch.maximum(start.abs(), values.abs()), given.scales)
    assert (values - start).abs().le(steps * 1.001).all()


def test_further_reach_leads_further() -> None:
    given = problem(("int8", "row", None))
    near, far = (solve(given, reach=reach)[2] for reach in (0.5, 3.0))
    step = given.scales.multiplier[:, None]
    assert ((near - given.weight) / step).abs().max() <= 1.001
    assert ((far - given.weight) / step).abs().max() > 1.05


@pytest.mark.parametrize("learning_rate", [1e-3, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("schedule", ["plateau", "adaptive", "exponential"])
def test_never_worse_than_the_start(learning_rate: float, schedule: str) -> None:
    given = problem(("nvfp4", None, None))
    for optimizer in OPTIMIZERS:
        solver, start, values = solve(
            given, optimizer=optimizer, learning_rate=learning_rate, schedule=schedule, reach=1e6
        )
        assert solver.loss(values) <= solver.loss(start)
        assert values.isfinite().all()


class Recorder(GradientSolver):
    """Remembers the losses that it measured."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.losses: list[float] = []

    def _loss(self, error: torch.Tensor, core: torch.Tensor) -> float:
        self.losses.append(super()._loss(error, core))
        return self.losses[-1]


@pytest.mark.parametrize("penalty", [0.0, 0.85])
def test_the_best_state_is_the_one_that_is_returned(penalty: float) -> None:
    given = problem(("fp8", "tensor", None))
    for iterations in (1, 2, 3, 10, 40):
        options = {**SMALL, "iterations": iterations, "penalty": penalty, "learning_rate": 0.3}
        solver = Recorder(given, Gradient(**options))
        start = start_of(given)
        values = solver.solve(start).values
        seen = list(solver.losses)
        assert len(seen) == iterations + 1
        assert solver.loss(values) == min(seen)
        assert solver.loss(start) == seen[0], "the start is the first state"


def test_a_loss_that_is_nan_ends_it() -> None:
    class Breaks(Recorder):
        def _loss(self, error: torch.Tensor, core: torch.Tensor) -> float:
            found = super()._loss(error, core)
            return math.nan if len(self.losses) > 5 else found

    given = problem(("int8", "row", None))
    solver = Breaks(given, Gradient(**SMALL))
    values = solver.solve(start_of(given)).values
    assert len(solver.losses) == 6
    solver.losses.clear()
    assert values.isfinite().all()
    assert solver.loss(values) <= solver.loss(start_of(given))


def test_the_same_bytes_again() -> None:
    for optimizer in OPTIMIZERS:
        first, again = (solve(problem(("nvfp4", None, None)), optimizer=optimizer)[2] for _ in range(2))
        assert first.equal(again)
    torch.manual_seed(1)
    assert solve(problem(("nvfp4", None, None)), optimizer=optimizer)[2].equal(first)


def test_penalty_spares_the_error_as_a_whole() -> None:
    given = problem(("int8", "row", None))
    free, spared = (solve(given, penalty=penalty)[2] for penalty in (0.0, 4.0))
    assert (spared - given.weight).norm() < (free - given.weight).norm()


@pytest.mark.parametrize("weight", [
    torch.zeros(32, 64), torch.ones(32, 64), layer(64, 16), layer(16, 256), torch.eye(32), layer(32, 64) * 1e-12,
    torch.cat((layer(16, 64), torch.zeros(16, 64))), layer(32, 64) * torch.tensor([1e-12, 1.0]).repeat(32),
    layer(16, 1) @ layer(1, 64), layer(32, 64) * 1e15,
], ids=range(10))  # fmt: skip
@pytest.mark.parametrize("key", [("fp8", "tensor", None), ("int8", "row", None), ("nvfp4", None, None)], ids=str)
def test_odd_layers(weight: torch.Tensor, key: tuple[str, str | None, int | None]) -> None:
    solver, start, values = solve(problem(key, weight))
    assert values.isfinite().all()
    assert solver.loss(values) <= solver.loss(start)


def test_one_column() -> None:
    given = problem(("int8", "row", None), layer(32, 1))
    assert solve(given)[2].equal(start_of(given)), "every weight is its row's amax"


@pytest.mark.parametrize(("options", "losses"), [
    ({"stop_loss": 1e9}, 1),
    ({"schedule": "exponential", "gamma": 0.5, "learning_rate": 0.08, "stop_lr": 0.011, "min_lr": 0.0}, 4),
    ({"learning_rate": 1e-9, "stop_lr": 0.0, "stop_stall": 7}, 9),
], ids=["loss", "rate", "stall"])  # fmt: skip
def test_early_stopping(options: dict[str, Any], losses: int) -> None:
    """Stall: the start, then 8 equal losses. Rate: .08 at the start, then .04, .02, .01."""
    given = problem(("fp8", "row", None))
    solver = Recorder(given, Gradient(**{**SMALL, **options}))
    solver.solve(start_of(given))
    assert len(solver.losses) == losses


def test_weights_on_the_grid_need_no_step() -> None:
    given = problem(("int8", "row", None))
    on_grid = replace(given, weight=start_of(given))
    solver = Recorder(on_grid, Gradient(**SMALL))
    assert solver.solve(start_of(given)).values.equal(on_grid.weight)
    assert solver.losses == [0.0]


def rates(schedule: Schedule, losses: list[float], shape: tuple[int, int] = SQUARE, rate: float = 1.0) -> list[float]:
    """Learning rates after each loss; before the first, a loss of 100 is the start's."""
    pace, found = schedule.next(Pace(rate), 100.0, shape), []
    assert pace.rate == rate
    for loss in losses:
        pace = schedule.next(pace, loss, shape)
        found.append(pace.rate)
    return found


def test_exponential() -> None:
    schedule = Schedule("exponential", gamma=0.5, min_lr=0.2)
    assert rates(schedule, [99, 101, 98, 97]) == [0.5, 0.25, 0.2, 0.2]


def test_plateau() -> None:
    better, worse = 99.0, 100.0
    assert rates(Schedule(factor=0.5), [worse, worse, better, worse]) == [0.5, 0.25, 0.25, 0.125]
    assert rates(Schedule(factor=0.5, patience=2), [worse, better, worse, worse, worse]) == [1, 1, 1, 0.5, 0.5]
    assert rates(Schedule(factor=0.5, cooldown=2), [worse] * 5) == [0.5, 0.5, 0.5, 0.25, 0.25]
    assert rates(Schedule(factor=0.5, min_lr=0.3), [worse] * 3) == [0.5, 0.3, 0.3]
    assert rates(Schedule(factor=0.5, grace=3), [worse] * 4) == [1, 1, 0.5, 0.25]


def test_threshold() -> None:
    assert rates(Schedule(factor=0.5, threshold=0.1), [95, 89, 85]) == [0.5, 0.5, 0.25]
    assert rates(Schedule(factor=0.5, threshold=6, threshold_mode="abs"), [95, 93, 88]) == [0.5, 0.5, 0.25]


def test_plateau_is_steeper_for_long_matrices() -> None:
    assert Schedule(factor=0.9).shaped_factor((64, 64)) == pytest.approx(0.9)
    assert Schedule(factor=0.9).shaped_factor((64, 256)) == pytest.approx(0.9**2)
    assert Schedule(factor=0.9).shaped_factor((576, 64)) == pytest.approx(0.9**3)
    assert Schedule(factor=0.9, shape_influence=0.5).shaped_factor((256, 64)) == pytest.approx((0.9 + 0.81) / 2)
    assert Schedule(factor=0.9, shape_influence=0.0).shaped_factor((256, 64)) == 0.9
    assert rates(Schedule(factor=0.9), [100, 100], (64, 256)) == pytest.approx([0.81, 0.81**2])


def test_shape_multiplier() -> None:
    assert shape_multiplier((4096, 4096)) == pytest.approx(math.gamma(4096 ** (1 / 3) / 4096 + 1))
    assert shape_multiplier((4096, 4096)) == pytest.approx(0.99777, abs=1e-5)
    assert shape_multiplier((4097, 4096)) == pytest.approx(100 ** (4097 / 4096**2))
    assert shape_multiplier((4096, 64)) == pytest.approx(100.0)
    assert shape_multiplier((384, 1536)) == pytest.approx(10 ** (1536 / 384**2))
    assert shape_multiplier((1, 4096)) == math.inf
    assert shape_multiplier((1, 1)) == 1.0


@pytest.mark.parametrize(("stall", "factor"), [
    (0, 1.25), (49, 1.25), (50, 1.375), (75, 1.5), (100, 1.75), (149, 2.0), (150, 2.25), (200, 2.5), (299, 2.75),
    (300, 3.0), (4000, 3.0),
])  # fmt: skip
def test_adaptive_grows_by_the_stall_before(stall: int, factor: float) -> None:
    pace = Pace(1.0, best=100.0, stall=stall, seen=stall + 1)
    grown = Schedule("adaptive").next(pace, 99.0, SQUARE)
    assert grown.rate == pytest.approx(factor * shape_multiplier(SQUARE))
    assert grown.stall == 0


@pytest.mark.parametrize(("stall", "factor", "lowest"), [
    (1, 0.95, 9e-8), (25, 0.95, 9e-8), (26, 0.97, 8e-8), (51, 0.985, 7e-8), (76, 0.9875, 6e-8), (150, 0.98875, 5e-8),
    (151, 0.99, 4e-8), (201, 0.99125, 3e-8), (300, 0.9925, 2e-8), (301, 0.995, 5e-9),
])  # fmt: skip
def test_adaptive_decays_by_the_stall(stall: int, factor: float, lowest: float) -> None:
    pace = Pace(1.0, best=100.0, stall=stall - 1, seen=stall)
    schedule = Schedule("adaptive")
    assert schedule.next(pace, 100.0, SQUARE).rate == pytest.approx(factor * shape_multiplier(SQUARE))
    assert schedule.next(replace(pace, rate=lowest), 100.0, SQUARE).rate == lowest
    assert schedule.next(replace(pace, rate=1e-12), 100.0, SQUARE).rate == 1e-12, "a floor never raises the rate"


def test_adaptive_in_sequence() -> None:
    small = shape_multiplier(SQUARE)
    up, down = 1.25 * small, 0.95 * small
    assert rates(Schedule("adaptive"), [99, 99, 98]) == pytest.approx([up, up * down, up * down * up])
    assert rates(Schedule("adaptive"), [99.0 - i for i in range(40)])[-1] == 100.0, "the ceiling"


@pytest.mark.parametrize("shape", [(4096, 64), (64, 4096), (1, 4096), (4096, 1)])
def test_narrow_matrices_do_not_make_the_rate_explode(shape: tuple[int, int]) -> None:
    up, down = rates(Schedule("adaptive"), [99, 100], shape)
    assert up <= GROWTH[-1][1]
    assert down <= DECAY[-1][1] * up


@pytest.mark.parametrize("options", [
    {"optimizer": "sgd"}, {"schedule": "cosine"}, {"threshold_mode": "both"}, {"iterations": 0}, {"learning_rate": 0.0},
    {"learning_rate": math.nan}, {"reach": -1.0}, {"gamma": 0.0}, {"factor": 1.5}, {"patience": 0}, {"cooldown": -1},
    {"min_lr": math.inf}, {"shape_influence": 2.0}, {"stop_lr": -1.0}, {"stop_stall": -1}, {"stop_loss": math.nan},
    {"penalty": -1.0}, {"top_p": 0.0}, {"min_k": 9, "max_k": 8},
], ids=str)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options)).replace("_", ".")):
        Gradient(**options)


def test_prodigy_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyplus", None)
    with pytest.raises(UsageError, match=r"quantloom\[prodigy\]"):
        solve(problem(("int8", "row", None)), optimizer="prodigy")


class Allocated(TorchDispatchMode):
    """Bytes of tensors that operations made and that are still alive, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_memory_is_declared(optimizer: str) -> None:
    given = problem(("nvfp4", None, None), layer(512, 1024))
    method = Gradient(optimizer=optimizer, iterations=10, min_k=8, max_k=64)
    start = start_of(given)
    with Allocated() as allocated:
        method.solver(given).solve(start)
    declared = method.memory((512, 1024), "cpu")
    assert 0.5 * declared <= allocated.most <= declared
