"""Calibrated rounding: its values can be stored, its loss is what it says and falls, and odd input is survived."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from numerics import one_thread, padded  # noqa: F401

from quantloom.formats.errors import NonFiniteError, UsageError
from quantloom.formats.format import Format, Scales, Stats
from quantloom.formats.registry import FORMATS, make_format
from quantloom.stages import feedback_solver
from quantloom.stages.calibrated import Calibrated
from quantloom.stages.cascade import cascade_
from quantloom.stages.error_feedback import Panel, feed_back, losses, sweep_
from quantloom.stages.factor import Factor, activation_order, factorise
from quantloom.stages.feedback_solver import FeedbackSolver
from quantloom.stages.methods import Method, Problem, Rounded
from quantloom.stages.scale_search import Scaling
from quantloom.stages.statistics import Moments

CASES = [
    (name, scaling, size)
    for name, info in FORMATS.items()
    for scaling in info.scalings
    for size in ((16, 48) if scaling == "block" else (None,))
]
every_format = pytest.mark.parametrize(
    "fmt", [pytest.param(make_format(*case), id="-".join(str(part) for part in case if part)) for case in CASES]
)
NVFP4 = make_format("nvfp4")
SHAPE = (96, 144)


def weights(shape: tuple[int, int] = SHAPE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 0.02
    return torch.where(torch.rand(shape, generator=generator) < 0.005, x * 8, x)


def inputs(n: int, tokens: int = 1024, seed: int = 1) -> torch.Tensor:
    """Correlated activations (tokens, n) with a mean and a few strong channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) * torch.arange(1, n + 1) ** -0.7
    x = torch.randn(tokens, n, generator=generator) @ mixing.T + 0.3 * torch.randn(n, generator=generator)
    return x * torch.where(torch.rand(n, generator=generator) < 0.05, 6.0, 1.0)


def moments(x: torch.Tensor) -> Moments:
    """Statistics of activations."""
    return Moments(x.T @ x / len(x), x.mean(0), len(x))


def problem_of(fmt: Format, weight: torch.Tensor, known: Moments | None = None) -> Problem:
    """A problem as the quantize stage states it; rows and columns that the format needs are added as zeros."""
    known = known or moments(inputs(weight.shape[1]))
    multiple = fmt.rows_multiple
    weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % multiple, 0, -weight.shape[0] % multiple))
    x = padded(fmt, weight)
    sample = x.flatten() if fmt.searches else x.flatten()[:0]
    whole = fmt.whole(Stats(x.abs().max(), sample), fmt.searches) if fmt.needs_stats else None
    amax = torch.zeros(()) if fmt.scaling == "tensor" else fmt.amax(x)
    scales = fmt.search(x, amax, whole) if fmt.searches else fmt.scales(amax, whole)
    missing = x.shape[1] - known.hessian.shape[0]
    hessian = torch.nn.functional.pad(known.hessian, (0, missing) * known.hessian.dim())
    known = Moments(hessian, torch.nn.functional.pad(known.mean, (0, missing)), known.tokens)
    return Problem("layer", x, fmt, scales, whole, known)


def start_of(problem: Problem) -> torch.Tensor:
    return problem.format.snap_(problem.weight.clone(), problem.scales)


def solve(problem: Problem, method: Calibrated | None = None) -> Rounded:
    return (method or Calibrated()).solver(problem).solve(start_of(problem))


