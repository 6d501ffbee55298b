#!/usr/bin/env python3
"""quantloom beside the programs of peers.py: whole processes, on the same checkpoint, in turns within one run.

    python benchmarks/compare.py [--arch llama] [--gb 0.5] [--repeats 3] [--cases fp8,nvfp4] [--programs quantloom,...]

CPU seconds (user and system, of the whole process tree) and ratios within one run hold on a busy machine; wall seconds
hold only if nothing else runs. "Net" is net of imports: a process that only imports what the program imports runs right
before each conversion and is subtracted; "wall s" is the whole process. Ratios are to quantloom. GB are source bytes,
kept layers included; every program is told to keep the same ones, and the output sizes show that it did. quantloom
flushes its output to the disk, the others leave that to the system.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measure import Failed, Usage, generate, machine, measure, median, save_json, size, table
from peers import CASES, EXCLUDE, PEERS, QUANTLOOM, Case, Program, create, default_envs

ALL = (QUANTLOOM, *PEERS)
Key = tuple[str, str]
"""Names of case and program."""


@dataclass(frozen=True)
class Result:
    """A program on a case, net of imports."""

    case: str
    program: str
    cpu_per_gb: float
    wall_per_gb: float
    wall: float
    """Seconds of the whole process, imports included."""
    peak_mb: float
    out_mb: float


@dataclass
class Runs:
    """What has been measured so far."""

    conversions: dict[Key, list[Usage]] = field(default_factory=lambda: defaultdict(list))
    imports: dict[Key, list[Usage]] = field(default_factory=lambda: defaultdict(list))
    """The import-only process right before each conversion."""
    out: dict[Key, int] = field(default_factory=dict)
    """Bytes written."""
    failures: dict[Key, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What is compared on what."""

    cases: Sequence[Case]
    programs: Sequence[Program]
    pythons: dict[str, str]
    """Interpreter by program."""
    source: Path
    exclude: str
    scratch: Path

    def run(self, repeats: int) -> Runs:
        """Every program in turn, its imports right before its work, so that a busy minute hits all of them."""
        runs = Runs()
        for program in self.programs:
            self._imports(program)  # fills the caches
        for _ in range(repeats):
            for case in self.cases:
                for program in self.programs:
                    self._convert(case, program, runs)
        return runs

    def _imports(self, program: Program) -> Usage:
        return measure([self.pythons[program.name], "-c", program.imports], dict(program.env))

    def _convert(self, case: Case, program: Program, runs: Runs) -> None:
        key, dst = (case.name, program.name), self.scratch / "out"
        arguments = program.arguments(case, self.source, dst, self.exclude)
        if arguments is None or key in runs.failures:
            return
        try:
            imports = self._imports(program)
            used = measure([self.pythons[program.name], *arguments], dict(program.env))
            runs.imports[key].append(imports)
            runs.conversions[key].append(used)
            runs.out[key] = size(dst)
            print(f"  {case.name}, {program.name}: {used.cpu:.1f} CPU s, {used.wall:.1f} s", file=sys.stderr)
        except Failed as error:
            runs.failures[key] = str(error)
            print(f"  {case.name}, {program.name} failed: {error}", file=sys.stderr)
        finally:
            shutil.rmtree(dst, ignore_errors=True)


def results(runs: Runs, gb: float) -> Iterator[Result]:
    """Each conversion less the imports measured right before it, so that a slow minute cancels; then the median."""
    for key, usages in runs.conversions.items():
        net = median(used.less(imports) for used, imports in zip(usages, runs.imports[key], strict=True))
        whole = median(usages)
        yield Result(*key, net.cpu / gb, net.wall / gb, whole.wall, whole.peak, runs.out[key] / 1e6)


def median_imports(runs: Runs) -> dict[str, Usage]:
    """By program, over all cases."""
    names = dict.fromkeys(program for _, program in runs.imports)
    return {name: median(u for (_, of), some in runs.imports.items() if of == name for u in some) for name in names}


