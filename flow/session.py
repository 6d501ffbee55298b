"""What a run has finished: receipts, and the journal that keeps them once their bytes are on the device.

Syncing after every layer would stop the work each time. A thread does it for all layers that were finished meanwhile,
beside the work: first their files, then one append of their lines.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from ..stages.work import Receipt
from .graph import Failure
from .plan import Plan
from .run_journal import Log, finished_lines
from .sizes import count

_log = logging.getLogger(__name__)

INTERVAL = 5.0
"""Seconds between two syncs: as much work is lost when the power goes."""
SHARE = 20
"""A sync that took long is followed by a pause of so many times its length."""


def standing(finished: int, plan: Plan) -> str:
    """``3 of 8 tensors are finished``."""
    return f"{finished} of {count(len(plan.layers), 'tensor')} are finished"


class Session:
    """A run's receipts: those of an earlier run, and those that are added."""

    def __init__(
        self, plan: Plan, log: Log, sync: Callable[[Iterable[Receipt]], None], done: Sequence[Receipt] = ()
    ) -> None:
        self.first_plan, self.log = plan, log
        self.plan = plan
        """What becomes real: another one than ``first_plan`` when layers failed that are then kept."""
        self.failed: dict[str, str] = {}
        """Those layers, with the reason."""
        self.laid_out_again = False
        """Whether files of ``plan`` take the place of those of ``first_plan``."""
        self.committing = False
        """Whether the journal says that files get their names: nothing else is left to do, or to be undone."""
        self.receipts: list[Receipt] = list(done)
        self.resumed = tuple(done)
        """What an earlier run had finished."""
        self.notes: list[str] = []
        """What was found of it, for people."""
        self.journalled = {receipt.name for receipt in done}
        """Layers of which the journal tells."""
        self._counted = {(receipt.name, receipt.rows) for receipt in done}
        self._settled: frozenset[str] = frozenset()
        self._sync = sync
        self._pending: list[Receipt] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._failure: Failure | None = None
        self._thread = threading.Thread(target=self._keep, name="quantloom-journal", daemon=True)
        self._thread.start()

    def add(self, receipts: Sequence[Receipt]) -> list[Receipt]:
        """Counts what was written, and returns what was not counted before: a layer that is tried again may bring row
        ranges that were. Raises what went wrong when earlier receipts were journalled."""
        new = self.add_new(receipts)
        with self._lock:
            self._pending += new
            failure = self._failure
        if failure is not None:
            raise failure.error
        return new

    def add_new(self, receipts: Iterable[Receipt]) -> list[Receipt]:
        """The same without journalling."""
        new = [
            receipt for receipt in receipts
            if (receipt.name, receipt.rows) not in self._counted and receipt.name not in self._settled
        ]  # fmt: skip
        self._counted |= {(receipt.name, receipt.rows) for receipt in new}
        self.receipts += new
        return new

    def keep(self, names: Collection[str]) -> None:
        """Drops the receipts of all other layers: they are written anew. Those of these layers stay what they are."""
        self.receipts = [receipt for receipt in self.receipts if receipt.name in names]
        self._counted = {(receipt.name, receipt.rows) for receipt in self.receipts}
        self._settled = frozenset(names)

    @property
    def standing(self) -> str:
        """How far it is, by its journal: ``3 of 8 tensors are finished``."""
        return standing(len(self.journalled), self.first_plan)

    def close(self) -> None:
        """Journals what is pending, and ends. Raises SinkError when a file cannot be synced."""
        self._ended.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure.error
        self._commit()

    def _keep(self) -> None:
        pause = INTERVAL
        while not self._ended.wait(pause):
            began = time.perf_counter()
            try:
                self._commit()
            except Exception as error:  # raised in the thread that works
                with self._lock:
                    self._failure = Failure(error)
                return
            pause = max(INTERVAL, SHARE * (time.perf_counter() - began))

    def _commit(self) -> None:
        with self._lock:
            taken, self._pending = self._pending, []
        if taken:
            self._sync(taken)
            self.log.append(finished_lines(taken))
            self.journalled |= {receipt.name for receipt in taken}
            _log.debug("%s: %d receipts", self.log.place, len(taken))
