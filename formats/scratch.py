"""Reusable work buffers: fresh float32 temporaries cost more in page faults than the arithmetic on them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch

_TILE = 1 << 16
"""Elements per tile: four float32 buffers of this size stay in a core's second-level cache."""

_local = threading.local()


def scratch(key: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor of undefined content that this thread may use until it asks for ``key`` again.

    CUDA tensors come from torch's caching allocator, which already reuses memory in stream order.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    pool: dict[str, torch.Tensor] = _local.__dict__.setdefault("pool", {})
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = pool.get(key)
    if buffer is None or buffer.numel() < nbytes:
        buffer = pool[key] = torch.empty(nbytes, dtype=torch.uint8)
    return buffer[:nbytes].view(dtype).view(shape)


def set_tile(size: int) -> None:
    """Lets this thread's tiles have ``size`` elements, if that is more than fit into its cache: see ``flow.budget``."""
    _local.__dict__["tile"] = max(size, _TILE)


def tiles(x: torch.Tensor, size: int = 0) -> Iterator[slice]:
    """Ranges of the first dimension of ``x`` of about a tile, at least ``size`` elements (on a GPU: all at once)."""
    count = x.shape[0]
    size = max(size, _local.__dict__.get("tile", _TILE))
    step = count if x.device.type != "cpu" else max(1, size * count // max(1, x.numel()))
    for start in range(0, count, max(1, step)):
        yield slice(start, min(start + step, count))