def ratio(value: float, base: float) -> str:
    """Empty where a busy machine or a tiny checkpoint has left nothing to divide."""
    return f"{value / base:.1f}x" if value > 0 and base > 0 else ""


def rows(found: Sequence[Result]) -> Iterator[list[str]]:
    """One per result, beside quantloom's figures for the same case."""
    ours = {r.case: r for r in found if r.program == QUANTLOOM.name}
    for r in sorted(found, key=lambda r: [case.name for case in CASES].index(r.case)):
        seconds = [f"{r.cpu_per_gb:.2f}", f"{r.wall_per_gb:.2f}", f"{r.wall:.1f}"]
        sizes = [f"{r.peak_mb:.0f}", f"{r.out_mb:.0f}"]
        yield [r.case, r.program, *seconds, *sizes, *ratios(r, ours.get(r.case))]


def ratios(r: Result, base: Result | None) -> list[str]:
    if base is None:
        return [""] * 3
    pairs = ((r.cpu_per_gb, base.cpu_per_gb), (r.wall_per_gb, base.wall_per_gb), (r.wall, base.wall))
    return [ratio(*pair) for pair in pairs]


COLUMNS = (
    "format", "program", "CPU s/GB net", "wall s/GB net", "wall s", "peak MB", "out MB",
    "CPU net ratio", "wall net ratio", "wall ratio",
)  # fmt: skip


def report(runs: Runs, found: Sequence[Result]) -> str:
    imports = [[p, f"{u.cpu:.2f}", f"{u.wall:.2f}", f"{u.peak:.0f}"] for p, u in median_imports(runs).items()]
    failed = [f"{case}, {program}: {why.splitlines()[-1]}" for (case, program), why in runs.failures.items()]
    tables = [table(COLUMNS, rows(found)), table(("imports only", "CPU s", "wall s", "peak MB"), imports)]
    return "\n\n".join([*tables, *(["failed:\n" + "\n".join(failed)] if failed else [])])


def pick_cases(wanted: str) -> list[Case]:
    """Cases whose name starts with one of the given words."""
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    return [case for case in CASES if not words or any(case.name.startswith(word) for word in words)]


def pick_programs(wanted: str) -> list[Program]:
    by_name = {program.name: program for program in ALL}
    return [by_name[name.strip()] for name in wanted.split(",")] if wanted else list(ALL)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare quantloom with its peers on one generated checkpoint.")
    parser.add_argument("--arch", choices=EXCLUDE, default="llama")
    parser.add_argument("--gb", type=float, default=0.5)
    parser.add_argument("--shards", type=int, default=1, help="convert_to_quant takes part with one file only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", default="", help=f"prefixes of: {', '.join(case.name for case in CASES)}")
    parser.add_argument("--programs", default="", help=f"some of: {', '.join(program.name for program in ALL)}")
    parser.add_argument("--envs", type=Path, default=default_envs(), help="folder of the peers' environments")
    parser.add_argument("--temp", type=Path, help="folder for checkpoints and outputs, both removed at the end")
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    programs = pick_programs(args.programs)
    pythons = {p.name: str(create(p, args.envs)) if p.requirements else sys.executable for p in programs}
    with tempfile.TemporaryDirectory(dir=args.temp, prefix="quantloom-compare-") as name:
        scratch, cases = Path(name), pick_cases(args.cases)
        nbytes = generate(scratch / "model", args.arch, args.gb, args.shards)
        runs = Bench(cases, programs, pythons, scratch / "model", EXCLUDE[args.arch], scratch).run(args.repeats)
    found = list(results(runs, nbytes / 1e9))
    print(f"{args.arch}, {nbytes / 1e9:.2f} GB of bf16, {args.shards} file(s), median of {args.repeats}\n")
    print(report(runs, found))
    facts = {"arch": args.arch, "bytes": nbytes, "repeats": args.repeats, "machine": machine()}
    imports = {program: asdict(used) for program, used in median_imports(runs).items()}
    save_json(args.json, {**facts, "imports": imports, "results": [asdict(r) for r in found]})
    return 1 if runs.failures else 0


if __name__ == "__main__":
    sys.exit(main())