def decoded(fmt: Format, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
    multiplier = scales.multiplier
    if fmt.scaling == "block":
        multiplier = multiplier.repeat_interleave(fmt.rows_multiple, 0)
    return fmt.decode(codes, multiplier)


def check_valid(problem: Problem, rounded: Rounded) -> None:
    """Finite, expressible, of the announced shapes, and zero where the weight is padding."""
    fmt, values, scales = problem.format, rounded.values, rounded.scales
    assert values.shape == problem.weight.shape
    assert values.isfinite().all()
    assert scales.stored.shape == scales.multiplier.shape == fmt.scale_shape((values.shape[0], values.shape[1]))
    assert scales.stored.dtype == problem.scales.stored.dtype
    assert torch.equal(fmt.snap_(values.clone(), scales), values)
    assert torch.equal(decoded(fmt, fmt.encode_(values.clone(), scales), scales), values)
    whole = problem.whole if fmt.name == "nvfp4" else None
    assert torch.equal(fmt.multiplier(scales.stored, whole), scales.multiplier)


def output_error(x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor) -> float:
    n = x.shape[1]
    return float((x @ (values - weight)[:, :n].T).norm() / (x @ weight[:, :n].T).norm())


# What is stored


@every_format
def test_values_can_be_stored(fmt: Format) -> None:
    for shape in (SHAPE, (33, 50), (1, 7), (5, 300)):
        problem = problem_of(fmt, weights(shape))
        rounded = solve(problem)
        check_valid(problem, rounded)
        assert not rounded.values[:, shape[1] :].any(), "padding"


@every_format
def test_outputs_are_better_than_those_of_the_start(fmt: Format) -> None:
    """On inputs that took no part; and by the loss, on those that did."""
    everything = inputs(SHAPE[1], 4096)
    problem = problem_of(fmt, weights(), moments(everything[:2048]))
    solver = Calibrated().solver(problem)
    start = start_of(problem)
    rounded = solver.solve(start)
    assert solver.loss(rounded.values) < 0.7 * solver.loss(start)
    after, before = (output_error(everything[2048:], problem.weight, x) for x in (rounded.values, start))
    assert after < 0.85 * before


@every_format
def test_it_is_deterministic_and_leaves_its_input_alone(fmt: Format) -> None:
    problem = problem_of(fmt, weights())
    assert problem.moments is not None
    kept = problem.weight.clone(), problem.moments.hessian.clone()
    first, second = solve(problem), solve(problem)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.scales.multiplier, second.scales.multiplier)
    assert torch.equal(kept[0], problem.weight)
    assert torch.equal(kept[1], problem.moments.hessian)


