"""What people see: progress, tables, logs and errors. The only place that prints."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..formats.errors import QuantloomError, UsageError, printable
from .progress import Display
from .sizes import count, show_size
from .tables import Name, short_size, shortened

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..formats.registry import FormatInfo
    from ..stages.work import LayerPlan
    from .budget import Budget
    from .inspect import Inspection
    from .pipeline import Flow
    from .plan import Plan
    from .report import Report
    from .roundings import Rounding

PIPE_WIDTH = 400
"""Columns of a table that goes into a file or another program."""


MOST_ROWS = 5000
"""Layers that a plan lists unasked: nobody reads more."""


class _StderrHandler(logging.Handler):
    """Lines on whatever stderr is at that moment: a live display puts itself in its place."""

    noisy: tuple[str, ...] = ()
    """Packages of which only errors are shown; they set the levels of their own loggers when they are imported."""
    telling = (
        "aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "httpcore", "httpx", "huggingface_hub",
        "s3fs", "urllib3",
    )  # fmt: skip
    """Packages that are never shown: they log requests with their signatures."""

    def emit(self, record: logging.LogRecord) -> None:
        package = record.name.partition(".")[0]
        if package not in self.telling and (record.levelno >= logging.ERROR or package not in self.noisy):
            sys.stderr.write(f"{record.levelname} {record.name}: {printable(record.getMessage())}\n")


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

    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(highlight=False, width=None if terminal else PIPE_WIDTH, quiet=sys.stdout is None)


def guarded(action: Callable[[], int], stopped: str = "stopped") -> int:
    """Runs a command; errors become one message on stderr. 0 done, 1 the work failed, 2 wrong usage."""
    from rich.text import Text

    try:
        status = action()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a reader that has gone away is known; not when the interpreter ends
        return status
    except UsageError as error:
        stderr().print(Text("usage: ", "bold red") + Text(str(error)))
        return 2
    except QuantloomError as error:
        stderr().print(Text("error: ", "bold red") + Text("\n".join([str(error), *_notes(error)])))
        return 1
    except KeyboardInterrupt as error:
        words = [f"stopped: {note}" for note in _notes(error)] or [stopped]
        stderr().print(Text(words[0], "bold red"))
        return 1
    except BrokenPipeError:  # a reader such as head went away
        sys.stderr.close()
        return 1
    except OSError as error:  # work wraps its own: what is left is a full or closed stdout
        stderr().print(Text("error: ", "bold red") + Text(f"cannot print the result: {error}; the work itself is done"))
        return 1


def _notes(error: BaseException) -> list[str]:
    """What was added to an exception on its way: what it leaves, and what to do."""
    return [printable(note) for note in getattr(error, "__notes__", ())]


def escape(text: str) -> str:
    from rich.markup import escape

    return escape("\n".join(printable(line) for line in text.split("\n")))


def run_flow(flow: Flow, quiet: bool, as_json: bool) -> Report:
    """Computes with progress on stderr, and prints the report."""
    report = flow.compute(progress=None if quiet else Display(stderr()))
    if as_json:
        print(report.to_json())
    elif not quiet:
        stdout().print(report, soft_wrap=True)
    return report


def print_text(text: str) -> None:
    """Lines on stdout."""
    stdout().print(escape(text), soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2))


def make_table(*headings: str) -> Table:
    """Columns that fold long words; those whose heading begins with ``>`` are short and stand to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    # Gaps of two columns: at 80 columns the names of most models stay in one piece.
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        if heading.startswith(">"):
            table.add_column(heading[1:], justify="right", no_wrap=True)
        else:
            table.add_column(heading, overflow="fold")
    return table


