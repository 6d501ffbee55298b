"""Reductions that give the same bits on every device, thread count and row range."""

from __future__ import annotations

import torch

from .scratch import scratch, tiles


def halvings(x: torch.Tensor, width: int = 1) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Steps that sum the last dimension of ``x`` in place by halving it, and the view where at most ``width`` sums lie.

    A step is to add its second tensor to its first. Explicit element-wise additions, never a library's own order;
    halving on from the result continues the same tree.
    """
    steps = []
    while (length := x.shape[-1]) > width:
        half = length // 2
        left = x[..., :half]
        steps.append((left, x[..., half : 2 * half]))
        if length % 2:
            steps.append((left[..., :1], x[..., -1:]))
        x = left
    return steps, x


def tree_sum_(x: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension, as a view of ``x``, which is overwritten."""
    steps, total = halvings(x)
    for left, right in steps:
        left.add_(right)
    return total[..., 0]


def sums_(x: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension; may destroy ``x``.

    Where bits need not agree between devices: on a CPU in the order of ``tree_sum_``, whatever the range of rows; a
    GPU's own order depends on the shape alone, and takes one launch instead of twenty.
    """
    return tree_sum_(x) if x.device.type == "cpu" else x.sum(-1)


def least(error: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Per column of (k, n) ``candidates``, k <= 8, the one of least ``error`` >= 0.

    The index goes into the last three bits of the error: one integer minimum, instead of comparisons and selections
    that cost ten times as much. Of errors that agree but for those bits the first wins.
    """
    index = torch.arange(error.shape[0], dtype=torch.int32, device=error.device)[:, None]
    keys = (error.view(torch.int32) & -8).bitwise_or_(index)
    return candidates.gather(0, keys.amin(0, keepdim=True).bitwise_and_(7).long())[0]


def absmax(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude over the last dimension of float32 ``x``; NaN wins.

    Magnitudes are ordered as their bits are, and torch reduces integers many times faster than ``aminmax``.
    """
    largest = torch.empty(x.shape[:-1], dtype=x.dtype, device=x.device)
    for part in tiles(x):
        rows = x[part]
        bits = scratch("absmax", rows.shape, torch.int32, x.device)
        if x.shape[-1] < 32:  # too few for its vectors
            magnitude = torch.abs(rows, out=bits.view(torch.float32)).view(1, rows.shape[0], -1)
            largest[part] = torch.nn.functional.max_pool1d(magnitude, x.shape[-1]).view(rows.shape[:-1])
        else:
            largest[part] = torch.bitwise_and(rows.view(torch.int32), 0x7FFFFFFF, out=bits).amax(-1).view(torch.float32)
    return largest


def divide(x: torch.Tensor, by: float) -> torch.Tensor:
    """``x / by``, correctly rounded: for a Python number torch's CUDA kernels multiply by its reciprocal instead."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)
