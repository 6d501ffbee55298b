"""What a message about a missing checkpoint adds: what is there instead, and names that are near."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from .errors import CheckpointError, did_you_mean, listed
from .places import Place, RemotePath
from .shards import is_store
from .urls import lost_slash

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_store(where: str) -> None:
    """CheckpointError for an output that is still a store."""
    if is_store(where):
        raise CheckpointError(
            f"{where}: is a store, and no checkpoint yet: make files of it first, with `quantloom assemble {where} OUT`"
        )


def found_instead(paths: Iterable[Place]) -> str:
    names = sorted(path.name for path in paths)
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f"found {pickles[0]}, which is a pickle, which can run code; convert it to safetensors first"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"found {ggufs[0]}, which is a GGUF file; quantloom reads safetensors"
    if not names:
        return "found nothing"
    return f"found {listed(names, 5)}"


def near(path: Place) -> str:
    """A hint at siblings with a similar name, or at the parent that is missing too."""
    if isinstance(path, RemotePath):
        return "" if path.has_listing else "; a URL of HTTP is that of a file, as there are no folders and patterns"
    if hint := lost_slash(str(path)):
        return hint
    try:
        siblings = [entry.name for entry in islice(path.parent.iterdir(), 1000) if not entry.name.startswith(".")]
    except (OSError, ValueError):
        return f", and neither does the folder {path.parent}"
    hint = did_you_mean(path.name, siblings) if siblings else f"; the folder {path.parent} is empty"
    return hint if len(hint) < 300 else ""
