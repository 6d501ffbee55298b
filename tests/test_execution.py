"""Running plans: every scheduler, number of workers, chunk size and split into tasks writes the same bytes."""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
from checkpoints import FORMATS, LINEAR, make_tensors, without_checksums, write_file, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from quantloom import Pipeline
from quantloom.flow import budget, graph, parts
from quantloom.flow.execute import run_plan
from quantloom.flow.graph import Key, batches, receipt_keys, stage_graph, submission
from quantloom.flow.plan import Plan, make_plan
from quantloom.flow.recipe import Output, Recipe, Run
from quantloom.flow.report import Report
from quantloom.formats.errors import SinkError, UsageError
from quantloom.stages.stage import make_stage
from quantloom.stages.work import Environment, Receipt

CASES = [(name, rounding) for name in FORMATS for rounding in ("mse", "nearest")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(tmp_path_factory.mktemp("source") / "tiny.safetensors")


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """Bytes of the conversion with these options on one worker, each layer one task."""
    folder = tmp_path_factory.mktemp("reference")
    made: dict[str, bytes] = {}

    def bytes_of(**options: Any) -> bytes:
        key = str(sorted(options.items()))
        if key not in made:
            path = folder / f"{len(made)}.safetensors"
            Pipeline(scheduler="sync").read(source).stage("quantize", **options).write(path)
            made[key] = path.read_bytes()
        return made[key]

    return bytes_of


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A cluster in this process: it starts in a moment, and everything still passes through its protocol."""
    distributed = pytest.importorskip("distributed")
    with (
        dask.config.set({"distributed.admin.log-length": 0}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, memory_limit=None,
                                 dashboard_address="127.0.0.1:0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        yield client


def plan_of(source: Path, output: Path, **options: Any) -> Plan:
    stage = make_stage("quantize", {"format": "mxfp8", **options})
    return make_plan(Recipe((str(source),), (stage,), Output(str(output))))


# -- the same bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("name", ["fp8", "int8 rotated", "nvfp4"])
def test_any_number_of_threads(name: str, workers: int, source: Path, reference: Callable[..., bytes], tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    path = tmp_path / "out.safetensors"
    Pipeline(workers=workers).read(source).stage("quantize", **FORMATS[name]).write(path)
    assert path.read_bytes() == reference(**FORMATS[name])


def test_a_second_run_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    pipeline = Pipeline().read(source).quantize("nvfp4")
    first = pipeline.write(tmp_path / "a.safetensors")
    second = pipeline.write(tmp_path / "b.safetensors")
    pipeline.write(tmp_path / "a.safetensors", overwrite=True)
    one, other = (without_checksums((tmp_path / name).read_bytes()) for name in ("a.safetensors", "b.safetensors"))
    assert one == other
    assert [layer.error for layer in first.layers] == [layer.error for layer in second.layers]


@pytest.mark.parametrize("name", ["fp8 row", "nvfp4"])
def test_a_given_client(name: str, client: Any, source: Path, reference: Callable[..., bytes], tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(graph, "BATCH_BYTES", 100_000)
    path = tmp_path / "out.safetensors"
    flow = Pipeline().read(source).stage("quantize", **FORMATS[name]).write(path, compute=False)
    report = flow.compute(client)
    assert path.read_bytes() == reference(**FORMATS[name])
    assert len(report.layers) == LINEAR
    assert report.distributed
    assert client.status == "running"


def test_an_address(source: Path, reference: Callable[..., bytes], tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 1, "processes": False, "protocol": "tcp", "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(**options) as cluster:
        path = tmp_path / "out.safetensors"
        Pipeline(scheduler=cluster.scheduler_address).read(source).quantize("mxfp8").write(path)
    assert path.read_bytes() == reference(format="mxfp8")


def test_row_ranges_on_a_cluster(client: Any, source: Path, reference: Callable[..., bytes], tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    wanted = reference(format="nvfp4")
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    path = tmp_path / "out.safetensors"
    Pipeline().read(source).quantize("nvfp4").write(path, compute=False).compute(client)
    assert without_checksums(path.read_bytes()) == without_checksums(wanted)


def test_an_own_cluster_of_processes(source: Path, reference: Callable[..., bytes], tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    path = tmp_path / "out.safetensors"
    Pipeline(scheduler="distributed", workers=1).read(source).quantize("mxfp8").write(path)
    assert path.read_bytes() == reference(format="mxfp8")


@pytest.mark.parametrize(("name", "rounding"), CASES)
def test_layers_in_row_ranges(name: str, rounding: str, source: Path, reference: Callable[..., bytes], tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    options = {**FORMATS[name], "rounding": rounding}
    wanted = reference(**options)
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    path = tmp_path / "out.safetensors"
    flow = Pipeline(workers=2).read(source).stage("quantize", **options).write(path, compute=False)
    split = [layer.parts for layer in flow.plan.layers if layer.parts]
    assert sorted(len(ranges) for ranges in split) == [2, 2, 3, 3]
    assert all(start % 128 == 0 for ranges in split for start, _ in ranges)
    report = flow.compute()
    assert without_checksums(path.read_bytes()) == without_checksums(wanted)
    assert len(report.layers) == LINEAR - ("block" in name)  # no block divides 100 x 72
    assert sum(layer.nbytes_in for layer in report.layers) == sum(layer.layer.nbytes for layer in flow.plan.quantized)


@settings(max_examples=20, deadline=None)
@given(chunk=st.integers(1000, 300_000), case=st.sampled_from(CASES), part=st.sampled_from([20_000, 1 << 30]))
def test_chunk_sizes_do_not_change_bytes(chunk: int, case: tuple[str, str], part: int, source: Path,
                                         reference: Callable[..., bytes],
                                         tmp_path_factory: pytest.TempPathFactory) -> None:  # fmt: skip
    options = {**FORMATS[case[0]], "rounding": case[1]}
    wanted = reference(**options)
    path = tmp_path_factory.mktemp("chunks") / "out.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "CPU_CHUNK_BYTES", chunk)
        patch.setattr(parts, "PART_BYTES", part)
        Pipeline(scheduler="sync").read(source).stage("quantize", **options).write(path)
    bytes_of = without_checksums if part == 20_000 else bytes
    assert bytes_of(path.read_bytes()) == bytes_of(wanted)


def test_what_was_quantized_converts_again_the_same_way(source: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Layers that are decoded on read follow the same rules."""
    middle = tmp_path / "middle.safetensors"
    Pipeline().read(source).quantize("fp8", scaling="block", block_size=64).write(middle)
    Pipeline(scheduler="sync").read(middle).quantize("nvfp4").write(tmp_path / "a.safetensors")
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    monkeypatch.setattr(budget, "CPU_CHUNK_BYTES", 5_000)
    Pipeline(workers=3).read(middle).quantize("nvfp4").write(tmp_path / "b.safetensors")
    one, other = (without_checksums((tmp_path / name).read_bytes()) for name in ("a.safetensors", "b.safetensors"))
    assert one == other


def test_tensors_of_every_odd_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"l{rows}x{columns}.weight": torch.randn(rows, columns) for rows, columns in
               itertools.product((1, 15, 129, 300), (1, 17, 64))}  # fmt: skip
    source = write_file(tmp_path / "in.safetensors", tensors)
    for name in ("fp8", "int8", "mxfp8", "nvfp4"):
        Pipeline(scheduler="sync").read(source).quantize(name).write(tmp_path / f"{name}.safetensors")
        monkeypatch.setattr(parts, "PART_BYTES", 1000)
        monkeypatch.setattr(budget, "CPU_CHUNK_BYTES", 700)
        Pipeline(workers=2).read(source).quantize(name).write(tmp_path / f"{name}-split.safetensors")
        monkeypatch.undo()
        whole, split = (tmp_path / f"{name}{end}.safetensors" for end in ("", "-split"))
        assert without_checksums(whole.read_bytes()) == without_checksums(split.read_bytes()), name


