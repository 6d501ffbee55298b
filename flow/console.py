"""What people see: progress, tables, logs and errors. The only place that prints."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..formats.errors import QuantloomError, UsageError
from .sizes import count, show_seconds, show_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.table import Table

    from ..formats.registry import FormatInfo
    from ..stages.work import Receipt
    from .budget import Budget
    from .inspect import Inspection
    from .pipeline import Flow
    from .plan import Plan
    from .report import Report
    from .verify import Verification

PIPE_WIDTH = 400
"""Columns of a table that goes into a file or another program."""

PLAIN_SECONDS = 10.0
"""Without a terminal, a line of progress this often."""


class _StderrHandler(logging.Handler):
    """Lines on whatever stderr is at that moment: a live display puts itself in its place."""

    noisy: tuple[str, ...] = ()
    """Packages of which only errors are shown; they set the levels of their own loggers when they are imported."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.name.partition(".")[0] not in self.noisy:
            sys.stderr.write(f"{record.levelname} {record.name}: {record.getMessage()}\n")


def setup_logging(verbosity: int) -> None:
    """-1 quiet: errors; 0: warnings; 1: what is done; 2: everything."""
    level = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    root = logging.getLogger()
    own = next((handler for handler in root.handlers if isinstance(handler, _StderrHandler)), None)
    if own is None:
        own = _StderrHandler()
        root.addHandler(own)
    own.noisy = () if level == logging.DEBUG else ("distributed", "asyncio", "tornado")
    root.setLevel(level)


def stderr() -> Console:
    """The console for everything that is not a result."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def stdout() -> Console:
    """The console for results; tables are as wide as they need to be where nobody sees the end of a line."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def guarded(action: Callable[[], int], stopped: str = "stopped") -> int:
    """Runs a command; errors become one message on stderr. 0 done, 1 the work failed, 2 wrong usage."""
    from rich.text import Text

    try:
        return action()
    except UsageError as error:
        stderr().print(Text("usage: ", "bold red") + Text(str(error)))
        return 2
    except QuantloomError as error:
        stderr().print(Text("error: ", "bold red") + Text(str(error)))
        return 1
    except KeyboardInterrupt:
        stderr().print(Text(stopped, "bold red"))
        return 1
    except BrokenPipeError:  # a reader such as head went away
        sys.stderr.close()
        return 1