def print_plan(plan: Plan, budget: Budget, verbose: bool = False) -> None:
    """Matrices by format, what changes and what is kept (with ``verbose`` every other tensor too), then the totals."""
    from rich.text import Text

    console = stdout()
    adapters = (">adapter",) if plan.adapter else ()
    becomes = ("becomes", ">before", ">after") if plan.base is None else ("stored as", ">original")
    table = make_table("layer", ">shape", *becomes, *adapters)
    most = max(20, console.width // 4)
    rows = [layer for layer in plan.layers if verbose or _worth_a_row(layer)]
    if len(rows) > MOST_ROWS and not verbose:
        console.print(f"{len(rows)} layers; --verbose lists them")
        rows = []
    for layer in rows:
        shape = layer.layer.weight.shape
        kept = shortened(f"kept: {layer.reason}" if layer.reason else "copied", most)
        what = Text(layer.format or layer.change) if layer.format or layer.change else Text(kept, "dim")
        sizes = [short_size(layer.layer.nbytes), *([] if plan.base else [short_size(layer.nbytes_out)])]
        adapter = f"rank {layer.adapter.rank}, {short_size(layer.adapter.nbytes)}" if layer.adapter else ""
        table.add_row(Name(layer.layer.name), "x".join(map(str, shape)), what, *sizes, *([adapter] if adapters else []))
    if table.row_count:
        console.print(table)
    console.print(escape(plan.explain(budget.workers)), soft_wrap=True)
    parts = f"{show_size(budget.base)} for the process, {budget.workers} x {show_size(budget.task_bytes)} for tasks"
    total = f"at most {show_size(budget.peak_bytes)} ({parts}); budget {show_size(budget.limit)}"
    console.print(f"memory   {total}", soft_wrap=True)


def _worth_a_row(layer: LayerPlan) -> bool:
    """Whether it is quantized or changed, or a matrix that is kept for a reason."""
    return bool(layer.format or ((layer.reason or layer.change) and len(layer.layer.weight.shape) == 2))


def print_inspection(found: Inspection, every_layer: bool) -> None:
    """Sizes and formats, metadata, and with ``every_layer`` a row for each."""
    console = stdout()
    quantized, held = sum(found.dialects.values()), count(len(found.layers), "tensor")
    if quantized:
        held = f"{count(quantized, 'quantized layer')}, {count(len(found.layers) - quantized, 'other tensor')}"
    console.print(
        f"{escape(found.path)}: {count(len(found.files), 'file')}, {held}, {show_size(found.nbytes)}", soft_wrap=True
    )
    table = make_table("stored as", ">tensors", ">weights", ">bytes", ">bits/weight")
    for name, (layers, size, weights) in found.formats.items():
        bits = f"{size * 8 / weights:.2f}" if weights else "-"
        table.add_row(name, str(layers), f"{weights / 1e6:.2f} M", show_size(size), bits)
    console.print(table)
    for name, layers in found.dialects.items():
        console.print(f"dialect {name}: {count(layers, 'quantized layer')}")
    for key, value in found.metadata.items():
        print_text(f"metadata {key}: {value if len(value) <= 200 else f'{value[:200]}... ({len(value)} characters)'}")
    for problem in found.problems:
        console.print(f"[yellow]warning:[/] {escape(problem)}", soft_wrap=True)
    if every_layer:
        rows = make_table("tensor", ">shape", "stored as", ">bytes")
        for layer in found.layers:
            shape = "x".join(map(str, layer["shape"]))
            rows.add_row(Name(layer["name"]), shape, layer["format"], show_size(layer["bytes"]))
        console.print(rows)


def print_roundings(roundings: Iterable[Rounding]) -> None:
    """When to use which, and the options below each."""
    for rounding in roundings:
        stdout().print(f"[bold]{rounding.name}[/]  {escape(rounding.help)}", soft_wrap=True)
        for option in rounding.options:
            default = "" if option.default is None else f" (default {option.default})"
            print_text(f"    {option.name}  {option.help}{default}")


def print_formats(formats: Iterable[FormatInfo]) -> None:
    """What can be written, where it runs, and who loads it."""
    table = make_table("format", "scalings", ">bits", "runs natively on", "loaded by")
    for info in formats:
        scalings = ", ".join(info.scalings) + (f" of {info.group_size}" if info.group_size else "")
        table.add_row(info.name, scalings, f"{info.bits:g}", info.hardware, info.loaded_by)
    stdout().print(table)
