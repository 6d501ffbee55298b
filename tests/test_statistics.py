"""Statistics stores: what is read is what was summed up, stores add up, and broken ones are refused with their list."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from quantloom.flow.calibrate import calibrate
from quantloom.flow.calibrate_folder import merge
from quantloom.formats.errors import CheckpointError, PlanError, UsageError
from quantloom.stages.accumulate import Sums, exact_products
from quantloom.stages.estimates import Estimate, merged
from quantloom.stages.histogram import count, percentile
from quantloom.stages.statistics import Statistics
from quantloom.stages.statistics_store import BLOCK_BYTES, row_blocks, write_store

WIDTH = 24


def inputs(tokens: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """Correlated, with a mean and a heavy tail."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(tokens, width, generator=generator).pow(3) @ mix + torch.randn(width, generator=generator)


def estimate(x: torch.Tensor, hessian: bool = True) -> Estimate:
    sums = Sums(x.shape[1], hessian)
    sums.add(x)
    return sums.estimate()


def store(path: Path, groups: dict[str, torch.Tensor], run: str = "run", hessian: bool = True) -> Statistics:
    """``groups``: names of layers that share an input, joined by commas -> its tokens."""
    made = [(names.split(","), estimate(x, hessian)) for names, x in groups.items()]
    write_store(path, made, {run: f"{run} in words"}, frozenset())
    return Statistics.open(path)


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-5) -> bool:
    return float((found.double() - wanted).abs().max() / wanted.abs().max()) <= bound


def test_moments_are_those_of_the_tokens(tmp_path: Path) -> None:
    x = inputs(500)
    found = store(tmp_path / "s.zarr", {"a.q,a.k": x, "b": inputs(7, 40, 1)})
    assert found.names == ("a.q", "a.k", "b")
    assert found.input_of("a.q") == found.input_of("a.k") != found.input_of("b")
    assert (found.width("a.k"), found.tokens("a.k"), found.width("b"), found.tokens("b")) == (WIDTH, 500, 40, 7)
    moments = found.moments("a.k")
    wide = x.double()
    assert moments.hessian.dtype == moments.mean.dtype == torch.float32
    assert close(moments.hessian, wide.T @ wide / 500)
    assert close(moments.mean, wide.mean(0))
    assert close(found.diagonal("a.q"), wide.square().mean(0))
    assert moments.tokens == 500
    assert found.amax("a.q") == float(x.abs().max())


def test_a_diagonal_stays_a_vector(tmp_path: Path) -> None:
    x = inputs(300)
    found = store(tmp_path / "s.zarr", {"a": x}, hessian=False)
    assert not found.has_hessian("a")
    assert found.moments("a").hessian.shape == (WIDTH,)
    assert close(found.moments("a").hessian, x.double().square().mean(0))


def test_matrices_move_in_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantloom.stages.statistics_store.BLOCK_BYTES", 4 * WIDTH * 5)
    x = inputs(100)
    found = store(tmp_path / "s.zarr", {"a": x})
    assert list(row_blocks(WIDTH)) == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 24)]
    assert len(list((tmp_path / "s.zarr" / "a" / "1" / "hessian" / "c").iterdir())) == 5
    assert close(found.moments("a").hessian, x.double().T @ x.double() / 100)
    assert BLOCK_BYTES >= 1 << 20


@pytest.mark.parametrize("q", [1, 25, 50, 90, 99, 99.9, 100])
def test_percentiles_are_near_the_exact_ones(q: float) -> None:
    x = inputs(4000).abs()
    exact = float(torch.quantile(x.flatten().double(), q / 100))
    found = percentile(count(x), float(x.max()), q)
    assert found == pytest.approx(exact, rel=0.02)
    assert found <= float(x.max())


def test_percentiles_of_a_store(tmp_path: Path) -> None:
    x = inputs(2000)
    found = store(tmp_path / "s.zarr", {"a": x})
    assert found.percentile("a", 100) == found.amax("a")
    assert found.percentile("a", 50) < found.percentile("a", 99) < found.amax("a")
    for q in (0, -1, 101, float("nan")):
        with pytest.raises(UsageError, match="between 0 and 100"):
            found.percentile("a", q)


def test_zeros_and_constants_have_percentiles() -> None:
    assert percentile(count(torch.zeros(10)), 0.0, 99) == 0
    assert percentile(count(torch.full((10,), 3.0)), 3.0, 50) == pytest.approx(3.0, rel=0.07)


