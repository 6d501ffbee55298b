"""Runs the graph on a Dask cluster: one of our own on this machine, or the user's by address or client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..formats.errors import SinkError, UsageError, WorkerError
from ..stages.cancelling import cancel
from .budget import Budget
from .cluster_checks import check_workers
from .graph import Failure, Graph, Key, LayersOf, Results
from .local_cluster import local_client, undisturbed
from .lost_hosts import watched
from .packed_tasks import pack_tasks, unpack
from .placement import Placement

if TYPE_CHECKING:
    from distributed import Client

_log = logging.getLogger(__name__)

CONNECT_SECONDS = 10
"""How long a scheduler may take to answer."""
WORKER_SECONDS = 30
"""How long its first worker may take to come."""


def run_distributed(
    where: Client | str, graph: Graph, layers_of: LayersOf, budget: Budget, place: Placement
) -> Results:
    """Receipts as tasks finish. Workers read the source and write the output themselves: they need both paths."""
    distributed = _package()
    with contextlib.ExitStack() as stack:
        if where in ("distributed", "dask-cuda"):
            client = local_client(distributed, str(where), budget, stack)
        else:
            client = _connected(distributed, where, stack) if isinstance(where, str) else where
            _wait_for_workers(client)
            check_workers(client, budget, place)
        hosts = _hosts(client, layers_of, place)
        _log.info("workers are ready")
        futures = _submitted(client, graph, list(layers_of), hosts)
        try:
            key_of = {future.key: key for future, key in zip(futures, layers_of, strict=True)}
            waiting = distributed.as_completed(futures, loop=client.loop, with_results=True, raise_errors=False)
            with watched(client, _by_host(futures, key_of, hosts)) as lost:
                for future, found in waiting:
                    yield key_of[future.key], _outcome(distributed, future, found, lost)
        except BaseException as error:
            if isinstance(error, _cancellations(distributed)):  # nobody is there who could be asked to stop
                why = next(iter(str(error).splitlines()), type(error).__name__)
                raise SinkError(f"the Dask scheduler went away: {why}") from error
            with contextlib.suppress(Exception):
                client.run(cancel, budget.environment.run_id)
                client.cancel(futures, force=True)
            raise


def _outcome(distributed: Any, future: Any, found: Any, lost: Mapping[Any, str]) -> Any:
    """What a task returned, or why it did not; raises what ended the whole run. ``lost``: machines, by key."""
    if future.key in lost and future.cancelled():
        return Failure(_host_lost(lost[future.key]))
    if future.status == "error":
        return Failure(_explained(distributed, future.exception()))
    if isinstance(found, BaseException):
        raise found
    return unpack(found)


def _explained(distributed: Any, error: Exception) -> Exception:
    """What Dask itself says of a task, in words that help."""
    if isinstance(error, distributed.KilledWorker):
        hint = "probably for want of memory: lower --memory or --workers"
        return WorkerError(f"workers died on their task, {hint} ({error})")
    return error


def _host_lost(host: str) -> WorkerError:
    """Why a task that one machine alone might run did not: its layers are tried again, on those that are left."""
    error = WorkerError(f"machine {host} left the cluster before its tasks were done")
    error.transient = True
    return error


def _hosts(client: Any, layers_of: LayersOf, place: Placement) -> dict[Key, list[str]]:
    """By key, the machine that alone may run it, where files must be written exclusively."""
    if place.writes == "shared":
        return {}
    threads: dict[str, int] = {}
    for worker in client.scheduler_info(n_workers=-1)["workers"].values():
        threads[worker["host"]] = threads.get(worker["host"], 0) + worker["nthreads"]
    return place.hosts(threads, layers_of)


def _by_host(futures: list[Any], key_of: dict[Any, Key], hosts: dict[Key, list[str]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for future in futures:
        for host in hosts.get(key_of[future.key], ()):
            found.setdefault(host, []).append(future)
    return found


def _submitted(client: Any, graph: Graph, keys: list[Key], hosts: dict[Key, list[str]]) -> list[Any]:
    """Futures of all tasks."""
    import dask
    from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

    annotations: dict[str, Any] = {"priority": _priorities(graph, keys).get}
    if hosts:
        annotations["workers"] = hosts.get
    layer = MaterializedLayer(pack_tasks(graph), annotations=annotations)
    # Tasks carry the plans of their layers, a few kilobytes each: more than Dask expects, and no data.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"}):
        return list(client.get(HighLevelGraph({"quantloom": layer}, {"quantloom": set()}), keys, sync=False))


def _priorities(graph: Graph, keys: list[Key]) -> dict[Key, int]:
    """Tasks are to begin in the order of ``keys``, each after what it waits for."""
    priorities: dict[Key, int] = {}
    for number, key in enumerate(keys):
        pending = [key]
        while pending:
            if (name := pending.pop()) not in priorities:
                priorities[name] = -number
                pending += graph[name].dependencies
    return priorities


def _cancellations(distributed: Any) -> tuple[type[BaseException], ...]:
    """What waiting for results raises when their scheduler is gone."""
    gone = (distributed.CancelledError, asyncio.CancelledError, concurrent.futures.CancelledError)
    return (*gone, distributed.comm.CommClosedError)


def _wait_for_workers(client: Any) -> None:
    try:
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
    except TimeoutError as error:
        raise SinkError(f"the Dask scheduler has no workers: none came in {WORKER_SECONDS} seconds") from error


def _package() -> Any:
    """The package ``distributed``; UsageError when it is not there."""
    try:
        with undisturbed():  # somewhere in there an interrupt is lost
            import distributed
    except ImportError as error:
        raise UsageError("a distributed run needs the package distributed: pip install 'quantloom[cluster]'") from error
    return distributed


def _connected(distributed: Any, address: str, stack: contextlib.ExitStack) -> Any:
    """A client of the scheduler at ``address``, with the certificates that Dask's own configuration names."""
    security = _security(distributed, address)
    try:
        return stack.enter_context(
            distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False, security=security)
        )
    except OSError as error:
        raise SinkError(f"{address}: cannot reach the Dask scheduler{_why(address, error)}") from error
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:  # what Dask makes of an address that is none
        why = str(error) or type(error).__name__
        raise UsageError(f"{address}: no address of a Dask scheduler, such as tcp://host:8786: {why}") from error


def _security(distributed: Any, address: str) -> Any:
    """What Dask's configuration says; UsageError when an address of TLS has no certificates, or they cannot be read."""
    security = distributed.Security()
    try:
        given = security.get_connection_args("client")["ssl_context"]
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"{address}: the certificates of Dask's configuration cannot be used: {error}") from error
    if address.startswith("tls://") and given is None:
        raise UsageError(
            f"{address}: no certificates are configured; set distributed.comm.tls.ca-file, client.cert and client.key "
            "in Dask's configuration, or DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ...__CLIENT__CERT and ...__CLIENT__KEY"
        )
    return security


def _why(address: str, error: OSError) -> str:
    """What most likely keeps a scheduler from answering."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    words = " ".join(str(each) for each in chain)
    if address.startswith("tls://"):
        hint = "is it one of TLS, and do both sides trust the certificates of the other?"
    else:
        hint = "is it running, and if it wants TLS: is the address tls://host:port?"
    reason = next((str(each) for each in reversed(chain) if str(each)), type(error).__name__)
    first = "it refused the certificate" if "CERTIFICATE" in words.upper() else f"no answer in {CONNECT_SECONDS} s"
    return f": {first}; {hint} ({reason.splitlines()[0]})"
