"""Runs that are killed at any moment go on when they are started again, and end with the same bytes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import FORMATS, listing
from killing import CASES, Bench, ByHand, Case, Moment, kill, options_of, shown, workers_of
from servers import Line

from quantloom import Pipeline
from quantloom.flow import part_files, sink
from quantloom.formats.errors import SinkError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills and looks into /proc")

TRIALS = int(os.environ.get("QUANTLOOM_KILLS", "2"))
"""Trials of each case. benchmarks/kill_campaign.py runs more of them."""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_killed_at_any_moment(case: Case, tmp_path: Path) -> None:
    bench = Bench(case, tmp_path)
    first = list(CASES).index(case.name) * 1000
    for seed in range(first, first + TRIALS):
        outcome = bench.trial(seed)
        assert not outcome.problem, shown(outcome)


def test_the_trials_do_kill(tmp_path: Path) -> None:
    """Every kind of moment leaves something behind: otherwise the tests above would show nothing."""
    bench = Bench(CASES["fp8 row in shards"], tmp_path)
    for number, moment in enumerate([Moment(call=bench.calls // 2), Moment(lines=3)]):
        place = bench.place(f"killed-{number}")
        assert bench.run(place, moment).status == -9
        assert any(name.endswith(".part") for name in listing(place))
        assert any(name.endswith(".journal.jsonl") for name in listing(place))


@pytest.mark.parametrize("name", ["nvfp4 in shards", "kept layer", "replaced shards", "replaced store"])
def test_killed_at_every_call_of_the_commit(name: str, tmp_path: Path) -> None:
    bench = Bench(CASES[name], tmp_path)
    killed = 0
    for call in range(bench.calls - 20, bench.calls + 2):  # how often the journal is written is for the clock to say
        place = bench.place(f"call-{call}")
        if bench.run(place, Moment(call=call)).status != -9:
            break
        killed += 1
        ended = bench.run(place)
        found = listing(place)
        if ended.status:  # complete, and killed before the locks went
            assert "exists already; pass --overwrite" in " ".join(ended.words.split())
            found = {name: value for name, value in found.items() if not name.endswith(".lock")}
        assert found == bench.whole, f"call {call} of {bench.calls}"
    assert killed >= 6


def test_heads_that_the_power_took_are_written_again(sharded: Path, tmp_path: Path) -> None:
    """Parts are created without a sync: one of the right size may have lost what was in it."""
    flow = Pipeline().read(sharded).stage("quantize", **FORMATS["nvfp4"])
    flow.write(tmp_path / "whole", shard_size="100KB")
    plan = flow.write(tmp_path / "out", shard_size="100KB", compute=False).plan
    (tmp_path / "out").mkdir()
    sink.log_of(plan).append(sink.lines_of([sink.head_of(plan)]))
    for shard in part_files.shards_of(plan):
        with Path(f"{shard.path}.part").open("wb") as file:
            file.truncate(shard.size)
    flow.write(tmp_path / "out", shard_size="100KB")
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")


def test_an_old_output_is_not_taken_for_the_new_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.safetensors"
    flow = Pipeline().read(checkpoint)
    flow.quantize("fp8").write(output)

    def killed(paths: object, stale: object) -> None:
        shutil.copytree(tmp_path, tmp_path / "killed")
        raise KeyboardInterrupt

    monkeypatch.setattr(sink, "exchange", killed)
    with pytest.raises(KeyboardInterrupt):
        flow.quantize("mxfp8").write(output, overwrite=True)
    monkeypatch.undo()
    for name in ("out.safetensors.journal.jsonl", "out.safetensors"):
        shutil.copy(tmp_path / "killed" / name, tmp_path / name)
    (tmp_path / "out.safetensors.part").unlink()
    with pytest.raises(SinkError, match=r"has \d+ bytes instead of \d+: .* is not whole; delete its journal"):
        flow.quantize("mxfp8").write(output, overwrite=True)


# -- clusters ----------------------------------------------------------------------------------------------------------

CLUSTER = Case("cluster", options_of("nvfp4"), scheduler="threads")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(CLUSTER, tmp_path_factory.mktemp("cluster"))


@pytest.fixture
def by_hand(tmp_path: Path) -> Iterator[ByHand]:
    with ByHand(tmp_path) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_worker_of_our_own_cluster_is_killed(bench: Bench) -> None:
    place = bench.place("worker")
    ended = bench.run(place, Moment(lines=2), "distributed", lambda pid: kill(workers_of(pid)[0]))
    assert ended.status == 0, ended.words
    assert listing(place) == bench.whole


@pytest.mark.slow
def test_the_client_with_our_own_cluster_is_killed(bench: Bench) -> None:
    place = bench.place("client")
    assert bench.run(place, Moment(lines=2), "distributed").status == -9
    assert any(name.endswith(".part") for name in listing(place))
    assert bench.run(place).status == 0
    assert listing(place) == bench.whole


def _worker(cluster: ByHand) -> None:
    kill(workers_of(cluster.nannies[0].pid)[0])


def _nanny(cluster: ByHand) -> None:
    cluster.nannies[0].kill()


def _every_nanny(cluster: ByHand) -> None:
    for nanny in cluster.nannies:
        nanny.kill()
    cluster.add_worker()


def _scheduler(cluster: ByHand) -> None:
    assert cluster.scheduler is not None
    cluster.scheduler.kill()


STRIKES: dict[str, Callable[[ByHand], None]] = {
    "worker": _worker, "nanny": _nanny, "every nanny": _every_nanny, "scheduler": _scheduler,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("victim", [*STRIKES, "client"])
def test_a_cluster_by_hand(victim: str, bench: Bench, by_hand: ByHand) -> None:
    place = bench.place(f"by hand, {victim}")
    if victim == "client":
        assert bench.run(place, Moment(lines=2), by_hand.address).status == -9
        assert bench.run(place, scheduler=by_hand.address).status == 0
    else:
        ended = bench.run(place, Moment(lines=2), by_hand.address, lambda _: STRIKES[victim](by_hand))
        if victim == "scheduler":
            assert ended.status == 1
            assert "the Dask scheduler went away" in " ".join(ended.words.split())
            by_hand.stop()
            by_hand.start()
            ended = bench.run(place, scheduler=by_hand.address)
        assert ended.status == 0, ended.words
    assert listing(place) == bench.whole


@contextlib.contextmanager
def frozen(pids: list[int], seconds: float) -> Iterator[Callable[[int], None]]:
    """What stops these processes when it is called, so that they go on after some time."""
    wakers: list[threading.Timer] = []

    def wake() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    def freeze(_: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wakers.append(threading.Timer(seconds, wake))
        wakers[-1].start()

    yield freeze
    assert wakers, "nothing was frozen"
    for waker in wakers:
        waker.join()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["scheduler", "workers"])
def test_a_cluster_that_is_frozen_for_a_while(who: str, bench: Bench, by_hand: ByHand) -> None:
    """A machine that swaps, or is suspended, costs its time alone."""
    place = bench.place(f"frozen {who}")
    assert by_hand.scheduler is not None
    by_hand.wait_for_workers()
    pids = [by_hand.scheduler.pid] if who == "scheduler" else [workers_of(each.pid)[0] for each in by_hand.nannies]
    with frozen(pids, 4) as freeze:
        ended = bench.run(place, Moment(lines=2), by_hand.address, freeze)
    assert ended.status == 0, ended.words
    assert listing(place) == bench.whole


@pytest.mark.slow
def test_the_line_to_the_scheduler_is_cut(bench: Bench, by_hand: ByHand) -> None:
    """The cluster lives, only this client does not reach it any more."""
    place, line = bench.place("cut"), Line(by_hand.port)
    ended = bench.run(place, Moment(lines=2), f"tcp://127.0.0.1:{line.port}", lambda _: line.cut())
    assert ended.status == 1
    told = " ".join(ended.words.split())
    assert "the Dask scheduler went away" in told
    assert "run the same command again to continue" in told
    assert "Traceback" not in told
    assert any(name.endswith(".part") for name in listing(place))
    ended = bench.run(place, scheduler=by_hand.address)
    assert ended.status == 0, ended.words
    assert listing(place) == bench.whole
