"""The same work on every layer, in threads: for passes that write nothing and need no graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..stages.cancelling import cancel, forget
from ..stages.work import Environment
from .budget import CPU_CHUNK_BYTES, cores
from .runner import prepare_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_layers(
    function: Callable[[Item, Environment], Result], items: Iterable[Item], workers: int | None = None
) -> list[Result]:
    """Results in order. An error or Ctrl-C stops what runs at its next chunk, and what waits at once."""
    environment = Environment(f"map-{time.monotonic_ns()}", chunk_bytes=CPU_CHUNK_BYTES)

    def call(item: Item) -> Result:
        prepare_thread(environment)
        return function(item, environment)

    pool = ThreadPoolExecutor(workers or cores(), thread_name_prefix="quantloom")
    try:
        return list(pool.map(call, items))
    except BaseException:
        cancel(environment.run_id)
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown()
        forget(environment.run_id)
