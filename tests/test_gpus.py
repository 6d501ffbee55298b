"""Several GPUs: a worker process for each, pinned before anything is loaded. All but the CUDA calls runs anywhere."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_file

from quantloom import Pipeline
from quantloom.flow import chains, graph, local_cluster, recovery, session
from quantloom.flow.budget import CUDA_TASKS, Budget, make_budget
from quantloom.flow.devices import check_devices, gpu_workers, visible_devices
from quantloom.flow.execute import run_plan
from quantloom.flow.local_cluster import local_client, tasks_that_fit
from quantloom.flow.recipe import Run
from quantloom.formats import scratch
from quantloom.formats.errors import PlanError, SinkError, UsageError
from quantloom.stages.work import Environment

MB = 1 << 20


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs, of which this process must not touch one."""

    def touched(*_: Any, **__: Any) -> None:
        raise AssertionError("CUDA was initialised in the parent")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("init", "_lazy_init", "mem_get_info", "set_device", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, touched)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# -- which GPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "scheduler", "used"), [
    ("cpu", "threads", ()), ("cuda", "threads", (0, 1, 2, 3)), ("cuda:1", "threads", ()), ("cuda", "sync", ()),
    ("cuda:2,cuda:0", "threads", (2, 0)), ("cuda:1", "distributed", (1,)), ("cuda", "dask-cuda", (0, 1, 2, 3)),
    ("cuda", "tcp://host:8786", ()), ("cpu", "distributed", ()),
])  # fmt: skip
def test_every_visible_gpu_or_those_that_are_named(device: str, scheduler: str, used: tuple[int, ...],
                                                   four: None) -> None:  # fmt: skip
    assert gpu_workers(Run(device=device, scheduler=scheduler)) == used


def test_one_gpu_is_served_by_threads_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu_workers(Run(device="cuda")) == ()
    assert gpu_workers(Run(device="cuda", scheduler="distributed")) == (0,)


@pytest.mark.parametrize("device", ["cuda:", "cuda,cuda", "cuda:0,cpu", "cuda:0,", "gpu", "cuda:0, cuda:1"])
def test_devices_that_are_none(device: str) -> None:
    with pytest.raises(UsageError, match=r"unknown device .*; known: cpu, cuda, cuda:0, cuda:0,cuda:1"):
        Run(device=device)


def test_a_device_that_is_named_twice() -> None:
    with pytest.raises(UsageError, match="'cuda:1,cuda:1' names cuda:1 twice"):
        Run(device="cuda:1,cuda:1")


@pytest.mark.parametrize(("run", "words"), [
    (Run(device="cuda:0,cuda:7"), "device 'cuda:7' is not there: torch .* finds 4 CUDA devices"),
    (Run(device="cuda:0,cuda:1", scheduler="sync"), "the scheduler sync uses one GPU"),
    (Run(device="cuda:0,cuda:1", scheduler="tcp://host:8786"), "the GPU that they were started with"),
    (Run(scheduler="dask-cuda"), "add --device cuda"),
])  # fmt: skip
def test_devices_that_cannot_be_used(run: Run, words: str, four: None) -> None:
    with pytest.raises(UsageError, match=words):
        check_devices(run)


@pytest.mark.parametrize(("outer", "names"), [
    (None, ["0", "2"]), ("3,5,7", ["3", "7"]), ("GPU-aa,MIG-bb, GPU-cc", ["GPU-aa", "GPU-cc"]),
])  # fmt: skip
def test_an_outer_choice_of_devices_is_kept(outer: str | None, names: list[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if outer is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outer)
    assert visible_devices((0, 2)) == names


def test_a_device_outside_of_the_outer_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UsageError, match="cuda:1 is not there: CUDA_VISIBLE_DEVICES is '3'"):
        visible_devices((1,))


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    tensors = {f"blocks.{number}.weight": torch.randn(256, 128) for number in range(9)}
    source = write_file(tmp_path / "in" / "s.safetensors", tensors)
    return Pipeline().read(source).quantize("nvfp4").write(tmp_path / "o.safetensors", compute=False).plan


def test_every_gpu_has_its_share_of_the_budget(plan: Any, four: None) -> None:
    roomy = make_budget(plan.layers, Run(device="cuda", memory=10**12), "")
    assert roomy.gpus == (0, 1, 2, 3)
    assert (roomy.workers, roomy.tasks_per_gpu) == (4 * CUDA_TASKS, CUDA_TASKS)
    assert roomy.environment.device == "cuda", "which each worker sees as its only one"
    for tasks in (1, 3):
        room = roomy.base + 4 * int(roomy.task_bytes * (tasks + 0.5))
        made = make_budget(plan.layers, Run(device="cuda", memory=room), "")
        assert made.tasks_per_gpu <= tasks + 1  # this process may have grown or shrunk a little meanwhile
        assert made.peak_bytes <= made.limit == room
    assert make_budget(plan.layers, Run(device="cuda", memory=10**12, workers=2), "").workers == 8
    with pytest.raises(PlanError, match=r"the processes of 4 GPUs themselves hold.*name fewer GPUs: --device cuda:0"):
        make_budget(plan.layers, Run(device="cuda", memory=2000 * MB), "")