@every_format
def test_ranges_of_rows(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are worked on together find what they find alone, but for the last bits of matrix products."""
    problem = problem_of(fmt, weights((192, 96)))
    solver = Calibrated().solver(problem)
    at_once = solver.solve(start_of(problem))
    monkeypatch.setattr(feedback_solver, "_PANEL", {"cpu": 50 * 96})
    assert len(list(solver.ranges())) > 2
    in_pieces = solver.solve(start_of(problem))
    check_valid(problem, in_pieces)
    assert (at_once.values == in_pieces.values).float().mean() > 0.97
    assert solver.loss(in_pieces.values) == pytest.approx(solver.loss(at_once.values), rel=0.01)


# The loss


@every_format
def test_the_loss_is_the_damped_quadratic(fmt: Format) -> None:
    problem = problem_of(fmt, weights())
    assert problem.moments is not None
    hessian = problem.moments.hessian.double()
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(len(hessian))
    error = (start_of(problem) - problem.weight).double()
    expected = float(((error @ damped) * error).sum())
    assert Calibrated(damping=0.1).solver(problem).loss(start_of(problem)) == pytest.approx(expected, rel=1e-4)


@every_format
def test_sweeps_never_raise_the_loss(fmt: Format) -> None:
    problem = problem_of(fmt, weights())
    found = [Calibrated(sweeps=sweeps).solver(problem) for sweeps in range(5)]
    loss = [solver.loss(solver.solve(start_of(problem)).values) for solver in found]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(loss))
    assert loss[4] < loss[0]


def by_column(panel: Panel, factor: Factor, scaling: Scaling, sweeps: int) -> torch.Tensor:
    """Error feedback and coordinate descent as they are written down, in float64."""
    inverse, multiplier = (part.repeat_interleave(len(factor.order) // len(part), 0).double()
                           for part in scaling.steps(panel.peak))  # fmt: skip

    def rounded(x: torch.Tensor, j: int) -> torch.Tensor:
        code = scaling.format.element.round_((x * inverse[j]).float()).double()
        return code * multiplier[j]

    weight = panel.weight.double()
    hessian = (factor.pull * factor.diagonal[:, None]).double()
    lower = factor.lower.double()
    values = torch.zeros_like(weight)
    for j in range(len(weight)):
        values[j] = rounded(weight[j] - lower[j, :j] @ (values - weight)[:j], j)
    for _ in range(sweeps):
        for j in range(len(weight)):
            values[j] = rounded(values[j] - hessian[j] @ (values - weight) / hessian[j, j], j)
    return values.float()


@pytest.mark.parametrize(
    "case", [("int8", "row"), ("fp8", "row"), ("fp8", "block", 48), ("fp8", "block", 192), ("nvfp4",)], ids=str
)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_blocks_do_what_single_columns_do(case: tuple[str, ...], sweeps: int) -> None:
    """Blocks, strips and matrix products between them are a matter of speed."""
    fmt = make_format(*case)
    problem = problem_of(fmt, weights((192, 576)))
    assert problem.moments is not None
    scaling = Scaling(fmt, problem.whole)
    factor = factorise(problem.moments.hessian, 0.05, scaling.grouped)
    x = problem.weight.T.index_select(0, factor.order)
    panel = feed_back(x, scaling.search(x, factor.pivots, fmt.ratios), factor, scaling)
    for _ in range(sweeps):
        sweep_(panel, factor, scaling)
    expected = by_column(panel, factor, scaling, sweeps)
    assert (panel.values == expected).float().mean() > 0.98, "a tie in the last bit moves what comes after it"
    mine, theirs = (losses(values - x, factor).sum() for values in (panel.values, expected))
    assert float(mine) == pytest.approx(float(theirs), rel=0.01)


def test_a_cascade_of_one_column_is_rounding() -> None:
    scaling = Scaling(NVFP4, torch.tensor(1.0))
    x, peak = torch.randn(16, 40), torch.full((1, 40), 3.0)
    expected = scaling.round(x, peak)
    moves = torch.empty_like(x)
    cascade_(x.clone(), moves, x, torch.eye(16), scaling.format.element, scaling.steps(peak))
    assert torch.equal(x + moves, x + (expected - x))


def test_the_factor_is_one_of_the_damped_moments() -> None:
    hessian = moments(inputs(96, 64)).hessian
    factor = factorise(hessian, 0.05, 16)
    damped = hessian / factor.unit + 0.05 * torch.eye(96)
    damped = damped[factor.order][:, factor.order]
    rebuilt = factor.lower.T @ (factor.pivots[:, None] * factor.lower)
    assert torch.allclose(rebuilt, damped, rtol=0, atol=1e-4 * float(damped.max()))
    assert torch.allclose(factor.pull * factor.diagonal[:, None], damped, rtol=1e-5, atol=1e-6)
    assert torch.equal(factor.lower.triu(1), torch.zeros(96, 96))
    assert torch.equal(factor.lower.diagonal(), torch.ones(96))


def test_whole_groups_move() -> None:
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(0))
    order = activation_order(diagonal, 16)
    assert sorted(order.tolist()) == list(range(96))
    groups = order.view(6, 16)
    assert (groups // 16 == groups[:, :1] // 16).all()
    strength = diagonal[groups].sum(1)
    assert (strength[:-1] >= strength[1:]).all()
    assert (diagonal[groups][:, :-1] >= diagonal[groups][:, 1:]).all()


def test_a_shared_factor_gives_the_same() -> None:
    problem, method = problem_of(NVFP4, weights()), Calibrated()
    assert problem.moments is not None
    first, second = (method.solver(problem) for _ in range(2))
    assert isinstance(first, FeedbackSolver)
    assert isinstance(second, FeedbackSolver)
    assert first.factor is second.factor
    assert method.factor(problem.moments, 48) is not first.factor
    again = method.solver(replace(problem, moments=replace(problem.moments, made={})))
    assert torch.equal(again.solve(start_of(problem)).values, first.solve(start_of(problem)).values)


# Scales


def test_int8_clips_where_outputs_gain_and_nowhere_else() -> None:
    """One weight of a row is large. On a channel that hardly matters it is clipped, on a strong one it is kept."""
    fmt = make_format("int8", "row")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[:, 5] = 3.0
    for strength, clipped in ((1e-4, True), (30.0, False)):
        x = inputs(128, 2048)
        x[:, 5] = strength * torch.randn(2048, generator=torch.Generator().manual_seed(2))
        problem = problem_of(fmt, weight, moments(x))
        found = solve(problem, Calibrated(damping=1e-4))
        kept = found.values[:, 5].mean() / 3
        assert kept < 0.9 if clipped else kept > 0.99
        solver = Calibrated(damping=1e-4).solver(problem)
        assert solver.loss(found.values) < solver.loss(start_of(problem))


@every_format
def test_search_finds_the_least_of_all_candidates(fmt: Format) -> None:
    if fmt.scaling == "tensor":
        pytest.skip("see the next test")
    problem = problem_of(fmt, weights())
    scaling, x = Scaling(fmt, problem.whole), problem.weight.T.contiguous()
    importance = torch.rand(len(x), generator=torch.Generator().manual_seed(3))
    ratios = fmt.ratios + fmt.clips

    def error(scales: Scales) -> torch.Tensor:
        squares = (fmt.snap_(problem.weight.clone(), scales) - problem.weight).square() * importance
        dims = {"row": (1,), "block": (1, 3), "group": (2,)}[fmt.scaling]
        return fmt.shaped(squares).sum(dims)

    candidates = torch.stack([error(scaling.scales(fmt.amax(problem.weight) * ratio)) for ratio in ratios])
    found = error(scaling.stored(scaling.search(x, importance, ratios)))
    assert torch.allclose(found, candidates.amin(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["fp8", "int8", "fp8_e5m2"])
def test_search_for_the_whole_tensor(name: str) -> None:
    fmt = make_format(name, "tensor")
    problem = problem_of(fmt, weights())
    solver = Calibrated().solver(problem)
    importance = torch.rand(SHAPE[1], generator=torch.Generator().manual_seed(3))[solver.order]
    ratios = fmt.ratios + fmt.clips
    peak = solver.search_tensor(importance, ratios)
    x = solver.turned(problem.weight)
    peaks = problem.weight.abs().max() * torch.tensor(ratios)
    errors = Scaling(fmt, None).errors(x, peaks[:, None, None].expand(-1, 1, SHAPE[0]), importance).sum((1, 2))
    assert float(peak) == float(peaks[errors.argmin()])


# Several matrices


@every_format
def test_matrices_solved_in_one_are_solved_as_alone(fmt: Format) -> None:
    """Rows do not interact; scales of a tensor, and what NVFP4's rows share, stay those of each matrix."""
    known = moments(inputs(SHAPE[1]))
    problems = [
        problem_of(fmt, weights((rows, SHAPE[1]), seed) * 10.0**seed, known)
        for seed, rows in enumerate((fmt.rows_multiple * 2, fmt.rows_multiple, fmt.rows_multiple * 3))
    ]
    method = Calibrated()
    solvers = [method.solver(problem) for problem in problems]
    for solver, problem, found in zip(solvers, problems, method.solve_together(solvers), strict=True):
        alone = method.solver(problem).solve(problem.weight)
        assert torch.equal(fmt.snap_(found.values.clone(), found.scales), found.values)
        assert (found.values == alone.values).float().mean() > 0.95, "a tie in the last bit moves what comes after it"
        assert solver.loss(found.values) == pytest.approx(solver.loss(alone.values), rel=0.05)


# Statistics of little use


@every_format
def test_a_diagonal_is_enough_for_scales(fmt: Format) -> None:
    """As good as the search of a full matrix that is diagonal; no worse than the start; padding stays."""
    x = inputs(50)
    known = moments(x)
    problem = problem_of(fmt, weights((33, 50)), Moments(known.hessian.diagonal().clone(), known.mean, len(x)))
    solver = Calibrated().solver(problem)
    assert isinstance(solver, feedback_solver.DiagonalSolver)
    start = start_of(problem)
    rounded = solver.solve(start)
    check_valid(problem, rounded)
    assert not rounded.values[:, 50:].any()
    assert solver.loss(rounded.values) <= solver.loss(start) * 1.02, "the start may know candidates that are not tried"
    assert problem.moments is not None
    full = replace(problem, moments=replace(problem.moments, hessian=problem.moments.hessian.diag()))
    same = Calibrated().solver(full)
    assert same.loss(start) == pytest.approx(solver.loss(start), rel=1e-4)


def hessians() -> Iterator[tuple[str, torch.Tensor, int]]:
    x = inputs(50, 1024)
    rank_one = x[:1] * 100
    dead = x.clone()
    dead[:, 10:30] = 0
    for name, some in (("few tokens", x[:64]), ("rank 1", rank_one), ("rank 8", x[:8]), ("dead channels", dead),
                       ("no input at all", x * 0), ("tiny", x * 1e-12), ("huge", x * 1e12)):  # fmt: skip
        yield name, some.T @ some / len(some), len(some)


@pytest.mark.parametrize("kind", [kind for kind, *_ in hessians()])
@every_format
def test_poor_statistics(fmt: Format, kind: str) -> None:
    """Valid, never worse by the loss than the start, and not far from the weights."""
    hessian, tokens = next((hessian, tokens) for name, hessian, tokens in hessians() if name == kind)
    problem = problem_of(fmt, weights((33, 50)), Moments(hessian, torch.zeros(50), tokens))
    rounded = solve(problem)
    check_valid(problem, rounded)
    solver, start = Calibrated().solver(problem), start_of(problem)
    assert solver.loss(rounded.values) <= solver.loss(start) * (1 + 1e-6) or kind == "no input at all"
    far, near = ((x - problem.weight).norm() / problem.weight.norm() for x in (rounded.values, start))
    assert far < 3 * near + 1e-6


@pytest.mark.parametrize("kind", ["zeros", "zero rows", "zero columns", "tiny rows", "tiny", "huge", "one value"])
@every_format
def test_odd_weights(fmt: Format, kind: str) -> None:
    weight = weights((33, 50))
    if kind == "zeros":
        weight.zero_()
    elif kind == "zero rows":
        weight[5:9] = 0
    elif kind == "zero columns":
        weight[:, 16:40] = 0
    elif kind == "tiny rows":
        weight[::2] *= 1e-12
    elif kind == "tiny":
        weight *= 1e-20
    elif kind == "huge":
        weight *= 1e12
    else:
        weight = torch.full_like(weight, 0.25)
    problem = problem_of(fmt, weight)
    rounded = solve(problem)
    check_valid(problem, rounded)
    start = start_of(problem)
    solver = Calibrated().solver(problem)
    assert solver.loss(rounded.values) <= solver.loss(start) * (1 + 1e-6)
    zero_rows = ~problem.weight.any(1)
    assert not rounded.values[zero_rows].any()


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 16), (1, 130), (3, 129), (200, 3)])
@every_format
def test_odd_shapes(fmt: Format, shape: tuple[int, int]) -> None:
    problem = problem_of(fmt, weights(shape))
    rounded = solve(problem)
    check_valid(problem, rounded)
    assert Calibrated().memory((problem.weight.shape[0], problem.weight.shape[1]), "cpu") > 0


