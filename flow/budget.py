"""The memory budget: what may be used, what one task needs, and how many tasks that allows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from ..formats.errors import PlanError
from ..stages.matrix import sees_whole
from ..stages.work import Environment, LayerPlan
from .devices import gpu_workers
from .recipe import Run
from .sizes import show_size

CPU_CHUNK_BYTES = 1 << 20
"""Source bytes per chunk on a CPU: small enough for the float32 rows and their temporaries to stay in cache."""
CROWD = 4
"""Chunks grow with the number of threads, up to this factor: each operation hands Python's lock around, and many
threads spend more time waiting for it than working (16 threads, 0.8 GB, NVFP4 ``mse``: 10.1 s on 1 MiB, 3.5 on 4)."""
CUDA_CHUNK_BYTES = 64 << 20
CUDA_TASKS = 6
"""Tasks at a time on one GPU: while some read and write, one computes ..."""
CUDA_SOLVING_TASKS = 4
"""... and where whole matrices are solved: reading and writing matter less, and threads of one process stand in each
other's way when they start kernels (`benchmarks/scaling.py --gb 12 --gpus 1 --roundings learned`, one H200, from the
first receipt to the last: 7.6 s, and 8.4 with --tasks 6)."""
_CUDA_PROCESS_BYTES = 768 << 20
"""Host memory that CUDA's context and libraries take in a worker process, beside interpreter and torch."""
_SMALLEST_CHUNK = 64 << 10
_STARTUP_BYTES = 24 << 20
"""What threads, torch's first operations and the file header take once work begins."""
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Where a container's own limit stands: (folder, file of the limit, file of the use), version 2 and 1."""


@dataclass(frozen=True)
class Budget:
    """How a plan will use memory."""

    limit: int
    """Bytes that the process may use."""
    base: int
    """Bytes that the process holds before any work (interpreter, torch); with it, those of the GPUs' processes."""
    task_bytes: int
    """Bytes of the hungriest task."""
    workers: int
    """Tasks at a time."""
    environment: Environment
    gpus: tuple[int, ...] = ()
    """Indices of the GPUs of this machine that get a worker process each; empty: work is done otherwise."""

    @property
    def tasks_per_gpu(self) -> int:
        """Tasks at a time of one GPU's worker process."""
        return max(1, self.workers // max(1, len(self.gpus)))

    @property
    def peak_bytes(self) -> int:
        """Most that the process will hold."""
        return self.base + self.workers * self.task_bytes


def cores() -> int:
    """Processors that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that this process can still have: of the machine or of its container, whichever is less.

    A container's use counts cached file pages too, which the kernel gives back on demand: a run that reads gigabytes
    would otherwise see its own reading as memory that is gone.
    """
    free = psutil.virtual_memory().available
    for folder, limit_name, used_name in _CGROUPS:
        try:
            limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
        except (OSError, ValueError):
            continue
        free = min(free, max(0, limit - max(0, used - _cached_bytes(folder))))
    return free


def _cached_bytes(group: Path) -> int:
    """File pages that a container's use counts."""
    try:
        words = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return sum(int(count) for name, count in words if name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return 0


def device_memory(run: Run) -> int | None:
    """Bytes that this process can still have on the run's GPU; None without one, or if other processes do the work.

    Those are asked themselves: whoever asks gets a context on the GPU (``flow.gpu_cluster``).
    """
    if run.device == "cpu" or run.scheduler not in ("threads", "sync") or gpu_workers(run):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info(run.device)[0])


def make_budget(layers: Sequence[LayerPlan], run: Run, run_id: str) -> Budget:
    """Chunk size and number of tasks at a time for these layers.

    Chunks shrink before a layer is refused. Raises PlanError, naming the layer, its need and the budget, when even the
    smallest chunk of a layer does not fit beside the process itself.
    """
    base = psutil.Process().memory_info().rss + _STARTUP_BYTES
    limit = run.memory if run.memory is not None else base + free_memory() // 2
    on_cuda, gpus = run.device.startswith("cuda"), gpu_workers(run)
    kinds = _one_of_each(layers)
    most = run.workers or (cuda_tasks(kinds) if on_cuda else cores())
    chunk = CPU_CHUNK_BYTES * (min(most, CROWD) if run.scheduler == "threads" else 1)
    environment = Environment(run_id, "cuda" if gpus else run.device, CUDA_CHUNK_BYTES if on_cuda else chunk)
    # A worker process of a local cluster holds what this one holds; that of a GPU has several tasks at a time.
    own = base if run.scheduler == "distributed" and not gpus else 0
    base += (base + _CUDA_PROCESS_BYTES) * len(gpus)
    each = max(1, len(gpus))
    while True:
        hungriest = max(kinds, key=lambda layer: layer.peak_bytes(environment), default=None)
        need = own + (hungriest.peak_bytes(environment) if hungriest else 0)
        if base + need * each <= limit or environment.chunk_bytes <= _SMALLEST_CHUNK:
            break
        environment = replace(environment, chunk_bytes=environment.chunk_bytes // 2)
    if hungriest is not None and base + need * each > limit:
        held = f"the processes of {each} GPUs themselves hold" if gpus else "the process itself holds"
        raise PlanError(
            f"{hungriest.layer.name} needs {show_size(need)} at a time{' and GPU' if gpus else ''}, beside "
            f"{show_size(base)} that {held}: {show_size(base + need * each)} do not fit in the memory budget of "
            f"{show_size(limit)}; raise --memory{', or name fewer GPUs: --device cuda:0' if gpus else ''}"
        )
    workers = max(1, min(most, (limit - base) // max(1, need * each))) * each
    free = device_memory(run)
    if free is not None and hungriest is not None:
        if need > free:
            raise PlanError(
                f"{hungriest.layer.name} needs {show_size(need)}, but {run.device} has {show_size(free)} free; use "
                "another device, or --rounding mse, which works on rows"
            )
        workers = min(workers, free // max(1, need))
    return Budget(limit, base, need, workers, environment, gpus)


def cuda_tasks(layers: Iterable[LayerPlan]) -> int:
    """Tasks at a time of one GPU, where memory allows them."""
    return CUDA_SOLVING_TASKS if any(map(sees_whole, layers)) else CUDA_TASKS


def _one_of_each(layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    """A layer of each kind that needs its own memory: 100,000 layers have dozens of shapes, and share their chains."""
    kinds: dict[tuple[Any, ...], LayerPlan] = {}
    for plan in layers:
        kinds.setdefault(_kind(plan), plan)
    return list(kinds.values())


def _kind(plan: LayerPlan) -> tuple[Any, ...]:
    """What steps ask of a layer when they say how much memory they take."""
    weight, tensors = plan.layer.weight, plan.layer.tensors
    stored = tuple((ref.dtype, ref.shape, ref.path) for ref in tensors)
    return id(plan.steps), weight.dtype, weight.shape, stored, plan.together, id(plan.adapter)


def _status() -> str:
    """What Linux says of this process: ``resource`` would begin with the memory of the program that started it."""
    try:
        return Path("/proc/self/status").read_text()
    except OSError:
        return ""


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import sys

    if found := re.search(r"VmHWM:\s+(\d+) kB", _status()):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
