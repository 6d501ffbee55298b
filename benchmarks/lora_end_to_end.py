#!/usr/bin/env python3
"""Sentence embeddings of MiniLM with quantized weights and an adapter beside them, against the float32 model's.

    python benchmarks/lora_end_to_end.py [--format nvfp4] [--ranks 8,16,64] [--sources random,docstrings,english,both]
                                         [--parts adapters,ranks,budgets,dtypes] [--json FILE]

All 37 linear layers are quantized and have an adapter, rank 32 where nothing else is said. Sentences, measures and
statistics are those of rounding_end_to_end.py; the pipeline writes model and adapter, both are read back, and the
products of the adapter are added to the decoded weights.

- adapters: every rounding and method, with statistics of every source
- ranks: others than 32, for ``calibrated`` with method ``weighted``
- budgets: the bytes of rank 8 and 32 in all layers, spent where the error falls most per byte instead
- dtypes: the adapter in half precision
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lora_cases import EVERY, adapted
from measure import machine, save_json, size, table
from rounding_cases import chosen
from rounding_end_to_end import FORMATS, SOURCES, Model, Stores
from sentences import EVALUATION

from quantloom.stages.inputs import release

RANK = 32
PARTS = ("adapters", "ranks", "budgets", "dtypes")
BEST = "both"
"""Statistics of the rows about ranks, budgets and dtypes."""
MEASURED = ("random", "docstrings", "english", "both")
TARGETS = {
    ("mse", "svd", "-"): (0.983, 0.975), ("mse", "weighted", SOURCES["random"]): (0.9905, 0.985),
    ("calibrated", "weighted", SOURCES["both"]): (0.9908, 0.985),
}  # fmt: skip
"""Cosine and Spearman's correlation at rank 32."""


@dataclass(frozen=True)
class Case:
    """A way to quantize the model and to make its adapter."""

    rounding: str
    method: str = ""
    """Of the adapter; empty: there is none."""
    source: str = ""
    """Of the statistics; empty: there are none."""
    words: str = ""
    """What else the row is about."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further ones of the adapter."""


@dataclass(frozen=True)
class Row:
    """What became of the embeddings."""

    rounding: str
    method: str
    words: str
    statistics: str
    cosine: float
    lowest: float
    spearman: float
    megabytes: float
    """Of the adapter's file, in 1e6."""
    seconds: float
    """CPU seconds of the conversion."""

    def cells(self) -> list[str]:
        numbers = (f"{self.cosine:.5f}", f"{self.lowest:.4f}", f"{self.spearman:.4f}")
        cost = (f"{self.megabytes:.2f}", f"{self.seconds:.1f}")
        return [self.rounding, self.method or "none", self.words, self.statistics, *numbers, *cost]


class Bench:
    """Everything that rows need."""

    def __init__(self, folder: Path, format: str) -> None:
        self.folder, self.format, self.model = folder, format, Model()
        self.stores = Stores(self.model, folder)

    def adapters(self, sources: Sequence[str]) -> Iterator[Case]:
        yield from (Case("mse", method) for method in ("", "svd", "svdquant"))
        for source in sources:
            yield from (Case("mse", method, source) for method in ("weighted", "svdquant"))
        for source in sources:
            yield from (Case("calibrated", method, source) for method in ("", "svd", "weighted", "svdquant"))

    def ranks(self, ranks: Sequence[int]) -> Iterator[Case]:
        for rank in ranks:
            yield Case("calibrated", "weighted", BEST, f"rank {rank}", (("rank", rank),))

    def budgets(self) -> Iterator[Case]:
        for rank in (8, RANK):
            budget = 4 * rank * sum(sum(self.model.weight(name).shape) for name in self.model.layers)
            options = (("rank", "auto"), ("budget", budget))
            yield Case("calibrated", "weighted", BEST, f"budget of rank {rank}", options)

    def dtypes(self) -> Iterator[Case]:
        for dtype in ("BF16", "F16"):
            yield Case("calibrated", "weighted", BEST, dtype, (("dtype", dtype),))

    def row(self, case: Case) -> Row:
        quantize = {**FORMATS[self.format], "rounding": case.rounding}
        if case.source:
            quantize["statistics"] = self.stores.path(case.source)
        lora = {"rank": RANK, "target": EVERY, "method": case.method, **dict(case.options)} if case.method else None
        began = time.process_time()
        weights, report = adapted(self.model, self.folder, quantize, lora)
        seconds = time.process_time() - began
        assert len(report.layers) == len(self.model.layers)
        release()
        megabytes = size(Path(report.adapter.path)) / 1e6 if report.adapter else 0.0
        statistics = SOURCES[case.source] if case.source else "-"
        score = self.model.score(weights)
        return Row(case.rounding, case.method, case.words, statistics, *score, megabytes, seconds)


def misses(rows: Sequence[Row]) -> Iterator[str]:
    """Every target that is not met."""
    for row in rows:
        wanted = TARGETS.get((row.rounding, row.method, row.statistics))
        if wanted and not row.words and (row.cosine < wanted[0] or row.spearman < wanted[1]):
            got = f"{row.cosine:.5f} / {row.spearman:.4f}"
            yield f"{row.rounding} + {row.method}, {row.statistics}: {got}, wanted {wanted[0]} / {wanted[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Adapters end to end on MiniLM.")
    parser.add_argument("--format", choices=list(FORMATS), default="nvfp4", help="the targets are about nvfp4")
    parser.add_argument("--ranks", default="8,16,64", help="other than 32")
    parser.add_argument("--sources", default=",".join(MEASURED), help="statistics of the rows about adapters")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    parts = chosen(args.parts, PARTS)
    ranks = [int(rank) for rank in args.ranks.split(",")]
    given = {"adapters": [chosen(args.sources, list(SOURCES))], "ranks": [ranks]}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.format)
        cases = [case for part in parts for case in getattr(bench, part)(*given.get(part, []))]
        for source in dict.fromkeys(case.source for case in cases if case.source):
            bench.stores.path(source)  # made beforehand: its time is no row's
        for case in cases:
            rows.append(bench.row(case))
            print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    print(f"All linear layers of MiniLM in {args.format}, {len(EVALUATION)} sentences, rank {RANK}\n")
    heads = ["weights", "adapter", "", "statistics from", "cosine", "lowest", "Spearman", "adapter MB", "CPU s"]
    print(table(heads, [row.cells() for row in rows]))
    missed = list(misses(rows)) if args.format == "nvfp4" else []
    print("\nTargets missed:\n" + ("\n".join(f"- {line}" for line in missed) or "- none"))
    save_json(args.json, {"machine": machine(), "rows": [asdict(row) for row in rows], "missed": missed})
    return 0


if __name__ == "__main__":
    sys.exit(main())
