"""The report of a run: a value that prints itself for people, notebooks and programs."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..formats.errors import listed, printable
from ..formats.shards import index_file, is_single_file, is_store
from ..stages.work import Receipt
from .adapter import AdapterFile
from .adapter_report import GAINS, adapter_lines
from .budget import peak_memory
from .layer_report import LayerReport
from .next_commands import assemble_command, assembled_name
from .plan import Plan
from .quality import MEASURES, Column, gains
from .scalar_report import scalar_errors, scalar_warnings
from .session import Session
from .sizes import count, show_rate, show_seconds, show_size
from .tables import Name, short_size

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

WORST_SHOWN = 5


@dataclass(frozen=True)
class Report:
    """What a run did."""

    source: tuple[str, ...]
    output: str
    layers: tuple[LayerReport, ...]
    kept: dict[str, int]
    """Number of tensors kept, by reason."""
    changed: dict[str, int]
    """Number of layers whose stored form was changed, by what happened to them."""
    nbytes_in: int
    nbytes_out: int
    seconds: float
    peak_bytes: int
    """Largest resident memory of this process."""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    distributed: bool = False
    """Whether a Dask cluster did the work; ``peak_bytes`` is then the client's, not the workers'."""
    statistics: str = ""
    """The store that was used."""
    index: str = ""
    """Path of the index, where ``output`` names no file because it was split into shards beside each other."""
    adapter: AdapterFile | None = None
    """The adapter that was written beside the output ..."""
    base: str = ""
    """... or as the output, for this model, which was quantized already."""
    scalar_errors: Mapping[str, float] = field(default_factory=dict)
    """Relative error of the weights under ``.weight_scalar`` instead of the scales of groups, by layer, where mode
    legacy of the hybrid stage added it."""
    found: tuple[str, ...] = ()
    """Warnings of what the run measured; those in ``warnings`` were known before."""
    nbytes_resumed: int = 0
    """Of ``nbytes_in``, what an earlier run had converted."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Layers that failed and are kept as they are, with the reason."""

    @property
    def ratio(self) -> float:
        """Output bytes per input byte."""
        return self.nbytes_out / self.nbytes_in if self.nbytes_in else 1.0

    @property
    def worst(self) -> list[LayerReport]:
        """Layers by falling error."""
        return sorted(self.layers, key=lambda layer: -layer.error)

    @property
    def verify_command(self) -> str:
        """The command that checks the output against the source."""
        import shlex

        against = [word for source in self.source for word in ("--against", source)]
        statistics = ["--statistics", self.statistics] if self.statistics else []
        adapter = ["--adapter", self.adapter.path] if self.adapter else []
        made = self.base or self.index or (assembled_name(self.output) if is_store(self.output) else self.output)
        return shlex.join(["quantloom", "verify", made, *against, *statistics, *adapter])

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "source": list(self.source), "output": self.output, **({"quantized": self.base} if self.base else {}),
            "bytes_in": self.nbytes_in, "bytes_out": self.nbytes_out,
            "ratio": self.ratio, "seconds": self.seconds, "peak_memory_bytes": self.peak_bytes,
            "distributed": self.distributed, "resumed_bytes": self.nbytes_resumed, "failed": dict(self.failed),
            **({} if self.adapter is None else {"adapter": self.adapter.to_dict()}),
            **({"scalar_errors": dict(self.scalar_errors)} if self.scalar_errors else {}),
            "layers": [layer.to_dict() for layer in self.layers], "changed": self.changed, "kept": self.kept,
            "notes": list(self.notes), "warnings": [*self.warnings, *self.found], "verify": self.verify_command,
            **({"assemble": assemble_command(self.output)} if is_store(self.output) else {}),
        }  # fmt: skip

    @property
    def _columns(self) -> list[Column]:
        """Errors that the layers have."""
        def sampled(layer: LayerReport) -> str:
            return f"{layer.error:.5f}" if layer.sampled else ""

        columns = (Column("error (sampled)", sampled), *MEASURES, *GAINS)
        return [column for column in columns if any(column.of(layer) for layer in self.layers)]

    @property
    def _done(self) -> str:
        if self.changed:
            return f"{count(sum(self.changed.values()), 'layer')} changed"
        if not self.layers:
            return "no layer changed"
        return f"{count(len(self.layers), 'layer')} quantized"

    @property
    def _sizes(self) -> tuple[str, str]:
        """Headings of a layer's sizes."""
        return ("original", "adapter") if self.base else ("before", "after")

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self, most: int | None = None) -> Table:
        """Layers by falling error, as a rich table."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=None, header_style="bold")
        for heading, least in (("layer", 16), ("format", 6)):
            table.add_column(heading, overflow="fold", min_width=least)
        for column in self._columns:
            table.add_column(column.heading, justify="right", min_width=9)
        for heading in (*self._sizes, "time"):
            table.add_column(heading, justify="right", no_wrap=True)
        for layer in self.worst[:most]:
            table.add_row(
                Name(layer.name), Text(layer.format), *(column.of(layer) for column in self._columns),
                short_size(layer.nbytes_in), short_size(layer.nbytes_out), show_seconds(layer.seconds),
            )  # fmt: skip
        return table

    def summary(self) -> str:
        """A few lines: sizes, time, kept layers and why, and how to verify."""
        rate = (self.nbytes_in - self.nbytes_resumed) / self.seconds if self.seconds else 0.0
        peak = f"peak memory {'of the client ' if self.distributed else ''}{show_size(self.peak_bytes)}"
        did = (
            f"{self.index or self.output}: {show_size(self.nbytes_in)} -> {show_size(self.nbytes_out)} "
            f"({self.ratio:.1%}), {self._done}"
        )
        if self.base:
            did = f"{self.output}: {show_size(self.nbytes_out)} for {count(len(self.layers), 'layer')} of {self.base}"
        lines = [
            did,
            f"{show_seconds(self.seconds)}, {show_rate(rate)}, {peak}",
        ]
        if self.nbytes_resumed:
            lines.append(f"continued an earlier run, which had converted {show_size(self.nbytes_resumed)}")
        lines += [f"{count(number, 'layer')}: {what}" for what, number in self.changed.items()]
        lines += [f"kept {count(number, 'tensor')}: {reason}" for reason, number in self.kept.items()]
        lines += gains([layer.quality for layer in self.layers if layer.quality])
        if unchanged := [layer.name for layer in self.layers if layer.quality and layer.quality.kept_start]:
            lines.append(f"no better than the rounding they started from, which is kept: {', '.join(unchanged)}")
        if any(layer.sampled for layer in self.layers):
            lines.append("errors are measured on a sample of rows; `quantloom verify` measures every weight")
        if self.adapter is not None:
            lines += adapter_lines(self.adapter, {layer.name: layer.gain for layer in self.layers if layer.gain})
        lines += [f"warning: {text}" for text in self.found]
        lines += [f"make files of it: {assemble_command(self.output)}"] if is_store(self.output) else []
        lines.append(f"check it: {self.verify_command}")
        return "\n".join(map(printable, lines))

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        sizes = f"{show_size(self.nbytes_in)} -> {show_size(self.nbytes_out)}"
        names = f"{', '.join(self.source)!r} -> {self.output!r}"
        return f"Report({names}: {self._done}, {sizes}, {show_seconds(self.seconds)})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        if self.layers:
            yield Text(f"Worst layers by error (of {len(self.layers)}):")
            yield self.table(WORST_SHOWN)
        yield Text(self.summary(), overflow=options.overflow or "fold")  # soft wrapping must not cut it

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(layer.name)}</td><td>{html.escape(layer.format)}</td>"
            f"{''.join(f'<td>{column.of(layer)}</td>' for column in self._columns)}"
            f"<td>{show_size(layer.nbytes_in)}</td><td>{show_size(layer.nbytes_out)}</td></tr>"
            for layer in self.worst
        )
        errors = "".join(f"<th>{column.heading}</th>" for column in self._columns)
        sizes = "".join(f"<th>{heading}</th>" for heading in self._sizes)
        head = f"<tr><th>layer</th><th>format</th>{errors}{sizes}</tr>"
        return f"<pre>{html.escape(self.summary())}</pre><table>{head}{rows}</table>"


def make_report(session: Session, seconds: float, distributed: bool = False) -> Report:
    """Joins the receipts of each layer's row ranges."""
    plan, receipts = session.plan, session.receipts
    joined: dict[str, list[Receipt]] = {}
    for receipt in receipts:
        joined.setdefault(receipt.name, []).append(receipt)
    layers = []
    for layer in plan.quantized:
        if (parts := joined.get(layer.layer.name)) is None:  # its line in the journal of an earlier run was damaged
            continue
        whole = Receipt(
            layer.layer.name, layer.format, layer.layer.nbytes, layer.nbytes_out, sum(part.seconds for part in parts),
            sum(part.squared_error for part in parts), sum(part.squared_weight for part in parts),
        )  # fmt: skip
        gain = parts[0].gain
        error = whole.error or 0.0 if gain is None else gain.before.weight
        written = layer.adapter.nbytes if layer.adapter is not None and plan.base is not None else whole.nbytes_out
        measured = error, whole.seconds, layer.rounding, parts[0].quality, gain
        layers.append(LayerReport(whole.name, whole.format, whole.nbytes_in, written, *measured))
    wrong = scalar_errors(plan.layers, receipts)
    index = index_file(plan.shards) if is_single_file(plan.output.path) else None
    return Report(
        plan.recipe.source, plan.output.path, tuple(layers), dict(plan.kept.most_common()),
        dict(plan.changed.most_common()),
        plan.nbytes_in, _written(plan), seconds, peak_memory(),
        (*plan.notes, *session.notes), plan.warnings, distributed,
        plan.recipe.statistics or "", str(index[0]) if index else "", plan.adapter,
        plan.base_path, wrong, (*_failures(session.failed), *scalar_warnings(wrong, receipts)),
        sum(receipt.nbytes_in for receipt in session.resumed), session.failed,
    )  # fmt: skip


def _failures(failed: Mapping[str, str]) -> list[str]:
    """Of layers that are kept because they failed."""
    if not failed:
        return []
    return [f"{count(len(failed), 'layer')} failed and stayed unquantized: {listed(list(failed), 4)}"]


def _written(plan: Plan) -> int:
    """Bytes of the output; of the adapter where that is all."""
    return plan.adapter.nbytes if plan.base is not None and plan.adapter is not None else plan.nbytes_out
