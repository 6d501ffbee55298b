"""Runs that are killed at a random moment and started again until they end: helper of test_kills and kill_campaign.

A run is a fork of a process that has torch loaded, so that one costs a tenth of a second. It dies at one of the calls
by which it changes the disk (before it, or with half of it done; with what was not synced lost, as when the power
goes), after some time, or once its journal has some lines.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import psutil
from checkpoints import FORMATS, environment, listing, make_tensors, write_file, write_folder

import quantloom

PAUSE = 0.001
"""Seconds that each call takes longer where a run is killed by the clock."""


@dataclass(frozen=True)
class Case:
    """A conversion, and what it finds."""

    name: str
    options: tuple[str, ...]
    sharded: bool = False
    """Whether source and output are folders of shards."""
    replaces: bool = False
    """Whether there is an older output, in other shards."""
    fails: str = ""
    """A layer that cannot be converted, in every run."""
    scheduler: str = "threads"
    store: bool = False
    """Whether it writes to a Zarr store, of which the same run makes files."""


@dataclass(frozen=True)
class Moment:
    """When and how a run dies; nothing of it: it does not."""

    call: int | None = None
    """At this one of its calls that change the disk, counted from 0."""
    torn: bool = False
    """Half of what this call would write is written."""
    power: bool = False
    """Some of what was not synced is lost."""
    seed: int = 0
    """Decides what is lost."""
    delay: float | None = None
    """So many seconds after it began."""
    lines: int | None = None
    """When its journal has so many lines."""


UNDISTURBED = Moment()
_MOST_SECONDS = 200
"""A run that takes longer hangs."""


@dataclass
class Outcome:
    """What a trial did, and what was wrong with its end."""

    case: str
    seed: int
    moments: list[Moment] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    """Where each kill found the run."""
    problem: str = ""


def options_of(name: str) -> tuple[str, ...]:
    """The command line of an entry of FORMATS."""
    pairs = FORMATS[name].items()
    return tuple(word for key, value in pairs for word in (f"--{key.replace('_', '-')}", str(value)))


_SHARDS = ("--shard-size", "100KB")
_LORA = ("--preset", "none", "--lora-rank", "4", "--lora-target", "mlp", "--lora-depth", "9")

CASES = {
    case.name: case
    for case in [
        *(Case(name, options_of(name)) for name in FORMATS),
        *(Case(f"{name}, sync", options_of(name), scheduler="sync") for name in ("fp8", "nvfp4")),
        *(Case(f"{name} in shards", (*options_of(name), *_SHARDS), sharded=True) for name in ("fp8 row", "nvfp4")),
        Case("replaced shards", (*options_of("int8"), "--overwrite", "--shard-size", "300KB"), True, True),
        Case("replaced file", (*options_of("int8"), "--overwrite"), replaces=True),
        Case("kept layer", (*options_of("mxfp8"), "--on-error", "keep", *_SHARDS), True, fails="blocks.1.mlp.up"),
        Case("kept layer, replaced", (*options_of("fp8"), "--on-error", "keep", "--overwrite"), True, True, "odd"),
        Case("adapter", (*options_of("nvfp4"), *_LORA)),
        Case("peft adapter, shards", (*options_of("fp8"), *_LORA, "--lora-dialect", "peft", *_SHARDS), True),
        Case("verified", (*options_of("mxfp8"), "--verify", *_SHARDS), True),
        Case("store", (*options_of("nvfp4"), *_SHARDS), True, store=True),
        Case("replaced store", (*options_of("nvfp4"), *_SHARDS, "--overwrite"), True, True, store=True),
        Case("verified store", (*options_of("fp8"), "--verify", *_SHARDS), True, store=True),
    ]
}


# -- in the process that is killed -------------------------------------------------------------------------------------


class Disk:
    """Counts the calls that change the disk, and ends this process at one of them."""

    def __init__(self, moment: Moment, pause: float) -> None:
        self.calls = 0
        self._moment, self._pause = moment, pause
        self._lock = threading.Lock()
        self._unsynced: dict[tuple[int, int], list[tuple[int, int, bytes]]] = {}

    def install(self) -> None:
        from quantloom.flow.run_journal import FileLog

        for name in ("pwrite", "fsync", "replace", "unlink", "mkdir", "rmdir"):
            setattr(os, name, self._watched(getattr(os, name), name))
        real = FileLog.append

        def append(log: FileLog, lines: bytes) -> None:
            with self._lock:
                if self._is_now():
                    if self._moment.torn:
                        with log.path.open("ab") as file:
                            file.write(lines[: len(lines) // 2])
                    self._die()
            real(log, lines)

        FileLog.append = append  # type: ignore[method-assign]

    def _watched(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            time.sleep(self._pause)
            with self._lock:
                if self._is_now():
                    if self._moment.torn and name == "pwrite":
                        descriptor, content, offset = arguments
                        call(descriptor, content[: len(content) // 2], offset)
                    elif self._moment.torn:
                        call(*arguments, **named)
                    self._die()
                if name == "pwrite":
                    self._remember(*arguments)
                elif name == "fsync":
                    status = os.fstat(arguments[0])
                    self._unsynced.pop((status.st_dev, status.st_ino), None)
                return call(*arguments, **named)

        return watched

    def _remember(self, descriptor: int, content: Any, offset: int) -> None:
        if self._moment.power:
            status = os.fstat(descriptor)
            files = self._unsynced.setdefault((status.st_dev, status.st_ino), [])
            files.append((os.dup(os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)), offset,
                          os.pread(descriptor, len(content), offset)))  # fmt: skip

    def _is_now(self) -> bool:
        self.calls += 1
        return self.calls - 1 == self._moment.call

    def _die(self) -> None:
        lost = random.Random(self._moment.seed)
        for writes in self._unsynced.values():
            share = lost.choice([0.0, 0.5, 1.0])
            for descriptor, offset, before in reversed(writes):
                if lost.random() < share:
                    os.lseek(descriptor, offset, os.SEEK_SET)
                    os.write(descriptor, before)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def _convert(arguments: list[str], case: Case, moment: Moment, words: str) -> None:
    """The command, in a process of its own; ``words``: a file for what it prints and the number of its calls."""
    from quantloom.flow import cli, graph, parts, recovery, session
    from quantloom.formats.errors import CheckpointError
    from quantloom.stages import writing

    session.INTERVAL, session.SHARE, recovery.PAUSE = 0.01, 0, 0.0
    graph.BATCH_BYTES, parts.PART_BYTES = 1, 40_000
    real = writing.Write.run

    def run(step: writing.Write, work: Any) -> Any:
        if work.plan.format and work.plan.layer.name == case.fails:
            raise CheckpointError(f"{case.fails}: broken for good")
        return real(step, work)

    if case.fails:
        writing.Write.run = run  # type: ignore[method-assign]
    with open(words, "w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        clocked = moment.delay is not None or moment.lines is not None
        disk = Disk(moment, PAUSE if clocked else 0.0)
        disk.install()
        try:
            if case.store:
                _store(arguments, Path(words))
            cli.main(_assembling(arguments, case.replaces) if case.store else arguments)
        finally:
            file.write(f"\ncalls {disk.calls}\n")


def _store(arguments: list[str], words: Path) -> None:
    """The conversion, unless an earlier run had finished it."""
    from quantloom.flow import cli

    try:
        cli.main(arguments)
    except SystemExit as ended:
        sys.stdout.flush()
        if ended.code and "exists already and is complete" not in " ".join(words.read_text().split()):
            raise


def _assembling(arguments: list[str], replaces: bool) -> list[str]:
    store = Path(arguments[2])
    return ["assemble", str(store), f"{store.with_name('out')}/", *(["--overwrite"] if replaces else [])]


# -- in the process that kills -----------------------------------------------------------------------------------------


@cache
def _forks() -> Any:
    forks = multiprocessing.get_context("forkserver")
    folders = [Path(quantloom.__file__).parent / name for name in ("formats", "stages", "flow")]
    modules = [path for folder in folders for path in sorted(folder.glob("[a-z]*.py"))]
    own = [f"quantloom.{path.parent.name}.{path.stem}" for path in modules]
    forks.set_forkserver_preload(["torch", "pytest", "dask.threaded", "dask.local", "filelock", "rich.table", *own])
    return forks


def kill(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    status: int
    """-9: killed."""
    words: str
    calls: int


class Bench:
    """A case with its source, what lies at the output before, and what an undisturbed run makes of it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self._folder = case, folder
        source = folder / "source"
        self._source = write_folder(source) if case.sharded else write_file(source / "tiny.safetensors")
        self._before = folder / "before"
        self._before.mkdir()
        if case.replaces and case.store:  # files are replaced by files of their names
            self._run(self._source, self._before, (*self.case.options, "--rounding", "nearest"))
        elif case.replaces:
            old = folder / "old"
            small = {name: x for name, x in make_tensors(1).items() if "blocks.0" in name}
            write_folder(old, small, shards=4) if case.sharded else write_file(old / "a.safetensors", small)
            self._run(old if case.sharded else old / "a.safetensors", self._before,
                      ("--format", "fp8", "--shard-size", "60KB") if case.sharded else ("--format", "fp8"))  # fmt: skip
        whole = self.place("whole")
        began = time.monotonic()
        ended = self.run(whole)
        self.seconds = time.monotonic() - began
        self.calls = ended.calls
        assert ended.status == 0, ended.words
        self.whole = listing(whole)
        assert self.whole != listing(self._before)

    def place(self, name: str) -> Path:
        """A folder to write to, with what lies there before."""
        return Path(shutil.copytree(self._before, self._folder / name))

    def run(
        self, place: Path, moment: Moment = UNDISTURBED, scheduler: str = "", strike: Callable[[int], None] = kill
    ) -> Ended:
        """One run that writes to ``place``; the scheduler is the case's, unless another one is given. ``strike`` does
        what comes from outside at the moment, to the process of this number."""
        chosen = ("--scheduler", scheduler) if scheduler else ()  # of the same option, the last one counts
        return self._run(self._source, place, (*self.case.options, *chosen), moment, strike)

    def _run(
        self, source: Path, place: Path, options: tuple[str, ...], moment: Moment = UNDISTURBED,
        strike: Callable[[int], None] = kill,
    ) -> Ended:  # fmt: skip
        output = place / ("out.zarr" if self.case.store else "out" if self.case.sharded else "out.safetensors")
        arguments = ["convert", str(source), str(output), "--quiet", "--workers", "2"]
        arguments += ["--scheduler", self.case.scheduler, *options]
        words = self._folder / "words.txt"
        words.unlink(missing_ok=True)
        alone = "distributed" in arguments or any("://" in word for word in arguments)  # Dask has threads of its own
        start = multiprocessing.get_context("spawn") if alone else _forks()
        process = start.Process(target=_convert, args=(arguments, self.case, moment, str(words)))
        process.start()
        _await(process, moment, place, strike)
        process.join(_MOST_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return Ended(-99, "hangs", 0)
        told = words.read_text() if words.exists() else ""
        calls = told.rpartition("calls ")[2].strip()
        return Ended(process.exitcode, told, int(calls) if calls.isdigit() else 0)

    def trial(self, seed: int, scheduler: str = "") -> Outcome:
        """A run that is killed one to three times and then ends; ``seed`` decides how. ``scheduler``: of the first."""
        chance, outcome = random.Random(seed), Outcome(self.case.name, seed)
        place = self.place(f"trial-{seed}")
        for number in range(chance.choice((1, 1, 2, 3))):
            moment = self._moment(chance, self.calls if number == 0 else self.calls // 3)
            ended = self.run(place, moment, scheduler if number == 0 else "")
            outcome.moments.append(moment)
            outcome.phases.append(self._phase(place) if ended.status == -9 else "ended before")
            if ended.status not in (0, -9) and not _is_done(ended):
                outcome.problem = f"a run that was to be killed failed: {ended.words}"
                return outcome
            if ended.status != -9:
                break
        ended = self.run(place)
        found = listing(place)
        if self.case.store or (ended.status and _is_done(ended)):  # complete, and killed before the locks went
            found = {name: value for name, value in found.items() if not name.endswith(".lock")}
        if ended.status and not _is_done(ended):
            outcome.problem = f"the last run failed: {ended.words}"
        if found != self.whole and not outcome.problem:
            names = sorted({*found, *self.whole})
            outcome.problem = f"differs in {[name for name in names if found.get(name) != self.whole.get(name)]}"
        if not outcome.problem:
            shutil.rmtree(place)
        return outcome

    def _moment(self, chance: random.Random, calls: int) -> Moment:
        """One of a run that makes about so many calls."""
        kind = chance.random()
        if kind < 0.15:
            return Moment(delay=chance.uniform(0, self.seconds))
        if kind < 0.25:
            return Moment(lines=chance.randint(1, 12))
        first, last = chance.choice(((0, 10), (0, calls), (calls - 20, calls), (calls - 20, calls)))
        call, seed = chance.randint(max(0, first), last), chance.randrange(1 << 30)
        return Moment(call=call, torn=chance.random() < 0.5, power=chance.random() < 0.5, seed=seed)

    def _phase(self, place: Path) -> str:
        journals = sorted([*place.rglob("*.journal.jsonl"), *place.rglob("journal/*.jsonl")])
        if not journals:
            here = {name: value for name, value in listing(place).items() if not name.endswith(".lock")}
            if self.case.store and any(name.startswith("out/") for name in here):
                return "assembling"
            return "after the commit" if here == self.whole else "planning"
        lines = b"".join(path.read_bytes() for path in journals).splitlines()
        if any(b'{"commit"' in line for line in lines[1:]):
            return "committing"
        if any(place.rglob("*.part.before")):
            return "second layout"
        return "running" if len(lines) > 1 else "running, nothing finished"


def _is_done(ended: Ended) -> bool:
    return ended.status != 0 and "exists already; pass --overwrite" in " ".join(ended.words.split())


def _await(process: Any, moment: Moment, place: Path, strike: Callable[[int], None]) -> None:
    """Strikes from outside, by the clock or by the journal."""
    if moment.delay is not None:
        process.join(moment.delay)
        if process.is_alive():
            strike(process.pid)
    while moment.lines is not None and process.is_alive():
        with contextlib.suppress(OSError):
            if any(path.read_bytes().count(b"\n") >= moment.lines for path in place.rglob("*.journal.jsonl")):
                strike(process.pid)
                return
        time.sleep(0.001)


def workers_of(pid: int) -> list[int]:
    """Processes of Dask workers that a process started, the oldest first."""
    below = psutil.Process(pid).children(recursive=True)
    return sorted(each.pid for each in below if "spawn_main" in " ".join(each.cmdline()))


class ByHand:
    """A Dask scheduler and workers, started as people do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.nannies: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", str(self.port))
        self.add_worker()
        self.add_worker()

    def add_worker(self) -> None:
        self.nannies.append(self._start("worker", self.address, "--nthreads", "1", "--local-directory",
                                        str(self._folder)))  # fmt: skip

    def wait_for_workers(self) -> None:
        """Until every nanny has its worker; AssertionError when that takes more than a minute."""
        deadline = time.monotonic() + 60
        while not all(workers_of(nanny.pid) for nanny in self.nannies):
            assert time.monotonic() < deadline, "no workers came"
            time.sleep(0.05)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        with (self._folder / "dask.txt").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "dask", *words, "--no-dashboard"], stdout=log, stderr=log,
                                    env=environment())  # fmt: skip

    def stop(self) -> None:
        """Kills everything, workers before those who would start them again."""
        processes = [each for each in (*self.nannies, self.scheduler) if each is not None]
        below = [pid for each in processes if each.poll() is None for pid in workers_of(each.pid)]
        for each in processes:
            each.kill()
            each.wait()
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.nannies, self.scheduler = [], None


def shown(outcome: Outcome) -> str:
    """All that is needed to see it again."""
    return json.dumps({"case": outcome.case, "seed": outcome.seed, "phases": outcome.phases,
                       "moments": [str(moment) for moment in outcome.moments], "problem": outcome.problem})  # fmt: skip
