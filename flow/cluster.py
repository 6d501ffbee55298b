"""Runs the graph on a Dask cluster: one of our own on this machine, or the user's by address or client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..formats.errors import SinkError, UsageError
from ..stages.work import Receipt, cancel
from .budget import Budget
from .graph import Graph, Key

if TYPE_CHECKING:
    from distributed import Client


def require_distributed() -> None:
    """UsageError when the package ``distributed`` is not there."""
    import importlib.util

    if importlib.util.find_spec("distributed") is None:
        raise UsageError("a distributed run needs the package distributed: pip install 'quantloom[cluster]'")


def run_distributed(where: Client | str, graph: Graph, keys: list[Key], budget: Budget) -> Iterator[list[Receipt]]:
    """Receipts as tasks finish. Workers read the source and write the output themselves: they need both paths."""
    require_distributed()
    from distributed import as_completed

    with contextlib.ExitStack() as stack:
        client = _client(where, budget, stack)
        futures = client.get(graph, keys, sync=False)
        try:
            for _future, receipts in as_completed(futures, loop=client.loop, with_results=True):
                yield receipts
        except BaseException:
            with contextlib.suppress(Exception):
                client.cancel(futures, force=True)
                client.run(cancel, budget.environment.run_id)
            raise


def _client(where: Client | str, budget: Budget, stack: contextlib.ExitStack) -> Client:
    """The user's client, one for an address, or one for a cluster of processes that lives as long as the run."""
    from distributed import Client, LocalCluster

    if not isinstance(where, str):
        return where
    try:
        if where != "distributed":
            client: Client = stack.enter_context(Client(where, timeout=30, set_as_default=False))
            return client
        # Tasks keep to the budget themselves; Dask's own memory limit cannot see torch's memory and would only interfere.
        cluster = stack.enter_context(
            LocalCluster(n_workers=budget.workers, threads_per_worker=1, memory_limit=None, dashboard_address=None)
        )
        own: Client = stack.enter_context(Client(cluster, set_as_default=False))
        return own
    except OSError as error:
        raise SinkError(f"{where}: cannot reach the Dask scheduler: {error}") from error
