#!/usr/bin/env python3
"""What checksums cost: ``verify`` beside plain reading of the same files, and conversions with and without them.

    python benchmarks/checksums.py [--mb 1024] [--folder DIR] [--repeats 5]

Best of the repeats, which alternate; files are warm in the page cache. The conversion without checksums leaves out
XXH3 of what is written, and nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measure import machine, save_json, table
from safetensors.torch import save_file

from quantloom import Pipeline
from quantloom.flow import checksums
from quantloom.flow.budget import cores
from quantloom.flow.verify_checksums import verify_checksums
from quantloom.formats.fileio import Reader
from quantloom.stages import writing

MIB = 1 << 20


class NoSums:
    """Counts nothing."""

    def add(self, name: str, offset: int, content: memoryview) -> None: ...

    def pieces(self) -> tuple[Any, ...]:
        return ()


def make(path: Path, mib: int) -> None:
    """Layers of 32 MiB in BF16."""
    torch.manual_seed(0)
    save_file({f"blocks.{n}.weight": torch.randn(4096, 4096).bfloat16() for n in range(mib // 32)}, path)


def read(path: Path) -> None:
    """All bytes, in ranges of 64 MiB, by as many threads as there are cores."""
    with Reader(path) as reader, ThreadPoolExecutor(cores()) as pool:

        def part(start: int) -> None:
            buffer = memoryview(bytearray(MIB))
            for first in range(start, min(start + 64 * MIB, reader.size), MIB):
                reader.read_into(buffer[: min(MIB, reader.size - first)], first)

        list(pool.map(part, range(0, reader.size, 64 * MIB)))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def convert(source: Path, output: Path, summing: type, heads: Callable[..., Any]) -> float:
    """CPU seconds, which hold on a shared machine."""
    taken, finished = writing.Summing, checksums.finished_head
    writing.Summing, checksums.finished_head = summing, heads  # type: ignore[misc, assignment]
    try:
        flow = Pipeline().read(source).quantize("fp8").write(output, overwrite=True, compute=False)
        return cpu_seconds(flow.compute)
    finally:
        writing.Summing, checksums.finished_head = taken, finished  # type: ignore[misc]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What checksums cost.")
    parser.add_argument("--mb", type=int, default=1024, help="MiB of the source; outputs of verify are half of it")
    parser.add_argument("--folder", type=Path, help="where to write, if not the folder for temporary files")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="quantloom-sums-") as folder:
        source, output = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
        make(source, args.mb)
        kinds: dict[str, tuple[type, Callable[..., Any]]] = {
            "with": (writing.Summing, checksums.finished_head), "without": (NoSums, lambda shard, sums: shard.head),
        }  # fmt: skip
        spent: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(args.repeats):
            for name, (summing, heads) in kinds.items():
                spent[name].append(convert(source, output, summing, heads))
        convert(source, output, *kinds["with"])
        nbytes = output.stat().st_size
        rates: dict[str, list[float]] = {"read": [], "verify": []}
        for _ in range(args.repeats):
            rates["read"].append(nbytes / 1e9 / seconds(lambda: read(output)))
            rates["verify"].append(nbytes / 1e9 / seconds(lambda: verify_checksums(str(output))))
    share = statistics.median(a / b for a, b in zip(spent["with"], spent["without"], strict=True)) - 1
    body = [[f"{name}, GB / s", f"{max(values):.2f}"] for name, values in rates.items()]
    body += [[f"fp8 {name} checksums, CPU s", f"{min(values):.2f}"] for name, values in spent.items()]
    body += [["cost of checksums, median of pairs", f"{share:.1%}"]]
    print(table(("what", "value"), body))
    save_json(args.json, {"mib": args.mb, "machine": machine(), "rates": rates, "cpu_seconds": spent})
    return 0


if __name__ == "__main__":
    sys.exit(main())