# -- the graph ---------------------------------------------------------------------------------------------------------


def test_one_node_for_each_layer_and_stage(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path / "out")
    nodes = stage_graph(plan.layers, Environment())
    assert len(nodes) == sum(len(layer.steps) + 1 for layer in plan.layers)
    layer = next(layer for layer in plan.layers if layer.format)
    keys = [(step.name, layer.layer.name) for step in layer.steps] + [("receipt", layer.layer.name)]
    assert [key[0] for key in keys] == ["read", "scale", "round", "pack", "write", "receipt"]
    for above, key in itertools.pairwise(keys):
        assert set(nodes[key].dependencies) == {above}
    assert set(nodes[keys[0]].dependencies) == set()


@pytest.mark.parametrize(("options", "shared"), [({"format": "nvfp4"}, True), ({"format": "fp8"}, True),
                                                 ({"format": "fp8", "scaling": "row"}, False)])  # fmt: skip
def test_row_ranges_meet_in_one_scale(options: dict[str, Any], shared: bool, source: Path, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    plan = plan_of(source, tmp_path / "out", **options)
    layer = next(layer for layer in plan.layers if len(layer.parts) == 3)
    nodes = stage_graph([layer], Environment())
    scale: Key = ("tensor scale", layer.layer.name)
    assert (scale in nodes) is shared
    steps = [node for key, node in nodes.items() if key[0] == "scale"]
    assert len(steps) == 3
    assert all((scale in node.dependencies) is shared for node in steps)
    if shared:
        assert {key[0] for key in nodes[scale].dependencies} == {"amax"}
        assert len(nodes[scale].dependencies) == 3
    assert len(receipt_keys(layer)) == 3


def test_batches_are_large_enough_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"blocks.{number}.weight": torch.zeros(8, 16 + number % 5) for number in range(100)}
    plan = plan_of(write_file(tmp_path / "in.safetensors", tensors), tmp_path / "out", format="int8")
    monkeypatch.setattr(graph, "BATCH_BYTES", 5000)
    made = list(batches(plan.layers))
    sizes = [sum(layer.layer.nbytes for layer in batch) for batch in made]
    assert len(made) > 5
    assert all(size >= 5000 for size in sizes[:-1])
    batched = [layer.layer.name for batch in made for layer in batch]
    assert sorted(batched) == sorted(layer.layer.name for layer in plan.layers)
    largest = [layer.layer.nbytes for layer in made[0]]
    assert min(largest) >= max(layer.layer.nbytes for layer in made[-1])


