"""Runs a plan: the same fused graph on threads, in this thread, or on a Dask cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from ..formats.errors import SinkError, memory_problem
from ..stages.cancelling import cancel, forget
from ..stages.work import LayerPlan, Receipt
from .budget import Budget, make_budget
from .devices import check_devices
from .graph import Graph, Key, Results, submission
from .placement import Placement
from .plan import Plan
from .recipe import Run
from .report import Report, make_report
from .sink import check_output, open_sink

if TYPE_CHECKING:
    from distributed import Client

_log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.5
"""Ctrl-C waits this long at most: Windows does not interrupt a lock that waits for ever."""


class Progress(Protocol):
    """Someone who watches a run."""

    def start(self, plan: Plan, budget: Budget) -> None:
        """Called once, before work."""

    def advance(self, receipts: Sequence[Receipt]) -> None:
        """Called with the receipts of each finished task."""

    def stop(self) -> None:
        """Called once, after work or failure."""


class Silent:
    """Nobody watches."""

    def start(self, plan: Plan, budget: Budget) -> None: ...

    def advance(self, receipts: Sequence[Receipt]) -> None: ...

    def stop(self) -> None: ...


def run_plan(plan: Plan, client: Client | str | None = None, progress: Progress | None = None) -> Report:
    """Converts. Raises QuantloomError (or KeyboardInterrupt) with the parts removed and nothing under a final name."""
    watcher = progress or Silent()
    began = time.perf_counter()
    run = _run_on(client, plan.recipe.run)
    check_devices(run)
    check_output(plan)
    run_id = f"{plan.digest[:16]}-{time.monotonic_ns()}"
    budget = make_budget(plan.layers, run, run_id)
    scheduler = _scheduler(client, run, budget)
    graph, keys = submission(plan.layers, budget.environment)
    _log.info("%d tasks, %d at a time, chunks of %d bytes", len(graph), budget.workers, budget.environment.chunk_bytes)
    receipts: list[Receipt] = []
    running = closing(_schedule(scheduler, graph, keys, budget, Placement(plan.layers, run.writes)))
    try:
        with _known_errors(), open_sink(plan, receipts), _torch_threads(), running as results:
            watcher.start(plan, budget)
            for done in results:
                receipts += done
                watcher.advance(done)
    finally:
        watcher.stop()
        forget(run_id)
    seconds = time.perf_counter() - began
    return make_report(plan, receipts, seconds, distributed=scheduler not in ("threads", "sync"))


def collect(layers: Sequence[LayerPlan], run: Run) -> list[Receipt]:
    """Receipts of chains that write nothing, on the scheduler of the run. Raises what ``run_plan`` raises."""
    check_devices(run)
    run_id = f"look-{time.monotonic_ns()}"
    budget = make_budget(layers, run, run_id)
    scheduler = _scheduler(None, run, budget)
    running = closing(_schedule(scheduler, *submission(layers, budget.environment), budget, Placement(layers)))
    try:
        with _known_errors(), _torch_threads(), running as results:
            return [receipt for done in results for receipt in done]
    finally:
        forget(run_id)


@contextmanager
def _known_errors() -> Iterator[None]:
    """Gives errors of the system and of torch their way out."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        if (known := _known(error)) is None:
            raise
        raise known from error


@contextmanager
def _torch_threads() -> Iterator[None]:
    """Restores what workers change for the whole process."""
    import torch

    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)


def _run_on(client: Client | str | None, run: Run) -> Run:
    """The run, on the scheduler of a client that was given."""
    if client is None:
        return run
    address: Any = client if isinstance(client, str) else client.scheduler.address  # type: ignore[union-attr]
    return replace(run, scheduler=address)


def _scheduler(client: Client | str | None, run: Run, budget: Budget) -> Client | str:
    """Where the tasks go: several GPUs get a process each, whose threads take the place of this one's."""
    if client is not None and not isinstance(client, str):
        return client
    return "distributed" if budget.gpus and run.scheduler == "threads" else run.scheduler


def _schedule(scheduler: Client | str, graph: Graph, keys: list[Key], budget: Budget, place: Placement) -> Results:
    """Results of the keys as they come."""
    if scheduler == "sync":
        return _local(graph, keys, budget, workers=0)
    if scheduler == "threads":
        return _local(graph, keys, budget, workers=budget.workers)
    from .cluster import run_distributed

    return run_distributed(scheduler, graph, keys, budget, place)


def _local(graph: Graph, keys: list[Key], budget: Budget, workers: int) -> Results:
    """Dask's own threaded or synchronous scheduler; results are handed over as tasks finish.

    The scheduler runs beside the caller's thread, which therefore stays free for Ctrl-C. Leaving early (an error, an
    interrupt) asks running tasks to stop at their next chunk and waits for them, so that no one writes afterwards.
    """
    import queue
    import threading
    from concurrent.futures import ThreadPoolExecutor

    from dask.local import get_sync
    from dask.threaded import get

    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    wanted = set(keys)

    def finished(key: Key, value: Any, _dsk: Any, _state: Any, _worker: Any) -> None:
        if key in wanted:
            results.put(value)

    def drive() -> None:
        callbacks = [(None, None, None, finished, None)]
        try:
            if workers:
                with ThreadPoolExecutor(workers, thread_name_prefix="quantloom") as pool:
                    try:
                        get(graph, keys, pool=pool, num_workers=workers, callbacks=callbacks)
                    except BaseException:
                        cancel(budget.environment.run_id)
                        pool.shutdown(cancel_futures=True)
                        raise
            else:
                get_sync(graph, keys, callbacks=callbacks)
            results.put(None)
        except BaseException as error:  # raised again in the caller's thread
            results.put(error)

    thread = threading.Thread(target=drive, name="quantloom-scheduler", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = results.get(timeout=_WAIT_SECONDS)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        cancel(budget.environment.run_id)
        thread.join()


def _known(error: Exception) -> SinkError | None:
    """An error of the system or of torch with a way out, where there is one."""
    if problem := memory_problem(error):
        return SinkError(f"{problem}; lower --memory or --workers")
    if isinstance(error, OSError):
        return SinkError(f"{error.filename or 'file system'}: {error.strerror or error}")
    return None
