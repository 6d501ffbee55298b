"""Running all layers of a plan although some fail: again where that may help, and what is left of them.

A task that fails does not end the run: its exception comes back as a value. Read errors, short memory and dead workers
may pass, so that its layers are tried again, each alone. What fails for good stops the run, or is collected.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Protocol

from ..formats.errors import PlanError, SinkError, UsageError, is_transient
from ..stages.cancelling import Cancelled
from ..stages.work import LayerPlan, Receipt
from .graph import Failure, Graph, LayersOf, Results

_log = logging.getLogger(__name__)

RETRIES = 2
"""So many times a layer is tried again."""
PAUSE = 1.0
"""Seconds before it is; then four times as long."""

Schedule = Callable[[Graph, LayersOf], Results]
"""Runs a graph."""


class Build(Protocol):
    """Makes a graph from batches of layers; its keys begin with ``name``."""

    def __call__(self, chosen: Iterable[list[LayerPlan]], *, name: str) -> tuple[Graph, LayersOf]: ...


def run_layers(
    chosen: Iterable[list[LayerPlan]], build: Build, schedule: Schedule, keep: bool
) -> Generator[list[Receipt], None, dict[str, BaseException]]:
    """Receipts of batches as tasks finish; returns errors by the names of layers that failed for good. Only with
    ``keep`` there are any: otherwise the first such error is raised."""
    waiting = list(chosen)
    failed: dict[str, BaseException] = {}
    for attempt in range(RETRIES + 1):
        last = attempt == RETRIES
        again: dict[str, list[LayerPlan]] = {}
        graph, layers_of = build(waiting, name=f"batch {attempt}")
        for key, found in schedule(graph, layers_of):
            if not isinstance(found, Failure):
                yield found
                continue
            error, groups = found.error, _separated(layers_of[key])
            hopeless = last or not is_transient(error)
            if hopeless and not (keep and _is_the_layers_own(error)):
                raise error
            for group in groups:
                names = [each.layer.name for each in group]
                _log.info("%s failed: %s", ", ".join(names), error)
                if last or (hopeless and len(groups) == 1):
                    failed |= dict.fromkeys(names, error)
                else:
                    again[names[0]] = group
        waiting = [group for name, group in again.items() if name not in failed]
        if not waiting:
            break
        time.sleep(PAUSE * 4**attempt)
    return failed


def _separated(chosen: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers one by one, but for those that are solved in one."""
    groups: dict[str, list[LayerPlan]] = {}
    for plan in chosen:
        groups.setdefault(plan.together[0][0] if plan.together else plan.layer.name, []).append(plan)
    return list(groups.values())


def _is_the_layers_own(error: BaseException) -> bool:
    """Whether another layer would not fail in the same way: a full disk is nobody's own."""
    if isinstance(error, Cancelled | UsageError | PlanError):
        return False
    return not isinstance(error, SinkError) or is_transient(error)
