"""Matrix products as exact as they must be, and on a GPU no slower; torch's global flags are left alone.

A float32 matrix is the sum of two bfloat16 ones up to 2**-16 of each element. Three bfloat16 products on tensor cores,
summed in float32, then stand for one float32 product, in a fraction of its time (Henry, Tang and Heinecke, "Leveraging
the bfloat16 artificial intelligence datatype for higher-precision computations", arXiv 1904.06376). A CPU multiplies
in float32.
"""

from __future__ import annotations

import torch

_LONG = 2048
"""Sums shorter than this gain too little from being split in three."""
_ROWS = 2048
"""Rows that are split at a time."""


def rough(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in float32, on a GPU of operands rounded to bfloat16: for gradients and whoever checks what they do."""
    return a @ b if a.device.type == "cpu" else _product(a.bfloat16(), b.bfloat16())


def precise(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` with relative errors of about 2**-16, or those of float32."""
    if not _splits(b):
        return a @ b
    made = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    operand = Operand(b.shape, b.device)
    operand.put(slice(None), b)
    for start in range(0, a.shape[0], _ROWS):
        operand.subtract_from_(made[start : start + _ROWS], a[start : start + _ROWS])
    return made.neg_()


class Operand:
    """A float32 matrix (k, r), zero at first, whose rows change between products that it is multiplied in."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.x = torch.zeros(shape, dtype=torch.float32, device=device)
        self.parts = self.x.new_zeros((2, *shape), dtype=torch.bfloat16) if _splits(self.x) else None

    def put(self, part: slice, rows: torch.Tensor) -> None:
        """Replaces rows."""
        self.x[part] = rows
        if self.parts is not None:
            high, low = self.parts
            high[part] = rows
            low[part] = rows - high[part]

    def subtract_from_(self, out: torch.Tensor, a: torch.Tensor) -> None:
        """``out`` (b, r) -= a (b, j) times the first j rows."""
        j = a.shape[1]
        if self.parts is None:
            out.addmm_(a, self.x[:j], alpha=-1)
            return
        high, low = self.parts[0, :j], self.parts[1, :j]
        above = a.bfloat16()
        below = (a - above).bfloat16()
        for left, right in ((below, high), (above, low), (above, high)):
            out.sub_(_product(left, right))


def _splits(x: torch.Tensor) -> bool:
    return x.is_cuda and x.shape[0] >= _LONG


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Float32 product of bfloat16 matrices on a GPU."""
    return torch.mm(a, b, out_dtype=torch.float32)
