# mypy: ignore-errors
# ruff: noqa: RUF005, B007 (Triton compiles no more than this of Python)
"""Triton kernels of the cascades: each thread walks down the columns of a strip for one row, all in registers; from
strip to strip moves travel by products on tensor cores.

Results are those of ``cascade`` but for the last bits of sums.
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
"""Columns that are held in registers, and spelled out by the compiler."""
_PROGRAM = {"R": 32, "D": 128, "num_warps": 2}
"""Rows and warps of a program (both warps walk the same rows), and the moves that a product takes at a time."""


@triton.jit
def _load(matrix, start, ld, rows, r, B: tl.constexpr, S: tl.constexpr):
    """Columns of a strip, a value each for every row."""
    columns = ()
    for i in tl.static_range(S):
        inside = (rows < r) & (start + i + 0 * rows < B)
        columns = columns + (tl.load(matrix + (start + i) * ld + rows, mask=inside, other=0.0),)
    return columns


@triton.jit
def _store(matrix, columns, start, ld, rows, r, B: tl.constexpr, S: tl.constexpr):
    for i in tl.static_range(S):
        tl.store(matrix + (start + i) * ld + rows, columns[i], mask=(rows < r) & (start + i + 0 * rows < B))


@triton.jit
def _pull(columns, coupling, move, ldc, left, after: tl.constexpr, S: tl.constexpr):
    """Columns behind ``after``, of ``left`` that there are, less what a move asks of them; ``coupling`` points at what
    it asks of the first."""
    moved = ()
    for i in tl.static_range(S):
        if i > after:
            moved = moved + (columns[i] - tl.load(coupling + i * ldc, mask=i < left, other=0.0) * move,)
        else:
            moved = moved + (columns[i],)
    return moved


@triton.jit
def _advance(target, coupling, made, start, first, done, ld, ldc, rows, r,
             B: tl.constexpr, W: tl.constexpr, R: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Takes from the targets of W columns what moves ``first`` to ``done`` ask of them."""
    columns = start + tl.arange(0, W)
    asked = tl.zeros((W, R), tl.float32)
    tl.debug_barrier()  # moves were stored by other threads
    for column in tl.range(first, done, D, num_stages=1):
        moved = column + tl.arange(0, D)
        pulls = tl.load(coupling + columns[:, None] * ldc + moved[None, :],
                        mask=(columns < B)[:, None] & (moved < done)[None, :], other=0.0)  # fmt: skip
        moves = tl.load(made + moved[:, None] * ld + rows[None, :],
                        mask=(moved < done)[:, None] & (rows < r)[None, :], other=0.0)  # fmt: skip
        asked = tl.dot(pulls, moves, asked, input_precision="tf32x3")
    place, inside = target + columns[:, None] * ld + rows[None, :], (columns < B)[:, None] & (rows < r)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) - asked, mask=inside)
    tl.debug_barrier()  # targets are loaded by other threads


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
def _largest(target, start, ld, rows, r, B: tl.constexpr, G: tl.constexpr, S: tl.constexpr):
    """The largest target of a group."""
    largest = tl.zeros_like(rows).to(tl.float32)
    for first in range(start, start + G, S):
        columns = _load(target, first, ld, rows, r, B, S)
        for i in tl.static_range(S):
            largest = tl.maximum(largest, tl.abs(columns[i]))
    return largest


