"""What people see while a model is calibrated: columns on a terminal, otherwise a line now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .progress import PLAIN_SECONDS
from .sizes import count, show_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars


class CalibrationDisplay:
    """Share of the batches of all passes, and time left at the mean rate."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars: Bars | None = None
        self.done = self.total = 0
        self.began = self.said = 0.0

    def start(self, passes: int, batches: int, inputs: int) -> None:
        """The first line."""
        self.total = passes * batches
        self.began = self.said = time.perf_counter()
        if not passes:
            return
        over = "one pass" if passes == 1 else f"{passes} passes"
        words = "1 batch" if batches == 1 else f"{batches} batches"
        self.console.print(f"calibrating {count(inputs, 'input')} of linear layers, {over} over {words}")
        if self.console.is_terminal:
            from rich import progress

            columns = [progress.BarColumn(bar_width=16), progress.TextColumn("{task.fields[words]}", markup=False)]
            self.bars = progress.Progress(*columns, console=self.console, transient=True)
            self.bars.start()
            self.task = self.bars.add_task("", total=self.total, words=self._words())

    def advance(self, batches: int) -> None:
        """Counts batches."""
        self.done += batches
        now = time.perf_counter()
        if self.bars:
            self.bars.update(self.task, completed=self.done, words=self._words())
        elif now - self.said >= PLAIN_SECONDS:
            self.said = now
            self.console.print(self._words())

    def stop(self) -> None:
        """Takes the columns away."""
        if self.bars:
            self.bars.stop()

    def _words(self) -> str:
        spent = time.perf_counter() - self.began
        left = f", {show_seconds((self.total - self.done) * spent / self.done)} left" if self.done else ""
        return f"{self.done / max(1, self.total):4.0%}, {self.done}/{self.total} batches{left}"