def test_what_is_submitted_is_one_small_task_for_each_batch(tmp_path: Path) -> None:
    tensors = {f"blocks.{number}.weight": torch.randn(512, 512) for number in range(8)}
    plan = plan_of(write_file(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors", format="nvfp4")
    tasks, keys = submission(batches(plan.layers), Environment("run"))
    assert len(tasks) == len(keys) == 1
    task = tasks[next(iter(keys))]
    assert len(pickle.dumps(task)) < 8 * 4000 < tensors["blocks.0.weight"].nbytes / 30
    assert not task.dependencies


def test_edges_between_tasks_are_numbers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one fused task hands to another: magnitudes of row ranges, the scale, receipts; never a tensor."""
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    plan = plan_of(source, tmp_path / "out.safetensors", format="nvfp4")
    tasks, keys = submission(batches(plan.layers), Environment("run"))
    assert {key[2] for key in tasks} == {"batch", "amax", "tensor scale"}
    results: list[tuple[Key, Any]] = []

    from dask.local import get_sync

    from quantloom.flow.sink import open_sink

    def finished(key: Key, value: Any, *_: Any) -> None:
        results.append((key, value))

    with open_sink(plan) as session, ThreadPoolExecutor(1) as thread:  # tasks set up torch for their thread
        thread.submit(get_sync, tasks, list(keys), callbacks=[(None, None, None, finished, None)]).result()
        session.add([receipt for key, value in results if key in keys for receipt in value])
    assert len(results) == len(tasks)
    for key, value in results:
        if key in keys:
            assert all(isinstance(receipt, Receipt) for receipt in value)
            assert len(pickle.dumps(value)) < 1000 * len(value)
            assert not any(isinstance(field, torch.Tensor) for receipt in value for field in vars(receipt).values())
        else:
            assert type(value) is float


def test_a_hundred_thousand_tensors_are_few_tasks(tmp_path: Path) -> None:
    """Small tensors share tasks: the scheduler must not cost more than the work, and a task not keep workers idle."""
    plan = plan_of(write_file(tmp_path / "in.safetensors", {f"b.{n}.weight": torch.zeros(4, 32) for n in range(2000)}),
                   tmp_path / "out.safetensors")  # fmt: skip
    tasks, keys = submission(batches(plan.layers), Environment())
    assert len(tasks) == len(keys) == 8
    assert max(len(batch) for batch in batches(plan.layers)) == graph.BATCH_LAYERS


# -- running -----------------------------------------------------------------------------------------------------------


class Watcher:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.receipts: list[Receipt] = []

    def start(self, plan: Plan, budget: budget.Budget) -> None:
        self.events.append("start")

    def resume(self, receipts: Any) -> None:
        self.events.append("resume")

    def advance(self, receipts: Any) -> None:
        self.events.append("advance")
        self.receipts += receipts

    def stop(self) -> None:
        self.events.append("stop")


@pytest.mark.parametrize("scheduler", ["threads", "sync"])
def test_progress_is_told_of_every_layer_and_byte(scheduler: str, source: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    monkeypatch.setattr(graph, "MOST_BATCHES", 10**9)
    watcher = Watcher()
    flow = Pipeline(scheduler=scheduler).read(source).quantize("fp8").write(tmp_path / "o.safetensors", compute=False)
    report = flow.compute(progress=watcher)
    assert watcher.events[0] == "start"
    assert watcher.events[-1] == "stop"
    assert watcher.events.count("advance") == len(flow.plan.layers)
    assert sum(receipt.nbytes_in for receipt in watcher.receipts) == flow.plan.nbytes_in == report.nbytes_in
    assert sum(receipt.first for receipt in watcher.receipts) == len(flow.plan.layers)


def test_progress_is_stopped_after_a_failure(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantloom.formats.fileio import Writer

    def full(*_: Any) -> None:
        raise SinkError("no more")

    watcher = Watcher()
    flow = Pipeline().read(source).quantize("fp8").write(tmp_path / "o.safetensors", compute=False)
    _ = flow.plan
    monkeypatch.setattr(Writer, "write", full)
    with pytest.raises(SinkError, match="no more"):
        flow.compute(progress=watcher)
    assert watcher.events[-1] == "stop"


def test_torch_is_left_as_it_was(source: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.is_grad_enabled()
    Pipeline(workers=2).read(source).quantize("fp8").write(tmp_path / "o.safetensors")
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before == (before[0], True)


def test_a_device_that_is_not_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, words in (("cuda:3", "'cuda:3' is not there: torch .* finds 1 CUDA devices"),):
        with pytest.raises(UsageError, match=words):
            Pipeline(device=device).read(source).quantize("fp8").write(tmp_path / "o.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_does_not_answer(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    from quantloom.flow import cluster

    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(SinkError, match=r"tcp://127.0.0.1:1: cannot reach the Dask scheduler"):
        Pipeline(scheduler="tcp://127.0.0.1:1").read(source).quantize("fp8").write(tmp_path / "o.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["a://b", "tcp://", "tcp://host:x", "tcp://[::1"])
def test_an_address_that_is_none(address: str, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with pytest.raises(UsageError, match="no address of a Dask scheduler"):
        Pipeline(scheduler=address).read(source).quantize("fp8").write(tmp_path / "o.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_without_workers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    from quantloom.flow import cluster

    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    options = {"n_workers": 0, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with (
        distributed.LocalCluster(**options) as empty,
        distributed.Client(empty, set_as_default=False) as client,
        pytest.raises(SinkError, match="has no workers"),
    ):
        Pipeline().read(source).quantize("fp8").write(tmp_path / "o.safetensors", compute=False).compute(client)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("raised", [True, False])
def test_a_scheduler_that_goes_away(raised: bool, client: Any, source: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    distributed = pytest.importorskip("distributed")

    def lost(futures: Any, **_: Any) -> Iterator[Any]:
        error = distributed.CancelledError("scheduler-connection-lost")
        if raised:
            raise error
        yield futures[0], error

    monkeypatch.setattr(distributed, "as_completed", lost)
    with pytest.raises(SinkError, match="the Dask scheduler went away: scheduler-connection-lost"):
        Pipeline().read(source).quantize("fp8").write(tmp_path / "o.safetensors", compute=False).compute(client)
    assert list(tmp_path.iterdir()) == []


def test_workers_are_told_absolute_paths(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = make_plan(Pipeline().read(source).quantize("fp8").write("o.safetensors", compute=False).recipe)
    assert {slot.path for shard in plan.shards for slot in shard.slots} == {str(tmp_path / "o.safetensors")}


def test_a_folder_in_and_out(tmp_path: Path) -> None:
    tensors = make_tensors()
    write_folder(tmp_path / "in", tensors)
    write_file(tmp_path / "one" / "model.safetensors", tensors)
    Pipeline().read(tmp_path / "in").quantize("mxfp8").write(tmp_path / "a.safetensors")
    folder = tmp_path / "in"
    Pipeline().read(sorted(folder.glob("*.safetensors"))).quantize("mxfp8").write(tmp_path / "b.safetensors")
    Pipeline().read(folder / "*.safetensors").quantize("mxfp8").write(tmp_path / "c.safetensors")
    Pipeline().read(folder / "model.safetensors.index.json").quantize("mxfp8").write(tmp_path / "d.safetensors")
    made = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "abcd"]
    assert made.count(made[0]) == 4


def test_the_run_decides_nothing_about_bytes(source: Path, tmp_path: Path) -> None:
    digests = set()
    for run in (Run(), Run(memory=10**9), Run(workers=3), Run(scheduler="sync")):
        recipe = Recipe((str(source),), (make_stage("quantize", {"format": "fp8"}),), Output(str(tmp_path / "o")), run)
        digests.add(make_plan(recipe).digest)
    assert len(digests) == 1
    recipe = Recipe((str(source),), (make_stage("quantize", {"format": "int8"}),), Output(str(tmp_path / "o")))
    assert make_plan(recipe).digest not in digests


def test_run_plan_returns_a_report(source: Path, tmp_path: Path) -> None:
    report = run_plan(plan_of(source, tmp_path / "o.safetensors"))
    assert isinstance(report, Report)
    assert report.output == str(tmp_path / "o.safetensors")


def test_passes_over_layers_stop_early() -> None:
    from quantloom.flow.threads import map_layers
    from quantloom.stages.cancelling import Cancelled, check_cancelled

    assert map_layers(lambda item, _: item * 2, range(50), workers=3) == [item * 2 for item in range(50)]
    finished = []

    def work(item: int, environment: Environment) -> None:
        if item == 0:
            time.sleep(0.05)
            raise KeyboardInterrupt
        for _ in range(200):
            check_cancelled(environment.run_id)
            time.sleep(0.01)
        finished.append(item)

    with pytest.raises((KeyboardInterrupt, Cancelled)):
        map_layers(work, range(50), workers=3)
    assert finished == []


def test_equal_sources_give_equal_files_whenever_they_were_written(checkpoint: Path, tmp_path: Path) -> None:
    twin = tmp_path / "elsewhere" / checkpoint.name
    twin.parent.mkdir()
    twin.write_bytes(checkpoint.read_bytes())
    os.utime(twin, (1, 1))
    outputs = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for source, output in zip((checkpoint, twin), outputs, strict=True):
        Pipeline().read(source).quantize("mxfp8").write(output)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
