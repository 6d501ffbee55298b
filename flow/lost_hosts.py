"""Machines that leave a cluster while it works: this is said, and what only they may do is given up after a minute."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Between two looks at the workers."""
GRACE_SECONDS = 60.0
"""A machine without workers may come back for so long: a nanny starts one again within seconds."""
_ALL = ""
"""Stands for every machine, where none is left."""


@contextlib.contextmanager
def watched(client: Any, futures_of: Mapping[str, Sequence[Any]]) -> Iterator[Mapping[Any, str]]:
    """Watches the cluster for the time of the block.

    futures_of: by machine, the futures that no other one may run. The mapping that is yielded has, by key, the machine
    of each that was cancelled because that machine is gone. While no machine is left at all, nothing is given up.
    """
    lost: dict[Any, str] = {}
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(client, futures_of, lost, over), name="quantloom-hosts", daemon=True)
    thread.start()
    try:
        yield lost
    finally:
        over.set()
        thread.join(1)  # a scheduler that is frozen does not answer it


def _watch(client: Any, futures_of: Mapping[str, Sequence[Any]], lost: dict[Any, str], over: threading.Event) -> None:
    seen = dict.fromkeys(futures_of, time.monotonic())
    missed: set[str] = set()
    while not over.wait(LOOK_SECONDS):
        there = _machines(client)
        if there is None:
            continue
        now = time.monotonic()
        seen |= dict.fromkeys(there or futures_of, now)
        left = {host: [future for future in futures if not future.done()] for host, futures in futures_of.items()}
        absent = {host for host, futures in left.items() if futures and host not in there} if there else {_ALL}
        for host in sorted(absent - missed):
            _log.warning("%s", _words(host))
        missed = absent
        for host in absent - {_ALL}:
            if now - seen[host] > GRACE_SECONDS:
                lost |= {future.key: host for future in left[host]}
                with contextlib.suppress(Exception):
                    client.cancel(left[host])


def _words(host: str) -> str:
    if host == _ALL:
        return "the cluster has no worker: waiting for one; Ctrl-C stops, and keeps what is finished"
    return f"machine {host} has no worker: waiting {GRACE_SECONDS:.0f} s for one, then others get its files"


def _machines(client: Any) -> set[str] | None:
    """Those that have workers; None when the scheduler cannot be asked: whoever waits for results hears of it."""
    with contextlib.suppress(Exception):
        return {worker["host"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()}
    return None
