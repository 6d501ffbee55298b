"""The step of methods that see a whole matrix: gathers the stream, rounds, measures, and streams on."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ..formats.format import Format, Scales
from ..formats.registry import make_format
from .cancelling import cancellable
from .inputs import Inputs
from .methods import Method, Problem, Rounded, Solver, Stacking
from .quality import Measure, Quality, row_ranges
from .work import Chunk, Environment, LayerPlan, Stream, Work

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_MOST_SPLIT = 64
_WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Solve:
    """Rounds one whole weight matrix by a method. The result is never worse than its start by the method's objective,
    measured on what is stored: otherwise the start is kept."""

    format: tuple[str, str, int | None]
    """Arguments of ``make_format``."""
    method: Method
    inputs: Inputs | None = None
    """Statistics of the layer's inputs."""

    @property
    def name(self) -> str:
        """The method's."""
        return self.method.name

    def run(self, work: Work) -> Work:
        return self.run_together([work])[0]

    def run_together(self, works: Sequence[Work]) -> list[Work]:
        """Layers that are solved in one: all are gathered when the first is pulled, and the others' results wait."""
        fmt = make_format(*self.format)
        upstream = [(work, work.stream) for work in works]
        waiting: dict[str, tuple[Rounded, Quality]] = {}

        def solved(split: int) -> dict[str, tuple[Rounded, Quality]]:
            problems = [replace(self._problem(work, stream, fmt), split=split) for work, stream in upstream]
            with cancellable(works[0].environment.run_id):
                found = solve_all(self.method, problems)
            return {problem.name: result for problem, result in zip(problems, found, strict=True)}

        def stream_of(work: Work) -> Stream:
            def stream(start: int, stop: int) -> Iterator[Chunk]:
                if work.plan.layer.name not in waiting:
                    waiting.update(until_it_fits(work.plan.layer.name, solved))
                rounded, work.quality = waiting.pop(work.plan.layer.name)
                work.squared_error, work.squared_weight = work.quality.stored.weight**2, 1.0
                for rows in row_ranges(rounded.values, fmt.rows_multiple):
                    part = fmt.rows(rounded.scales, rows.start, rows.stop)
                    x = rounded.values[rows]
                    yield Chunk(rows.start, x, part, fmt.encode_(x, part))

            return stream

        for work in works:
            work.stream = stream_of(work)
        return list(works)

    def _problem(self, work: Work, stream: Stream | None, fmt: Format) -> Problem:
        assert stream is not None
        rows, columns = work.plan.layer.weight.shape[0], fmt.columns(work.plan.layer.weight.shape[1])
        weight, scales = _gather(stream(0, rows), (rows, columns), fmt)
        moments = None if self.inputs is None else self.inputs.moments(columns, weight.device)
        whole = None if work.whole is None else torch.tensor(work.whole, device=weight.device)
        return Problem(work.plan.layer.name, weight, fmt, scales, whole, moments)

    def operations(self, plan: LayerPlan) -> float:
        """Floating-point operations of the method, roughly."""
        rows, columns = plan.layer.weight.shape
        return self.method.operations((rows, columns))

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Weight, start and result, scales, what the method takes, and the statistics twice while they are turned.

        Layers that are solved in one lie there all at a time, and their weights twice."""
        fmt = make_format(*self.format)
        rows = sum(count for _, count in plan.together) or plan.layer.weight.shape[0]
        columns = fmt.columns(plan.layer.weight.shape[1])
        groups = math.prod(fmt.scale_shape((rows, columns)))
        statistics = 8 * columns**2 if self.inputs else 0
        matrices = (16 if plan.together else 12) * rows * columns
        return matrices + 24 * groups + self.method.memory((rows, columns), environment.device) + statistics


def sees_whole(plan: LayerPlan) -> bool:
    """Whether one of its steps must have the whole matrix in memory."""
    return any(isinstance(step, Solve) for step in plan.steps)


def until_it_fits(name: str, work: Callable[[int], Result]) -> Result:
    """What ``work`` gives for a split of 1; while a device is out of memory, from the start for twice as much."""
    split = 1
    while True:
        try:
            return work(split)
        except torch.OutOfMemoryError:
            split *= 2
            if split > _MOST_SPLIT:
                raise
            _log.warning("%s: out of memory, ranges of rows are split in %d", name, split)
        torch.cuda.empty_cache()
        time.sleep(_WAIT_SECONDS)  # other tasks hold what is missing, and some are about to end


def solve(method: Method, problem: Problem) -> tuple[Rounded, Quality]:
    """``solve_all`` for one matrix."""
    return solve_all(method, [problem])[0]


def solve_all(method: Method, problems: Sequence[Problem]) -> list[tuple[Rounded, Quality]]:
    """What the method finds for each, or its start where that is no worse, and how good it is.

    More than one problem is for methods that solve them in one.
    """
    solvers = [method.solver(problem) for problem in problems]
    starts = [problem.format.snap_(problem.weight.clone(), problem.scales) for problem in problems]
    if len(problems) == 1:
        found = [solvers[0].solve(starts[0])]
    else:
        assert isinstance(method, Stacking)
        found = method.solve_together(solvers)
    return [_better(*each) for each in zip(problems, solvers, starts, found, strict=True)]


def _better(problem: Problem, solver: Solver, start: torch.Tensor, found: Rounded) -> tuple[Rounded, Quality]:
    """What was found, or the start."""
    kept = not solver.loss(found.values) <= solver.loss(start)  # NaN is no improvement
    if kept:
        found = Rounded(start, problem.scales)
    measure = Measure(problem.weight, problem.moments, solver.projection)
    return found, Quality(measure.errors(found.values), measure.nearest(problem.format), kept)


def _gather(chunks: Iterator[Chunk], shape: tuple[int, int], fmt: Format) -> tuple[torch.Tensor, Scales]:
    """The float32 matrix and its scales."""
    weight: torch.Tensor | None = None
    found: list[Scales] = []
    first = 0
    for chunk in chunks:
        assert chunk.scales is not None
        if weight is None:
            weight = torch.empty(shape, dtype=torch.float32, device=chunk.x.device)
        weight[first : first + chunk.x.shape[0]] = chunk.x
        first += chunk.x.shape[0]
        found.append(chunk.scales)
    assert weight is not None
    return weight, found[0] if fmt.scaling == "tensor" else _joined(found)


def _joined(parts: list[Scales]) -> Scales:
    """Scales of neighbouring rows as one."""
    inverses = [part.inverse for part in parts if part.inverse is not None]
    return Scales(
        torch.cat([part.stored for part in parts]), torch.cat([part.multiplier for part in parts]),
        torch.cat(inverses) if inverses else None,
    )  # fmt: skip
