"""The memory budget: what may be used, what one task needs, and how many tasks that allows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from ..formats.errors import PlanError
from ..stages.work import Environment, LayerPlan
from .recipe import Run
from .sizes import show_size

CPU_CHUNK_BYTES = 1 << 20
"""Source bytes per chunk on a CPU: small enough for the float32 rows and their temporaries to stay in cache."""
CUDA_CHUNK_BYTES = 64 << 20
CUDA_TASKS = 6
"""Tasks at a time on one GPU: while some read and write, one computes."""
_SMALLEST_CHUNK = 64 << 10


@dataclass(frozen=True)
class Budget:
    """How a plan will use memory."""

    limit: int
    """Bytes that the process may use."""
    base: int
    """Bytes that the process holds before any work (interpreter, torch)."""
    task_bytes: int
    """Bytes of the hungriest task."""
    workers: int
    """Tasks at a time."""
    environment: Environment

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
    """Bytes that this process can still have: of the machine or of its container, whichever is less."""
    free = psutil.virtual_memory().available
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (int(Path(name).read_text()) for name in (limit_file, used_file))
        except (OSError, ValueError):
            continue
        free = min(free, max(0, limit - used))
    return free


def make_budget(layers: Sequence[LayerPlan], run: Run, run_id: str) -> Budget:
    """Chunk size and number of tasks at a time for these layers.

    Chunks shrink before a layer is refused. Raises PlanError, naming the layer, its need and the budget, when even the
    smallest chunk of a layer does not fit beside the process itself.
    """
    base = psutil.Process().memory_info().rss
    limit = run.memory if run.memory is not None else base + free_memory() // 2
    on_cuda = run.device.startswith("cuda")
    environment = Environment(run_id, run.device, CUDA_CHUNK_BYTES if on_cuda else CPU_CHUNK_BYTES)
    most = run.workers or (CUDA_TASKS if on_cuda else cores())
    while True:
        hungriest = max(layers, key=lambda layer: layer.peak_bytes(environment), default=None)
        need = hungriest.peak_bytes(environment) if hungriest else 0
        if base + need <= limit or environment.chunk_bytes <= _SMALLEST_CHUNK:
            break
        environment = replace(environment, chunk_bytes=environment.chunk_bytes // 2)
    if hungriest is not None and base + need > limit:
        raise PlanError(
            f"{hungriest.layer.name} needs {show_size(need)} at a time, beside {show_size(base)} that the process itself "
            f"holds: {show_size(base + need)} do not fit in the memory budget of {show_size(limit)}; raise --memory"
        )
    workers = max(1, min(most, (limit - base) // max(1, need)))
    threads = 1 if on_cuda else max(1, cores() // workers)
    return Budget(limit, base, need, workers, replace(environment, threads=threads))