@triton.jit
def _walk(target, origin, coupling, made, inverse, multiplier, peaks, r, ld, ldc, lds, PEAKS: tl.constexpr,
          B: tl.constexpr, G: tl.constexpr, S: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
          LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    for start in range(0, B, S):
        group = (start // G) * lds + rows
        if PEAKS:
            if start % G == 0:
                _advance(target, coupling, made, start, 0, start, ld, ldc, rows, r, B, G, R, D)
                tl.store(peaks + group, _largest(target, start, ld, rows, r, B, G, S), mask=rows < r)
                tl.debug_barrier()
            else:
                _advance(target, coupling, made, start, start // G * G, start, ld, ldc, rows, r, B, S, R, D)
            scale = _multipliers(tl.load(peaks + group, mask=rows < r, other=0.0), 1.0, False)
            finer = tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)
        else:
            _advance(target, coupling, made, start, 0, start, ld, ldc, rows, r, B, S, R, D)
            scale = tl.load(multiplier + group, mask=rows < r, other=0.0)
            finer = tl.load(inverse + group, mask=rows < r, other=0.0)
        columns = _load(target, start, ld, rows, r, B, S)
        before = _load(origin, start, ld, rows, r, B, S)
        values, moves = (), ()
        for j in tl.static_range(S):
            value = round_to_grid(columns[j] * finer, LARGEST, UNIFORM, SMALLEST, SHIFT) * scale
            move = value - before[j]
            values, moves = values + (value,), moves + (move,)
            columns = _pull(columns, coupling + start * ldc + start + j, move, ldc, B - start, j, S)
        _store(target, values, start, ld, rows, r, B, S)
        _store(made, moves, start, ld, rows, r, B, S)


@triton.jit
def _choose(target, origin, coupling, made, peaks, ratios, cost, whole, r, ld, ldc, ldp,
            K: tl.constexpr, B: tl.constexpr, S: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
            LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    shared = tl.load(whole + rows, mask=rows < r, other=1.0)
    for start in range(0, B, S):
        _advance(target, coupling, made, start, 0, start, ld, ldc, rows, r, B, S, R, D)
        columns = _load(target, start, ld, rows, r, B, S)
        before = _load(origin, start, ld, rows, r, B, S)
        largest = tl.zeros((R,), tl.float32)
        for i in tl.static_range(S):
            largest = tl.maximum(largest, tl.abs(columns[i]))
        unit = _multipliers(largest, shared, True)
        least = tl.full((R,), float("inf"), tl.float32)
        kept, peak = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
        codes = ()
        for i in tl.static_range(S):
            codes = codes + (tl.zeros((R,), tl.float32),)
        for candidate in tl.range(0, K, num_stages=1):
            tried = largest * tl.load(ratios + candidate)
            scale = _multipliers(tried, shared, True)
            finer = tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)
            scaled = ()
            for i in tl.static_range(S):
                scaled = scaled + (columns[i] * finer,)
            found, total = (), tl.zeros((R,), tl.float32)
            for j in tl.static_range(S):
                code = round_to_grid(scaled[j], LARGEST, UNIFORM, SMALLEST, SHIFT)
                total += (scaled[j] - code) * (scaled[j] - code) * tl.load(cost + start + j)
                found = found + (code,)
                move = code - before[j] * finer
                scaled = _pull(scaled, coupling + start * ldc + start + j, move, ldc, B - start, j, S)
            relative = scale / unit
            total = tl.where(scale > 0, total * relative * relative, float("inf"))
            better = total < least
            least, kept = tl.where(better, total, least), tl.where(better, scale, kept)
            peak = tl.where(better, tried, peak)
            chosen = ()
            for i in tl.static_range(S):
                chosen = chosen + (tl.where(better, found[i], codes[i]),)
            codes = chosen
        values, moves = (), ()
        for i in tl.static_range(S):
            values, moves = values + (codes[i] * kept,), moves + (codes[i] * kept - before[i],)
        tl.store(peaks + (start // S) * ldp + rows, peak, mask=rows < r)
        _store(target, values, start, ld, rows, r, B, S)
        _store(made, moves, start, ld, rows, r, B, S)


def cascade_(target: torch.Tensor, moves: torch.Tensor, origin: torch.Tensor, coupling: torch.Tensor, element: Element,
             steps: Steps) -> None:  # fmt: skip
    """``cascade.cascade_`` in one kernel."""
    (width, rows), (inverse, multiplier) = target.shape, steps
    _walk[(triton.cdiv(rows, _PROGRAM["R"]),)](
        target, origin, coupling, moves, inverse, multiplier, inverse, rows, rows, coupling.stride(0),
        inverse.stride(0), PEAKS=False, B=width, G=width // inverse.shape[0], S=_STRIP, **grid_of(element),
        **_PROGRAM,
    )  # fmt: skip


def choosing_cascade_(target: torch.Tensor, moves: torch.Tensor, origin: torch.Tensor, coupling: torch.Tensor,
                      scaling: Scaling, peak: torch.Tensor, choice: Choice) -> None:  # fmt: skip
    """``cascade.choosing_cascade_`` in one kernel."""
    width, rows = target.shape
    strides = rows, rows, coupling.stride(0), peak.stride(0)
    shape = {"B": width, **grid_of(scaling.format.element), **_PROGRAM}
    grid = (triton.cdiv(rows, _PROGRAM["R"]),)
    if scaling.format.name == "mxfp8":  # powers of two: one candidate, the largest target's own
        _walk[grid](target, origin, coupling, moves, peak, peak, peak, *strides, PEAKS=True, G=scaling.grouped,
                    S=_STRIP, **shape)  # fmt: skip
        return
    assert scaling.whole is not None
    whole = scaling.whole.expand(rows).contiguous()
    _choose[grid](target, origin, coupling, moves, peak, choice.ratios, choice.cost, whole, *strides,
                  K=len(choice.ratios), S=scaling.grouped, **shape)  # fmt: skip


def walks(width: int, group: int) -> bool:
    """Whether ``cascade_`` can do a block: no strip may cross the edge of a scaling group."""
    return group >= width or group % _STRIP == 0


def chooses(fmt: Format) -> bool:
    """Whether ``choosing_cascade_`` knows the scales of a format."""
    return fmt.name in ("mxfp8", "nvfp4")
