# mypy: ignore-errors
"""Triton kernels for what eager CUDA is bound by launches and memory at: a round of flips, and a search for scales.

Each does what the function of the same name does on a CPU; sums may differ in the last bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from ..formats.elements import Element
from ..formats.format import Format
from .counter import start_of

if TYPE_CHECKING:
    from .flips import Parabolas
    from .methods import Problem

_ROWS, _CHUNK = 32, 256
"""Rows and columns of the matrix per program of a search for scales."""
_ELEMENTS = 1024
"""Elements per program of a round of flips."""


def grid_of(element: Element) -> dict[str, Any]:
    """What ``round_to_grid`` must know of an element grid."""
    return {
        "LARGEST": element.largest, "UNIFORM": element.dtype == "I8", "SMALLEST": element.smallest_normal,
        "SHIFT": 1.5 * 2.0 ** (23 - element.mantissa),
    }  # fmt: skip


@triton.jit
def round_to_grid(x, LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr):
    """``Element.round_``."""
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    if UNIFORM:
        binade = tl.full(x.shape, 1.0, tl.float32)
    else:
        binade = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        binade = tl.maximum(binade, SMALLEST)
    shift = binade * SHIFT
    return (x + shift) - shift


@triton.jit
def _mix(x):
    """``counter.hash_``, on uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _flip(error, gradient, weight, multiplier, row_curvature, column_curvature, n, total, penalty, share, start,
          row_size, row_stride, column_size, column_stride,
          LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr,
          SIZE: tl.constexpr):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = place < total
    row, column = (place // n).to(tl.int32), (place % n).to(tl.int32)
    now = tl.load(error + place, mask=mask, other=0.0)
    original = tl.load(weight + place, mask=mask, other=0.0)
    curvature = penalty + tl.load(row_curvature + row, mask=mask) * tl.load(column_curvature + column, mask=mask)
    slope = tl.load(gradient + place, mask=mask, other=0.0) + penalty * now
    group = (row // row_size) * row_stride + (column // column_size) * column_stride
    scale = tl.load(multiplier + group, mask=mask, other=1.0)
    stored = now + original
    wanted = (stored - slope / curvature) * tl.where(scale > 0, 1.0 / scale, 0.0)
    step = round_to_grid(wanted, LARGEST, UNIFORM, SMALLEST, SHIFT) * scale - stored
    gain = (curvature * step + 2.0 * slope) * step
    bits = _mix(_mix(row.to(tl.uint32) + start.to(tl.uint32)) + column.to(tl.uint32))
    drawn = (bits & 0xFFFFFF).to(tl.float32) * (1.0 / 16777216.0)
    moves = (gain < 0) & (drawn < share) & (original != 0)
    tl.store(error + place, tl.where(moves, now + step, now), mask=mask)


def flip(problem: Problem, error: torch.Tensor, gradient: torch.Tensor, parabolas: Parabolas,
         draw: tuple[float, int, int]) -> None:  # fmt: skip
    """``flips.flip`` in one pass."""
    fmt, (share, seed, turn), (rows, columns) = problem.format, draw, error.shape
    multiplier = problem.scales.multiplier.contiguous()
    _flip[(triton.cdiv(rows * columns, _ELEMENTS),)](
        error, gradient, problem.weight, multiplier, parabolas.rows, parabolas.columns,
        columns, rows * columns, parabolas.penalty, share, start_of(seed, turn), *_places(fmt, columns),
        **grid_of(fmt.element), SIZE=_ELEMENTS,
    )  # fmt: skip


def _places(fmt: Format, columns: int) -> tuple[int, int, int, int]:
    """Where the scale of element (i, j) lies: i // first * second + j // third * fourth."""
    size = fmt.block_size or 1
    if fmt.scaling == "tensor":
        return 1, 0, 1, 0
    if fmt.scaling == "row":
        return 1, 1, 1, 0
    return (size if fmt.scaling == "block" else 1), columns // size, size, 1


@triton.jit
def _errors(x, inverse, multiplier, importance, out, r, candidates, ldk, size,
            CHUNK: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
            LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    first = tl.program_id(1) * CHUNK
    group = first // size
    tried = tl.arange(0, K)
    live = (tried < candidates)[:, None] & (rows < r)[None, :]
    place = tried[:, None] * ldk + group * r + rows[None, :]
    finer = tl.load(inverse + place, mask=live, other=0.0)
    scale = tl.load(multiplier + place, mask=live, other=0.0)
    total = tl.zeros((K, R), tl.float32)
    for step in range(CHUNK):
        column = first + step
        here = tl.load(x + column * r + rows, mask=rows < r, other=0.0)[None, :]
        error = round_to_grid(here * finer, LARGEST, UNIFORM, SMALLEST, SHIFT) * scale - here
        total += error * error * tl.load(importance + column)
    part = tl.program_id(1) * candidates * r + tried[:, None] * r + rows[None, :]
    tl.store(out + part, total, mask=live)


def errors(x: torch.Tensor, steps: tuple[torch.Tensor, torch.Tensor], importance: torch.Tensor,
           element: Element) -> torch.Tensor:  # fmt: skip
    """``Scaling.errors`` (K, G, r) in one pass over the weights (n, r)."""
    inverse, multiplier = (step.contiguous() for step in steps)
    (n, r), (candidates, groups, _) = x.shape, inverse.shape
    size = n // groups
    chunk = next(width for width in range(min(size, _CHUNK), 0, -1) if size % width == 0)
    partial = torch.empty(groups, size // chunk, candidates, r, dtype=torch.float32, device=x.device)
    _errors[(triton.cdiv(r, _ROWS), n // chunk)](
        x, inverse, multiplier, importance, partial, r, candidates, groups * r, size,
        CHUNK=chunk, K=triton.next_power_of_2(candidates), R=_ROWS, **grid_of(element),
    )  # fmt: skip
    return partial.sum(1).transpose(0, 1)
