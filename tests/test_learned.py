"""Learned rounding: its laws, and the parts that it is made of."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantloom.formats.errors import UsageError
from quantloom.formats.format import Format, Stats
from quantloom.formats.registry import make_format
from quantloom.stages.counter import bits, seed_of, signs, uniform
from quantloom.stages.factor import factorise
from quantloom.stages.learned import Learned
from quantloom.stages.matrix import solve
from quantloom.stages.methods import Problem
from quantloom.stages.subspace import dominant_subspaces, orthonormal, project, rank_of

FORMATS = [
    ("fp8", "tensor", None), ("fp8", "row", None), ("fp8", "block", 64), ("fp8_e5m2", "tensor", None),
    ("int8", "tensor", None), ("int8", "row", None), ("int8", "block", 64),
    ("mxfp8", None, None), ("nvfp4", None, None),
]  # fmt: skip
CPU = torch.device("cpu")


def weight(rows: int = 128, columns: int = 192, seed: int = 0) -> torch.Tensor:
    """A falling spectrum and a few large columns, as real layers have them."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=generator))
    made = (left * torch.arange(1, left.shape[1] + 1) ** -0.6) @ right.T
    made[:, ::37] *= 4
    return made


def problem(fmt: Format, x: torch.Tensor, name: str = "layer") -> Problem:
    """The problem of a weight with searched scales."""
    padded = torch.nn.functional.pad(x, (0, fmt.columns(x.shape[1]) - x.shape[1]))
    amax = fmt.amax(padded)
    whole = fmt.whole(Stats(padded.abs().amax(), padded.flatten()), True) if fmt.needs_stats else None
    scales = fmt.scales(amax, whole) if fmt.scaling == "tensor" else fmt.search(padded, amax, whole)
    return Problem(name, padded, fmt, scales, whole)


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_the_projected_error_falls_and_the_error_hardly_rises(kind: tuple[str, str, int | None]) -> None:
    task = problem(make_format(*kind), weight())
    found, quality = solve(Learned(min_k=32), task)
    start = task.format.snap_(task.weight.clone(), task.scales)
    norm = task.weight.norm()
    solver = Learned(min_k=32).solver(task)
    before, after = (solver.projection(values - task.weight).norm() / norm for values in (start, found.values))
    assert after < 0.92 * before
    assert (found.values - task.weight).norm() < 1.08 * (start - task.weight).norm()
    assert solver.loss(found.values) < solver.loss(start)
    assert not quality.kept_start
    assert quality.stored.projected == pytest.approx(float(after), rel=1e-5)
    assert quality.stored.weight == pytest.approx(float((found.values - task.weight).norm() / norm), rel=1e-5)
    assert quality.stored.projected < quality.nearest.projected  # type: ignore[operator]


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_what_is_found_can_be_stored(kind: tuple[str, str, int | None]) -> None:
    fmt = make_format(*kind)
    task = problem(fmt, weight())
    found = solve(Learned(min_k=16), task)[0]
    assert torch.equal(fmt.snap_(found.values.clone(), found.scales), found.values)
    multiplier = found.scales.multiplier
    if fmt.scaling == "block":
        multiplier = multiplier.repeat_interleave(fmt.block_size or 1, 0)
    assert torch.equal(fmt.decode(fmt.encode_(found.values.clone(), found.scales), multiplier), found.values)


def hostile() -> dict[str, torch.Tensor]:
    """Weights that trip numerics up."""
    rows_and_columns = weight()
    rows_and_columns[5], rows_and_columns[:, 7:40] = 0, 0
    small_rows = weight()
    small_rows[9] *= 1e-12
    return {
        "zero": torch.zeros(64, 64), "zero rows and columns": rows_and_columns, "tiny rows": small_rows,
        "tiny": weight() * 1e-30, "huge": weight() * 1e30, "one value": torch.full((64, 64), 0.5),
        "rank 1": torch.outer(torch.linspace(-1, 1, 64), torch.linspace(1, 2, 64)),
        "one column": weight(64, 1), "one row": weight(1, 64), "odd": weight(67, 129), "one weight": weight(1, 1),
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile())
@pytest.mark.parametrize("kind", [("fp8", "row", None), ("int8", "row", None), ("mxfp8", None, None),
                                  ("nvfp4", None, None), ("fp8", "tensor", None)], ids=str)  # fmt: skip
def test_hostile_weights(name: str, kind: tuple[str, str, int | None]) -> None:
    fmt = make_format(*kind)
    task = problem(fmt, hostile()[name])
    found, quality = solve(Learned(), task)
    assert found.values.isfinite().all()
    assert quality.stored.weight <= 1.1 * max(quality.nearest.weight, 1e-7)
    assert (found.values[task.weight == 0] == 0).all()


