"""What people see while a run goes on: columns on a terminal, otherwise a line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from ..formats.errors import printable
from .sizes import count, show_rate, show_size
from .tables import short_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

    from ..stages.work import Receipt
    from .budget import Budget
    from .plan import Plan

PLAIN_SECONDS = 10.0
"""Without a terminal, a line of progress this often."""

BAR_COLUMNS = 100
"""A narrower terminal has no room for a bar: the numbers matter more."""


class Display:
    """Share, bytes, mean rate, time left at that rate, memory against the budget, layers done so far."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars: Bars | None = None
        self.bytes = self.layers = self.tasks = self.total_bytes = self.total_layers = self.total_tasks = 0
        self.before = 0
        """Bytes that an earlier run had read."""
        self.began = self.said = 0.0
        self.worked_on: frozenset[str] = frozenset()
        """Layers that are quantized or changed, not copied."""

    def start(self, plan: Plan, budget: Budget) -> None:
        """Warnings and notes, then the first line."""
        import psutil
        from rich.text import Text

        self.process, self.budget = psutil.Process(), budget
        self.worked_on = frozenset(layer.layer.name for layer in plan.layers if layer.format or layer.change)
        self.total_bytes, self.total_layers = plan.nbytes_in, len(self.worked_on)
        self.total_tasks = sum(max(1, len(layer.parts)) for layer in plan.layers)
        self.began = self.said = time.perf_counter()
        for text in plan.warnings:
            self.console.print(Text("warning:", "yellow") + Text(f" {printable(text)}", "default"))
        for text in plan.notes:
            self.console.print(Text(f"note: {printable(text)}"))
        if self.console.is_terminal:
            self._start_bars()
        else:
            aim = "to quantize" if plan.formats else "to change"
            words = f"converting {count(len(plan.layers), 'tensor')} ({count(self.total_layers, 'layer')} {aim})"
            if plan.base is not None:
                words = f"comparing {count(self.total_layers, 'layer')} with {plan.base_path}"
            tasks = f"{count(budget.workers, 'task')} at a time, memory budget {show_size(budget.limit)}"
            self.console.print(f"{words}, {show_size(self.total_bytes)}, {tasks}")

    def resume(self, receipts: Sequence[Receipt]) -> None:
        """Counts what was finished before, which says nothing about the rate."""
        self.before = sum(receipt.nbytes_in for receipt in receipts)
        self.advance(receipts)

    def advance(self, receipts: Sequence[Receipt]) -> None:
        """Counts finished tasks; after the last one the files are synced and renamed, which may take a while."""
        self.bytes += sum(receipt.nbytes_in for receipt in receipts)
        self.layers += sum(receipt.first and receipt.name in self.worked_on for receipt in receipts)
        self.tasks += len(receipts)
        now = time.perf_counter()
        last = self.syncing and now - self.began >= PLAIN_SECONDS
        if self.bars:
            self.bars.update(self.task, completed=self.bytes, **self._fields())
        elif last or now - self.said >= PLAIN_SECONDS:
            self.said = now
            self.console.print(", ".join(self._fields().values()))

    def stop(self) -> None:
        """Takes the columns away."""
        if self.bars:
            self.bars.stop()

    @property
    def syncing(self) -> bool:
        """Whether every task is done and only the commit is left."""
        return self.tasks >= self.total_tasks

    def _start_bars(self) -> None:
        from rich import progress

        # Rich's own speed is that of the last few updates, which come in bursts.
        columns = [progress.TextColumn(f"{{task.fields[{name}]}} ", markup=False) for name in self._fields()]
        bar = [progress.BarColumn(bar_width=16)] if self.console.width >= BAR_COLUMNS else []
        self.bars = progress.Progress(*bar, *columns, console=self.console, transient=True)
        self.bars.start()
        self.task = self.bars.add_task("", total=self.total_bytes, **self._fields())

    def _fields(self) -> dict[str, Any]:
        """What a line shows, in its order."""
        rate = (self.bytes - self.before) / max(time.perf_counter() - self.began, 1e-9)
        left = f"{_clock((self.total_bytes - self.bytes) / rate)} left" if rate else "-:-- left"
        return {
            "share": f"{self.bytes / max(1, self.total_bytes):4.0%}",
            "bytes": _amount(self.bytes, self.total_bytes),
            "rate": show_rate(rate),
            "left": "syncing" if self.syncing else left,
            "memory": f"{short_size(self.process.memory_info().rss)} / {short_size(self.budget.limit)}",
            "layers": f"{self.layers}/{self.total_layers} layers",
        }


class Reading:
    """Share, bytes and rate of a long look at files, on one line of a terminal, otherwise now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.began = self.said = time.perf_counter()
        self.shown = False

    def advance(self, done: int, total: int) -> None:
        """Says how far it is, from the second second on."""
        now = time.perf_counter()
        if now - self.said < (1.0 if self.console.is_terminal else PLAIN_SECONDS):
            return
        self.said, self.shown = now, True
        rate = done / (now - self.began)
        line = f"{done / max(1, total):4.0%}, {_amount(done, total)}, {show_rate(rate)}"
        self.console.print(line, end="  \r" if self.console.is_terminal else "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.shown and self.console.is_terminal:
            self.console.print(" " * 50, end="\r")


def _amount(part: int, whole: int) -> str:
    """``1.2/23.8 GB``: both in the unit of the whole."""
    number, unit = short_size(whole).split()
    scale = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    digits = len(number.partition(".")[2])
    return f"{part / scale:.{digits}f}/{number} {unit}"


def _clock(seconds: float) -> str:
    """``0:07``, ``4:05``, ``2:10:00``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
