#!/usr/bin/env python3
"""How long quantloom takes to start: before it does anything, and until help is on the screen.

    python benchmarks/startup.py [--repeats 15]

Medians, after one run of each that fills the caches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from measure import Usage, machine, measure, median, save_json, table


def commands() -> dict[str, list[str]]:
    python = sys.executable
    script = Path(python).with_name("quantloom")
    return {
        "python alone": [python, "-c", "pass"],
        "import quantloom": [python, "-c", "import quantloom"],
        "python -m quantloom.flow.cli --help": [python, "-m", "quantloom.flow.cli", "--help"],
        **({"quantloom --help": [str(script), "--help"]} if script.exists() else {}),
        "import torch": [python, "-c", "import torch"],
    }


def collect(repeats: int) -> dict[str, Usage]:
    wanted = commands()
    used: dict[str, list[Usage]] = {name: [] for name in wanted}
    for argv in wanted.values():
        measure(argv)
    for _ in range(repeats):
        for name, argv in wanted.items():
            used[name].append(measure(argv))
    return {name: median(usages) for name, usages in used.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time of quantloom's start.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    args = parser.parse_args(argv)
    found = collect(args.repeats)
    body = [[name, f"{u.cpu:.3f}", f"{u.wall:.3f}", f"{u.peak:.0f}"] for name, u in found.items()]
    print(table(("start", "CPU s", "wall s", "peak MB"), body))
    usages = {name: asdict(used) for name, used in found.items()}
    save_json(args.json, {"repeats": args.repeats, "machine": machine(), "starts": usages})
    return 0


if __name__ == "__main__":
    sys.exit(main())
