"""Commands that a report names for what comes next."""

from __future__ import annotations

import shlex

from ..formats.shards import STORE_SUFFIX, is_store


def assembled_name(store: str) -> str:
    """Where a store's files might go: a folder here of the same name."""
    name = store.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return name.removesuffix(STORE_SUFFIX) or "model"


def assemble_command(output: str) -> str:
    """The command that makes files of an output that is a store; empty for one that is none."""
    return shlex.join(["quantloom", "assemble", output, assembled_name(output)]) if is_store(output) else ""
