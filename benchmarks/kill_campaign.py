"""Kills runs at random moments over all cases of tests/killing.py, and says what came of it.

    python benchmarks/kill_campaign.py --trials 500
    python benchmarks/kill_campaign.py --trials 20 --scheduler distributed

A trial is a conversion that is killed one to three times, each time started again, and compared with an undisturbed
one, byte for byte. With ``--scheduler distributed`` its first run has a cluster of processes. Needs Linux.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from killing import CASES, Bench, shown


def main() -> int:
    """The exit status: 1 when a trial failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheduler", default="", help="of the first run of each trial; default: the case's own")
    wanted = parser.parse_args()
    began, phases, kills, failures = time.monotonic(), Counter[str](), Counter[int](), 0
    with tempfile.TemporaryDirectory() as folder:
        benches = []
        for number, case in enumerate(CASES.values()):
            place = Path(folder, str(number))
            place.mkdir()
            benches.append(Bench(case, place))
        for number in range(wanted.trials):
            outcome = benches[number % len(benches)].trial(wanted.seed + number, wanted.scheduler)
            phases.update(outcome.phases)
            kills[sum(phase != "ended before" for phase in outcome.phases)] += 1
            if outcome.problem:
                failures += 1
                print(shown(outcome), flush=True)
            if number % 50 == 49:
                print(f"{number + 1} trials, {time.monotonic() - began:.0f} s, {failures} failures", flush=True)
    print(f"{wanted.trials} trials of {len(benches)} cases in {time.monotonic() - began:.0f} s: {failures} failures")
    print("kills:", ", ".join(f"{count} {phase}" for phase, count in phases.most_common()))
    print("trials by the number of kills:", dict(sorted(kills.items())))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