class Display:
    """Live progress on a terminal; otherwise a line now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars: Bars | None = None
        self.bytes = self.layers = self.total_bytes = self.total_layers = 0
        self.began = self.said = 0.0

    def start(self, plan: Plan, budget: Budget) -> None:
        import psutil

        self.process, self.budget = psutil.Process(), budget
        self.total_bytes, self.total_layers = plan.nbytes_in, len(plan.layers)
        self.began = self.said = time.perf_counter()
        for text in plan.warnings:
            self.console.print(f"[yellow]warning:[/] {_escape(text)}")
        for text in plan.notes:
            self.console.print(f"note: {_escape(text)}")
        if self.console.is_terminal:
            self._start_bars()
        else:
            words = f"{count(self.total_layers, 'layer')}, {show_size(self.total_bytes)}"
            tasks = f"{count(budget.workers, 'task')} at a time, memory budget {show_size(budget.limit)}"
            self.console.print(f"converting {words}, {tasks}")

    def _start_bars(self) -> None:
        from rich import progress

        # Rich's own speed is that of the last few updates, which come in bursts.
        columns = progress.BarColumn(bar_width=20), progress.TextColumn("{task.description}")
        self.bars = progress.Progress(*columns, console=self.console, transient=True)
        self.bars.start()
        self.task = self.bars.add_task(self._status(), total=self.total_bytes)

    def _status(self) -> str:
        """Share, bytes, layers, mean rate, time left at that rate, memory."""
        rate = self.bytes / max(time.perf_counter() - self.began, 1e-9)
        left = f"{show_seconds((self.total_bytes - self.bytes) / rate)} left" if self.bytes else "no estimate yet"
        return (
            f"{self.bytes / max(1, self.total_bytes):4.0%}  {show_size(self.bytes)} of {show_size(self.total_bytes)}, "
            f"{self.layers}/{self.total_layers} layers, {rate / 1e9:.2f} GB/s, {left}, "
            f"memory {show_size(self.process.memory_info().rss)} of {show_size(self.budget.limit)}"
        )

    def advance(self, receipts: Sequence[Receipt]) -> None:
        self.bytes += sum(receipt.nbytes_in for receipt in receipts)
        self.layers += sum(receipt.first for receipt in receipts)
        now = time.perf_counter()
        if self.bars:
            self.bars.update(self.task, completed=self.bytes, description=self._status())
        elif now - self.said >= PLAIN_SECONDS:
            self.said = now
            self.console.print(self._status())

    def stop(self) -> None:
        if self.bars:
            self.bars.stop()


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def run_flow(flow: Flow, quiet: bool, as_json: bool) -> Report:
    """Computes with progress on stderr, and prints the report."""
    report = flow.compute(progress=None if quiet else Display(stderr()))
    if as_json:
        print(report.to_json())
    elif not quiet:
        stdout().print(report, soft_wrap=True)
    return report


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2))


def _table(*headings: str) -> Table:
    """Columns that fold long words; those whose heading begins with ``>`` are short and stand to the right."""
    from rich.table import Table

    table = Table(header_style="bold")
    for heading in headings:
        if heading.startswith(">"):
            table.add_column(heading[1:], justify="right", no_wrap=True)
        else:
            table.add_column(heading, overflow="fold")
    return table


def print_plan(plan: Plan, budget: Budget) -> None:
    """Layers by format and what is kept, then the totals."""
    console = stdout()
    table = _table("layer", ">shape", "becomes", ">before", ">after")
    for layer in plan.layers:
        if not layer.format and not layer.reason:
            continue
        what = layer.format or f"[dim]kept: {_escape(layer.reason)}[/]"
        shape = " x ".join(str(size) for size in layer.layer.weight.shape)
        sizes = show_size(layer.layer.nbytes), show_size(layer.nbytes_out)
        table.add_row(_escape(layer.layer.name), shape, what, *sizes)
    console.print(table)
    console.print(_escape(plan.explain(budget.workers)), soft_wrap=True)
    parts = f"{show_size(budget.base)} for the process, {budget.workers} x {show_size(budget.task_bytes)} for tasks"
    total = f"at most {show_size(budget.peak_bytes)} ({parts}); budget {show_size(budget.limit)}"
    console.print(f"memory   {total}", soft_wrap=True)


def print_inspection(found: Inspection, every_layer: bool) -> None:
    """Sizes and formats, metadata, and with ``every_layer`` a row for each."""
    console = stdout()
    total = f"{count(len(found.files), 'file')}, {count(len(found.layers), 'layer')}, {show_size(found.nbytes)}"
    console.print(f"{_escape(found.path)}: {total}", soft_wrap=True)
    table = _table("stored as", ">layers", ">weights", ">bytes", ">bits/weight")
    for name, (layers, size, weights) in found.formats.items():
        bits = f"{size * 8 / weights:.2f}" if weights else "-"
        table.add_row(name, str(layers), f"{weights / 1e6:.2f} M", show_size(size), bits)
    console.print(table)
    for name, layers in found.dialects.items():
        console.print(f"dialect {name}: {count(layers, 'quantized layer')}")
    for key, value in found.metadata.items():
        shown = value if len(value) <= 200 else f"{value[:200]}... ({len(value)} characters)"
        console.print(f"metadata {_escape(key)}: {_escape(shown)}", soft_wrap=True)
    for problem in found.problems:
        console.print(f"[yellow]warning:[/] {_escape(problem)}", soft_wrap=True)
    if every_layer:
        rows = _table("layer", ">shape", "stored as", ">bytes")
        for layer in found.layers:
            shape = " x ".join(map(str, layer["shape"]))
            rows.add_row(_escape(layer["name"]), shape, layer["format"], show_size(layer["bytes"]))
        console.print(rows)


def print_verification(result: Verification, most: int) -> None:
    """Worst layers, problems, and the verdict."""
    console = stdout()
    table = _table("layer", "format", ">relative error")
    for layer in result.worst[:most]:
        table.add_row(_escape(layer.name), layer.format, f"{layer.error:.5f}")
    if result.worst:
        console.print(f"Worst {min(most, len(result.worst))} of {count(len(result.worst), 'quantized layer')}:")
        console.print(table)
    for problem in result.problems:
        console.print(f"[red]broken:[/] {_escape(problem)}", soft_wrap=True)
    for name in result.unknown:
        console.print(f"[yellow]warning:[/] {_escape(name)}: not in the source", soft_wrap=True)
    kept = len(result.layers) - len(result.worst)
    verdict = "sound" if result.ok else f"BROKEN ({count(len(result.problems), 'problem')})"
    layers = f"{count(len(result.worst), 'quantized layer')}, {kept} kept as they were"
    console.print(f"{_escape(result.output)}: {verdict}; {layers}", soft_wrap=True)


def print_formats(formats: Iterable[FormatInfo]) -> None:
    """What can be written, where it runs, and who loads it."""
    table = _table("format", "scalings", ">bits", "runs natively on", "loaded by")
    for info in formats:
        scalings = ", ".join(info.scalings) + (f" of {info.group_size}" if info.group_size else "")
        table.add_row(info.name, scalings, f"{info.bits:g}", info.hardware, info.loaded_by)
    stdout().print(table)
