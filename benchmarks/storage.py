#!/usr/bin/env python3
"""What this machine's storage and memory allow, to put beside a conversion's GB/s.

    python benchmarks/storage.py [--mb 512] [--folder DIR]

A conversion can take no less than the larger of in / read and out / write.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import machine, save_json, table

MIB = 1 << 20


@dataclass(frozen=True)
class Rate:
    """A rate, best of the repeats."""

    name: str
    per_wall_s: float
    """GB for each second."""
    per_cpu_s: float
    """GB for each CPU second of this process; what holds on a shared machine."""


def best(name: str, nbytes: int, work: Callable[[], None], repeats: int = 3) -> Rate:
    wall = cpu = float("inf")
    for _ in range(repeats):
        began, spent = time.perf_counter(), time.process_time()
        work()
        wall = min(wall, time.perf_counter() - began)
        cpu = min(cpu, time.process_time() - spent)
    return Rate(name, nbytes / wall / 1e9, nbytes / max(cpu, 1e-6) / 1e9)


def write(path: Path, nbytes: int, sparse: bool, sync: bool) -> None:
    """Random bytes, so that no file system stores less than it is given."""
    path.unlink(missing_ok=True)
    block = os.urandom(MIB)
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        if sparse:
            os.ftruncate(fd, nbytes)
        for start in range(0, nbytes, MIB):
            os.pwrite(fd, block, start)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path, block: int) -> None:
    buffer = bytearray(block)
    fd = os.open(path, os.O_RDONLY)
    try:
        start = 0
        while got := os.preadv(fd, [buffer], start):
            start += got
    finally:
        os.close(fd)


def read_cold(path: Path) -> None:
    """After asking the kernel to forget the file; a host below a virtual machine may still have it."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    read(path, 16 * MIB)


def direct_read(path: Path) -> None:
    """Past the page cache; only where the file system allows."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 16 * MIB) as buffer:
            start = 0
            while got := os.preadv(fd, [buffer], start):
                start += got
    finally:
        os.close(fd)


def memory_rate(nbytes: int) -> Rate:
    source, target = memoryview(bytearray(os.urandom(MIB)) * (nbytes // MIB)), memoryview(bytearray(nbytes))

    def copy() -> None:
        target[:] = source

    return best("memcpy, one thread", nbytes, copy)


def storage_rates(path: Path, nbytes: int) -> list[Rate]:
    rates = [
        best("write, left to the page cache", nbytes, lambda: write(path, nbytes, sparse=False, sync=False)),
        best("write + fsync", nbytes, lambda: write(path, nbytes, sparse=False, sync=True)),
        best("write + fsync, sparse file first", nbytes, lambda: write(path, nbytes, sparse=True, sync=True)),
        best("read, warm, 256 KiB blocks", nbytes, lambda: read(path, MIB // 4)),
        best("read, warm, 1 MiB blocks", nbytes, lambda: read(path, MIB)),
    ]
    if hasattr(os, "posix_fadvise"):
        rates.append(best("read, dropped from the cache", nbytes, lambda: read_cold(path)))
    try:
        rates.append(best("read, O_DIRECT", nbytes, lambda: direct_read(path)))
    except (OSError, AttributeError) as error:
        print(f"no O_DIRECT here: {error}", file=sys.stderr)
    return rates


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rates of this machine's storage and memory.")
    parser.add_argument("--mb", type=int, default=512, help="MiB moved for each figure")
    parser.add_argument("--folder", type=Path, help="where to write, if not the folder for temporary files")
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    args = parser.parse_args(argv)
    nbytes = args.mb * MIB
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="quantloom-storage-") as folder:
        rates = [*storage_rates(Path(folder) / "file", nbytes), memory_rate(nbytes)]
    body = [[rate.name, f"{rate.per_wall_s:.2f}", f"{rate.per_cpu_s:.2f}"] for rate in rates]
    print(table(("what", "GB / s", "GB / CPU s"), body))
    save_json(args.json, {"mib": args.mb, "machine": machine(), "rates": [asdict(rate) for rate in rates]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