def test_device_memory_decides_how_many_tasks_a_gpu_has() -> None:
    assert tasks_that_fit({"a": (1, 1000), "b": (1, 700)}, 300) == 2
    with pytest.raises(PlanError, match="GPU of worker b has 200 B free"):
        tasks_that_fit({"a": (1, 1000), "b": (1, 200)}, 300)
    with pytest.raises(PlanError, match="worker a sees 4 GPUs, not the one"):
        tasks_that_fit({"a": (4, 1000)}, 300)


# -- processes ---------------------------------------------------------------------------------------------------------

PRELOAD = """
import torch
torch.cuda.device_count = lambda: 1
torch.cuda.mem_get_info = lambda *_: ({free}, {free})
"""


def where_am_i() -> tuple[str, int, int]:
    return os.environ["CUDA_VISIBLE_DEVICES"], os.getpid(), torch.get_num_threads()


def test_a_process_for_each_gpu(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, four: None) -> None:
    """Workers see their own GPU alone, run as many tasks as its memory allows, and write the bytes of one process."""
    dask, _ = pytest.importorskip("dask"), pytest.importorskip("distributed")
    run_plan(plan)
    expected = (tmp_path / "o.safetensors").read_bytes()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,5,7")
    seen: list[Any] = []

    def spied(*arguments: Any) -> Any:
        client = local_client(*arguments)
        seen.append((client.run(where_am_i), client.nthreads()))
        return client

    def on_cpu(*arguments: Any) -> Budget:
        made = make_budget(*arguments)
        assert made.gpus == (0, 2)
        return replace(made, environment=Environment(arguments[2]), task_bytes=30)

    monkeypatch.setattr("quantloom.flow.cluster.local_client", spied)
    monkeypatch.setattr("quantloom.flow.execute.make_budget", on_cpu)
    again = Pipeline(device="cuda:0,cuda:2", memory=10**12).read(plan.recipe.source[0]).quantize("nvfp4")
    with dask.config.set({"distributed.worker.preload": [PRELOAD.format(free=70)]}):
        report = again.write(tmp_path / "o.safetensors", overwrite=True)
    assert (tmp_path / "o.safetensors").read_bytes() == expected
    assert report.distributed
    [(places, threads)] = seen
    assert sorted(place[0] for place in places.values()) == ["7", "GPU-aa"]
    assert os.getpid() not in {place[1] for place in places.values()}
    assert {place[2] for place in places.values()} == {1}
    assert set(threads.values()) == {2}, "70 bytes are room for two tasks of 30"


class FakeCluster:
    """Remembers how it was made; a cluster in this process does the work."""

    made: dict[str, Any] = {}  # noqa: RUF012

    def __new__(cls, **options: Any) -> Any:
        import distributed

        cls.made = options
        quiet = {"dashboard_address": "127.0.0.1:0", "memory_limit": None}
        return distributed.LocalCluster(n_workers=options["n_workers"], threads_per_worker=1, processes=False, **quiet)


@pytest.mark.parametrize("scheduler", ["distributed", "dask-cuda"])
def test_dask_cuda_starts_the_workers_where_it_is_installed(scheduler: str, monkeypatch: pytest.MonkeyPatch,
                                                            four: None) -> None:  # fmt: skip
    distributed = pytest.importorskip("distributed")
    module = types.ModuleType("dask_cuda")
    module.LocalCUDACluster = FakeCluster  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "dask_cuda", module)
    monkeypatch.setattr(local_cluster, "device_room", lambda: (1, 10**9))
    monkeypatch.setattr(local_cluster, "tasks_that_fit", lambda rooms, _: 2)
    budget = Budget(10**12, 0, 10, 4, Environment(), gpus=(1, 3))
    with contextlib.ExitStack() as stack:
        client = local_client(distributed, scheduler, budget, stack)
        assert len(client.nthreads()) == 2
    given = FakeCluster.made
    assert given["CUDA_VISIBLE_DEVICES"] == ["1", "3"]
    assert (given["n_workers"], given["threads_per_worker"]) == (2, 2)
    assert given["memory_limit"] is given["device_memory_limit"] is None
    assert given["dashboard_address"] == given["worker_dashboard_address"] == "127.0.0.1:0"


def test_dask_cuda_that_is_asked_for_but_not_there(four: None) -> None:
    distributed = pytest.importorskip("distributed")
    budget = Budget(10**12, 0, 10, 4, Environment(), gpus=(1, 3))
    with contextlib.ExitStack() as stack, pytest.raises(UsageError, match="pip install dask-cuda"):
        local_client(distributed, "dask-cuda", budget, stack)


# -- page-locked buffers -----------------------------------------------------------------------------------------------


