"""NVFP4: E2M1 codes, an E4M3 scale per 16 consecutive weights of a row, one float32 scale for the tensor.

A weight is ``code * block scale * tensor scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .elements import E2M1, E4M3, Element, e2m1_encode_, shorten_
from .format import TINY, Format, Scales, Stats
from .reduce import absmax, divide, least
from .scratch import scratch, tiles

_SEARCH_TOP = 256.0
"""Where the largest block scale lands when scales are searched: room above it for candidates up to 1.5 amax."""

_CANDIDATES = (0.92, 0.98, 1.04, 1.44, 1.56)
"""Block scales tried, relative to amax / 6, and rounded to E4M3. In between amax would fall between 4 and 6, where the
grid is coarsest. Of sets of five (steps of 0.02; normal, Laplace, Student and real weights) the one with the least
error that a search found, and less than nine evenly spaced ones have."""

_LOWEST = 0.86
"""No candidate is below this: amax would be nearer to 8, which E2M1 lacks, than to 6."""

_E4M3_HALF_STEP = 2.0**-10
"""Added to the lowest candidate, so that rounding does not take it further down where E4M3 is coarse."""

_PART = 1 << 18
"""Weights whose candidate scales are made at a time."""


@dataclass(frozen=True)
class Nvfp4(Format):
    """Block scales are divided by the tensor scale and rounded to E4M3; a block that rounds to scale 0 is all zeros."""

    element: ClassVar[Element] = E2M1
    code_dtype: ClassVar[str] = "U8"
    scale_dtype: ClassVar[str] = "F8_E4M3"
    two_pass: ClassVar[bool] = True
    ratios: ClassVar[tuple[float, ...]] = tuple(round(0.75 + 0.07 * step, 2) for step in range(12))

    @property
    def searches(self) -> bool:
        return True

    def code_columns(self, n: int) -> int:
        return n // 2

    def amax(self, x: torch.Tensor) -> torch.Tensor:
        return absmax(x.view(x.shape[0], -1, 16))

    def whole(self, stats: Stats, search: bool) -> torch.Tensor:
        top = _SEARCH_TOP if search else E4M3.largest
        return torch.where(stats.amax > 0, divide(stats.amax.clamp(min=TINY), top * E2M1.largest), 1.0)

    def scales(self, amax: torch.Tensor, whole: torch.Tensor | None) -> Scales:
        assert whole is not None
        stored = E4M3.nearest_(divide(amax, E2M1.largest).div_(whole)).clamp_(max=E4M3.largest)
        return Scales(stored.to(torch.float8_e4m3fn), stored.mul_(whole))

    def search(self, x: torch.Tensor, amax: torch.Tensor, whole: torch.Tensor | None) -> Scales:
        assert whole is not None
        base = divide(amax, E2M1.largest).div_(whole).view(-1)
        best = torch.empty_like(base)
        ratios = torch.tensor(_CANDIDATES, device=x.device)[:, None]
        inverse, blocks = 1.0 / whole, x.view(-1, 16)
        for part in tiles(blocks, _PART):
            some = base[part]
            candidates = E4M3.nearest_(torch.maximum(some * ratios, some * _LOWEST + _E4M3_HALF_STEP))
            error = self._errors(blocks[part], shorten_(inverse / candidates))
            best[part] = least(error.mul_(candidates).mul_(candidates), candidates)
        best = best.mul_(base.sign()).view(amax.shape)
        return Scales(best.to(torch.float8_e4m3fn), best * whole)

    @staticmethod
    def _errors(blocks: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """Squared errors (candidates, blocks), in units of the step, of ``blocks`` (n, 16) times each ``inverse``.

        Works on planes, (16, n): the i-th weight of every block side by side, so that a block's scale and a sum over
        a block are element-wise operations on long contiguous runs.
        """
        sums = scratch("nvfp4_sums", (4, *inverse.shape), blocks.dtype, blocks.device)
        for part in tiles(blocks):
            rows = blocks[part]
            planes, scaled, delta, spare = scratch("nvfp4", (4, 16, len(rows)), rows.dtype, rows.device)
            # Split into 2 x 8 the copy escapes torch's special case for transposed matrices, which is slower here.
            planes.view(2, 8, -1).copy_(rows.view(-1, 2, 8).permute(1, 2, 0))
            planes.abs_()
            eight, rest, four, last = delta[:8], delta[8:], delta[:4], delta[4:8]
            for candidate, total in zip(inverse[:, part], sums[..., part].unbind(1), strict=True):
                torch.mul(planes, candidate, out=scaled)
                E2M1.squared_error(scaled, delta, spare)
                eight.add_(rest)
                torch.add(four, last, out=total)
        return sums[:2].add_(sums[2:])[0].add_(sums[1])

    def encode_(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
        step = scales.multiplier
        codes = torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8, device=x.device)
        for part in tiles(x):
            blocks = x[part].view(-1, step.shape[1], 16)
            codes[part] = e2m1_encode_(blocks.div_(step[part, :, None]).view(-1, x.shape[1]))
        # A block's codes are one 64-bit word; those of a block with scale 0 are 0.
        codes.view(torch.int64).mul_(step > 0)
        return codes

    def multiplier(self, stored: torch.Tensor, whole: torch.Tensor | None) -> torch.Tensor:
        assert whole is not None
        return E4M3.decode(stored) * whole

    def decode(self, codes: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        x = E2M1.decode(torch.stack((codes & 15, codes >> 4), dim=-1)).view(codes.shape[0], -1)
        x.view(x.shape[0], -1, 16).mul_(multiplier[:, :, None])
        return x
