"""How long a plan would take on any number of workers: a model, made of measured costs and the plan's real batches.

Batches go to the next free worker, biggest first, as Dask hands them out. A worker computes for a batch and moves its
bytes, one after the other on a CPU and side by side on a GPU. Storage is shared: nothing ends before all bytes have
passed it. Nor does anything end before the scheduler has handed out every task.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..formats.errors import UsageError, did_you_mean, shown
from ..stages.work import LayerPlan
from .budget import Budget, cuda_tasks
from .costs import CPU, DEVICES, LAYER_SECONDS, TASK_SECONDS, Device, work_seconds
from .graph import batches
from .recipe import Run
from .sizes import count, parse_size, show_seconds, show_size

USUAL = (1, 8, 128)
"""Numbers of workers that are looked at when none is named."""
_DEFAULT_RATE = 6e9
_KEYS = ("gpus", "workers", "hosts", "read", "write", "device")
_MOST_WORKERS = 1_000_000


@dataclass(frozen=True)
class Cluster:
    """What a plan is thought to run on."""

    workers: tuple[int, ...] = USUAL
    """Numbers of workers, one simulation for each."""
    device: Device = CPU
    read: float = _DEFAULT_RATE
    """Bytes a second that all workers read together."""
    write: float = _DEFAULT_RATE
    """Bytes a second that all workers write together, synced."""
    scheduler: str = "distributed"

    @classmethod
    def parse(cls, text: str, run: Run) -> Cluster:
        """``gpus=8,read=6GB/s,write=2GB/s,hosts=2,device=h200``; what is not named is the recipe's or usual.

        ``gpus`` and ``workers`` count those of one host. Raises UsageError, naming what is wrong.
        """
        given = _pairs(text) if text.strip() else {}
        if "gpus" in given and "workers" in given:
            raise UsageError("simulate: gpus and workers both say how many work on a host; drop one")
        name = given.get("device", "h100" if "gpus" in given or run.device.startswith("cuda") else "cpu")
        if name not in DEVICES:
            raise UsageError(f"simulate: unknown device {shown(name)}{did_you_mean(name, DEVICES)}")
        device = DEVICES[name]
        if "gpus" in given and device is CPU:
            raise UsageError("simulate: gpus=... with device=cpu: name workers instead of gpus, or another device")
        hosts = _count("hosts", given.get("hosts", "1"))
        each = next((_count(key, given[key]) for key in ("gpus", "workers") if key in given), None)
        workers = (each * hosts,) if each else USUAL if hosts == 1 else (hosts,)
        read = _rate("read", given["read"]) if "read" in given else _DEFAULT_RATE
        write = _rate("write", given["write"]) if "write" in given else read
        own = run.scheduler if run.scheduler in TASK_SECONDS and hosts == 1 and device is CPU else "distributed"
        return cls(workers, device, read, write, own)


@dataclass(frozen=True)
class Outcome:
    """What is to be expected of one number of workers."""

    workers: int
    seconds: float
    bound: str
    """What keeps it from being faster: start-up, storage read, storage write, scheduler, largest task or work."""
    busy: float
    """Share of the workers' time that they compute."""
    rate: float
    """Source bytes a second."""
    memory: int
    """Bytes that each worker needs on its host at most; GPUs hold the tasks' share of it themselves."""


