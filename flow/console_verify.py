"""What people see of a verification: the worst layers, what is broken, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .adapter_report import GAINS, gain_lines
from .console import escape, make_table, stdout
from .quality import MEASURES, Column, gains
from .sizes import count
from .tables import Name

if TYPE_CHECKING:
    from .verify import Verification
    from .verify_checksums import ChecksumCheck


def print_verification(result: Verification, most: int) -> None:
    """Worst layers, problems, and the verdict."""
    console = stdout()
    measured = [column for column in (*MEASURES, *GAINS) if any(column.of(layer) for layer in result.worst)]
    columns = measured or [Column("relative error", lambda layer: f"{layer.error:.5f}")]
    table = make_table("layer", "format", *(f">{column.heading}" for column in columns))
    for layer in result.worst[:most]:
        table.add_row(Name(layer.name), layer.format, *(column.of(layer) for column in columns))
    if result.worst:
        console.print(f"Worst {min(most, len(result.worst))} of {count(len(result.worst), 'quantized layer')}:")
        console.print(table)
    for problem in result.problems:
        console.print(f"[red]broken:[/] {escape(problem)}", soft_wrap=True)
    if result.note:
        console.print(f"note: {escape(result.note)}", soft_wrap=True)
    for name in result.unknown if result.layers else ():
        console.print(f"[yellow]warning:[/] {escape(name)}: not in the source", soft_wrap=True)
    if off := [(layer.scalar_error, layer.name) for layer in result.layers if layer.scalar_error]:
        wrong = f"the weights of {count(len(off), 'layer')} are wrong, by {max(off)[0]:.3g} in {max(off)[1]}"
        console.print(f"[yellow]warning:[/] decoded by .weight_scalar, {escape(wrong)}", soft_wrap=True)
    beside = {layer.name: layer.gain for layer in result.worst if layer.gain}
    for line in [*gains([layer.quality for layer in result.worst if layer.quality]), *gain_lines(beside)]:
        console.print(line, soft_wrap=True)
    verdict = "sound" if result.ok else f"BROKEN ({count(len(result.problems), 'problem')})"
    summed = sum(check.tensors for check in result.checksums)
    layers = ", ".join([*_tallies(result), *([f"checksums of {count(summed, 'tensor')}"] if summed else [])])
    console.print(f"{escape(result.output)}: {verdict}; {layers}", soft_wrap=True)


def print_checksums(result: ChecksumCheck) -> None:
    """What is not as it was written, and the verdict."""
    console = stdout()
    for finding in result.findings:
        console.print(f"[red]broken:[/] {escape(str(finding))}", soft_wrap=True)
    console.print(escape(str(result)), soft_wrap=True)


def _tallies(result: Verification) -> list[str]:
    """How many layers are quantized, decoded, kept ..."""
    changed = {change: result.changed(change) for change in ("decoded", "cast", "corrected")}
    kept = len(result.layers) - len(result.worst) - sum(map(len, changed.values()))
    said = [count(len(result.worst), "quantized layer")] if result.worst or not changed["decoded"] else []
    for change, what in (("decoded", "layer"), ("cast", "tensor")):
        if found := changed[change]:
            error = max(layer.error for layer in found)
            said.append(f"{count(len(found), what)} {change} (relative error at most {error:.2g})")
    said.append(f"{count(kept, 'tensor')} kept as they were")
    return said + ([count(len(changed["corrected"]), "corrected bias vector")] if changed["corrected"] else [])
