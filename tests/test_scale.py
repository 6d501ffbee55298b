"""A terabyte on paper: planning 100,000 tensors in bounds, and the laws of simulated runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checkpoints import benchmark, child, environment, make_tensors, write_file
from hypothesis import given
from hypothesis import strategies as st

from quantloom import Pipeline
from quantloom.flow.costs import CPU, DEVICES, H100, TASK_SECONDS
from quantloom.flow.graph import batches, stage_graph, submission
from quantloom.flow.plan import Plan, make_plan
from quantloom.flow.recipe import Run
from quantloom.flow.simulate import Cluster, Load, makespan, outcome
from quantloom.formats.errors import UsageError
from quantloom.formats.heads import place
from quantloom.formats.source import open_source
from quantloom.stages.work import Environment

MB = 10**6


def giant() -> ModuleType:
    return benchmark("giant")


@pytest.fixture(scope="module")
def terabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 TB of FP8 blocks in about 100,000 tensors and 160 shards, of which the headers alone are on the disk."""
    folder = tmp_path_factory.mktemp("giant") / "model"
    made = giant().make_giant(folder)
    assert made.nbytes > 0.95e12
    assert 98_000 < made.tensors < 102_000
    assert made.shards == 160
    taken = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    assert taken < 100 * MB
    return folder


PLAN = r"""
import json, re, sys
from pathlib import Path
from quantloom import Pipeline
from quantloom.flow.budget import make_budget
from quantloom.flow.graph import batches, submission

def peak():  # of this program alone: what resource says begins with the one that started it
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

flow = Pipeline().read(sys.argv[1]).quantize("nvfp4").write("out/", compute=False)
budget = make_budget(flow.plan.layers, flow.recipe.run, "run")
flow.plan.explain(budget.workers)
planned = peak()
graph, keys = submission(batches(flow.plan.layers), budget.environment)
graphed = peak()
print(json.dumps([planned, graphed, len(flow.plan.layers), len(keys)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
def test_a_terabyte_is_planned_and_graphed_in_half_a_gigabyte(terabyte: Path) -> None:
    """The whole process: 240 MB of it are the interpreter and torch."""
    command = [sys.executable, "-c", PLAN, str(terabyte)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())  # however long
    planned, graphed, layers, tasks = json.loads(done.stdout)
    assert layers > 49_000
    assert 800 < tasks < 1300
    assert planned < 500 * MB
    assert graphed - planned < 50 * MB


def small_giant(folder: Path, tensors: int, kind: str = "fp8") -> Plan:
    giant().make_giant(folder, kind, 2, tensors, 4, 16)
    return make_plan(Pipeline().read(folder).quantize("nvfp4").write(folder / "out", compute=False).recipe)


def test_layers_of_a_shape_share_their_chain(tmp_path: Path) -> None:
    plan = small_giant(tmp_path / "model", 1500)
    assert len(plan.quantized) > 600
    chains = {id(layer.steps) for layer in plan.quantized}
    assert len(chains) == len({layer.layer.weight.shape for layer in plan.quantized}) < 20
    assert len({id(layer.entry) for layer in plan.quantized}) == len(chains)
    assert len({id(layer.layer.weight.shape) for layer in plan.layers if len(layer.layer.weight.shape) == 1}) < 20


def calls_of_planning(folder: Path) -> tuple[int, int]:
    """Python calls that planning takes, and layers: a count that no busy machine changes."""
    recipe = Pipeline().read(folder).quantize("nvfp4").write(folder / "out", compute=False).recipe
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    make_plan(recipe)  # fills caches and imports what is needed
    sys.setprofile(count)
    try:
        plan = make_plan(recipe)
    finally:
        sys.setprofile(None)
    return calls, len(plan.layers)


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_planning_grows_with_the_layers_and_no_faster(tmp_path: Path, kind: str) -> None:
    found = []
    for tensors in (1000, 4000):
        giant().make_giant(tmp_path / str(tensors), kind, 2, tensors, 4, 16)
        found.append(calls_of_planning(tmp_path / str(tensors)))
    (few, small), (many, large) = found
    each = (many - few) / (large - small)
    assert each < 150, f"{each:.0f} calls a layer"
    assert many / large < 1.1 * few / small


def test_heads_are_made_when_they_are_written(tmp_path: Path) -> None:
    """Every shard's header repeats what all layers are: of 100 shards they would be a gigabyte."""
    shard = small_giant(tmp_path / "model", 1500).shards[0]
    assert place(shard.slots, shard.texts).length == len(shard.head)
    assert len(shard.head) % 64 == 0
    assert min(slot.start for slot in shard.slots) == len(shard.head)
    pipeline = Pipeline().read(tmp_path / "model").quantize("nvfp4")
    shards = pipeline.write(tmp_path / "o", shard_size="200MB", compute=False).plan.shards
    assert len(shards) > 2
    assert len({id(shard.texts[0].obj) for shard in shards}) == 1
    assert all(shard.size == len(shard.head) + sum(slot.nbytes for slot in shard.slots) for shard in shards)


