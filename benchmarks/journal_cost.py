"""What keeping a journal costs: the same conversion with the usual syncs, and with none before the commit.

    python benchmarks/journal_cost.py --gb 8 --format fp8 [--device cuda] [--folder /storage/to/measure] [--rounds 3]

Rounds alternate, so that a busy machine slows both down; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from make_checkpoint import make_checkpoint

from quantloom import Pipeline
from quantloom.flow import session

NEVER = 1e9


class Counted:
    """Counts group commits, and how long they took."""

    def __init__(self) -> None:
        self.real, self.calls, self.seconds = session.Session._commit, 0, 0.0

    def __call__(self, run: session.Session) -> None:
        began = time.perf_counter()
        self.real(run)
        self.calls += 1
        self.seconds += time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--format", default="fp8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    usual = session.INTERVAL
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "in"
        make_checkpoint(source, "flux", args.gb)
        flow = Pipeline(device=args.device).read(source).quantize(args.format, rounding="nearest")
        flow.write(Path(folder) / "out.safetensors", overwrite=True)  # warms caches and the device up
        seconds: dict[float, list[float]] = {usual: [], NEVER: []}
        counted = Counted()
        session.Session._commit = lambda run: counted(run)  # type: ignore[method-assign]
        for _ in range(args.rounds):
            for interval, taken in seconds.items():
                session.INTERVAL = interval
                before = counted.calls, counted.seconds
                began = time.perf_counter()
                flow.write(Path(folder) / "out.safetensors", overwrite=True)
                taken.append(time.perf_counter() - began)
                calls, spent = counted.calls - before[0], counted.seconds - before[1]
                print(f"every {interval:g} s: {taken[-1]:.2f} s, {calls} group commits in {spent:.2f} s", flush=True)
        with_, without = (statistics.median(taken) for taken in seconds.values())
        print(json.dumps({"gb": args.gb, "format": args.format, "device": args.device,
                          "with": with_, "without": without, "ratio": round(with_ / without, 4)}))  # fmt: skip


if __name__ == "__main__":
    main()
