"""Reusable work buffers: fresh float32 temporaries cost more in page faults than the arithmetic on them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

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


class _Pinned:
    """Page-locked host memory, and a mark behind the last copy out of it."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.copied = torch.cuda.Event()

    def bytes(self, count: int) -> torch.Tensor:
        """The first ``count`` bytes, once the copy that still reads them is over."""
        self.copied.synchronize()
        return self.buffer[:count]


_TURNS = 2
"""Host buffers of each key: one is filled while the other is copied to the GPU."""


def upload(key: str, count: int, device: torch.device, fill: Callable[[memoryview], None]) -> torch.Tensor:
    """``count`` bytes that ``fill`` writes into host memory, uint8 (count,) on ``device``.

    On a CPU it is scratch memory. For a GPU the host memory is page-locked, and the copy goes on in this thread's
    stream while the thread reads the next chunk into another buffer; none is filled again before its copy is over.
    """
    if device.type == "cpu":
        target = scratch(key, (count,), torch.uint8, device)
        fill(target.numpy().data)
        return target
    pool: dict[tuple[str, int], _Pinned] = _local.__dict__.setdefault("pinned", {})
    turns: dict[str, int] = _local.__dict__.setdefault("turns", {})
    turn = turns[key] = (turns.get(key, -1) + 1) % _TURNS
    pinned = pool.get((key, turn))
    if pinned is None or pinned.buffer.numel() < count:
        if pinned is not None:
            pinned.copied.synchronize()
        pinned = pool[key, turn] = _Pinned(count)
    host = pinned.bytes(count)
    fill(host.numpy().data)
    moved = host.to(device, non_blocking=True)
    pinned.copied.record()
    return moved


def download(key: str, x: torch.Tensor) -> torch.Tensor:
    """``x`` on the CPU: itself, or in page-locked memory that this thread may use until it asks for ``key`` again.

    Waits for this thread's stream alone; other threads go on with theirs.
    """
    if x.device.type == "cpu":
        return x
    x = x.contiguous()
    pool: dict[tuple[str, int], _Pinned] = _local.__dict__.setdefault("pinned", {})
    pinned = pool.get((key, 0))
    if pinned is None or pinned.buffer.numel() < x.nbytes:
        pinned = pool[key, 0] = _Pinned(x.nbytes)
    host = pinned.buffer[: x.nbytes].view(x.dtype).view(x.shape)
    host.copy_(x, non_blocking=True)
    pinned.copied.record()
    pinned.copied.synchronize()
    return host


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
