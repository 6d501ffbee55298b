"""Runs a plan: the same fused graph on threads, in this thread, or on a Dask cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ..formats.errors import SinkError, listed, memory_problem
from ..stages.cancelling import cancel, forget
from ..stages.work import LayerPlan, Receipt
from .budget import Budget, make_budget
from .devices import check_devices
from .graph import Graph, Key, LayersOf, Results, submission
from .output_checks import check_output
from .placement import Placement
from .plan import Plan
from .recipe import Run
from .recovery import run_layers
from .report import Report, make_report
from .resume import left_over
from .salvage import lay_out_again
from .session import Session
from .sink import open_sink

if TYPE_CHECKING:
    from distributed import Client

_log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.5
"""Ctrl-C waits this long at most: Windows does not interrupt a lock that waits for ever."""


class Progress(Protocol):
    """Someone who watches a run."""

    def start(self, plan: Plan, budget: Budget) -> None:
        """Called once, before work."""

    def resume(self, receipts: Sequence[Receipt]) -> None:
        """Called after that with what an earlier run had finished, if it had."""

    def advance(self, receipts: Sequence[Receipt]) -> None:
        """Called with the receipts of each finished task."""

    def stop(self) -> None:
        """Called once, after work or failure."""


class Silent:
    """Nobody watches."""

    def start(self, plan: Plan, budget: Budget) -> None: ...

    def resume(self, receipts: Sequence[Receipt]) -> None: ...

    def advance(self, receipts: Sequence[Receipt]) -> None: ...

    def stop(self) -> None: ...


def run_plan(plan: Plan, client: Client | str | None = None, progress: Progress | None = None) -> Report:
    """Converts, or continues what an earlier run of the plan left.

    Raises QuantloomError (or KeyboardInterrupt) with nothing under a final name; what is finished is kept for the next
    run, which a note of the exception says.
    """
    watcher = progress or Silent()
    began = time.perf_counter()
    check_output(plan)
    job = Job(plan.layers, plan.recipe.run, client, plan.digest[:16])
    try:
        with _known_errors(), open_sink(plan) as session, _torch_threads():
            watcher.start(replace(plan, notes=(*plan.notes, *session.notes)), job.budget)
            if session.resumed:
                watcher.resume(session.resumed)
            if failed := _work(session, job, watcher):
                _work_again(session, job, failed)
    finally:
        watcher.stop()
        forget(job.run_id)
    return make_report(session, time.perf_counter() - began, distributed=not job.is_local)


def _work(session: Session, job: Job, watcher: Progress) -> dict[str, BaseException]:
    """Every layer that is left; errors of those that failed for good."""
    if session.committing:  # all data was there; layers that were kept because they failed are not in the journal
        return {}
    keep = session.plan.recipe.run.on_error == "keep"
    with closing(job.run(left_over(session.plan, session.receipts), keep)) as running:
        while True:
            try:
                done = next(running)
            except StopIteration as ended:
                return dict(ended.value or {})
            watcher.advance(session.add(done))


def _work_again(session: Session, job: Job, failed: Mapping[str, BaseException]) -> None:
    """Lays the output out with the failed layers as they are, and fills it."""
    _log.info("kept as they are, because they failed: %s", listed(sorted(failed)))
    reasons = {name: str(error) or type(error).__name__ for name, error in failed.items()}
    with closing(job.run(lay_out_again(session, reasons), keep=False)) as running:
        for receipts in running:
            session.add_new(receipts)


def collect(layers: Sequence[LayerPlan], run: Run) -> list[Receipt]:
    """Receipts of chains that write nothing, on the scheduler of the run. Raises what ``run_plan`` raises."""
    job = Job(layers, run, None, "look")
    try:
        with _known_errors(), _torch_threads(), closing(job.run(layers, keep=False)) as running:
            return [receipt for done in running for receipt in done]
    finally:
        forget(job.run_id)


class Job:
    """How layers are run: on which scheduler, and within which budget."""

    def __init__(self, layers: Sequence[LayerPlan], run: Run, client: Client | str | None, name: str) -> None:
        run = _run_on(client, run)
        check_devices(run)
        self.run_id = f"{name}-{time.monotonic_ns()}"
        budget = make_budget(layers, run, self.run_id)
        self.scheduler = _scheduler(client, run, budget)
        self.is_local = self.scheduler in ("threads", "sync")
        # Workers elsewhere sync what they wrote themselves: nobody else can.
        elsewhere = not self.is_local and self.scheduler not in ("distributed", "dask-cuda")
        self.budget = replace(budget, environment=replace(budget.environment, sync=elsewhere))
        self.writes = run.writes

    def run(self, layers: Sequence[LayerPlan], keep: bool) -> Generator[list[Receipt], None, dict[str, BaseException]]:
        """See ``run_layers``."""
        if not layers:
            return {}
        environment, workers = self.budget.environment, self.budget.workers
        _log.info("%d layers, %d tasks at a time, chunks of %d bytes", len(layers), workers, environment.chunk_bytes)
        place = Placement(layers, self.writes)
        build = partial(submission, environment=environment)
        return (yield from run_layers(place.batches(), build, partial(self._schedule, place), keep))

    def _schedule(self, place: Placement, graph: Graph, layers_of: LayersOf) -> Results:
        """Results of the keys as they come."""
        if self.is_local:
            return _local(graph, layers_of, self.budget, 0 if self.scheduler == "sync" else self.budget.workers)
        from .cluster import run_distributed

        return run_distributed(self.scheduler, graph, layers_of, self.budget, place)


@contextmanager
def _known_errors() -> Iterator[None]:
    """Gives errors of the system and of torch their way out."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        if (known := _known(error)) is None:
            raise
        for note in getattr(error, "__notes__", ()):
            known.add_note(note)
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


def _local(graph: Graph, layers_of: LayersOf, budget: Budget, workers: int) -> Results:
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

    def finished(key: Key, value: Any, _dsk: Any, _state: Any, _worker: Any) -> None:
        if key in layers_of:
            results.put((key, value))

    def drive() -> None:
        callbacks = [(None, None, None, finished, None)]
        try:
            if workers:
                with ThreadPoolExecutor(workers, thread_name_prefix="quantloom") as pool:
                    try:
                        get(graph, list(layers_of), pool=pool, num_workers=workers, callbacks=callbacks)
                    except BaseException:
                        cancel(budget.environment.run_id)
                        pool.shutdown(cancel_futures=True)
                        raise
            else:
                get_sync(graph, list(layers_of), callbacks=callbacks)
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
    except BaseException:
        cancel(budget.environment.run_id)
        raise
    finally:
        thread.join()


def _known(error: Exception) -> SinkError | None:
    """An error of the system or of torch with a way out, where there is one."""
    if problem := memory_problem(error):
        return SinkError(f"{problem}; lower --memory or --workers")
    if isinstance(error, OSError):
        return SinkError(f"{error.filename or 'file system'}: {error.strerror or error}")
    return None