def test_histograms_add_up_exactly() -> None:
    x = inputs(1000)
    assert torch.equal(count(x), count(x[:300]) + count(x[300:]))
    assert int(count(x).sum()) == x.numel()


def test_estimates_of_two_halves_are_that_of_the_whole() -> None:
    x = inputs(1000)
    whole, halves = estimate(x), merged([estimate(x[:300]), estimate(x[300:])])
    assert whole.rows
    assert halves.rows
    assert close(halves.rows(3, 9), whole.rows(3, 9).double())
    assert close(halves.mean, whole.mean)
    assert torch.equal(halves.histogram, whole.histogram)
    assert (halves.tokens, halves.amax) == (whole.tokens, whole.amax)
    assert merged([estimate(x), estimate(x, hessian=False)]).rows is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_types_are_widened_first(dtype: torch.dtype) -> None:
    x = inputs(200).to(dtype)
    rows = estimate(x).rows
    assert rows
    assert close(rows(0, WIDTH), x.double().T @ x.double() / 200)


@pytest.mark.parametrize("user", ["high", "medium", "highest"])
def test_products_are_exact_and_the_users_setting_comes_back(user: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(user)
        x = inputs(300)
        with exact_products():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        rows = estimate(x).rows
        assert rows
        assert close(rows(0, WIDTH), x.double().T @ x.double() / 300)
        assert torch.get_float32_matmul_precision() == user
    finally:
        torch.set_float32_matmul_precision(before)


def test_stores_merge_weighted_by_tokens(tmp_path: Path) -> None:
    x = inputs(900)
    one = store(tmp_path / "one.zarr", {"q,k": x[:200], "only.one": x[:50]}, "one")
    two = store(tmp_path / "two.zarr", {"q,k,v": x[200:]}, "two")
    both = merge([one.path, two.path], tmp_path / "both.zarr")
    assert (both.tokens("q"), both.tokens("v"), both.tokens("only.one")) == (900, 700, 50)
    assert both.input_of("q") == both.input_of("k")
    assert both.input_of("v") != both.input_of("q"), "only one of the stores knows it"
    wide = x.double()
    assert close(both.moments("k").hessian, wide.T @ wide / 900)
    assert close(both.moments("k").mean, wide.mean(0))
    assert both.amax("k") == float(x.abs().max())
    assert both.describe()["runs"] == ["one in words", "two in words"]


def test_merging_refuses_what_would_be_wrong(tmp_path: Path) -> None:
    one = store(tmp_path / "one.zarr", {"q": inputs(10)}, "one")
    with pytest.raises(UsageError, match="would count twice"):
        merge([one.path, one.path], tmp_path / "out.zarr")
    with pytest.raises(UsageError, match="two or more"):
        merge([one.path], tmp_path / "out.zarr")
    wide = store(tmp_path / "wide.zarr", {"q": inputs(10, 30)}, "wide")
    with pytest.raises(UsageError, match=r"24 in .*, 30 in .*different models"):
        merge([one.path, wide.path], tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()
    two = store(tmp_path / "two.zarr", {"q": inputs(10)}, "two")
    with pytest.raises(PlanError, match="exists"):
        merge([one.path, two.path], one.path)


def test_a_statistics_value_travels_as_path_and_digest(tmp_path: Path) -> None:
    found = store(tmp_path / "s.zarr", {f"layers.{index}.q": inputs(5) for index in range(50)})
    packed = pickle.dumps(found)
    assert len(packed) < 500
    assert pickle.loads(packed).names == found.names


def test_a_store_that_changed_is_another_one(tmp_path: Path) -> None:
    import shutil

    found = store(tmp_path / "s.zarr", {"a": inputs(5)})
    packed = pickle.dumps(found)
    moved = tmp_path / "moved.zarr"
    shutil.copytree(found.path, moved)
    assert Statistics.open(moved).digest == found.digest
    shutil.rmtree(found.path)
    changed = store(tmp_path / "s.zarr", {"a": inputs(5, seed=1)})
    assert changed.digest != found.digest
    with pytest.raises(CheckpointError, match="has changed since the plan was made"):
        pickle.loads(packed)


def test_what_does_not_fit_is_listed_with_its_numbers(tmp_path: Path) -> None:
    found = store(tmp_path / "s.zarr", {"q": inputs(5), "k": inputs(5), "up": inputs(5)})
    assert found.check({"q": (3, WIDTH), "k": (9, WIDTH), "up": (1, WIDTH), "more": (4, 4)}) == []
    problems = found.check({"q": (3, WIDTH), "k": (WIDTH, 9)})
    assert len(problems) == 2
    assert problems[0] == f"k: statistics of {WIDTH} inputs, but the weight is {WIDTH}x9"
    assert problems[1].startswith("up: the checkpoint has no such layer")


def test_unknown_layers_are_named(tmp_path: Path) -> None:
    found = store(tmp_path / "s.zarr", {"blocks.0.attn.q": inputs(5)})
    assert "blocks.0.attn.q" in found
    assert "blocks.0.attn.v" not in found
    with pytest.raises(UsageError, match=r"no statistics of layer 'blocks.0.attn.v'; did you mean 'blocks.0.attn.q'"):
        found.moments("blocks.0.attn.v")


def edited(path: Path, change: Any) -> None:
    table = path / "zarr.json"
    found = json.loads(table.read_text())
    change(found["attributes"])
    table.write_text(json.dumps(found))


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Statistics.open(tmp_path / "none.zarr")
    (tmp_path / "zarr.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not of statistics"):
        Statistics.open(tmp_path)
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON"):
        Statistics.open(tmp_path)
    path = tmp_path / "s.zarr"
    store(path, {"a": inputs(5)})
    edited(path, lambda held: held["quantloom_statistics"].update(version=99))
    with pytest.raises(CheckpointError, match="version 99, this program reads 1"):
        Statistics.open(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held["inputs"]["a"].update(where="../../etc"),
        lambda held: held["inputs"]["a"].update(where="/etc"),
        lambda held: held["inputs"]["a"].update(where=""),
        lambda held: held["inputs"]["a"].update(width=0),
        lambda held: held["inputs"]["a"].update(width="x"),
        lambda held: held["inputs"]["a"].update(extra=1),
        lambda held: held["layers"]["a"].update(input="b"),
        lambda held: held.update(layers=[]),
        lambda held: held.pop("runs"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "s.zarr"
    store(path, {"a": inputs(5)})
    edited(path, lambda held: change(held["quantloom_statistics"]))
    with pytest.raises(CheckpointError, match="table of statistics is broken"):
        Statistics.open(path)


def test_an_input_that_is_missing_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    store(path, {"q,k": inputs(5), "up": inputs(5)})
    edited(path, lambda held: held["quantloom_statistics"]["inputs"]["q"].update(runs=[], tokens=0, where=""))
    with pytest.raises(CheckpointError, match=r"1 of 2 inputs are not complete, those of q, k; .*run the same command"):
        Statistics.open(path)


def test_lost_arrays_and_chunks_are_noticed(tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "s.zarr"
    found = store(path, {"a": inputs(5), "b": inputs(5), "c": inputs(5)})
    shutil.rmtree(path / "a" / "1" / "hessian")
    with pytest.raises(CheckpointError, match="a/1/hessian is missing or broken"):
        found.moments("a")
    shutil.rmtree(path / "b" / "1" / "hessian" / "c")
    with pytest.raises(CheckpointError, match="b/1/hessian is missing or broken"):
        found.moments("b")
    edited(path, lambda held: held["quantloom_statistics"]["inputs"]["c"].update(width=25))
    with pytest.raises(CheckpointError, match=r"c/1/mean: has shape \(24,\), the store.s table says \(25,\)"):
        Statistics.open(path).moments("c")


@pytest.mark.parametrize("name", ["a/b", "../up", ".hidden", "__init__", "zarr.json", "ünï cödé", "a%2Fb", "c"])
def test_any_name_is_a_folder_inside_the_store(tmp_path: Path, name: str) -> None:
    x = inputs(20)
    found = store(tmp_path / "in" / "s.zarr", {name: x})
    assert close(found.moments(name).hessian, x.double().T @ x.double() / 20)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["s.zarr"]


def test_zarr_reads_a_store_as_a_plain_group(tmp_path: Path) -> None:
    import zarr

    linear = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8))
    calibrate(linear, [inputs(30)], tmp_path / "s.zarr")
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    assert group["0/1/hessian"].shape == (WIDTH, WIDTH)  # type: ignore[union-attr]
