# mypy: ignore-errors
"""Triton kernels for what eager CUDA would be bound by launches at: one cascade over a block of columns, one round of
flips. Each does what the function of the same name does on a CPU, in the same units; sums may differ in the last bits.
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
    from .cascade import Choice
    from .flips import Parabolas
    from .methods import Problem
    from .scale_search import Scaling

_ROWS = 16
"""Rows of the matrix per program of a cascade: the block of columns then stays in registers."""
_STRIP = 16
"""Columns that are walked one by one; the rest of the block follows by a product."""
_ELEMENTS = 1024
"""Elements per program of a round of flips."""


def grid_of(element: Element) -> dict[str, Any]:
    """What ``_round`` must know of an element grid."""
    return {
        "LARGEST": element.largest, "UNIFORM": element.dtype == "I8", "SMALLEST": element.smallest_normal,
        "SHIFT": 1.5 * 2.0 ** (23 - element.mantissa),
    }  # fmt: skip


@triton.jit
def _round(x, LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr):
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
    step = _round(wanted, LARGEST, UNIFORM, SMALLEST, SHIFT) * scale - stored
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
def _before(target, coupling, moves, part, rows, inside, start, r, ld, ldc, B: tl.constexpr, S: tl.constexpr):
    """Targets (S, rows) of a strip, less what the moves before it pull."""
    x = tl.load(target + part[:, None] * ld + rows[None, :], mask=inside, other=0.0)
    for first in range(0, start, S):
        earlier = first + tl.arange(0, S)
        pulls = tl.load(coupling + part[:, None] * ldc + earlier[None, :], mask=(part < B)[:, None], other=0.0)
        made = tl.load(moves + earlier[:, None] * ld + rows[None, :], mask=(rows < r)[None, :], other=0.0)
        x -= tl.dot(pulls, made, input_precision="ieee")
    return x


@triton.jit
def _walk(target, origin, coupling, moves, inverse, multiplier, r, ld, ldo, ldc, lds,
          B: tl.constexpr, G: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
          LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    place = tl.arange(0, S)
    for start in range(0, B, S):
        part = start + place
        inside = (part < B)[:, None] & (rows < r)[None, :]
        x = _before(target, coupling, moves, part, rows, inside, start, r, ld, ldc, B, S)
        for j in range(S):
            column = start + j
            live = (rows < r) & (column + 0 * rows < B)
            group = (column // G) * lds
            here = tl.sum(tl.where(place[:, None] == j, x, 0.0), axis=0)
            here *= tl.load(inverse + group + rows, mask=live, other=0.0)
            value = _round(here, LARGEST, UNIFORM, SMALLEST, SHIFT)
            value *= tl.load(multiplier + group + rows, mask=live, other=0.0)
            move = value - tl.load(origin + column * ldo + rows, mask=live, other=0.0)
            pulls = tl.load(coupling + part * ldc + column, mask=(part < B) & (part > column), other=0.0)
            x -= pulls[:, None] * move[None, :]
            tl.store(target + column * ld + rows, value, mask=live)
            tl.store(moves + column * ld + rows, move, mask=live)
        tl.debug_barrier()  # the next strip reads what other threads of this program have stored


@triton.jit
def _multipliers(peak, whole, NVFP4: tl.constexpr):
    """Decode multipliers of MXFP8 and NVFP4 groups whose largest weight is ``peak``."""
    if NVFP4:
        stored = _round(tl.div_rn(tl.div_rn(peak, 6.0), whole), 448.0, False, 2.0**-6, 1.5 * 2.0**20)
        return stored * whole
    bits = peak.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)  # 448 = 1.75 * 2**8
    exponent = tl.where(peak > 0, tl.minimum(tl.maximum(exponent, 1), 254), 0)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _choose(target, origin, coupling, moves, peaks, ratios, cost, whole, candidates, r, ld, ldo, ldc, ldp,
            B: tl.constexpr, G: tl.constexpr, K: tl.constexpr, R: tl.constexpr, NVFP4: tl.constexpr,
            LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = (rows < r)[None, :]
    place = tl.arange(0, G)
    ratio = tl.load(ratios + tl.minimum(tl.arange(0, K), candidates - 1))  # the last again never wins over itself
    shared = tl.load(whole)
    for start in range(0, B, G):
        part = start + place
        x = _before(target, coupling, moves, part, rows, inside, start, r, ld, ldc, B, G)
        tried = tl.max(tl.abs(x), axis=0)[None, :] * ratio[:, None]
        scale = _multipliers(tried, shared, NVFP4)
        inverse = tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)
        y = x[None, :, :] * inverse[:, None, :]
        codes = tl.zeros_like(y)
        total = tl.zeros_like(scale)
        for j in range(G):
            chosen = (place == j)[None, :, None]
            here = tl.sum(tl.where(chosen, y, 0.0), axis=1)
            code = _round(here, LARGEST, UNIFORM, SMALLEST, SHIFT)
            total += (here - code) * (here - code) * tl.load(cost + start + j)
            before = tl.load(origin + (start + j) * ldo + rows, mask=rows < r, other=0.0)
            move = code - before[None, :] * inverse
            pulls = tl.load(coupling + part * ldc + start + j)
            y -= tl.where(place > j, pulls, 0.0)[None, :, None] * move[:, None, :]
            codes = tl.where(chosen, code[:, None, :], codes)
        total = tl.where(scale > 0, total * scale * scale, float("inf"))
        best = tl.arange(0, K)[:, None] == tl.argmin(total, axis=0)[None, :]
        kept = tl.sum(tl.where(best, scale, 0.0), axis=0)
        value = tl.sum(tl.where(best[:, None, :], codes, 0.0), axis=0) * kept[None, :]
        origins = tl.load(origin + part[:, None] * ldo + rows[None, :], mask=inside, other=0.0)
        tl.store(peaks + (start // G) * ldp + rows, tl.sum(tl.where(best, tried, 0.0), axis=0), mask=rows < r)
        tl.store(target + part[:, None] * ld + rows[None, :], value, mask=inside)
        tl.store(moves + part[:, None] * ld + rows[None, :], value - origins, mask=inside)
        tl.debug_barrier()


def cascade_(target: torch.Tensor, origin: torch.Tensor, coupling: torch.Tensor, scaling: Scaling,
             peak: torch.Tensor, choice: Choice | None = None) -> torch.Tensor:  # fmt: skip
    """``cascade.cascade_`` in one kernel."""
    moves = torch.empty_like(target)
    width, rows = target.shape
    grid, element = (triton.cdiv(rows, _ROWS),), grid_of(scaling.format.element)
    strides = (rows, target.stride(0), origin.stride(0), coupling.stride(0), peak.stride(0))
    group = width // peak.shape[0]
    if choice is None:
        inverse, multiplier = scaling.steps(peak)
        _walk[grid](target, origin, coupling, moves, inverse, multiplier, *strides[:4], inverse.stride(0),
                    B=width, G=group, S=_STRIP, R=_ROWS, **element)  # fmt: skip
        return moves
    ratios, candidates = choice.ratios, len(choice.ratios)
    whole = ratios if scaling.whole is None else scaling.whole
    _choose[grid](target, origin, coupling, moves, peak, ratios, choice.cost, whole, candidates, *strides,
                  B=width, G=group, K=triton.next_power_of_2(candidates), R=_ROWS,
                  NVFP4=scaling.format.name == "nvfp4", **element)  # fmt: skip
    return moves


def chooses(fmt: Format) -> bool:
    """Whether ``cascade_`` knows how to choose the scales of a format while it goes on."""
    return fmt.name in ("mxfp8", "nvfp4")
