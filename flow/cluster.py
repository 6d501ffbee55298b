"""Runs the graph on a Dask cluster: one of our own on this machine, or the user's by address or client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from ..formats.errors import SinkError, UsageError, WorkerError
from ..stages.cancelling import cancel
from .budget import Budget
from .graph import Failure, Graph, Key, Results

if TYPE_CHECKING:
    from distributed import Client

_log = logging.getLogger(__name__)

CONNECT_SECONDS = 30
"""How long a scheduler may take to answer, and its first worker to come."""

_LOCAL = "127.0.0.1:0"
"""Any free port, for this machine only: Dask's own choice is a fixed one that the whole network sees."""


def run_distributed(where: Client | str, graph: Graph, keys: list[Key], budget: Budget) -> Results:
    """Receipts as tasks finish. Workers read the source and write the output themselves: they need both paths."""
    distributed = _package()
    with contextlib.ExitStack() as stack:
        client = _client(distributed, where, budget, stack)
        _wait_for_workers(client)
        futures = client.get(graph, keys, sync=False)
        try:
            key_of = {future.key: key for future, key in zip(futures, keys, strict=True)}
            waiting = distributed.as_completed(futures, loop=client.loop, with_results=True, raise_errors=False)
            for future, found in waiting:
                if future.status == "error":
                    found = Failure(_explained(distributed, future.exception()))
                elif isinstance(found, BaseException):
                    raise found
                yield key_of[future.key], found
        except BaseException as error:
            if isinstance(error, _cancellations(distributed)):  # nobody is there who could be asked to stop
                why = next(iter(str(error).splitlines()), type(error).__name__)
                raise SinkError(f"the Dask scheduler went away: {why}") from error
            with contextlib.suppress(Exception):
                client.run(cancel, budget.environment.run_id)
                client.cancel(futures, force=True)
            raise


def _explained(distributed: Any, error: Exception) -> Exception:
    """What Dask itself says of a task, in words that help."""
    if isinstance(error, distributed.KilledWorker):
        hint = "probably for want of memory: lower --memory or --workers"
        return WorkerError(f"workers died on their task, {hint} ({error})")
    return error


def _cancellations(distributed: Any) -> tuple[type[BaseException], ...]:
    """What waiting for results raises when their scheduler is gone."""
    gone = (distributed.CancelledError, asyncio.CancelledError, concurrent.futures.CancelledError)
    return (*gone, distributed.comm.CommClosedError)


def _wait_for_workers(client: Any) -> None:
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        raise SinkError(f"the Dask scheduler has no workers: none came in {CONNECT_SECONDS} seconds") from error


def _package() -> Any:
    """The package ``distributed``, which has no types; UsageError when it is not there."""
    try:
        import distributed
    except ImportError as error:
        raise UsageError("a distributed run needs the package distributed: pip install 'quantloom[cluster]'") from error
    return distributed


def _client(distributed: Any, where: Client | str, budget: Budget, stack: contextlib.ExitStack) -> Any:
    """The user's client, one for an address, or one for a cluster of processes that lives as long as the run."""
    if not isinstance(where, str):
        return where
    try:
        if where != "distributed":
            return stack.enter_context(distributed.Client(where, timeout=CONNECT_SECONDS, set_as_default=False))
        # Tasks keep to the budget themselves; Dask's own memory limit cannot see torch's memory and would interfere.
        quiet = logging.CRITICAL if not _log.isEnabledFor(logging.DEBUG) else None
        options = {"n_workers": budget.workers, "threads_per_worker": 1, "memory_limit": None, "silence_logs": quiet}
        web = {"dashboard_address": _LOCAL, "worker_dashboard_address": _LOCAL}
        cluster = stack.enter_context(distributed.LocalCluster(**options, **web))
        return stack.enter_context(distributed.Client(cluster, set_as_default=False))
    except OSError as error:
        raise SinkError(f"{where}: cannot reach the Dask scheduler: {error}") from error
    except (ValueError, TypeError, AssertionError) as error:  # what Dask makes of an address that is none
        why = str(error) or type(error).__name__
        raise UsageError(f"{where}: no address of a Dask scheduler, such as tcp://host:8786: {why}") from error
