"""Clusters that live as long as a run: worker processes on this machine, one for each GPU where there are several."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..formats.errors import PlanError, SinkError, UsageError
from ..stages.cancelling import STOPPING
from .budget import Budget
from .devices import visible_devices
from .sizes import show_size

_log = logging.getLogger(__name__)

_LOCAL = "127.0.0.1"
_ANY_PORT = "127.0.0.1:0"
"""Any free port, for this machine only: Dask's own choice is a fixed one that the whole network sees."""
_UNWATCHED = {"distributed.worker.profile.enabled": False, "distributed.admin.system-monitor.interval": "10s"}
"""Nobody looks at samples of workers that end with the run, and taking them holds up the threads that work."""


def local_client(distributed: Any, scheduler: str, budget: Budget, stack: contextlib.ExitStack) -> Any:
    """A client of a cluster of worker processes that ends with ``stack``.

    Workers die with this process however it ends: each watches a pipe that this process holds open.
    """
    if not budget.gpus:
        # Tasks keep to the budget themselves; Dask's own memory limit cannot see torch's memory and would interfere.
        options = {"n_workers": budget.workers, "threads_per_worker": 1, "memory_limit": None, **_quiet()}
        return _started(distributed, partial(distributed.LocalCluster, **options), stack)
    threads = budget.tasks_per_gpu
    while True:
        with contextlib.ExitStack() as trial:
            client = _started(distributed, partial(_gpu_cluster, distributed, scheduler, budget, threads), trial)
            fitting = min(threads, tasks_that_fit(client.run(device_room), budget.task_bytes))
            if fitting == threads:
                stack.push(trial.pop_all())
                return client
        _log.info("device memory has room for %d tasks at a time on each GPU, not for %d", fitting, threads)
        threads = fitting


def device_room() -> tuple[int, int]:
    """In a worker: how many GPUs it sees, and the free bytes of the first."""
    import torch

    return torch.cuda.device_count(), torch.cuda.mem_get_info()[0]


def tasks_that_fit(rooms: dict[str, tuple[int, int]], task_bytes: int) -> int:
    """Tasks at a time for which every worker's GPU has memory; PlanError where there is none, or not even for one."""
    for worker, (count, free) in rooms.items():
        if count != 1:
            raise PlanError(f"the worker {worker} sees {count} GPUs, not the one it was started for")
        if task_bytes > free:
            raise PlanError(
                f"the hungriest layer needs {show_size(task_bytes)}, but the GPU of worker {worker} has "
                f"{show_size(free)} free; use other devices, or --rounding mse, which works on rows"
            )
    return min((free // max(1, task_bytes) for _, free in rooms.values()), default=1)


def _started(distributed: Any, start: Callable[[], Any], stack: contextlib.ExitStack) -> Any:
    """A client of the cluster that ``start`` makes; SinkError when its processes do not come up."""
    import dask

    with undisturbed(), dask.config.set(_UNWATCHED):
        try:
            cluster = stack.enter_context(start())
            return stack.enter_context(distributed.Client(cluster, set_as_default=False))
        except RuntimeError as error:
            raise SinkError(f"the worker processes of the local cluster did not start: {error}") from error


def _gpu_cluster(distributed: Any, scheduler: str, budget: Budget, threads: int) -> Any:
    """One worker process for each GPU, which is all that it sees; by dask-cuda where that is installed."""
    names = visible_devices(budget.gpus)
    if importlib.util.find_spec("dask_cuda") is not None:
        from dask_cuda import LocalCUDACluster

        # Neither memory of the host nor of the device holds results of tasks that could be spilled.
        limits = {"memory_limit": None, "device_memory_limit": None}
        wanted = {"CUDA_VISIBLE_DEVICES": names, "n_workers": len(names), "threads_per_worker": threads}
        return LocalCUDACluster(**wanted, **limits, **_quiet())
    if scheduler == "dask-cuda":
        raise UsageError("the scheduler dask-cuda needs the package dask-cuda: pip install dask-cuda")
    security = distributed.Security()
    common = {
        "host": _LOCAL, "security": security, "dashboard": True, "dashboard_address": _ANY_PORT,
        "protocol": "tls://" if security.require_encryption else "tcp://",
    }  # fmt: skip
    level = _quiet()["silence_logs"]
    worker = {**common, "nthreads": threads, "memory_limit": None, "silence_logs": level}
    # The child gets its environment before anything of CUDA is loaded; this process needs no context for it.
    workers = {
        f"cuda:{index}": {"cls": distributed.Nanny, "options": {**worker, "env": {"CUDA_VISIBLE_DEVICES": name}}}
        for index, name in zip(budget.gpus, names, strict=True)
    }
    manager = {"cls": distributed.Scheduler, "options": {**common, "port": 0}}
    return distributed.SpecCluster(workers=workers, scheduler=manager, silence_logs=level, security=security)


def _quiet() -> dict[str, Any]:
    """Options that keep Dask's log and pages to this machine and to whoever debugs."""
    level = logging.CRITICAL if not _log.isEnabledFor(logging.DEBUG) else None
    return {"silence_logs": level, "dashboard_address": _ANY_PORT, "worker_dashboard_address": _ANY_PORT}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Puts off signals that stop the program: half a cluster cannot be closed, and Dask would say so at length.

    Threads and processes that are started meanwhile never see Ctrl-C, which a terminal sends to all processes: this one
    stops them.
    """
    came: list[int] = []
    before = {}
    try:
        for number in STOPPING:
            before[number] = signal.signal(number, lambda number, _frame: came.append(number))
    except ValueError:  # only the main thread may say what a signal does
        before = {}
    masked = None
    if hasattr(signal, "pthread_sigmask"):
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # whichever thread starts it lets Ctrl-C through from then on
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if masked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)