class Fakes:
    """Stands for page-locked memory and events: a copy is under way until its event was waited for."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8)
        self.busy = False
        self.copied = self

    def record(self) -> None:
        self.busy = True

    def synchronize(self) -> None:
        self.busy = False

    def bytes(self, count: int) -> torch.Tensor:
        self.synchronize()
        return self.buffer[:count]


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Fakes]]:
    monkeypatch.setattr(scratch, "_Pinned", Fakes)
    scratch._local.__dict__.pop("pinned", None)
    scratch._local.__dict__.pop("turns", None)
    yield scratch._local.__dict__.setdefault("pinned", {})
    scratch._local.__dict__.pop("pinned", None)
    scratch._local.__dict__.pop("turns", None)


def test_no_buffer_is_filled_while_it_is_copied(pinned: dict[Any, Fakes]) -> None:
    """The device is ``meta``: what matters is which host buffers are filled, and when."""
    filled: list[int] = []
    for size in (100, 80, 100, 300, 300, 10):

        def fill(target: memoryview, size: int = size) -> None:
            assert len(target) == size
            address = torch.frombuffer(target, dtype=torch.uint8).data_ptr()
            owner = next(each for each in pinned.values() if each.buffer.data_ptr() == address)
            assert not owner.busy, "a copy out of it is still under way"
            filled.append(address)

        moved = scratch.upload("rows", size, torch.device("meta"), fill)
        assert (moved.device.type, tuple(moved.shape)) == ("meta", (size,))
    assert all(one != two for one, two in itertools.pairwise(filled)), "turns, so that both overlap"
    assert len(pinned) == 2


def test_on_a_cpu_nothing_is_page_locked(pinned: dict[Any, Fakes]) -> None:
    def fill(target: memoryview) -> None:
        target[:] = bytes(range(8))

    made = scratch.upload("rows", 8, torch.device("cpu"), fill)
    assert made.tolist() == list(range(8))
    assert scratch.download("out", made) is made
    assert not pinned


# -- with GPUs ---------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [{"format": "nvfp4", "rounding": "learned"}, {"format": "fp8", "rounding": "mse"}])
def test_several_gpus_write_the_bytes_of_one(options: dict[str, Any], tmp_path: Path) -> None:
    tensors = {f"blocks.{number}.weight": torch.randn(1024, 768).bfloat16() for number in range(24)}
    source = write_file(tmp_path / "in" / "s.safetensors", tensors)
    for device in ("cuda:0", "cuda:0,cuda:1", "cuda"):
        Pipeline(device=device).read(source).stage("quantize", **options).write(tmp_path / f"{device}.safetensors")
    made = [(tmp_path / f"{device}.safetensors").read_bytes() for device in ("cuda:0", "cuda:0,cuda:1", "cuda")]
    assert made[0] == made[1] == made[2]


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_this_process_makes_no_context(tmp_path: Path) -> None:
    from checkpoints import child

    source = write_file(tmp_path / "in" / "s.safetensors")
    script = tmp_path / "script.py"
    script.write_text(f"""
import torch
from quantloom import Pipeline
if __name__ == "__main__":
    Pipeline(device="cuda").read({str(source)!r}).quantize("fp8").write({str(tmp_path / "o.safetensors")!r})
    assert not torch.cuda.is_initialized()
""")
    assert child(str(script)).status == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_page_locked_copies_bring_the_same_bytes() -> None:
    device = torch.device("cuda")
    for number in range(20):
        content = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)

        def fill(target: memoryview, content: torch.Tensor = content) -> None:
            torch.frombuffer(target, dtype=torch.uint8).copy_(content)

        moved = scratch.upload("rows", content.numel(), device, fill)
        assert torch.equal(scratch.download(f"out {number % 2}", moved), content)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stays", [False, True])
def test_a_gpu_whose_memory_another_program_takes(stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the run works; it is given back before layers are tried again, or not before the run has stopped."""
    tensors = {f"b.{number}.weight": torch.randn(4096, 2048 + 64 * number).bfloat16() for number in range(8)}
    source = write_file(tmp_path / "in" / "s.safetensors", tensors)

    def convert(name: str, **how: Any) -> Any:
        flow = Pipeline(device="cuda:0", scheduler="sync", **how).read(source)
        return flow.quantize("nvfp4", rounding="learned").write(tmp_path / name)

    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    monkeypatch.setattr(session, "INTERVAL", 0.0)
    convert("wanted.safetensors")
    taken: list[torch.Tensor] = []
    began: list[str] = []
    start = chains.start

    def take(plan: Any, *rest: Any) -> Any:
        began.append(plan.layer.name)
        if len(began) == 5:
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            taken.append(torch.empty(free - (32 << 20), dtype=torch.uint8, device="cuda"))
        return start(plan, *rest)

    def pause(_: float) -> None:
        if not stays:
            taken.clear()
            torch.cuda.empty_cache()

    monkeypatch.setattr(chains, "start", take)
    monkeypatch.setattr(recovery, "time", types.SimpleNamespace(sleep=pause))
    if stays:
        with pytest.raises(SinkError, match=r"out of memory.*lower --memory or --workers") as caught:
            convert("out.safetensors")
        assert "run the same command again to continue" in caught.value.__notes__[-1]
        assert not (tmp_path / "out.safetensors").exists()
        taken.clear()
        torch.cuda.empty_cache()
        assert convert("out.safetensors", resume="require").nbytes_resumed
    else:
        convert("out.safetensors")
        assert len(began) > 8, "nothing was tried again"
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