def test_plain_chains_run_as_one_call_and_the_graph_stays_drawable(tmp_path: Path) -> None:
    write_file(tmp_path / "in.safetensors", make_tensors())
    flow = Pipeline().read(tmp_path / "in.safetensors").quantize("fp8").write(tmp_path / "o.safetensors", compute=False)
    layers, where = flow.plan.layers, Environment("run")
    graph, keys = submission(batches(layers), where)
    assert len(graph) == len(keys) == 1
    nodes = stage_graph(layers, where)
    assert {key[1] for key in nodes} == {layer.layer.name for layer in layers}
    assert len(nodes) == sum(len(layer.steps) + 1 for layer in layers)


def test_a_giant_opens_as_a_real_checkpoint(tmp_path: Path) -> None:
    for kind in ("fp8", "bf16"):
        made = giant().make_giant(tmp_path / kind, kind, 2, 1000, 4, 16)
        source = open_source(tmp_path / kind)
        assert (len(source.refs), source.nbytes, len(source.files)) == (made.tensors, made.nbytes, made.shards)
        assert "model.layers.3.mlp.experts.15.down_proj.weight" in source.refs


# -- simulated runs


loads = st.lists(
    st.builds(Load, st.floats(0, 100), st.integers(0, 10**11), st.integers(0, 10**11)), min_size=1, max_size=60
)
clusters = st.builds(
    Cluster, st.just((1,)), st.sampled_from(list(DEVICES.values())), st.floats(1e8, 1e11), st.floats(1e8, 1e11),
    st.sampled_from(list(TASK_SECONDS)),
)  # fmt: skip


@given(loads, clusters, st.integers(1, 40), st.integers(1, 40))
def test_more_workers_are_never_slower(tasks: list[Load], cluster: Cluster, one: int, other: int) -> None:
    few, many = sorted((one, other))
    assert outcome(tasks, cluster, many).seconds <= outcome(tasks, cluster, few).seconds * (1 + 1e-9)


@given(loads, clusters, st.integers(1, 200))
def test_nothing_is_faster_than_its_bounds(tasks: list[Load], cluster: Cluster, workers: int) -> None:
    found = outcome(tasks, cluster, workers)
    seconds = found.seconds * (1 + 1e-9)
    assert seconds >= sum(load.read for load in tasks) / cluster.read
    assert seconds >= sum(load.written for load in tasks) / cluster.write
    assert seconds >= max(load.compute for load in tasks)
    assert seconds >= sum(load.compute for load in tasks) / workers
    assert seconds >= len(tasks) * TASK_SECONDS[cluster.scheduler]
    assert 0 <= found.busy <= 1 + 1e-9
    assert found.bound in (
        "start-up", "storage read", "storage write", "storage", "scheduler", "compute", "largest task"
    )  # fmt: skip


