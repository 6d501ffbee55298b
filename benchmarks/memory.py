#!/usr/bin/env python3
"""quantloom's peak memory over the size of the checkpoint: it should not grow.

    python benchmarks/memory.py [--formats fp8,nvfp4] [--sizes 0.5,1,2,4,8] [--arch flux] [-- OPTIONS OF CONVERT]

Asserts nothing. The kernel's own figure for the whole process (libraries included) is what a container limit sees, so
that is what is reported. One checkpoint and one output are on the disk at a time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import generate, machine, measure, save_json, table
from peers import QUANTLOOM


@dataclass(frozen=True)
class Point:
    """One conversion."""

    format: str
    gb: float
    """Bytes of the checkpoint's tensors / 1e9."""
    peak_mb: float
    cpu_per_gb: float
    """Imports included."""


def convert(source: Path, format_: str, gb: float, options: Sequence[str]) -> Point:
    out = source.with_name("out")
    argv = [sys.executable, "-m", "quantloom.flow.cli", "convert", str(source), str(out), "--format", format_]
    used = measure([*argv, "--overwrite", "--quiet", *options])
    shutil.rmtree(out)
    return Point(format_, round(gb, 3), used.peak, used.cpu / gb)


def collect(formats: Sequence[str], sizes: Sequence[float], args: argparse.Namespace) -> list[Point]:
    points = []
    for gb in sizes:
        with tempfile.TemporaryDirectory(dir=args.temp, prefix="quantloom-memory-") as folder:
            source = Path(folder) / "model"
            made = generate(source, args.arch, gb, args.shards) / 1e9
            for format_ in formats:
                points.append(convert(source, format_, made, args.options))
                print(f"  {format_}, {made:.2f} GB: {points[-1].peak_mb:.0f} MB", file=sys.stderr)
    return points


def spread(peaks: Sequence[float]) -> float:
    """Largest over smallest, in percent above it."""
    return 100 * (max(peaks) / min(peaks) - 1)


def report(points: Sequence[Point], formats: Sequence[str]) -> str:
    by_format = {f: [p for p in points if p.format == f] for f in formats}
    columns = ["GB", *(f"{f}: peak MB" for f in formats), *(f"{f}: CPU s/GB" for f in formats)]
    body = [
        [f"{some[0].gb:.2f}", *(f"{p.peak_mb:.0f}" for p in some), *(f"{p.cpu_per_gb:.2f}" for p in some)]
        for some in zip(*by_format.values(), strict=True)
    ]
    spreads = [f"{f}: {spread([p.peak_mb for p in some]):.1f} %" for f, some in by_format.items()]
    return table(columns, body) + "\n\nspread of the peak, largest over smallest: " + ", ".join(spreads)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak memory of quantloom over checkpoint sizes.")
    parser.add_argument("--formats", default="fp8,nvfp4")
    parser.add_argument("--sizes", default="0.5,1,2,4,8", help="in 1e9 bytes")
    parser.add_argument("--arch", default="flux")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--temp", type=Path, help="folder for checkpoints and outputs, both removed at the end")
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    parser.add_argument("options", nargs="*", help="more options of quantloom convert, after --")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    formats, sizes = args.formats.split(","), [float(gb) for gb in args.sizes.split(",")]
    imports = measure([sys.executable, "-c", QUANTLOOM.imports])
    points = collect(formats, sizes, args)
    print(report(points, formats))
    print(f"imports alone: {imports.peak:.0f} MB, {imports.cpu:.2f} CPU s")
    document = {"arch": args.arch, "options": args.options, "imports": asdict(imports), "machine": machine()}
    save_json(args.json, {**document, "points": [asdict(p) for p in points]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
