"""What a worker of a Dask cluster sees. Its text is sent there and run: quantloom may be missing, or be another one.

Only the standard library, on top of what distributed itself needs; the same text runs on every Python that Dask knows.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import socket
from typing import Any

PACKAGES = ("torch", "safetensors", "numpy", "dask", "distributed")


def look(sources: list[Any], probes: list[Any], on_cuda: bool) -> dict[str, Any]:
    """``sources``: (path, bytes, seconds of the last change); ``probes``: (path, content) of files that must be there.

    Returns versions by package (None: not there), and what is wrong in words; nothing is raised.
    """
    return {
        "host": socket.gethostname(), "versions": _versions(), "device": _device() if on_cuda else None,
        "sources": [wrong for path, size, changed in sources if (wrong := _source(path, size, changed))],
        "folders": [wrong for path, content in probes if (wrong := _probe(path, content))],
    }  # fmt: skip


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": ".".join(platform.python_version_tuple()[:2]), "quantloom": None}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    with contextlib.suppress(ImportError):
        found["quantloom"] = importlib.import_module("quantloom").__version__
    return found


def _device() -> Any:
    """GPUs that the worker sees, and free bytes of the one that it uses."""
    try:
        torch = importlib.import_module("torch")
        count = torch.cuda.device_count()
        return [count, torch.cuda.mem_get_info()[0] if count else 0]
    except (ImportError, RuntimeError, AssertionError):
        return [0, 0]


def _source(path: str, size: int, changed: float) -> Any:
    """[what is wrong, whether work is impossible]."""
    try:
        status = os.stat(path)
    except OSError as error:
        return [f"cannot see the source {path}: {error.strerror}", True]
    if size < 0:  # a folder: its size and times mean nothing elsewhere
        return None
    if status.st_size != size:
        return [f"has another file as source {path}: {status.st_size} bytes instead of {size}", True]
    if not os.access(path, os.R_OK):
        return [f"may not read the source {path}", True]
    if abs(status.st_mtime - changed) > 2:
        return [f"has a source {path} of the same size that was changed at another time", False]
    return None


def _probe(path: str, content: str) -> Any:
    try:
        with open(path, "r+b") as file:
            if file.read().decode(errors="replace") != content:
                return f"has another folder as {os.path.dirname(path)}"
    except OSError as error:
        return f"cannot write to the folder {os.path.dirname(path)}: {error.strerror}"
    return None
