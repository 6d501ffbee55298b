"""Whole processes, measured: CPU seconds of the process tree, wall seconds, peak memory. POSIX only (os.wait4).

The kernel starts a child's peak memory at that of the process that started it. Every program here that measures
memory therefore keeps itself small: it never imports torch, and generates checkpoints in a process of their own.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEGA = 1e6


class Failed(Exception):
    """A measured process that ended badly; the message holds the end of what it printed."""


@dataclass(frozen=True)
class Usage:
    """What one process, with all the children it waited for, used."""

    cpu: float
    """User and system seconds."""
    wall: float
    """Seconds from start to end."""
    peak: float
    """Largest resident memory of any one process of the tree, in 1e6 bytes."""

    def less(self, other: Usage) -> Usage:
        """Seconds beyond another's; the peak stays."""
        return Usage(self.cpu - other.cpu, self.wall - other.wall, self.peak)


def measure(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Usage:
    """Run a program to its end. Raises Failed if it cannot start or its exit status is not 0."""
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **(env or {})}
            )
        except OSError as error:
            raise Failed(f"{shlex.join(argv)[:200]}: {error}") from None
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(max(0, output.seek(0, os.SEEK_END) - 1500))
            said = output.read().decode(errors="replace").strip()
            raise Failed(f"exit status {process.returncode}: {shlex.join(argv)[:200]}\n{said}")
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return Usage(used.ru_utime + used.ru_stime, wall, used.ru_maxrss * kilobyte / MEGA)


def median(usages: Iterable[Usage]) -> Usage:
    """Median seconds, largest peak."""
    every = list(usages)
    cpu, wall = statistics.median(u.cpu for u in every), statistics.median(u.wall for u in every)
    return Usage(cpu, wall, max(u.peak for u in every))


def generate(folder: Path, arch: str, gb: float, shards: int = 1, dtype: str = "bf16", seed: int = 0) -> int:
    """Make a checkpoint in a process of its own; the bytes of its tensors."""
    options = ["--arch", arch, "--gb", str(gb), "--shards", str(shards), "--dtype", dtype, "--seed", str(seed)]
    argv = [sys.executable, str(HERE / "make_checkpoint.py"), str(folder), *options]
    made = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(json.loads(made)["nbytes"])


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; every column after the texts on the left is right-aligned by its first row."""
    every = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(columns))]
    numeric = [any(row[i][:1].isdigit() for row in every[1:]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + ":" if n else "-" * w for w, n in zip(widths, numeric, strict=True)]
    return "\n".join([line(every[0]), line(rule), *map(line, every[1:])])


def machine() -> dict[str, object]:
    """What the figures depend on."""
    return {"cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0], "platform": sys.platform}


def save_json(path: str | None, document: Mapping[str, object]) -> None:
    if path:
        Path(path).write_text(json.dumps(document, indent=1) + "\n")
