"""Reusable work buffers: fresh float32 temporaries cost more in page faults than the arithmetic on them."""

from __future__ import annotations

import math
import threading

import torch

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


def release() -> None:
    """Drops this thread's buffers."""
    _local.__dict__.clear()