@dataclass(frozen=True)
class Simulation:
    """A plan on a cluster that need not exist."""

    cluster: Cluster
    tasks: int
    """Batches and row ranges that are handed out."""
    work: float
    """Seconds that all workers compute together."""
    outcomes: tuple[Outcome, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        cluster = self.cluster
        return {
            "device": cluster.device.name, "read_bytes_per_second": cluster.read,
            "write_bytes_per_second": cluster.write, "scheduler": cluster.scheduler, "tasks": self.tasks,
            "work_seconds": self.work, "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }  # fmt: skip

    def explain(self) -> str:
        """A table, as text."""
        cluster = self.cluster
        rates = f"storage reads {show_size(cluster.read)}/s and writes {show_size(cluster.write)}/s"
        load = f"{count(self.tasks, 'task')}, {show_seconds(self.work)} of work"
        lines = [
            f"simulated on {cluster.device.name}, {rates}: {load}",
            f"{'workers':>8}  {'time':>12}  {'bound by':<13}  {'busy':>5}  {'GB/s':>7}  {'memory each':>11}",
        ]
        for each in self.outcomes:
            lines.append(
                f"{each.workers:>8}  {show_seconds(each.seconds):>12}  {each.bound:<13}  {each.busy:>5.0%}  "
                f"{each.rate / 1e9:>7.2f}  {show_size(each.memory):>11}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Load:
    """What one task asks of its worker and of the storage."""

    compute: float
    """Seconds."""
    read: int
    """Bytes."""
    written: int
    layers: int = 1


def simulate(layers: Sequence[LayerPlan], budget: Budget, cluster: Cluster) -> Simulation:
    """The plan's layers on every number of workers of the cluster."""
    loads = [load for batch in batches(layers) for load in _loads(batch, cluster.device)]
    memory = budget.base + budget.task_bytes * (cuda_tasks(layers) if cluster.device.overlaps else 1)
    outcomes = tuple(replace(outcome(loads, cluster, workers), memory=memory) for workers in cluster.workers)
    return Simulation(cluster, len(loads), sum(load.compute for load in loads), outcomes)


def outcome(loads: Sequence[Load], cluster: Cluster, workers: int) -> Outcome:
    """Time and what bounds it; memory is not looked at."""
    lengths = [_length(load, cluster) for load in loads]
    read, written, on = sum(load.read for load in loads), sum(load.written for load in loads), cluster.scheduler
    compute = sum(load.compute for load in loads)
    longest, spread = max(lengths, default=0.0), makespan(lengths, workers)
    alone = workers > 1 and longest > 0.9 * spread
    works = "largest task" if alone else "compute" if 2 * compute >= sum(lengths) else "storage"
    bounds = {
        works: spread,
        "storage read": read / cluster.read,
        "storage write": written / cluster.write,
        "scheduler": sum(TASK_SECONDS[on] + load.layers * LAYER_SECONDS[on] for load in loads),
    }
    start = cluster.device.start
    seconds = max(bounds.values())
    bound = max(bounds, key=lambda name: bounds[name]) if seconds > start else "start-up"
    whole = start + seconds
    return Outcome(workers, whole, bound, compute / (whole * workers), read / whole, 0)


def makespan(lengths: Sequence[float], workers: int) -> float:
    """When the last of the tasks ends, each given to the worker that is free first, in their order.

    Never longer for more workers: the loads of more workers, sorted, are no larger one by one.
    """
    free = [0.0] * max(1, min(workers, len(lengths)))
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def _length(load: Load, cluster: Cluster) -> float:
    """Seconds of a task whose worker has the storage to itself."""
    moving = load.read / cluster.read + load.written / cluster.write
    return max(load.compute, moving) if cluster.device.overlaps else load.compute + moving


def _loads(batch: Sequence[LayerPlan], device: Device) -> list[Load]:
    """One task, or one for each row range of a layer that is alone in its batch."""
    compute = sum(work_seconds(plan, device) for plan in batch)
    read, written = sum(plan.layer.nbytes for plan in batch), sum(plan.nbytes_out for plan in batch)
    parts = batch[0].parts
    if not parts:
        return [Load(compute, read, written, len(batch))]
    shares = [(stop - start) / batch[0].rows for start, stop in parts]
    return [Load(compute * share, round(read * share), round(written * share)) for share in shares]


def _pairs(text: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise UsageError(f"simulate: {shown(item)} is not NAME=VALUE, as in gpus=8,read=6GB/s")
        if key not in _KEYS:
            raise UsageError(f"simulate: unknown name {shown(key)}{did_you_mean(key, _KEYS)}")
        if key in given:
            raise UsageError(f"simulate: {key} is given twice")
        given[key] = value
    return given


def _count(key: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,7}", value) or not 0 < int(value) <= _MOST_WORKERS:
        raise UsageError(f"simulate: {key}={shown(value)} is no number from 1 to {_MOST_WORKERS}")
    return int(value)


def _rate(key: str, value: str) -> float:
    wrong = UsageError(f"simulate: {key}={shown(value)} is no rate; write for example 6GB/s")
    try:
        rate = parse_size(re.sub(r"(?i)\s*/\s*s(ec)?$", "", value), key)
    except UsageError as error:
        raise wrong from error
    if not rate:
        raise wrong
    return float(rate)
