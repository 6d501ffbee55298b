# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108, B007 (Triton compiles no more than this of Python)
"""Triton kernels of the cascades: each thread walks down the columns of a block for one row, all in registers.

``pulls`` is the coupling turned, so that what a column asks of later ones lies side by side. Results are those of
``cascade`` but for the last bits of sums.
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
_ROWS = 32
"""Rows per program: one for each thread of a single warp, so that nothing is ever exchanged between threads."""


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
def _pull(columns, pulls, move, after: tl.constexpr, S: tl.constexpr):
    """Columns behind ``after`` less what a move asks of them; ``pulls`` points at what it asks of the first."""
    moved = ()
    for i in tl.static_range(S):
        if i > after:
            moved = moved + (columns[i] - tl.load(pulls + i) * move,)
        else:
            moved = moved + (columns[i],)
    return moved


@triton.jit
def _targets(target, pulls, made, start, done, ld, rows, r, B: tl.constexpr, S: tl.constexpr, P: tl.constexpr):
    """Targets of a strip, less what the ``done`` first moves ask of them: each thread reads its own again."""
    columns = _load(target, start, ld, rows, r, B, S)
    for column in tl.range(0, done, num_stages=1):
        move = tl.load(made + column * ld + rows, mask=rows < r, other=0.0)
        columns = _pull(columns, pulls + column * P + start, move, -1, S)
    return columns


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
def _store_peak(target, pulls, made, peak, start, ld, rows, r,
                B: tl.constexpr, G: tl.constexpr, S: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """The largest target of a group that is about to begin."""
    largest = tl.zeros_like(rows).to(tl.float32)
    for first in range(start, start + G, S):
        columns = _targets(target, pulls, made, first, start, ld, rows, r, B, S, P)
        for i in tl.static_range(S):
            largest = tl.maximum(largest, tl.abs(columns[i]))
    tl.store(peak, largest, mask=rows < r)


@triton.jit
def _walk(target, origin, pulls, made, inverse, multiplier, peaks, r, ld, lds, PEAKS: tl.constexpr,
          B: tl.constexpr, G: tl.constexpr, S: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
          LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    for start in range(0, B, S):
        group = (start // G) * lds + rows
        if PEAKS:
            if start % G == 0:
                _store_peak(target, pulls, made, peaks + group, start, ld, rows, r, B, G, S, P)
            scale = _multipliers(tl.load(peaks + group, mask=rows < r, other=0.0), 1.0, False)
            finer = tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)
        else:
            scale = tl.load(multiplier + group, mask=rows < r, other=0.0)
            finer = tl.load(inverse + group, mask=rows < r, other=0.0)
        columns = _targets(target, pulls, made, start, start, ld, rows, r, B, S, P)
        before = _load(origin, start, ld, rows, r, B, S)
        values, moves = (), ()
        for j in tl.static_range(S):
            value = round_to_grid(columns[j] * finer, LARGEST, UNIFORM, SMALLEST, SHIFT) * scale
            move = value - before[j]
            values, moves = values + (value,), moves + (move,)
            columns = _pull(columns, pulls + (start + j) * P + start, move, j, S)
        _store(target, values, start, ld, rows, r, B, S)
        _store(made, moves, start, ld, rows, r, B, S)


@triton.jit
def _choose(target, origin, pulls, made, peaks, ratios, cost, whole, r, ld, ldp,
            K: tl.constexpr, B: tl.constexpr, S: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
            LARGEST: tl.constexpr, UNIFORM: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    shared = tl.load(whole)
    for start in range(0, B, S):
        columns = _targets(target, pulls, made, start, start, ld, rows, r, B, S, P)
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
                scaled = _pull(scaled, pulls + (start + j) * P + start, code - before[j] * finer, j, S)
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


def cascade_(target: torch.Tensor, origin: torch.Tensor, coupling: torch.Tensor, element: Element,
             steps: Steps) -> torch.Tensor:  # fmt: skip
    """``cascade.cascade_`` in one kernel."""
    (width, rows), moves = target.shape, torch.empty_like(target)
    inverse, multiplier = steps
    pulls = _turned(coupling, _STRIP)
    _walk[(triton.cdiv(rows, _ROWS),)](
        target, origin, pulls, moves, inverse, multiplier, inverse, rows, rows, inverse.stride(0), PEAKS=False,
        B=width, G=width // inverse.shape[0], S=_STRIP, R=_ROWS, P=pulls.shape[0], **grid_of(element), num_warps=1,
    )  # fmt: skip
    return moves


def choosing_cascade_(target: torch.Tensor, origin: torch.Tensor, coupling: torch.Tensor, scaling: Scaling,
                      peak: torch.Tensor, choice: Choice) -> torch.Tensor:  # fmt: skip
    """``cascade.choosing_cascade_`` in one kernel."""
    (width, rows), moves, group = target.shape, torch.empty_like(target), scaling.grouped
    if scaling.format.name == "mxfp8":  # powers of two: one candidate, the largest target's own
        _walk[(triton.cdiv(rows, _ROWS),)](
            target, origin, _turned(coupling, _STRIP), moves, peak, peak, peak, rows, rows, peak.stride(0), PEAKS=True,
            B=width, G=group, S=_STRIP, R=_ROWS, P=width, **grid_of(scaling.format.element), num_warps=1,
        )  # fmt: skip
        return moves
    _choose[(triton.cdiv(rows, _ROWS),)](
        target, origin, _turned(coupling, group), moves, peak, choice.ratios, choice.cost, scaling.whole, rows, rows,
        peak.stride(0), K=len(choice.ratios), B=width, S=group, R=_ROWS, P=width,
        **grid_of(scaling.format.element), num_warps=1,
    )  # fmt: skip
    return moves


def _turned(coupling: torch.Tensor, strip: int) -> torch.Tensor:
    """What a column asks of later ones, side by side; zeros up to a whole number of strips."""
    missing = -coupling.shape[0] % strip
    return torch.nn.functional.pad(coupling.T, (0, missing, 0, missing)).contiguous()


def walks(width: int, group: int) -> bool:
    """Whether ``cascade_`` can do a block: no strip may cross the edge of a scaling group."""
    return group >= width or group % _STRIP == 0


def chooses(fmt: Format) -> bool:
    """Whether ``choosing_cascade_`` knows the scales of a format."""
    return fmt.name in ("mxfp8", "nvfp4")
