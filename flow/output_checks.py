"""Before any work: whether the output may be there, and fits."""

from __future__ import annotations

import os
from pathlib import Path

from ..formats.errors import PlanError, SinkError
from ..formats.fileio import free_bytes
from ..formats.shards import SUFFIX, is_single_file, is_store
from . import zarr_sink
from .commit import PREVIOUS_SUFFIX, part
from .output_files import final_paths, folder_of, folders_of, leftovers, log_of, sidecars_of, stale_files
from .plan import Plan
from .resume import peek
from .sizes import show_size

_SPARE_BYTES = 1 << 20
"""Left free beside the plan's bytes, for the index and the file system's own needs."""


def check_output(plan: Plan) -> None:
    """Refuses, before any work, an output that exists, a place that cannot be one, and a disk that is too small."""
    if is_store(plan.output.path):
        zarr_sink.check_output(plan)
        return
    output = Path(plan.output.path)
    try:
        _check_kind(plan, output)
        record = peek(plan, log_of(plan))
        if record is not None and record.committing is not None:
            return
        _check_existing(plan, output)
        folder = folder_of(plan)
        free, needed = free_bytes(folder), plan.nbytes_out + _sidecar_bytes(plan) + _SPARE_BYTES
        needed += 0 if plan.adapter is None else plan.adapter.nbytes  # counted here wherever it lies
        needed -= 0 if record is None else sum(_allocated(part(path)) for path in final_paths(plan))
    except OSError as error:
        raise SinkError(f"{error.filename or output}: cannot be looked at: {error.strerror or error}") from error
    if needed > free:
        raise PlanError(
            f"{folder}: the output needs {show_size(needed)}, but only {show_size(free)} are free there; "
            "free some space, or write to another disk"
        )


_OTHER_ENDINGS = (".safetensor", ".sft", ".st", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx")


def _check_kind(plan: Plan, output: Path) -> None:
    for place in {place for folder in folders_of(plan) for place in (folder, *folder.parents)}:
        if place.is_symlink() and not place.exists():
            raise PlanError(f"{place}: is a link to {os.readlink(place)}, which does not exist")
    if output.suffix.lower() in (*_OTHER_ENDINGS, SUFFIX) and output.suffix != SUFFIX and not output.is_dir():
        raise PlanError(f"{output}: a file ends in {SUFFIX}, and a folder must not look like a file; rename it")
    if is_single_file(plan.output.path) and output.is_dir():
        raise PlanError(f"{output}: is a folder; name a file, or a folder without the ending {SUFFIX}")
    if not is_single_file(plan.output.path) and output.is_file():
        raise PlanError(f"{output}: is a file; for one file as output, let the name end in {SUFFIX}")
    for path in final_paths(plan):
        if path.is_dir():
            raise PlanError(f"{path}: is a folder where a file of the output belongs; write somewhere else")


def _check_existing(plan: Plan, output: Path) -> None:
    """A file that would be replaced needs ``overwrite``; one that would mix with the output is refused."""
    if waiting := leftovers(plan, PREVIOUS_SUFFIX):
        old, name = waiting[0], waiting[0].name.removesuffix(PREVIOUS_SUFFIX)
        held = "a new one is there already" if os.path.lexists(old.with_name(name)) else f"{name} is missing"
        raise PlanError(
            f"{old}: left by a run that was stopped while it replaced {name} ({held}); rename it back to {name}, or "
            "delete it"
        )
    if not plan.output.overwrite:
        existing = [path for path in [*final_paths(plan), *stale_files(plan)] if os.path.lexists(path)]
        if existing:
            raise PlanError(f"{existing[0]}: exists already; pass --overwrite to replace it, or write somewhere else")
    if is_single_file(plan.output.path) or not output.is_dir():
        return
    known = {path.name for path in [*final_paths(plan), *stale_files(plan)]}
    if others := sorted(path.name for path in output.glob(f"*{SUFFIX}") if path.name not in known):
        raise PlanError(
            f"{output}: holds {others[0]}, which whoever reads this folder would take for a part of the model; "
            "write to an empty folder"
        )


def _sidecar_bytes(plan: Plan) -> int:
    return sum(source.stat().st_size for source, _ in sidecars_of(plan))


def _allocated(path: Path) -> int:
    """Bytes that a sparse file takes from the disk."""
    try:
        return int(getattr(path.stat(), "st_blocks", 0)) * 512
    except FileNotFoundError:
        return 0
