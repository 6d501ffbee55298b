# mypy: ignore-errors
"""Triton kernels of the cascades: each thread walks down the columns of a block for one row, all in registers.

``pulls`` is the coupling turned, so that what a column asks of later ones lies side by side. Strips of columns are
spelled out; what they ask of later strips follows. Results are those of ``cascade`` but for the last bits of sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..formats.elements import Element
from ..formats.format import Format
from .kernels import grid_of, round_to_grid

if TYPE_CHECKING:
    from .cascade import Choice, Steps
    from .scale_search import Scaling

_STRIP = 16
"""Columns that are walked one by one, spelled out by the compiler."""
_ROWS = 32
"""Rows per program: one for each thread of a single warp, so that nothing is exchanged between threads."""


@triton.jit
def _lanes(zero, R: tl.constexpr):
    """Rows of the program. ``zero`` keeps the compiler from giving a thread several neighbours: they lie in the way."""
    return tl.program_id(0) * R + (tl.arange(0, R) ^ zero)


@triton.jit
def _strip_of(block, strip, N: tl.constexpr, S: tl.constexpr, R: tl.constexpr):
    """One strip (S, R) of a block (N * S, R)."""
    chosen = (tl.arange(0, N) == strip)[:, None, None]
    return tl.sum(tl.where(chosen, tl.reshape(block, (N, S, R)), 0.0), axis=0)


@triton.jit
def _row_of(x, j, S: tl.constexpr):
    """Row j of (S, R)."""
    return tl.sum(tl.where((tl.arange(0, S) == j)[:, None], x, 0.0), axis=0)


@triton.jit
def _later(block, pulls, moves, every, part, B: tl.constexpr):
    """A block less what the moves (S, R) of a strip ask of it; strips that are done do not matter any more."""
    known = (every < B)[:, None] & (part < B)[None, :]
    far = tl.load(pulls + part[None, :] * B + every[:, None], mask=known, other=0.0)
    return block - tl.dot(far, moves, input_precision="tf32x3")


@triton.jit
def _walk(target, origin, pulls, made, inverse, multiplier, r, ld, ldo, lds, zero,
          B: tl.constexpr, G: tl.constexpr, S: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
          LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    rows = _lanes(zero, R)
    every, place = tl.arange(0, N * S), tl.arange(0, S)
    inside = (every < B)[:, None] & (rows < r)[None, :]
    block = tl.load(target + every[:, None] * ld + rows[None, :], mask=inside, other=0.0)
    for strip in range(N):
        start = strip * S
        part = start + place
        live = (part < B)[:, None] & (rows < r)[None, :]
        known = (rows < r) & (start + 0 * rows < B)
        scale = tl.load(multiplier + (start // G) * lds + rows, mask=known, other=0.0)
        finer = tl.load(inverse + (start // G) * lds + rows, mask=known, other=0.0)
        before = tl.load(origin + part[:, None] * ldo + rows[None, :], mask=live, other=0.0)
        x = _strip_of(block, strip, N, S, R)
        for j in tl.static_range(S):
            value = round_to_grid(_row_of(x, j, S) * finer, LARGEST, UNIFORM, SMALLEST, SHIFT) * scale
            move = value - _row_of(before, j, S)
            near = tl.load(pulls + (start + j) * B + part, mask=(place > j) & (part < B), other=0.0)
            x = tl.where((place == j)[:, None], value[None, :], x - near[:, None] * move[None, :])
        moves = tl.where(live, x - before, 0.0)
        tl.store(target + part[:, None] * ld + rows[None, :], x, mask=live)
        tl.store(made + part[:, None] * ld + rows[None, :], moves, mask=live)
        block = _later(block, pulls, moves, every, part, B)


@triton.jit
def _multipliers(peak, whole, NVFP4: tl.constexpr):
    """Decode multipliers of MXFP8 and NVFP4 groups whose largest weight is ``peak``."""
    if NVFP4:
        stored = round_to_grid(tl.div_rn(tl.div_rn(peak, 6.0), whole), 448.0, False, 2.0**-6, 1.5 * 2.0**20)
        return stored * whole
    bits = peak.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)  # 448 = 1.75 * 2**8
    exponent = tl.where(peak > 0, tl.minimum(tl.maximum(exponent, 1), 254), 0)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _choose(target, origin, pulls, made, peaks, ratios, cost, whole, r, ld, ldo, ldp, zero,
            K: tl.constexpr, B: tl.constexpr, S: tl.constexpr, R: tl.constexpr, N: tl.constexpr, NVFP4: tl.constexpr,
            LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    rows = _lanes(zero, R)
    every, place = tl.arange(0, N * S), tl.arange(0, S)
    inside = (every < B)[:, None] & (rows < r)[None, :]
    block = tl.load(target + every[:, None] * ld + rows[None, :], mask=inside, other=0.0)
    shared = tl.load(whole)
    for strip in range(tl.cdiv(B, S)):
        start = strip * S
        part = start + place
        live = (rows < r)[None, :]
        before = tl.load(origin + part[:, None] * ldo + rows[None, :], mask=live, other=0.0)
        x = _strip_of(block, strip, N, S, R)
        largest = tl.max(tl.abs(x), axis=0)
        unit = _multipliers(largest, shared, NVFP4)
        least = tl.full((R,), float("inf"), tl.float32)
        kept, peak, codes = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32), tl.zeros_like(x)
        for candidate in range(K):
            tried = largest * tl.load(ratios + candidate)
            scale = _multipliers(tried, shared, NVFP4)
            finer = tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)
            y, scaled = x * finer[None, :], before * finer[None, :]
            total = tl.zeros((R,), tl.float32)
            for j in tl.static_range(S):
                here = _row_of(y, j, S)
                code = round_to_grid(here, LARGEST, UNIFORM, SMALLEST, SHIFT)
                total += (here - code) * (here - code) * tl.load(cost + start + j)
                near = tl.load(pulls + (start + j) * B + part, mask=place > j, other=0.0)
                move = code - _row_of(scaled, j, S)
                y = tl.where((place == j)[:, None], code[None, :], y - near[:, None] * move[None, :])
            relative = scale / unit
            total = tl.where(scale > 0, total * relative * relative, float("inf"))
            better = total < least
            least, kept = tl.where(better, total, least), tl.where(better, scale, kept)
            peak = tl.where(better, tried, peak)
            codes = tl.where(better[None, :], y, codes)
        value = codes * kept[None, :]
        done = value - before
        tl.store(peaks + strip * ldp + rows, peak, mask=rows < r)
        tl.store(target + part[:, None] * ld + rows[None, :], value, mask=live)
        tl.store(made + part[:, None] * ld + rows[None, :], done, mask=live)
        block = _later(block, pulls, tl.where(live, done, 0.0), every, part, B)


def cascade_(target: torch.Tensor, origin: torch.Tensor, coupling: torch.Tensor, element: Element,
             steps: Steps) -> torch.Tensor:  # fmt: skip
    """``cascade.cascade_`` in one kernel."""
    (width, rows), moves = target.shape, torch.empty_like(target)
    inverse, multiplier = steps
    _walk[(triton.cdiv(rows, _ROWS),)](
        target, origin, coupling.T.contiguous(), moves, inverse, multiplier, rows, rows, rows, inverse.stride(0), 0,
        B=width, G=width // inverse.shape[0], S=_STRIP, R=_ROWS, N=_strips(width, _STRIP), **grid_of(element),
        num_warps=1,
    )  # fmt: skip
    return moves


def choosing_cascade_(target: torch.Tensor, origin: torch.Tensor, coupling: torch.Tensor, scaling: Scaling,
                      peak: torch.Tensor, choice: Choice) -> torch.Tensor:  # fmt: skip
    """``cascade.choosing_cascade_`` in one kernel."""
    (width, rows), moves, group = target.shape, torch.empty_like(target), scaling.grouped
    whole = choice.ratios if scaling.whole is None else scaling.whole
    _choose[(triton.cdiv(rows, _ROWS),)](
        target, origin, coupling.T.contiguous(), moves, peak, choice.ratios, choice.cost, whole,
        rows, rows, rows, peak.stride(0), 0, K=len(choice.ratios), B=width, S=group, R=_ROWS, N=_strips(width, group),
        NVFP4=scaling.format.name == "nvfp4", **grid_of(scaling.format.element), num_warps=1,
    )  # fmt: skip
    return moves


def walks(width: int, group: int) -> bool:
    """Whether ``cascade_`` can do a block: no strip may cross the edge of a scaling group."""
    return group >= width or group % _STRIP == 0


def chooses(fmt: Format) -> bool:
    """Whether ``choosing_cascade_`` knows the scales of a format."""
    return fmt.name in ("mxfp8", "nvfp4")


def _strips(width: int, size: int) -> int:
    """Strips of a block; a power of two, as tiles in registers are."""
    return triton.next_power_of_2(triton.cdiv(width, size))
