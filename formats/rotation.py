"""Hadamard rotation of weight rows (ConvRot): spreads outlier channels over a group before INT8 row quantization.

The matrix is the regular Hadamard matrix of order 4**k, a Kronecker power of H4 = (1 1 1 -1; 1 1 -1 1; 1 -1 1 1;
-1 1 1 1), divided by 2**k. It is symmetric and its own inverse, so the same function rotates and restores. The client
(comfy-kitchen) rotates activations by it at run time and accepts orders that are powers of four.
"""

from __future__ import annotations

import torch

from .scratch import scratch


def rotation_group(n: int, limit: int | None = None) -> int | None:
    """The largest 4**k, k >= 1, that divides ``n`` (and is at most ``limit``); None when 4 does not divide it."""
    group = 1
    while n % (group * 4) == 0 and (limit is None or group * 4 <= limit):
        group *= 4
    return group if group > 1 else None


def is_power_of_four(value: int) -> bool:
    return value >= 4 and value & (value - 1) == 0 and value.bit_length() % 2 == 1


def rotate_(x: torch.Tensor, group: int) -> torch.Tensor:
    """Rotates each ``group`` consecutive columns of float32 ``x`` (r, n), in place.

    One pass per factor H4, by additions in a fixed order instead of a matrix product: every device gives equal bits,
    and the cost is linear in log4(group).
    """
    stride = 1
    while stride < group:
        a, b, c, d = x.view(x.shape[0], -1, 4, stride).unbind(2)
        half, spare = scratch("rotation", (2, *a.shape), x.dtype, x.device)
        torch.add(c, d, out=spare)
        torch.add(a, b, out=half).add_(spare).mul_(0.5)
        # Rows of H4 / 2: (sum - 2 * one element) / 2, the element counted from the end.
        for first, last in ((a, d), (b, c)):
            spare.copy_(first)
            torch.sub(half, last, out=first)
            torch.sub(half, spare, out=last)
        stride *= 4
    return x