@given(st.lists(st.floats(0, 1e3), max_size=50), st.integers(1, 60))
def test_tasks_go_to_whoever_is_free(lengths: list[float], workers: int) -> None:
    """Graham's bound: never longer than the mean load and the longest task together."""
    found = makespan(lengths, workers)
    assert max([0.0, *lengths]) <= found * (1 + 1e-9) + 1e-9
    assert found <= (sum(lengths) / workers + max([0.0, *lengths])) * (1 + 1e-9) + 1e-9


def test_what_bounds_a_run_is_named() -> None:
    cluster = Cluster((1,), CPU, 1e9, 1e9, "threads")
    many = [Load(10.0, 10**9, 10**9)] * 64
    assert outcome(many, cluster, 1).bound == "compute"
    assert outcome([*many, Load(1000.0, 0, 0)], cluster, 64).bound == "largest task"
    assert outcome(many, cluster, 4096).bound.startswith("storage")
    assert outcome([Load(0.0, 1, 1)] * 10**6, Cluster((1,), CPU, scheduler="distributed"), 8).bound == "scheduler"
    assert outcome([Load(0.1, 1, 1)], cluster, 1).bound == "start-up"


def test_spec_of_a_cluster() -> None:
    cluster = Cluster.parse("gpus=8,read=6GB/s", Run())
    assert cluster == Cluster((8,), H100, 6e9, 6e9, "distributed")
    cluster = Cluster.parse(" workers=4 , hosts=3, read = 2.5GiB/s, write=500MB, device=h200 ", Run())
    assert cluster == Cluster((12,), DEVICES["h200"], 2.5 * 2**30, 5e8, "distributed")
    assert Cluster.parse("", Run()).workers == (1, 8, 128)
    assert Cluster.parse("read=1GB/s", Run(device="cuda")).device is H100
    assert Cluster.parse("workers=2", Run()).scheduler == "threads"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu=8", "unknown name 'gpu'; did you mean 'gpus'"),
        ("gpus", "'gpus' is not NAME=VALUE, as in gpus=8,read=6GB/s"),
        ("gpus=8,,read=1GB", "'' is not NAME=VALUE"),
        ("gpus=0", "gpus='0' is no number from 1 to 1000000"),
        ("gpus=-2", "gpus='-2' is no number"),
        ("gpus=99999999", "is no number from 1 to 1000000"),
        ("workers=many", "workers='many' is no number"),
        ("gpus=2,gpus=3", "gpus is given twice"),
        ("gpus=2,workers=3", "both say how many work on a host"),
        ("gpus=2,device=cpu", "name workers instead of gpus"),
        ("device=h10", "unknown device 'h10'; did you mean 'h100'"),
        ("read=fast", "read='fast' is no rate; write for example 6GB/s"),
        ("read=0GB/s", "read='0GB/s' is no rate; write for example 6GB/s"),
    ],
)
def test_wrong_specs_are_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"simulate: .*{message}"):
        Cluster.parse(text, Run())


def test_simulation_from_python_and_from_the_command_line(tmp_path: Path) -> None:
    write_file(tmp_path / "in.safetensors", make_tensors())
    flow = Pipeline().read(tmp_path / "in.safetensors").quantize("mxfp8").write(tmp_path / "out", compute=False)
    found = flow.simulate("gpus=8,read=6GB/s")
    assert [each.workers for each in found.outcomes] == [8]
    assert found.tasks == 1
    command = ("-m", "quantloom.flow.cli", "plan", str(tmp_path / "in.safetensors"), "--format", "mxfp8", "--simulate")
    text = child(*command, "gpus=8,read=6GB/s").out
    assert "simulated on h100, storage reads 6.00 GB/s" in text
    assert "bound by" in text
    json_text = child(*command, "", "--json").out
    outcomes = json.loads(json_text)["simulation"]["outcomes"]
    assert [each["workers"] for each in outcomes] == [1, 8, 128]
    assert not (tmp_path / "out").exists()
