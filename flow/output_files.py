"""Which files and folders make up an output: final names, leftovers of other runs, locks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..formats.objects import objects_at
from ..formats.places import Place, is_file_name
from ..formats.shards import SUFFIX, index_path, is_single_file, is_store, stem_of
from .commit import PREVIOUS_SUFFIX
from .plan import Plan
from .run_journal import SUFFIX as JOURNAL_SUFFIX
from .run_journal import FileLog, Log
from .store_log import StoreLog


def folder_of(plan: Plan) -> Path:
    """Where the model's files lie; the adapter's where it is written alone."""
    if not plan.shards and plan.adapter is not None:
        return plan.adapter.folder
    output = Path(plan.output.path)
    return output.parent if is_single_file(plan.output.path) else output


def folders_of(plan: Plan) -> list[Path]:
    """Every folder that files are written to."""
    return list(dict.fromkeys([folder_of(plan), *([] if plan.adapter is None else [plan.adapter.folder])]))


def final_paths(plan: Plan) -> list[Path]:
    """Everything that the commit creates, in the order in which it appears: a model comes after its adapter."""
    index = index_path(plan.shards)
    adapter = [] if plan.adapter is None else plan.adapter.files
    shards = [Path(shard.path) for shard in plan.shards]
    return [*adapter, *shards, *(target for _, target in sidecars_of(plan)), *([index] if index else [])]


def stale_files(plan: Plan) -> list[Path]:
    """Files of an earlier output of the same name that the new one does not replace; never a file of the source.

    In a folder these are all shards and the index of the same stem; beside a single file only shards that its index
    names, and only when the output is in shards again: ``flux-00001-of-00003`` beside ``flux`` may be another model.
    """
    folder, single = folder_of(plan), is_single_file(plan.output.path)
    if not plan.shards or not folder.is_dir() or (single and plan.output.shard_bytes is None):
        return []
    stem = stem_in(plan)
    index = folder / f"{stem}{SUFFIX}.index.json"
    found = {index.name, *_shards_of(index), *_shards_of(index.with_name(index.name + PREVIOUS_SUFFIX))}
    if not single:
        pattern = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?" + re.escape(SUFFIX))
        found |= {path.name for path in folder.iterdir() if pattern.fullmatch(path.name)}
    kept = {path.name for path in final_paths(plan)}
    sources = {path.resolve() for path in plan.source.files}
    paths = [folder / name for name in sorted(found - kept)]
    return [path for path in paths if os.path.lexists(path) and not path.is_dir() and path.resolve() not in sources]


def leftovers(plan: Plan, ending: str) -> list[Path]:
    """Files named as this output's are, in any number of shards, with an ending after it."""
    folder = folder_of(plan)
    if not folder.is_dir():
        return []
    pattern = re.compile(re.escape(stem_in(plan)) + rf"(-\d{{5}}-of-\d{{5}})?{SUFFIX}(\.index\.json)?{ending}")
    names = {target.name + ending for _, target in sidecars_of(plan)}
    own = [path for path in folder.iterdir() if plan.shards and (pattern.fullmatch(path.name) or path.name in names)]
    files = [] if plan.adapter is None else [path.with_name(path.name + ending) for path in plan.adapter.files]
    return sorted({*own, *(path for path in files if os.path.lexists(path))})


def locks_of(plan: Plan) -> list[Path]:
    """A folder's own, and that of the single file whose parts would have the same names."""
    folder = folder_of(plan)
    file = folder / f"{stem_in(plan)}{SUFFIX}.lock"
    adapter = [] if plan.adapter is None else [Path(f"{plan.adapter.shard.path}.lock")]
    if not plan.shards:
        return adapter
    return [*([] if is_single_file(plan.output.path) else [folder / ".quantloom.lock"]), file, *adapter]


def log_of(plan: Plan) -> Log:
    """The journal of a run that writes this output."""
    if is_store(plan.output.path):
        return StoreLog(objects_at(plan.output.path))
    if not plan.shards and plan.adapter is not None:
        return FileLog(Path(f"{plan.adapter.shard.path}{JOURNAL_SUFFIX}"))
    return FileLog(folder_of(plan) / f"{stem_in(plan)}{SUFFIX}{JOURNAL_SUFFIX}")


def stem_in(plan: Plan) -> str:
    """What the names of its files begin with."""
    single = is_single_file(plan.output.path)
    return Path(plan.output.path).name.removesuffix(SUFFIX) if single else stem_of(plan.source.files)


def _shards_of(index: Path) -> set[str]:
    """Shards that an index names beside itself; none when it cannot be read."""
    try:
        names = json.loads(index.read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return set()
    return {name for name in names if is_file_name(name) and name.endswith(SUFFIX)}


def sidecars_of(plan: Plan) -> list[tuple[Place, Path]]:
    """(source, target) of configuration and tokenizer files, for a folder output."""
    if not plan.shards or is_single_file(plan.output.path):
        return []
    return [(path, folder_of(plan) / path.name) for path in plan.source.sidecars]