@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_never_worse_than_the_start(rows: int, columns: int, seed: int) -> None:
    task = problem(make_format("nvfp4"), weight(rows, columns, seed))
    solver = Learned(min_k=4).solver(task)
    start = task.format.snap_(task.weight.clone(), task.scales)
    assert solver.loss(solve(Learned(min_k=4), task)[0].values) <= solver.loss(start)


def test_a_smaller_penalty_trades_error_for_projection() -> None:
    task = problem(make_format("nvfp4"), weight())
    low, high = (solve(Learned(min_k=32, penalty=penalty), task)[1].stored for penalty in (0.3, 4.0))
    assert low.projected is not None
    assert high.projected is not None
    assert low.projected < high.projected
    assert low.weight > high.weight


def test_the_result_depends_on_the_name_alone() -> None:
    fmt = make_format("fp8", "row")
    first, again, other = (solve(Learned(), problem(fmt, weight(), name))[0].values for name in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_subspaces_are_the_dominant_ones() -> None:
    x = weight(160, 240)
    left, right = dominant_subspaces(x, 24, seed_of("x"))
    assert left.shape == (160, 40)
    assert right.shape == (240, 40)
    for basis in (left, right):
        assert torch.allclose(basis.T @ basis, torch.eye(40), atol=1e-5)
    u, _, vh = torch.linalg.svd(x)
    captured = (left.T @ u[:, :24]).square().sum() / 24, (right.T @ vh[:24].T).square().sum() / 24
    assert min(captured) > 0.98
    error = torch.randn(160, 240, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(project((left, right), error), left.T @ error @ right, atol=1e-3)


@pytest.mark.parametrize("columns", [torch.zeros(50, 4), torch.ones(50, 4), 1e-20 * weight(50, 4)])
def test_a_basis_of_dependent_columns(columns: torch.Tensor) -> None:
    basis = orthonormal(columns)
    assert basis.isfinite().all()
    assert torch.allclose(basis.T @ basis, torch.eye(4), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "rank"), [((3072, 3072), 614), ((384, 1536), 256), ((100, 50), 50), ((99999, 9999), 1280)]
)
def test_ranks(shape: tuple[int, int], rank: int) -> None:
    assert rank_of(shape, 0.2, 256, 1280) == rank


def test_random_bits_are_pinned() -> None:
    """Files written today must come out the same tomorrow, on any device and in any split."""
    drawn = bits((64, 48), (seed_of("blocks.0.attn.qkv"), 3), CPU)
    assert hashlib.sha256(drawn.numpy().tobytes()).hexdigest()[:16] == "a727309f629d77d4"
    assert torch.equal(drawn[10:20], bits((10, 48), (seed_of("blocks.0.attn.qkv"), 3), CPU, first_row=10))


def test_random_numbers_are_uniform() -> None:
    x = uniform((512, 512), (1, 1), CPU)
    assert x.min() >= 0
    assert x.max() < 1
    assert x.mean() == pytest.approx(0.5, abs=2e-3)
    counts = torch.histc(x, 16) / x.numel()
    assert counts.sub(1 / 16).abs().max() < 1.5e-3
    for other in (uniform((512, 512), (1, 2), CPU), uniform((512, 512), (2, 1), CPU), x.roll(1, 0), x.roll(1, 1)):
        assert float(((x - 0.5) * (other - 0.5)).mean() * 12) == pytest.approx(0, abs=8e-3)
    assert signs((256, 256), 5, CPU).unique().tolist() == [-1.0, 1.0]
    assert signs((256, 256), 5, CPU).mean().abs() < 0.02


@pytest.mark.parametrize(("options", "words"), [
    ({"top_p": 0.0}, "top_p 0.0 must be above 0"), ({"min_k": 0}, "1 <= min_k <= max_k"),
    ({"min_k": 9, "max_k": 8}, "1 <= min_k <= max_k"), ({"penalty": -1.0}, "penalty"),
    ({"penalty": float("nan")}, "penalty"), ({"rounds": 0}, "rounds"),
])  # fmt: skip
def test_options_that_mean_nothing(options: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Learned(**options)  # type: ignore[arg-type]


def test_a_factor_that_failed_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuSOLVER leaves it: NaN, and no word of failure."""
    real, silent = torch.linalg.cholesky_ex, [True, False]

    def factorised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor, failed = real(x)
        return (factor * float("nan"), failed * 0) if silent.pop(0) else (factor, failed)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", factorised)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    q = orthonormal(x)
    assert torch.allclose(q.T @ q, torch.eye(16), atol=1e-5)
    assert torch.allclose(q @ (q.T @ x), x, atol=1e-4)
    silent[:] = [True, False]
    factor = factorise(x.T @ x, 0.01, 1)
    assert float(factor.diagonal.mean()) == pytest.approx(1.1, rel=1e-4)  # ten times the damping
    assert factor.lower.isfinite().all()
