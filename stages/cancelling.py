"""Stopping a run: it is asked once, and every task looks between its steps whether it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..formats.errors import QuantloomError


class Cancelled(QuantloomError):
    """The run was asked to stop; what it had written is removed."""


STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that stop a program."""

_cancelled: set[str] = set()
_running = threading.local()


def cancel(run_id: str) -> None:
    """Asks every task of the run in this process to stop at its next chunk."""
    _cancelled.add(run_id)


def forget(run_id: str) -> None:
    """Drops the request, once the run is over."""
    _cancelled.discard(run_id)


@contextmanager
def cancellable(run_id: str) -> Iterator[None]:
    """Lets ``check_here`` know for which run this thread works: long computations look at it between their steps."""
    _running.run_id = run_id
    try:
        yield
    finally:
        _running.run_id = ""


def check_here() -> None:
    """Raises Cancelled when the run that this thread works for was asked to stop."""
    check_cancelled(getattr(_running, "run_id", ""))


def check_cancelled(run_id: str) -> None:
    """Raises Cancelled when the run was asked to stop."""
    if run_id in _cancelled:
        raise Cancelled("stopped on request")