@every_format
@pytest.mark.parametrize("factor", [2.0**27, 2.0**-27, 1e8, 1e-8])
def test_the_scale_of_the_statistics_does_not_matter(fmt: Format, factor: float) -> None:
    problem = problem_of(fmt, weights())
    assert problem.moments is not None
    scaled = replace(problem, moments=replace(problem.moments, hessian=problem.moments.hessian * factor))
    one, other = solve(problem), solve(scaled)
    same = (one.values == other.values).float().mean()
    assert same == 1 if factor in (2.0**27, 2.0**-27) else same > 0.95
    solver = Calibrated().solver(problem)
    assert solver.loss(other.values) == pytest.approx(solver.loss(one.values), rel=0.02)


def test_more_damping_until_it_can_be_factorised() -> None:
    hessian = torch.ones(32, 32) * (1 + 1e-6)
    hessian[3, 3] = 0.5  # indefinite
    factor = factorise(hessian, 1e-6, 1)
    assert factor.lower.isfinite().all()
    assert factor.pivots.min() > 0


def test_statistics_that_are_no_numbers() -> None:
    hessian = torch.eye(8)
    hessian[2, 2] = torch.nan
    with pytest.raises(NonFiniteError):
        factorise(hessian, 0.05, 1)


def test_fewer_tokens_are_damped_more() -> None:
    method, known = Calibrated(), moments(inputs(16, 16))
    found = [method.damping_for(replace(known, tokens=tokens)) for tokens in (0, 1, 64, 256, 1024, 1 << 20)]
    assert found == pytest.approx([0.4, 0.4, 0.4, 0.2, 0.05, 0.05])
    assert Calibrated(damping=0.3).damping_for(known) == 0.3


# Options


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": -1.0}, {"damping": float("nan")},
                                     {"damping": float("inf")}, {"sweeps": -1}], ids=str)  # fmt: skip
def test_options_that_mean_nothing(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="calibrated"):
        Calibrated(**options)  # type: ignore[arg-type]


def test_it_is_a_method() -> None:
    method: Method = Calibrated()
    assert method.name == "calibrated"
    assert method.needs_moments


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@every_format
def test_a_gpu_does_as_well(fmt: Format) -> None:
    problem = problem_of(fmt, weights((192, 576)))
    known = problem.moments
    assert known is not None
    inverse = problem.scales.inverse
    there = replace(
        problem, weight=problem.weight.cuda(), whole=None if problem.whole is None else problem.whole.cuda(),
        scales=Scales(problem.scales.stored.cuda(), problem.scales.multiplier.cuda(),
                      None if inverse is None else inverse.cuda()),
        moments=Moments(known.hessian.cuda(), known.mean.cuda(), known.tokens),
    )  # fmt: skip
    rounded = solve(there)
    check_valid(there, rounded)
    solver = Calibrated().solver(problem)
    here = solver.loss(solve(problem).values)
    assert solver.loss(rounded.values.cpu()) == pytest.approx(here, rel=0.03)
