"""Looks at every worker of a cluster before work: what is installed there, and whether the disk is a shared one."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..formats.errors import PlanError, SinkError, listed
from .budget import Budget
from .placement import Placement
from .sizes import show_size

_log = logging.getLogger(__name__)

_SECONDS = 60
"""How long workers may take to import what they need (torch from a shared disk takes its time)."""


def check_workers(client: Any, budget: Budget, place: Placement) -> None:
    """PlanError for a worker that would write something else or cannot work; a warning for other differences."""
    on_cuda = budget.environment.device.startswith("cuda")
    with _probes(place.folders) as probes:
        seen = client.run(eval, _expression([_stated(path) for path in place.sources], probes, on_cuda),
                          on_error="return")  # fmt: skip
    for address, found in sorted(seen.items()):
        if isinstance(found, BaseException):
            raise PlanError(f"worker {address}: cannot be asked what is installed there: {found}") from found
        _check_versions(f"worker {address} on {found['host']}", found["versions"])
    for address, found in sorted(seen.items()):
        _check_files(f"worker {address} on {found['host']}", found)
    threads = client.nthreads()
    for address, found in sorted(seen.items()):
        if on_cuda:
            _check_device(f"worker {address} on {found['host']}", found["device"], budget, threads.get(address, 1))


def _expression(sources: Sequence[Any], probes: Sequence[Any], on_cuda: bool) -> str:
    """What ``eval`` turns into the worker's answer: text means the same to every Python, and needs nothing of ours."""
    text = Path(__file__).with_name("worker_look.py").read_text(encoding="utf-8")
    call = f"scope['look']({list(sources)!r}, {list(probes)!r}, {on_cuda!r})"
    return f"(lambda scope: exec({text!r}, scope) or {call})({{'__name__': 'look'}})"


def own_versions() -> dict[str, str | None]:
    """Versions of this process, as workers tell theirs."""
    from .worker_look import _versions

    return _versions()


def _check_versions(worker: str, found: dict[str, str | None]) -> None:
    own = own_versions()
    theirs, ours = found["quantloom"], own["quantloom"]
    if theirs != ours:
        has = "does not have quantloom" if theirs is None else f"has quantloom {theirs}"
        raise PlanError(
            f"{worker} {has}, this process {ours}: bytes could differ; on the workers: pip install quantloom=={ours}"
        )
    if lacking := [name for name, version in found.items() if version is None and own.get(name) is not None]:
        raise PlanError(f"{worker} does not have {listed(lacking)}; on the workers: pip install quantloom=={ours}")
    # Builds of torch for CPUs and for CUDA (2.9.0+cpu, 2.9.0+cu128) are the same release.
    differ = [
        f"{name} {version} instead of {own[name]}"
        for name, version in found.items()
        if version is not None and version.partition("+")[0] != (own[name] or "").partition("+")[0]
    ]
    if differ:
        _log.warning("%s has %s; results may differ in their last digits, or tasks fail", worker, listed(differ))


def _check_files(worker: str, found: dict[str, Any]) -> None:
    way_out = (
        "workers read the source and write the output themselves; mount the same storage everywhere, or convert into "
        "a Zarr store that all of them reach (s3://bucket/out.zarr), and make files of it with `quantloom assemble`"
    )
    for wrong, fatal in found["sources"]:
        if fatal:
            raise PlanError(f"{worker} {wrong}; {way_out}")
        _log.warning("%s %s", worker, wrong)
    for wrong in found["folders"]:
        raise PlanError(f"{worker} {wrong}; {way_out}")


def _check_device(worker: str, device: list[int], budget: Budget, threads: int) -> None:
    count, free = device
    if not count:
        raise PlanError(f"{worker} sees no CUDA device; start it where there is one, or leave out --device")
    if budget.task_bytes * threads > free:
        fitting = free // max(1, budget.task_bytes)
        hint = f"start it with --nthreads {fitting}" if fitting else "use --rounding mse, which works on rows"
        raise PlanError(
            f"{worker} has {threads} threads, each of which may need {show_size(budget.task_bytes)}, but its GPU has "
            f"{show_size(free)} free; {hint}"
        )


def _stated(path: str) -> tuple[str, int, float]:
    """Path, bytes and time of the last change, as ``worker_look`` compares them; of a folder, that it is there."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise PlanError(f"{path}: cannot be looked at: {error.strerror}") from error
    return (path, -1, 0.0) if stat.S_ISDIR(status.st_mode) else (path, status.st_size, status.st_mtime)


@contextlib.contextmanager
def _probes(folders: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """(path, content) of a small file in each folder, for as long as workers look for them."""
    token = uuid.uuid4().hex
    paths = [Path(folder) / f".quantloom-{token}.probe" for folder in folders]
    try:
        for path in paths:
            try:
                path.write_text(token)
            except OSError as error:
                raise SinkError(f"{path.parent}: cannot write there: {error.strerror}") from error
        yield [(str(path), token) for path in paths]
    finally:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()
